"""Products of activations with stored kernels: casts, gathers, operand order and gradients.

`compute_dtype` is the type of matmul *operands* only, also in gradients; sums are fp32, and fp32 operands use the
highest precision on every device. With fp64 parameters everything is fp64, for reference tests.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Float

from jax_selftrain.distributed.mesh import mesh_platform
from jax_selftrain.distributed.sharding import Axes, ShardingRules
from jax_selftrain.models.config import AXIS_LETTERS
from jax_selftrain.models.fsdp import all_gather_param, is_fsdp_sharded, psum_scatter_grad, unshard_param
from jax_selftrain.models.params import Params


def accumulation_dtype(compute_dtype: DTypeLike) -> jnp.dtype:
    """Return fp32, or fp64 for fp64 operands."""
    return jnp.promote_types(compute_dtype, jnp.float32)


def mixed_precision_einsum(
    equation: str, x: Array, w: Array, compute_dtype: DTypeLike, out: NamedSharding | None = None
) -> Array:
    """Compute an einsum of operands in `compute_dtype`, accumulated in fp32.

    Cotangents are cast as well: XLA multiplies fp32 by bf16 in three passes on a TPU, and compiles it for minutes.
    """
    x, w = x.astype(compute_dtype), w.astype(compute_dtype)
    if x.dtype == accumulation_dtype(compute_dtype):
        return _einsum(equation, x, w, out)
    return _vjp_einsum(equation, out, None, x, w)


def _einsum(equation: str, x: Array, w: Array, out: NamedSharding | None) -> Array:
    return jnp.einsum(
        equation,
        x,
        w,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=accumulation_dtype(x.dtype),
        out_sharding=out,
    )


_Fsdp = tuple[ShardingRules, Axes]
"""Sharding rules and logical axes of an fsdp-sharded kernel."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _vjp_einsum(equation: str, out: NamedSharding | None, fsdp: _Fsdp | None, x: Array, w: Array) -> Array:
    """Gather an fsdp-sharded kernel, in the backward pass once more."""
    return _einsum(equation, x, _all_gather(fsdp, w, x.dtype), out)


def _all_gather(fsdp: _Fsdp | None, w: Array, dtype: DTypeLike) -> Array:
    return w if fsdp is None else all_gather_param(fsdp[0], w, fsdp[1], dtype)


