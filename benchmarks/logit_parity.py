"""Compare logits with transformers, in fp32 and in fp64.

    python benchmarks/logit_parity.py MODEL [--texts FILE.jsonl] [--length 512]

MODEL is a folder with a Llama. One row holds random ids, with --texts another holds text. In fp64 both programs compute
every step in fp64; transformers' RMSNorm and rotation, which always round to fp32, are replaced. In fp32 the
difference is rounding: the table shows that of each program from fp64, and between the two.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["JAX_ENABLE_X64"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from jax_selftrain import hub
from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.models import forward, unembed


def ours(model: hub.LoadedModel, ids: np.ndarray, dtype: Any) -> np.ndarray:
    config, rules = model.config, model.sharding_rules

    @jax.jit
    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        hidden = forward(config, rules, params, tokens, compute_dtype=dtype)
        return unembed(config, rules, params, hidden, compute_dtype=dtype)

    with mesh_context(rules.mesh):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
        return np.asarray(logits(params, jnp.asarray(ids, jnp.int32)))


def theirs(folder: Path, ids: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    def rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def rotation(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        if dtype == torch.float32:
            return model(torch.tensor(ids)).logits.numpy()
        with patch.object(LlamaRMSNorm, "forward", rms_norm), patch.object(LlamaRotaryEmbedding, "forward", rotation):
            return model(torch.tensor(ids)).logits.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, help="JSONL with `text`")
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()

    model = hub.load_model(args.model, "data=1")
    rows = [np.random.default_rng(0).integers(0, model.config.vocab_size, args.length)]
    if args.texts:
        with args.texts.open() as file:
            text = "\n".join(json.loads(line)["text"] for _, line in zip(range(100), file, strict=False))
        rows.append(np.asarray(model.tokenizer(text)["input_ids"][: args.length]))
    ids = np.stack(rows)

    exact = ours(model, ids, jnp.float64)
    logits = {"ours, fp32": ours(model, ids, jnp.float32), "transformers, fp32": theirs(args.model, ids, torch.float32)}
    logits["transformers, fp64"] = theirs(args.model, ids, torch.float64)
    print(f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{args.model.name}: {ids.size} positions, largest logit {np.abs(exact).max():.1f}\n")
    print("| difference of logits | largest | root mean square | median |\n|---|---|---|---|")
    pairs = [(name, "ours, fp64", array - exact) for name, array in logits.items()]
    pairs.append(("ours, fp32", "transformers, fp32", logits["ours, fp32"] - logits["transformers, fp32"]))
    for one, other, difference in pairs:
        size = np.abs(difference)
        print(f"| {one} − {other} | {size.max():.1e} | {np.sqrt(np.mean(size**2)):.1e} | {np.median(size):.1e} |")


if __name__ == "__main__":
    main()
