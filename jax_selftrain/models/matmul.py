"""Products of activations with kernels, as they are stored: how operands are cast, gathered, laid out and summed.

`compute_dtype` is the type of matmul *operands* only, in gradients as well, accumulated in fp32; fp32 operands use the
highest precision on every device. With fp64 parameters everything is fp64, which reference tests use.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jax_selftrain.distributed.mesh import mesh_platform
from jax_selftrain.distributed.sharding import Axes, ShardingRules
from jax_selftrain.models.fsdp import all_gather_param, is_fsdp_sharded, psum_scatter_grad, unshard_param
from jax_selftrain.models.params import Params

_LETTERS = {"embed": "d", "kv_heads": "g", "q_per_kv": "r", "head_dim": "k", "mlp": "f", "vocab": "v"}
"""Of the axes of kernels, in einsums."""


def accumulation_dtype(compute_dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The type of everything that is not a matmul operand: fp32, or fp64 where operands are fp64."""
    return jnp.promote_types(compute_dtype, jnp.float32)


def mixed_precision_einsum(
    equation: str,
    x: jax.Array,
    w: jax.Array,
    compute_dtype: jax.typing.DTypeLike,
    out: NamedSharding | None = None,
) -> jax.Array:
    """An einsum of two operands cast to `compute_dtype`, accumulated and returned in fp32 (fp64 for fp64).

    What is handed back is cast as well before it meets an operand: else XLA would multiply fp32 by bf16, which takes a
    TPU three passes at the highest precision, and a compiler minutes.
    """
    x, w = x.astype(compute_dtype), w.astype(compute_dtype)
    if x.dtype == accumulation_dtype(compute_dtype):
        return _einsum(equation, x, w, out)
    return _low_precision_einsum(equation, out, x, w)


def _einsum(equation: str, x: jax.Array, w: jax.Array, out: NamedSharding | None) -> jax.Array:
    return jnp.einsum(
        equation,
        x,
        w,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=accumulation_dtype(x.dtype),
        out_sharding=out,
    )


def _transposed(equation: str) -> tuple[str, str]:
    """Of a product of x and w: those of (its cotangent, w) that gives x's, and of (x, its cotangent) that gives w's."""
    terms, result = equation.split("->")
    left, right = terms.split(",")
    return f"{result},{right}->{left}", f"{left},{result}->{right}"


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _low_precision_einsum(equation: str, out: NamedSharding | None, x: jax.Array, w: jax.Array) -> jax.Array:
    """Of operands narrower than the type they are accumulated in, whose gradients have operands as narrow."""
    return _einsum(equation, x, w, out)


