"""Weighted next-token cross-entropy, fused with the projection to the vocabulary: the logits of a batch never exist.

At V = 50k the logits are the largest array of a training step by far: `[B, T, V]` in float32 is 13 GB for 32 rows of
2048 tokens. One slice of positions after another is projected, and its gradient with respect to the hidden states and
the output matrix is taken at once, while its logits are there: the backward pass then only scales what it finds. So
each slice is projected once (recomputing the logits in the backward pass would project twice), and memory stays under
a few times `LOGITS_BYTES` per device whatever the batch.

Each replica does this for its own rows and adds up its own gradient of the output matrix; replicas meet once, at the
end. (Written as one program over the mesh, they would add up that matrix, the largest of all, for every slice.)

The sums of the weighted losses and of the weights' magnitudes are returned apart: sums of micro-batches add up exactly
to those of the batch, means do not. Weights may be negative (the sign-flip arm of a study), hence |w|.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_selftrain.config import Remat
from jax_selftrain.distributed.sharding import Axes, ShardingRules
from jax_selftrain.models import DecoderConfig, Params, forward, param_axes, unembed
from jax_selftrain.models.fsdp import all_gather_param, is_fsdp_sharded, psum_scatter_grad, unshard_param

LOGITS_BYTES = 2**26
"""Most bytes of float32 logits that one device holds at once (several copies of a slice live while its gradient is
taken)."""


class Batch(NamedTuple):
    """Training rows on the mesh; a leading axis of micro-batches may stand before B."""

    tokens: Int[Array, "B T+1"]
    segments: Int[Array, "B T"]
    """Document of each input token, 1, 2, …; 0 is padding."""
    positions: Int[Array, "B T"]
    """Rotary position of each input token."""
    weights: Float[Array, "B T"]
    """Weight of predicting `tokens[:, t + 1]` from position t; 0: not a target."""


class LossStats(NamedTuple):
    """What a batch contributes; contributions of several batches may be added."""

    loss: Float[Array, ""]
    """Σ w · negative log-likelihood, in nats."""
    weight: Float[Array, ""]
    """Σ |w|."""
    tokens: Int[Array, ""]
    """Number of targets (w ≠ 0)."""
    z: Float[Array, ""]
    """Σ |w| · (log Z)², Z the sum of exp(logits)."""
    kl: Float[Array, ""]
    """Σ |w| · KL(base ‖ student) in nats, over the whole vocabulary at each target; 0 without a base."""

    @classmethod
    def zero(cls, dtype: DTypeLike = jnp.float32) -> LossStats:
        """Of no batch at all."""
        nothing = jnp.zeros((), dtype)
        return cls(nothing, nothing, jnp.zeros((), jnp.int32), nothing, nothing)


class AuxLossWeights(NamedTuple):
    """Weights of what is minimized beside the loss. Static."""

    z_loss: float = 0.0
    """Of (log Z)² (PaLM, arXiv:2204.02311, §5)."""
    kl: float = 0.0
    """Of KL(base ‖ student)."""


def logits_chunk(config: DecoderConfig, rules: ShardingRules, rows: int, length: int) -> int:
    """How many of `length` positions may be projected together when `rows` global rows are in flight."""
    vocab_sharded = dict(rules.logical_to_mesh)["vocab"] is not None
    vocab = config.vocab_size // (rules.tensor_parallelism if vocab_sharded else 1)
    fits = max(1, LOGITS_BYTES // (4 * vocab * max(1, rows // rules.data_parallelism)))
    chunks = -(-length // fits)
    return -(-length // chunks)


def loss_fn(
    config: DecoderConfig,
    rules: ShardingRules,
    params: Params,
    batch: Batch,
    *,
    base: Params | None = None,
    penalties: AuxLossWeights | None = None,
    compute_dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
    chunk: int | None = None,
) -> tuple[Float[Array, ""], LossStats]:
    """Score a batch under teacher forcing.

    Args:
      config, rules, params: the model.
      batch: rows of T positions.
      base: the model to stay close to, of the same config; needed where `penalties.kl` is not 0.
      penalties: what is added to the loss; default: nothing.
      compute_dtype: type of the matmul operands; logits and softmax are float32 always (float64 for float64).
      remat: as in `models.forward`.
      chunk: positions projected together; unset: `chunk_length`.

    Returns:
      What is to be minimized, Σ w · nll + z_loss · Σ |w| (log Z)² + kl · Σ |w| KL, differentiable with respect to
      `params` (once: there is no second derivative), and the sums it is made of, which are not.
    """
    tokens, targets = batch.tokens[:, :-1], batch.tokens[:, 1:]
    rows, length = tokens.shape
    chunk = logits_chunk(config, rules, rows, length) if chunk is None else chunk
    dtype, penalties = jnp.dtype(compute_dtype), penalties or AuxLossWeights()

    def hidden_of(params: Params) -> Float[Array, "B T D"]:
        return forward(
            config,
            rules,
            params,
            tokens,
            positions=batch.positions,
            segments=batch.segments,
            compute_dtype=dtype,
            remat=remat,
        )

    head = _HeadSpec(config, rules, penalties, dtype, chunk)
    rest = _LossInputs(targets, batch.weights)
    if penalties.kl:
        if base is None:
            raise ValueError("a penalty on KL(base ‖ student) needs the base")
        frozen = jax.lax.stop_gradient(base)
        rest = rest._replace(base_output=head.all_gather_output(_output(config, frozen)), base_hidden=hidden_of(frozen))
    output = _output(config, params)
    if not is_fsdp_sharded(rules, head.axes):
        output = unshard_param(rules, output, head.axes, output.dtype)  # as its gradient will lie
    whole, parts = _head_loss(head, output, hidden_of(params), rest)
    weight, count = jnp.sum(jnp.abs(batch.weights)), jnp.sum(batch.weights != 0, dtype=jnp.int32)
    return whole, LossStats(parts.loss, weight, count, parts.z, parts.kl)


class _LossTerms(NamedTuple):
    """What the objective is made of; as in `LossSums`."""

    loss: Float[Array, ""]
    z: Float[Array, ""]
    kl: Float[Array, ""]


_Total = tuple[Float[Array, ""], _LossTerms]


class _HeadSpec(NamedTuple):
    """What the loss above the hidden states depends on beside arrays: static."""

    config: DecoderConfig
    rules: ShardingRules
    penalties: AuxLossWeights
    compute_dtype: Any
    chunk: int

    @property
    def axes(self) -> Axes:
        """Of the output matrix."""
        group, name = _output_name(self.config)
        return param_axes(self.config)[group][name]

    def all_gather_output(self, output: Float[Array, ...]) -> Float[Array, ...]:
        """The output matrix as it is multiplied with: gathered once, not once per slice of positions."""
        return all_gather_param(self.rules, output, self.axes, self.compute_dtype)

    def reduce_scatter_grads(self, gradients: Float[Array, ...]) -> Float[Array, ...]:
        """The sum of the replicas' gradients of it, along the first dimension, as it is stored."""
        if not is_fsdp_sharded(self.rules, self.axes):
            return jnp.sum(gradients, axis=0)
        specs = (PartitionSpec("data", *self.rules.unsharded_embed(self.axes).spec),)
        return psum_scatter_grad(self.rules, self.axes, lambda own: own[0], specs, gradients)


