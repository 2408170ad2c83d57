"""Drawing a token by descending a fixed radix-16 tree of partial sums over the vocabulary.

Leaves are the weights exp(logit − max); every inner node is the sum of its sixteen children. From the root down, one
independent uniform number per level picks a child with probability (its sum) / (sum of its parent): after ⌈log₁₆ V⌉
levels a leaf, with probability (its weight) / (all weights), up to the 2⁻²⁴ grain of the uniform numbers.

Why not inversion by one uniform number over the whole vocabulary? A draw changes ("parts") under rounding noise when
the uniform number falls between the noisy and the true boundary of two tokens. One number meets the boundaries of all
V tokens, and a cumulative sum over V terms is itself noisy: about 1e-2 partings per token at V = 50k. The tree meets at
most 15 boundaries a level, each a sum in a fixed short order: about 1e-5. Gumbel noise, the other usual way, needs V
random words per token; this needs four.

The sixteen children of node i stand a whole level's width M apart, at i, i + M, …, i + 15·M: sums then run over long
contiguous vectors, which took half the time of sixteen neighbors (and would fill 16 of a TPU's 128 lanes). Sums are
taken in one written-out order (never `sum`, whose order is the compiler's), so that a draw is the same wherever
arithmetic follows IEEE 754.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

RADIX = 16
_NEGLIGIBLE = -80.0
"""Logits this far below the row's largest weigh nothing. exp(−80) is 2e-35, far under the 2⁻²⁴ grain of the draw; the
cut keeps subnormal numbers out, which some devices flush to zero and others do not."""


def level_sizes(vocab_size: int) -> tuple[int, ...]:
    """Nodes of each level above the leaves, the root's (1) first; one draw takes as many words as there are levels."""
    widths = [-(-vocab_size // RADIX)]
    while widths[0] > 1:
        widths.insert(0, -(-widths[0] // RADIX))
    return tuple(widths)


def tree_path(tokens: Int[np.ndarray, " N"], vocab_size: int) -> Int[np.ndarray, "N n"]:
    """The nodes that a draw of each token passes below the root; the last is the token itself (on the host)."""
    path = [np.asarray(tokens)]
    for width in reversed(level_sizes(vocab_size)[1:]):
        path.insert(0, path[0] % width)
    return np.stack(path, axis=-1)


def categorical(
    logits: Float[Array, "B V"], random_bits: UInt32[Array, "B n"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw one token per row with probability softmax(logits).

    Args:
      logits: fp32, −inf for tokens that must not be drawn; each row has at least one finite value. A vocabulary that
        lies on a mesh axis is gathered.
      words: independent random words, n = len(tree_widths(V)), the root's first.

    Returns:
      Token ids, int32, and log Σ exp(logits) of each row as the tree has it. A token of zero weight is never returned.
      A row that is no distribution (NaN, +inf, or nothing finite) returns an unspecified id and a total that is not
      finite.
    """
    logits = replicate_vocab(logits)
    widths = level_sizes(logits.shape[1])
    if random_bits.shape[1] != len(widths):
        raise ValueError(
            f"{random_bits.shape[1]} words for a tree of {len(widths)} levels over {logits.shape[1]} tokens"
        )
    columns = logits.T
    top = jnp.max(columns, axis=0)
    below_max = columns - top
    # In this order XLA takes the exponentials in one pass; selecting among them afterwards took a pass of its own.
    values = jnp.exp(jnp.where(below_max < _NEGLIGIBLE, -jnp.inf, below_max))
    tree: list[Array] = []
    for width in reversed(widths):
        # Each level is kept: fused into its readers, XLA would take the exponentials again for the sums of each.
        level_nodes = jax.lax.optimization_barrier(_pad_to(values, RADIX * width))
        tree.insert(0, _with_batch_spec(logits, level_nodes, batch=1))
        values = _sum_of_16(tree[0])
    node = _with_batch_spec(logits, jnp.zeros(logits.shape[0], jnp.int32))
    for level, width in enumerate(widths):
        picked = _choose_child(_children(tree[level], node, width), random_bits[:, level])
        node = _with_batch_spec(logits, node + width * picked)
    return node, top + jnp.log(values[0])


def replicate_vocab(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """The same logits with the vocabulary whole on every device of a replica."""
    spec = jax.typeof(logits).sharding.spec
    if len(spec) == 2 and spec[1] is not None:
        return jax.reshard(logits, PartitionSpec(spec[0], None))
    return logits


def _with_batch_spec(rows: Array, values: Array, batch: int = 0) -> Array:
    """The values, with their dimension `batch` on the mesh axis of `rows` (JAX lets go of the axis where the batch is
    one row)."""
    axis = jax.typeof(rows).sharding.spec[0]
    spec = [axis if dimension == batch else None for dimension in range(values.ndim)]
    return values if axis is None else jax.reshard(values, PartitionSpec(*spec))


def take_per_row(values: Float[Array, "B N"], index: Int[Array, " B"]) -> Float[Array, " B"]:
    """values[b, index[b]] for every row (`take_along_axis` cannot do it for a sharded batch of one row)."""
    return jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds"))(values, index)


def _children(nodes: Float[Array, "N B"], parent: Int[Array, " B"], width: int) -> Float[Array, "B 16"]:
    order = width * jnp.arange(RADIX, dtype=jnp.int32)
    pick = jax.vmap(lambda column, i: column.at[i + order].get(mode="promise_in_bounds"), in_axes=(1, 0))
    return pick(nodes, parent)


def _pad_to(values: Float[Array, "N B"], n: int) -> Float[Array, "n B"]:
    """Zeros where a level lacks nodes."""
    return jnp.pad(values, ((0, n - values.shape[0]), (0, 0)))


def _sum_of_16(nodes: Float[Array, "16*M B"]) -> Float[Array, "M B"]:
    """Sums of siblings (a level's width apart): halves of the level added to each other, four times."""
    for _ in range(4):
        half = nodes.shape[0] // 2
        nodes = nodes[:half] + nodes[half:]
    return nodes


def _choose_child(children: Float[Array, "B 16"], word: UInt32[Array, " B"]) -> Int[Array, " B"]:
    """The child in whose share of the sum the uniform number (top 24 bits of the word) falls."""
    ends = [children[:, 0]]
    for j in range(1, RADIX):
        ends.append(ends[-1] + children[:, j])
    uniform = (word >> np.uint32(8)).astype(jnp.float32) * np.float32(2.0**-24)
    point = uniform * ends[-1]
    passed = jnp.zeros_like(word, dtype=jnp.int32)
    for end in ends:  # added up one by one: stacking them made XLA compile the chain of sums sixteen times over
        passed = passed + (end <= point)
    order = jnp.arange(RADIX, dtype=jnp.int32)
    last_positive = jnp.max(jnp.where(children > 0, order, 0), axis=1)
    return jnp.minimum(passed, last_positive)


def draw_margin(
    logits: Float[np.ndarray, "N V"], words: UInt32[np.ndarray, "N n"]
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, "N n"]]:
    """The draw in fp64, and how far it was from falling out otherwise: evidence that a parting is a rounding tie.

    At each level of the path the margin is the distance from the uniform number to the nearest boundary between two
    siblings, as a share of their sum (infinite where one child has it all). If every logit carries noise of at most ε,
    a boundary F = (left sum)/(sum) moves by at most F·(1−F)·(e^{2ε} − 1) ≤ ε/2 (to first order), and the fp32 sums of
    the tree add their own rounding: a draw whose margins are larger than that cannot part.

    Args:
      logits: on the host, −inf for excluded tokens; words: as in `draw`.

    Returns:
      Tokens [N], and margins [N, n], the root's first.
    """
    values = np.asarray(logits, np.float64)
    values = np.exp(values - values.max(axis=1, keepdims=True))
    rows, vocab_size = values.shape
    widths = level_sizes(vocab_size)
    tree: list[np.ndarray] = []
    for width in reversed(widths):
        padded = np.pad(values, ((0, 0), (0, RADIX * width - values.shape[1])))
        tree.insert(0, padded.reshape(rows, RADIX, width))
        values = tree[0].sum(axis=1)
    node = np.zeros(rows, np.int64)
    margins = np.empty((rows, len(widths)))
    for level, width in enumerate(widths):
        ends = np.cumsum(tree[level][np.arange(rows), :, node], axis=1)
        ends /= ends[:, -1:]
        uniform = (np.asarray(words[:, level]) >> 8)[:, None] * 2.0**-24
        between = (ends > 0) & (ends < 1)
        margins[:, level] = np.where(between, np.abs(ends - uniform), np.inf).min(axis=1)
        node = node + width * (ends <= uniform).sum(axis=1)
    return node, margins
