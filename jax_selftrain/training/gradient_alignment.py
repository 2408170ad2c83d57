"""Alignment of the gradients of two sets of documents.

A short step of gradient descent on documents with mean gradient g changes the loss of others, with mean gradient h, by
−η g·h to first order. TracIn (Pruthi et al. 2020, arXiv:2002.08484) sums g·h over checkpoints. LESS (Xia et al. 2024,
arXiv:2402.04333) selects training data by the cosine, because the norm of a gradient depends on the length of its text.
Here: one checkpoint, all weights, no preconditioning by Adam.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_selftrain import hub
from jax_selftrain.config import Remat, TrainConfig
from jax_selftrain.distributed.mesh import mesh_context, xla_options
from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.models import DecoderConfig, Params
from jax_selftrain.training.loss import Batch, loss_fn


def align_gradients(
    config: TrainConfig, documents: Sequence[Sequence[int]], others: Sequence[Sequence[int]]
) -> float | None:
    """Return the cosine of the mean gradients of two sets of documents.

    Args:
      config: the model, its mesh, and the rows of a training step: `seq_len`, `batch_size`, `grad_accum`, `dtype`.
      documents: token ids, the start token first; it is not a target.
      others: the same.

    Returns the cosine over all weights, float32; None if a set has no target or its gradient is zero. A mean gradient
    weights all targets equally, as training does.

    Raises InputError if the model cannot be read.
    """
    sides = [_cut_documents(side, config.seq_len) for side in (documents, others)]
    if not all(sides):
        return None
    model = hub.load_model(config.model, config.mesh, preset=config.preset)
    rules = model.sharding_rules
    rows = -(-config.batch_size // config.grad_accum // rules.data_parallelism) * rules.data_parallelism
    add_gradient = _compiled_add(model.config, rules, config.dtype, config.remat)
    with mesh_context(rules.mesh):
        totals = []
        for pieces in sides:
            total = _make_zeros(model.params)
            # A power of two: few programs are compiled.
            length = min(config.seq_len, 1 << (max(map(len, pieces)) - 2).bit_length())
            for first in range(0, len(pieces), rows):
                total = add_gradient(total, model.params, _pad_rows(pieces[first : first + rows], rows, length, rules))
            totals.append(total)
        product, *squares = (float(_dot(*pair)) for pair in (totals, totals[:1] * 2, totals[1:] * 2))
    size = float(np.sqrt(squares[0]) * np.sqrt(squares[1]))
    return product / size if size else None


def _cut_documents(documents: Sequence[Sequence[int]], length: int) -> list[Sequence[int]]:
    """Cut into pieces of `length` targets, each after one token."""
    return [
        document[start : start + length + 1] for document in documents for start in range(0, len(document) - 1, length)
    ]


def _pad_rows(pieces: Sequence[Sequence[int]], rows: int, length: int, rules: ShardingRules) -> Batch:
    """Make a batch with one piece in each row."""
    tokens, weights = np.zeros((rows, length + 1), np.int32), np.zeros((rows, length), np.float32)
    for row, piece in enumerate(pieces):
        tokens[row, : len(piece)] = piece
        weights[row, : len(piece) - 1] = 1
    segments = weights.astype(np.int32)
    positions = np.where(segments, np.arange(length, dtype=np.int32), 0)
    sharding = rules.sharding(("batch", None))
    return Batch(*(jax.device_put(array, sharding) for array in (tokens, segments, positions, weights)))


@lru_cache(maxsize=8)
def _compiled_add(
    config: DecoderConfig, rules: ShardingRules, dtype: str, remat: Remat
) -> Callable[[Params, Params, Batch], Params]:
    def add_gradient(total: Params, params: Params, batch: Batch) -> Params:
        def loss(params: Params) -> Float[Array, ""]:
            return loss_fn(config, rules, params, batch, compute_dtype=jnp.dtype(dtype), remat=remat)[0]

        return jax.tree.map(jnp.add, total, jax.grad(loss)(params))

    return jax.jit(add_gradient, donate_argnums=0, compiler_options=xla_options())


@jax.jit
def _make_zeros(params: Params) -> Params:
    return jax.tree.map(jnp.zeros_like, params)


@jax.jit
def _dot(one: Params, other: Params) -> Float[Array, ""]:
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), one, other)), jnp.zeros(()))