class _LossInputs(NamedTuple):
    """What the loss needs and no gradient is taken of."""

    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    base_output: Float[Array, ...] | None = None
    """Output matrix and …"""
    base_hidden: Float[Array, "B T D"] | None = None
    """… hidden states of the base."""

    def with_base_output(self, base_output: Array | None) -> _LossInputs:
        """The same with the output matrix of the base, which is not sliced."""
        return self._replace(base_output=base_output)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(head: _HeadSpec, output: Float[Array, ...], hidden: Float[Array, "B T D"], rest: _LossInputs) -> _Total:
    """The objective from the hidden states and the output matrix: as it is stored if replicas divide it."""

    def local(rules: ShardingRules, output: Array, hidden: Array, rest: _LossInputs) -> _Total:
        def add(total: _Total, piece: tuple[Array, _LossInputs]) -> tuple[_Total, None]:
            found = _chunk_loss(head, rules, output, piece[0], piece[1].with_base_output(rest.base_output))
            return jax.tree.map(jnp.add, total, found), None

        return _stacked(jax.lax.scan(add, _zero_terms(hidden), _chunks(head, hidden, rest))[0])

    return _summed(_per_replica(head, local, head.all_gather_output(output), hidden, rest))


def _head_loss_forward(
    head: _HeadSpec, output: Array, hidden: Array, rest: _LossInputs
) -> tuple[_Total, tuple[Array, Array]]:
    def local(rules: ShardingRules, output: Array, hidden: Array, rest: _LossInputs) -> tuple:
        slice_gradient = jax.value_and_grad(partial(_chunk_loss, head, rules), argnums=(0, 1), has_aux=True)

        def add(carry: tuple[_Total, Array], piece: tuple[Array, _LossInputs]) -> tuple[tuple[_Total, Array], Array]:
            found, (d_slice, d_hidden) = slice_gradient(output, piece[0], piece[1].with_base_output(rest.base_output))
            return jax.tree.map(jnp.add, carry, (found, d_slice.astype(hidden.dtype))), d_hidden

        begin = (_zero_terms(hidden), jnp.zeros_like(output, hidden.dtype))
        (total, d_output), d_hidden = jax.lax.scan(add, begin, _chunks(head, hidden, rest))
        return _stacked((total, d_output)), _unchunk(d_hidden, hidden.shape[1])

    (sums, d_outputs), d_hidden = _per_replica(head, local, head.all_gather_output(output), hidden, rest)
    return _summed(sums), (head.reduce_scatter_grads(d_outputs).astype(output.dtype), d_hidden)


