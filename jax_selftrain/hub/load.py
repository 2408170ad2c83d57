"""Models in memory: `load_model`, what it returns, and `convert` between the two kinds of model folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jax_selftrain.config import ConvertConfig, yaml_io
from jax_selftrain.distributed import broadcast_one_to_all
from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import ShardingRules, make_sharding_rules, shard_host_array
from jax_selftrain.errors import InputError
from jax_selftrain.hub import orbax_io
from jax_selftrain.hub.families import FAMILIES
from jax_selftrain.hub.model_folder import (
    CONFIG,
    PARAMS,
    Ref,
    copy_config_and_tokenizer,
    is_native,
    read_config,
    read_model_json,
    read_special_tokens,
    resolve,
    save_model,
    set_torch_dtype,
    source_tensor_names,
)
from jax_selftrain.hub.safetensors_io import load_params, open_weights, save_weights
from jax_selftrain.hub.tokenizer import SpecialTokens, has_tokenizer, read_tokenizer
from jax_selftrain.hub.trees import find_nonfinite, flatten, unflatten
from jax_selftrain.hub.weight_mapping import param_sources
from jax_selftrain.io import atomic
from jax_selftrain.models import DecoderConfig, Params, abstract_params, axis_sizes, forward, param_shardings, unembed


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from, and what is needed to write it as it was."""

    ref: str
    path: Path
    """The resolved folder."""
    raw: Mapping[str, Any]
    """Content of config.json."""
    tensors: Mapping[str, str]
    """Type of every tensor by Hugging Face name: "float32", "bfloat16" or "float16"."""
    dropped: tuple[str, ...]
    """Tensors that were left out: legacy buffers, copies of tied embeddings."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model on a mesh, ready to be sampled, scored or trained."""

    config: DecoderConfig
    params: Params = field(repr=False)
    """Nested dict of arrays, see `jax_selftrain.models`; placed by `param_shardings(config, rules)`."""
    sharding_rules: ShardingRules
    tokenizer: Any = field(repr=False)
    """A transformers tokenizer, or None where the model has none."""
    special_tokens: SpecialTokens
    source: ModelSource = field(repr=False)
    compute_dtype: jnp.dtype
    """Type of parameters and matmul operands."""

    def logits(self, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
        """Logits of the next token at every position, in fp32 on the host.

        Args:
          tokens: ids [B, T], all rows of one length.

        Raises:
          InputError: an id is outside the vocabulary, or T is longer than the model's positions.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(f"tokens should be whole numbers [batch, time], not {tokens.dtype} {tokens.shape}")
        if tokens.shape[1] > self.config.max_positions:
            raise InputError(
                f"{self.source.ref}: {tokens.shape[1]} tokens are more than the model's {self.config.max_positions} "
                "positions; cut the sequences"
            )
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.config.vocab_size):
            raise InputError(
                f"{self.source.ref}: token ids run from {tokens.min()} to {tokens.max()}, but the model knows 0 to "
                f"{self.config.vocab_size - 1}; were they made with another tokenizer?"
            )
        rows = len(tokens)
        padded = np.zeros(
            (-(-rows // self.sharding_rules.data_parallelism) * self.sharding_rules.data_parallelism, tokens.shape[1]),
            np.int32,
        )
        padded[:rows] = tokens
        with mesh_context(self.sharding_rules.mesh):
            batch = shard_host_array(self.sharding_rules, padded, ("batch", None))
            return np.asarray(_logits(self.config, self.sharding_rules, self.compute_dtype, self.params, batch))[:rows]

    def save_pretrained(self, folder: Ref) -> Path:
        """Write a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` opens, tokenizer included.

        Every tensor gets the type it came with, or the type of the parameters where that is narrower (a model loaded
        in bf16 is written in bf16).
        """
        types = {name: _narrower_dtype(kind, self.compute_dtype.name) for name, kind in self.source.tensors.items()}
        raw = self.source.raw if types == self.source.tensors else set_torch_dtype(self.source.raw, set(types.values()))
        return _save_hf(Path(folder), self.config, raw, self.params, types, self.source.path)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _logits(
    config: DecoderConfig, rules: ShardingRules, dtype: jnp.dtype, params: Params, tokens: jax.Array
) -> jax.Array:
    hidden = forward(config, rules, params, tokens, compute_dtype=dtype)
    logits = unembed(config, rules, params, hidden, compute_dtype=dtype)
    return jax.reshard(logits, rules.sharding((None, None, None)))


def load_model(
    ref: Ref, mesh: Mesh | str | None = None, dtype: str = "float32", *, preset: str = "tensor"
) -> LoadedModel:
    """Load a model onto a mesh.

    Args:
      ref: a Hugging Face folder, a hub id (`org/name`, `org/name@revision`), a model folder of ours, or a RUN folder.
      mesh: a mesh from `make_mesh`, its description (`data=4,model=2`), or None for all devices on `data`.
      dtype: `float32` or `bfloat16`: what parameters are cast to, and the type of matmul operands.
      preset: how parameters lie on the mesh: `replicated`, `fsdp` or `tensor`.

    Raises:
      InputError: the reference, the config, the weights or the tokenizer cannot be used; says which and why.
    """
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype!r} is unknown; choose float32 or bfloat16")
    path = resolve(ref)
    config, raw = read_config(path)
    mesh = mesh if isinstance(mesh, Mesh) else make_mesh(mesh or "")
    rules = make_sharding_rules(preset, mesh, axis_sizes(config))
    tokenizer = read_tokenizer(path) if has_tokenizer(path) else None
    special = read_special_tokens(path, raw, tokenizer, config.vocab_size)
    params, source = read_params(str(ref), path, config, raw, rules, np.dtype(dtype))
    return LoadedModel(config, params, rules, tokenizer, special, source, np.dtype(dtype))


def model_with_params(ref: Ref, params: Params, rules: ShardingRules) -> LoadedModel:
    """A model with the config and tokenizer of `ref` and other weights: fresh ones, or those of a step in training.

    Args:
      ref: any model, or a folder that has only config.json and a tokenizer.
      params: all of one type, which becomes `compute_dtype`; placed by `param_shardings(config, rules)`.
      rules: of `params`.

    Raises:
      InputError: config or tokenizer of `ref` cannot be used.
    """
    path = resolve(ref)
    config, raw = read_config(path)
    tokenizer = read_tokenizer(path) if has_tokenizer(path) else None
    special = read_special_tokens(path, raw, tokenizer, config.vocab_size)
    arrays = flatten(params)
    dtype = np.dtype(next(iter(arrays.values())).dtype)
    leaves = param_sources(FAMILIES[raw["model_type"]], config, source_tensor_names(path))
    tensors = {name: dtype.name for leaf in leaves for name in leaf.names}
    source = ModelSource(str(ref), path, set_torch_dtype(raw, {dtype.name}), tensors, ())
    return LoadedModel(config, params, rules, tokenizer, special, source, dtype)


def convert(config: ConvertConfig) -> Path:
    """Write a model as a model folder of ours (`format: flax`) or as a Hugging Face folder (`hf`).

    Raises:
      InputError: the model cannot be read, or the folder exists already or cannot be written.
    """
    yaml_io.require(config)
    path, out = resolve(config.source), Path(config.out)
    decoder, raw = read_config(path)
    kept = config.dtype == "keep"
    dtype = None if kept else np.dtype(config.dtype)

    def read() -> tuple[Params, ModelSource, dict[str, str]]:
        params, source = read_params(config.source, path, decoder, raw, _conversion_sharding(config, decoder), dtype)
        return params, source, dict(source.tensors) if kept else dict.fromkeys(source.tensors, config.dtype)

    stated = raw if kept else set_torch_dtype(raw, {config.dtype})
    if config.format == "hf":

        def write() -> None:
            params, _, tensors = read()
            _save_hf(out, decoder, stated, params, tensors, path)

        broadcast_one_to_all(write)
        return out
    params, source, tensors = read()
    save_model(
        out,
        stated,
        params,
        source_ref=config.source,
        metadata={"made_by": "convert", "dtype": config.dtype},
        tensors=tensors,
        dropped=source.dropped,
    )
    return out


def _conversion_sharding(config: ConvertConfig, decoder: DecoderConfig) -> ShardingRules:
    """Where parameters lie meanwhile: in memory; where several processes write a folder of ours together, divided among
    the devices of all."""
    sizes = axis_sizes(decoder)
    if jax.process_count() == 1 or config.format == "hf":
        return make_sharding_rules("replicated", make_mesh("", [cpu_device()]), sizes)
    return make_sharding_rules("replicated" if sizes["embed"] % jax.device_count() else "fsdp", make_mesh(), sizes)


def cpu_device() -> jax.Device:
    """A CPU where there is one beside the accelerator, for work that computes next to nothing and wants memory only."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        return jax.local_devices()[0]


def read_params(
    ref: str, path: Path, config: DecoderConfig, raw: Mapping[str, Any], rules: ShardingRules, dtype: np.dtype | None
) -> tuple[Params, ModelSource]:
    """Parameters in `dtype` (None: as they are stored), from either kind of folder."""
    if not is_native(path):
        with open_weights(path) as reader:
            params, binding = load_params(reader, FAMILIES[raw["model_type"]], config, rules, dtype)
        return params, ModelSource(ref, path, raw, binding.tensors, binding.dropped)
    record = read_model_json(path)
    shardings, shapes = flatten(param_shardings(config, rules)), flatten(abstract_params(config))
    if record["dtypes"].keys() != shapes.keys():
        raise InputError(f"{path}: model.json and {CONFIG} do not describe the same model; make the folder again")
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtype or np.dtype(record["dtypes"][name]), sharding=shardings[name])
        for name, leaf in shapes.items()
    }
    params = orbax_io.load_tree(path / PARAMS, unflatten(abstract))
    with mesh_context(rules.mesh):
        broken = find_nonfinite(params)
    if broken:
        raise InputError(f"{path}: {broken} holds NaN or infinity; the model is broken, so use another one")
    return params, ModelSource(ref, path, raw, record["tensors"], tuple(record["dropped"]))


def _save_hf(
    folder: Path,
    config: DecoderConfig,
    raw: Mapping[str, Any],
    params: Params,
    tensors: Mapping[str, str],
    source: Path,
) -> Path:
    with atomic.commit_folder(folder) as aside:
        copy_config_and_tokenizer(aside, raw, source)
        save_weights(aside, FAMILIES[raw["model_type"]], config, params, tensors)
    return folder


def _narrower_dtype(one: str, other: str) -> str:
    return one if np.dtype(one).itemsize <= np.dtype(other).itemsize else other