def _narrow_product_forward(
    equation: str, out: NamedSharding | None, x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _einsum(equation, x, w, out), (x, w)


def _narrow_product_backward(
    equation: str,
    out: NamedSharding | None,
    operands: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, w = operands
    to_x, to_w = _transposed(equation)
    g = cotangent.astype(x.dtype)
    dx = _einsum(to_x, g, w, jax.typeof(x).sharding)
    dw = _einsum(to_w, x, g, jax.typeof(w).sharding)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_low_precision_einsum.defvjp(_narrow_product_forward, _narrow_product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _fsdp_einsum(
    equation: str, rules: ShardingRules, axes: Axes, out: NamedSharding, x: jax.Array, w: jax.Array
) -> jax.Array:
    """Of x and a kernel as it is stored, divided among replicas: gathered in the type of x, again for x's gradient."""
    return _einsum(equation, x, all_gather_param(rules, w, axes, x.dtype), out)


def _divided_product_forward(
    equation: str, rules: ShardingRules, axes: Axes, out: NamedSharding, x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _fsdp_einsum(equation, rules, axes, out, x, w), (x, w)


def _divided_product_backward(
    equation: str,
    rules: ShardingRules,
    axes: Axes,
    out: NamedSharding,
    operands: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, w = operands
    to_x, to_w = _transposed(equation)
    g = cotangent.astype(x.dtype)
    dx = _einsum(to_x, g, all_gather_param(rules, w, axes, x.dtype), jax.typeof(x).sharding)
    parts = PartitionSpec(out.spec[0], *jax.typeof(x).sharding.spec[1:])  # each replica's own rows
    split = jax.reshard(x, NamedSharding(rules.mesh, parts))
    dw = psum_scatter_grad(rules, axes, lambda x, g: _einsum(to_w, x, g, None), (parts, out.spec), split, g)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_fsdp_einsum.defvjp(_divided_product_forward, _divided_product_backward)


def linear(
    rules: ShardingRules,
    kernel: jax.Array,
    axes: Axes,
    num_output_dims: int,
    x: jax.Array,
    compute_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """kernel · x in fp32 (fp64 for fp64).

    XLA's products on a CPU read their first operand where it lies and rearrange the second one beforehand. With one
    token a row, in decoding, rearranging the kernel would take longer than multiplying: there it comes first. With many
    tokens it comes second, since gradients then find their operands as they lie; and as a matrix, since one of more
    dimensions would be transposed beforehand even so.

    Args:
      kernel: [outputs…, inputs…] as stored; `axes` names its dimensions, of which the first `outputs` are the result's.
      x: [batch, …, inputs…].

    Returns:
      [batch, …, outputs…].
    """
    letters = "".join(_LETTERS[axis] for axis in axes if axis is not None)
    made, taken = letters[:num_output_dims], letters[num_output_dims:]
    leading = "btsuw"[: x.ndim - len(taken)]
    used_axes = tuple(None if axis == "embed" else axis for axis in axes)
    kept, summed = used_axes[:num_output_dims], used_axes[num_output_dims:]
    rows = ("batch", *[None] * (len(leading) - 1))
    if len(leading) == 2 and x.shape[1] == 1:
        equation, out = f"{letters},{leading}{taken}->{made}{leading}", rules.sharding((*kept, *rows))
        y = mixed_precision_einsum(equation, unshard_param(rules, kernel, axes, compute_dtype), x, compute_dtype, out)
        return jnp.moveaxis(y, range(num_output_dims), range(-num_output_dims, 0))
    equation, out = f"{leading}{taken},{letters}->{leading}{made}", rules.sharding((*rows, *kept))
    if is_fsdp_sharded(rules, axes):
        return _fsdp_einsum(equation, rules, axes, out, x.astype(compute_dtype), kernel)
    kernel = unshard_param(rules, kernel, axes, compute_dtype)
    divided_within = any(rules.spec(kept)[1:]) or any(rules.spec(summed)[1:])
    if mesh_platform(rules.mesh) != "cpu" or divided_within:
        return mixed_precision_einsum(equation, x, kernel, compute_dtype, out)
    shape, size = (*x.shape[: len(leading)], *kernel.shape[:num_output_dims]), math.prod(kernel.shape[:num_output_dims])
    x = jnp.reshape(x, (*shape[: len(leading)], -1), out_sharding=rules.sharding((*rows, summed[0])))
    kernel = jnp.reshape(kernel, (size, -1), out_sharding=rules.sharding((kept[0], summed[0])))
    flat = rules.sharding((*rows, kept[0]))
    y = mixed_precision_einsum(f"{leading}i,oi->{leading}o", x, kernel, compute_dtype, flat)
    return jnp.reshape(y, shape, out_sharding=out)


def dense(
    rules: ShardingRules, weights: Params, axes: Axes, outputs: int, x: jax.Array, compute_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """kernel · x + bias; arguments as of `linear`.

    Where there are low-rank factors `lora_a` [inputs…, r] and `lora_b` [r, outputs…] (LoRA, arXiv:2106.09685), their
    product counts as part of the kernel.
    """
    y = linear(rules, weights["kernel"], axes, outputs, x, compute_dtype)
    kept = axes[:outputs]
    if "lora_a" in weights:
        letters = "".join(_LETTERS[axis] for axis in axes if axis is not None)
        made, taken = letters[:outputs], letters[outputs:]
        a = unshard_param(rules, weights["lora_a"], (*axes[outputs:], None), compute_dtype)
        b = unshard_param(rules, weights["lora_b"], (None, *kept), compute_dtype)
        low = mixed_precision_einsum(
            f"bt{taken},{taken}z->btz", x, a, compute_dtype, rules.sharding(("batch", None, None))
        )
        y = y + mixed_precision_einsum(f"btz,z{made}->bt{made}", low, b, compute_dtype, jax.typeof(y).sharding)
    if "bias" in weights:
        y = y + unshard_param(rules, weights["bias"], kept, y.dtype)
    return y
