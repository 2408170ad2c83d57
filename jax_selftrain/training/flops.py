"""Model FLOP/s and model FLOP/s utilization (MFU) of a training run.

The convention is PaLM's (Chowdhery et al., arXiv:2204.02311, appendix B): per token 6·N for the products with N weights
(2 forward, 4 backward) and 12·L·H·K·T for attention over rows of T tokens, all T × T pairs counted. Masks and
rematerialization do not change the count, so that implementations can be compared. N counts the projection to the
vocabulary, also if it is tied to the embedding, but not the embedding lookup. Tokens are targets; padding is not work.
"""

from functools import cache
from math import prod

import jax
from jax.sharding import Mesh

from jax_selftrain.config import TrainConfig
from jax_selftrain.models import DecoderConfig, abstract_params

PEAK_FLOPS = {
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), 197e12),
    **dict.fromkeys(("TPU v5", "TPU v5p"), 459e12),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), 918e12),
    **dict.fromkeys(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), 312e12),
    **dict.fromkeys(("NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), 312e12),
    "NVIDIA H100 PCIe": 756e12,
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), 989.4e12),
    "NVIDIA B200": 2250e12,
}
"""Dense bf16 FLOP/s of one JAX device, by `device_kind`.

Sources: cloud.google.com/tpu/docs (per chip; a device of v2 and v3 is one of two cores) and NVIDIA's data sheets of
A100, H100, H200 and HGX B200 (without sparsity).
"""


@cache
def num_matmul_params(model: DecoderConfig) -> int:
    """Count the weights in matrix products: kernels and the output projection."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model))
    counted = {"kernel", "embedding"} if model.tie_word_embeddings else {"kernel"}
    return sum(prod(leaf.shape) for path, leaf in leaves if path[-1].key in counted)


def flops_per_token(model: DecoderConfig, seq_len: int) -> int:
    """Return the training FLOPs per token of rows of `seq_len` tokens."""
    attention = 12 * model.num_layers * model.num_heads * model.head_dim * seq_len
    return 6 * num_matmul_params(model) + attention


def measure_speed(config: TrainConfig, model: DecoderConfig, mesh: Mesh, tokens_per_second: float) -> dict[str, float]:
    """Return tokens and FLOPs per second, and `mfu` in bfloat16."""
    achieved = tokens_per_second * flops_per_token(model, config.seq_len)
    speed = {"tokens_per_second": tokens_per_second, "flops_per_second": achieved}
    peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind) if config.dtype == "bfloat16" else None
    return speed if peak is None else speed | {"mfu": achieved / (peak * mesh.devices.size)}