def _head_loss_backward(
    head: _HeadSpec, gradients: tuple[Array, Array], cotangents: _Total
) -> tuple[Array, Array, None]:
    d_output, d_hidden = ((cotangents[0] * gradient).astype(gradient.dtype) for gradient in gradients)
    return d_output, d_hidden, None


_head_loss.defvjp(_head_loss_forward, _head_loss_backward)


def _chunk_loss(
    head: _HeadSpec, rules: ShardingRules, output: Array, hidden: Float[Array, "B C D"], rest: _LossInputs
) -> _Total:
    """The objective of C positions of each row, whose logits exist here alone."""
    logits = _logits(head, rules, output, hidden)
    log_total = jax.nn.logsumexp(logits, axis=-1)
    loss = jnp.sum(rest.weights * (log_total - _at_target(logits, rest.targets)))
    magnitude = jnp.abs(rest.weights)
    z = jnp.sum(magnitude * jnp.square(log_total))
    kl = jnp.zeros_like(loss)
    if rest.base_output is not None and rest.base_hidden is not None:
        expected = jax.nn.log_softmax(_logits(head, rules, rest.base_output, rest.base_hidden), axis=-1)
        behind = expected - (logits - log_total[..., None])
        kl = jnp.sum(magnitude * jnp.sum(jnp.exp(expected) * behind, axis=-1))
    whole = loss
    if head.penalties.z_loss:
        whole = whole + head.penalties.z_loss * z
    if head.penalties.kl:
        whole = whole + head.penalties.kl * kl
    return whole, _LossTerms(loss, z, kl)


def _logits(
    head: _HeadSpec, rules: ShardingRules, output: Array, hidden: Float[Array, "B C D"]
) -> Float[Array, "B C V"]:
    group, name = _output_name(head.config)
    return unembed(head.config, rules, {group: {name: output}}, hidden, compute_dtype=head.compute_dtype)


def token_nll(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Negative log-likelihood of each target, in nats."""
    return jax.nn.logsumexp(logits, axis=-1) - _at_target(logits, targets)


def _at_target(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """The target's logit, picked by comparison, not by a gather: V may be sharded, and the comparison fuses."""
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)


def _per_replica(head: _HeadSpec, function: Any, output: Array, hidden: Array, rest: _LossInputs) -> Any:
    """Call `function(rules, output, hidden, rest)` with each replica's own rows; `model` stays an ordinary axis.

    What it returns has replicas, or rows, along its first dimension.
    """
    rows = PartitionSpec("data")
    specs: Any = (PartitionSpec(), rows, dict.fromkeys(_LossInputs._fields, rows) | {"base_output": PartitionSpec()})

    @partial(jax.shard_map, in_specs=specs, out_specs=rows, axis_names={"data"})
    def mapped(output: Array, hidden: Array, parts: dict[str, Array]) -> Any:
        rest = _LossInputs(**parts)
        own = jax.tree.map(_pcast_varying, (output, rest.base_output))
        return function(head.rules.without_data_axis(), own[0], hidden, rest._replace(base_output=own[1]))

    return mapped(output, hidden, rest._asdict())


def _stacked(tree: Any) -> Any:
    """With a dimension for the replicas."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _summed(tree: Any) -> Any:
    """Over the replicas. (Outside the `shard_map`: XLA 0.10 cannot add over one of several axes inside.)"""
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), tree)


def _pcast_varying(array: Array) -> Array:
    """The same value, from here on each replica's own (what is differentiated stays its own, too)."""
    return jax.lax.pcast(array, "data", to="varying")


def _zero_terms(hidden: Array) -> _Total:
    zero = _pcast_varying(jnp.zeros((), hidden.dtype))
    return zero, _LossTerms(zero, zero, zero)


def _chunks(head: _HeadSpec, hidden: Array, rest: _LossInputs) -> tuple[Array, _LossInputs]:
    """Everything that has positions, cut into slices of them."""
    return jax.tree.map(partial(_chunked, chunk=head.chunk), (hidden, rest.with_base_output(None)))


def _chunked(array: Array, chunk: int) -> Array:
    """`[B, T, …]` → `[chunks, B, chunk, …]`, padded with zeros (a zero weight makes padding count for nothing)."""
    rows, length = array.shape[:2]
    chunks = -(-length // chunk)
    padding = [(0, 0), (0, chunks * chunk - length)] + [(0, 0)] * (array.ndim - 2)
    pieces = jnp.pad(array, padding).reshape(rows, chunks, chunk, *array.shape[2:])
    return jnp.moveaxis(pieces, 1, 0)


def _unchunk(pieces: Array, length: int) -> Array:
    """What `_chunked` cut, whole again."""
    whole = jnp.moveaxis(pieces, 0, 1)
    return whole.reshape(whole.shape[0], -1, *whole.shape[3:])[:, :length]


def _output_name(config: DecoderConfig) -> tuple[str, str]:
    return ("embed", "embedding") if config.tie_word_embeddings else ("head", "kernel")


def _output(config: DecoderConfig, params: Params) -> Array:
    group, name = _output_name(config)
    return params[group][name]