def _vjp_einsum_bwd(
    equation: str, out: NamedSharding, fsdp: _Fsdp | None, operands: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    x, w = operands
    terms, result = equation.split("->")
    left, right = terms.split(",")
    to_w = f"{left},{result}->{right}"
    g = cotangent.astype(x.dtype)
    dx = _einsum(f"{result},{right}->{left}", g, _all_gather(fsdp, w, x.dtype), jax.typeof(x).sharding)
    if fsdp is None:
        dw = _einsum(to_w, x, g, jax.typeof(w).sharding)
    else:
        rows = PartitionSpec(out.spec[0], *jax.typeof(x).sharding.spec[1:])
        x_rows = jax.reshard(x, NamedSharding(fsdp[0].mesh, rows))
        dw = psum_scatter_grad(*fsdp, lambda x, g: _einsum(to_w, x, g, None), (rows, out.spec), x_rows, g)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_vjp_einsum.defvjp(lambda equation, out, fsdp, x, w: (_vjp_einsum(equation, out, fsdp, x, w), (x, w)), _vjp_einsum_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cpu_matmul(out: NamedSharding, x: Float[Array, "B T I"], w: Float[Array, "O I"]) -> Float[Array, "B T O"]:
    """Compute x wᵀ; XLA transposes the smaller operand of a gradient."""
    return _einsum("bti,oi->bto", x, w, out)


def _cpu_matmul_bwd(_: NamedSharding, operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, w = operands
    g, sharding = cotangent.astype(x.dtype), jax.typeof(w).sharding
    dx = _einsum("bto,oi->bti", g, w, jax.typeof(x).sharding)
    if w.shape[0] <= w.shape[1]:
        dw = _einsum("bto,bti->oi", g, x, sharding)
    else:
        transposed = sharding.update(spec=PartitionSpec(*sharding.spec[::-1]))
        dw = jax.lax.optimization_barrier(_einsum("bti,bto->io", x, g, transposed)).T  # without it, XLA transposes g
    return dx.astype(x.dtype), dw.astype(w.dtype)


_cpu_matmul.defvjp(lambda out, x, w: (_cpu_matmul(out, x, w), (x, w)), _cpu_matmul_bwd)


def linear(
    rules: ShardingRules, kernel: Array, axes: Axes, num_output_dims: int, x: Array, compute_dtype: DTypeLike
) -> Array:
    """Multiply a kernel with activations, in fp32 (fp64 for fp64).

    On a CPU, XLA reads the first operand of a product as stored and copies the second into another layout. With one
    token per row the kernel comes first: its copy would take longer than the product. With many tokens it comes second,
    since gradients then need no copies, and as a matrix, since XLA would transpose more dimensions.

    Args:
      kernel: [outputs…, inputs…] as stored.
      axes: logical axes of the kernel; the first `num_output_dims` are the outputs.
      x: [batch, …, inputs…].

    Returns:
      [batch, …, outputs…].
    """
    letters = "".join(AXIS_LETTERS[axis] for axis in axes if axis is not None)
    out_dims, in_dims = letters[:num_output_dims], letters[num_output_dims:]
    leading = "btsuw"[: x.ndim - len(in_dims)]
    unsharded_axes = tuple(None if axis == "embed" else axis for axis in axes)
    out_axes, in_axes = unsharded_axes[:num_output_dims], unsharded_axes[num_output_dims:]
    rows = ("batch", *[None] * (len(leading) - 1))
    if len(leading) == 2 and x.shape[1] == 1:
        equation, out = f"{letters},{leading}{in_dims}->{out_dims}{leading}", rules.sharding((*out_axes, *rows))
        y = mixed_precision_einsum(equation, unshard_param(rules, kernel, axes, compute_dtype), x, compute_dtype, out)
        return jnp.moveaxis(y, range(num_output_dims), range(-num_output_dims, 0))
    equation, out = f"{leading}{in_dims},{letters}->{leading}{out_dims}", rules.sharding((*rows, *out_axes))
    if is_fsdp_sharded(rules, axes):
        return _vjp_einsum(equation, out, (rules, axes), x.astype(compute_dtype), kernel)
    kernel = unshard_param(rules, kernel, axes, compute_dtype)
    is_sharded_within = any(rules.spec(out_axes)[1:]) or any(rules.spec(in_axes)[1:])
    if mesh_platform(rules.mesh) != "cpu" or is_sharded_within:
        return mixed_precision_einsum(equation, x, kernel, compute_dtype, out)
    shape, size = (*x.shape[: len(leading)], *kernel.shape[:num_output_dims]), math.prod(kernel.shape[:num_output_dims])
    x = jnp.reshape(x, (*shape[: len(leading)], -1), out_sharding=rules.sharding((*rows, in_axes[0])))
    kernel = jnp.reshape(kernel, (size, -1), out_sharding=rules.sharding((out_axes[0], in_axes[0])))
    flat = rules.sharding((*rows, out_axes[0]))
    x, kernel = x.astype(compute_dtype), kernel.astype(compute_dtype)
    y = _cpu_matmul(flat, x, kernel) if len(leading) == 2 else _einsum(f"{leading}i,oi->{leading}o", x, kernel, flat)
    return jnp.reshape(y, shape, out_sharding=out)


def dense(
    rules: ShardingRules, weights: Params, axes: Axes, num_output_dims: int, x: Array, compute_dtype: DTypeLike
) -> Array:
    """Apply a kernel with optional LoRA factors and bias.

    Arguments are those of `linear`. `lora_a` [inputs…, rank] and `lora_b` [rank, outputs…] add their product to the
    kernel (LoRA, arXiv:2106.09685).
    """
    y = linear(rules, weights["kernel"], axes, num_output_dims, x, compute_dtype)
    out_axes = axes[:num_output_dims]
    if "lora_a" in weights:
        letters = "".join(AXIS_LETTERS[axis] for axis in axes if axis is not None)
        out_dims, in_dims = letters[:num_output_dims], letters[num_output_dims:]
        a = unshard_param(rules, weights["lora_a"], (*axes[num_output_dims:], None), compute_dtype)
        b = unshard_param(rules, weights["lora_b"], (None, *out_axes), compute_dtype)
        rows = rules.sharding(("batch", None, None))
        low_rank = mixed_precision_einsum(f"bt{in_dims},{in_dims}z->btz", x, a, compute_dtype, rows)
        equation = f"btz,z{out_dims}->bt{out_dims}"
        y = y + mixed_precision_einsum(equation, low_rank, b, compute_dtype, jax.typeof(y).sharding)
    if "bias" in weights:
        y = y + unshard_param(rules, weights["bias"], out_axes, y.dtype)
    return y
