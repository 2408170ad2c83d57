"""How much useful arithmetic a run does per second, and which share of the hardware's that is (MFU).

The convention is that of PaLM (Chowdhery et al., arXiv:2204.02311, appendix B): per token 6·N for the matrix products
with N weights (2 forward, 4 backward) and 12·L·H·K·T for attention over rows of T tokens, all T × T pairs counted.
Neither causal masking, nor segment masks, nor what is computed again to save memory makes any difference, so that
numbers compare between implementations. N are the weights that are multiplied: looking up an embedding is no product,
the projection to the vocabulary is one, also where both are one matrix. Tokens are predicted tokens; padding does not
count as work.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import jax
from jax.sharding import Mesh

from jax_selftrain.config import TrainConfig
from jax_selftrain.models import DecoderConfig, abstract_params

# Dense bf16 FLOP/s of one JAX device, by `device_kind`. TPUs: the pages of each generation on cloud.google.com/tpu/docs
# (per chip; v2 and v3 show each of a chip's two cores as a device, hence half). NVIDIA: data sheets of A100, H100,
# H200 and HGX B200, the values without sparsity. Cards that share a name but not a speed are listed one by one.
PEAK_FLOPS = {
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA B200": 2250e12,
}


@dataclass(frozen=True)
class Throughput:
    """What turns tokens per second into FLOP/s and MFU."""

    flops_per_token: int
    peak_flops: float | None
    """Dense FLOP/s of all devices together; None where it is not known."""

    def flops_and_mfu(self, tokens_per_second: float) -> dict[str, float]:
        """`flops_per_second` and, where the peak is known, `mfu` (a share of 1)."""
        achieved = tokens_per_second * self.flops_per_token
        return {"flops_per_second": achieved} | ({} if self.peak_flops is None else {"mfu": achieved / self.peak_flops})


def num_matmul_params(model: DecoderConfig) -> int:
    """Weights that every token is multiplied by: all kernels, and a tied embedding in its role as output projection."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model))
    counted = {"kernel", "embedding"} if model.tie_word_embeddings else {"kernel"}
    return sum(prod(leaf.shape) for path, leaf in leaves if path[-1].key in counted)


def flops_per_token(model: DecoderConfig, seq_len: int) -> int:
    """FLOPs of training on one token in a row of `seq_len` tokens."""
    attention = 12 * model.num_layers * model.num_heads * model.head_dim * seq_len
    return 6 * num_matmul_params(model) + attention


def throughput(config: TrainConfig, model: DecoderConfig, mesh: Mesh) -> Throughput:
    """The yardstick of a run. Peaks are those of bfloat16: a run in float32 has no MFU."""
    one = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind) if config.dtype == "bfloat16" else None
    return Throughput(flops_per_token(model, config.seq_len), None if one is None else one * mesh.devices.size)
