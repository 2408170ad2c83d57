"""Reference implementations of the token draw for tests, and a small random model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt32

from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import make_sharding_rules
from jax_selftrain.models import DecoderConfig, Params, axis_sizes, forward, init_params, unembed
from jax_selftrain.models.config import RopeConfig
from jax_selftrain.sampling import SamplingParams
from jax_selftrain.sampling.categorical import RADIX, categorical, level_sizes
from jax_selftrain.sampling.counter_rng import per_sample_keys, token_random_bits
from jax_selftrain.sampling.decode import DecodeLoop, DecodeSpec, SampleBatch

SMALL_CONFIG = DecoderConfig(
    vocab_size=200,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=32,
    max_positions=256,
    norm="rmsnorm",
    norm_eps=1e-6,
    activation="silu",
    gated_mlp=True,
    parallel_residual=False,
    rotary_dim=4,
    rope=RopeConfig(),
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=None,
    tie_word_embeddings=False,
    initializer_range=0.4,
)
ENDING = SamplingParams(start_ids=(1,), stop_ids=(5, 77, 123), max_tokens=70)
"""Three of two hundred ids stop a sample: about two thirds end early, the others fill more than two chunks."""
SAMPLE_FIELDS = ("tokens", "lengths", "logprobs", "policy_logprobs", "stopped")

draw_with_logsumexp = jax.jit(categorical)
_token_random_bits = jax.jit(token_random_bits, static_argnums=2)


def random_bits(seed: int, sample_ids: Sequence[int] | np.ndarray, step: int, n: int) -> UInt32[np.ndarray, "B n"]:
    """Return the n random words of token `step` of each sample."""
    keys = per_sample_keys(seed, sample_ids)
    return np.asarray(_token_random_bits(keys, np.full(len(keys), step, np.int32), n))


def first_bits(rows: int, vocab_size: int, seed: int = 0) -> UInt32[np.ndarray, "B levels"]:
    """Return the random words of the first token of samples 0 … rows−1."""
    return random_bits(seed, np.arange(rows), 0, len(level_sizes(vocab_size)))


def random_logits(rows: int, vocab_size: int, scale: float, seed: int = 0) -> Float[np.ndarray, "B V"]:
    return scale * np.random.default_rng(seed).standard_normal((rows, vocab_size), dtype=np.float32)


def draw(logits: Float[np.ndarray, "B V"], bits: UInt32[np.ndarray, "B levels"]) -> Int[jax.Array, " B"]:
    return draw_with_logsumexp(logits, bits)[0]


def tree_path(tokens: Int[np.ndarray, " B"], vocab_size: int) -> Int[np.ndarray, "B levels"]:
    """Return the nodes from below the root to each token."""
    path = [np.asarray(tokens)]
    for width in reversed(level_sizes(vocab_size)[1:]):
        path.insert(0, path[0] % width)
    return np.stack(path, axis=-1)


def draw_with_margins(
    logits: Float[np.ndarray, "B V"], bits: UInt32[np.ndarray, "B levels"]
) -> tuple[Int[np.ndarray, " B"], Float[np.ndarray, "B levels"]]:
    """Draw in fp64, and measure the margins to another outcome.

    Small margins are evidence that a divergence is a rounding tie. At each level of the path the margin is the distance
    from the uniform number to the nearest boundary between two siblings, as a share of their sum (infinite if one child
    has it all). If every logit carries noise of at most ε, a boundary F = (left sum)/(sum) moves by at most
    F·(1−F)·(e^{2ε} − 1) ≤ ε/2 (to first order), and the fp32 sums of the tree add their own rounding: a draw with
    larger margins cannot diverge.

    Args:
      logits: on the host, −inf for excluded tokens.
      bits: as in `categorical`.

    Returns:
      Tokens, and margins, the root's first.
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
        uniform = (np.asarray(bits[:, level]) >> 8)[:, None] * 2.0**-24
        inside = (ends > 0) & (ends < 1)
        margins[:, level] = np.where(inside, np.abs(ends - uniform), np.inf).min(axis=1)
        node = node + width * (ends <= uniform).sum(axis=1)
    return node, margins


def draw_samples(
    spec: DecodeSpec,
    sampling_params: SamplingParams,
    params: Params,
    keys: UInt32[np.ndarray, "samples 2"],
    *,
    num_slots: int,
    queue_size: int | None = None,
    **options,
) -> SampleBatch:
    """Run a decode loop once; by default its queue holds all samples."""
    if queue_size is None:
        queue_size = -(-len(keys) // spec.sharding_rules.data_parallelism)
    loop = DecodeLoop(spec, sampling_params, params, num_slots=num_slots, queue_size=queue_size)
    return loop.generate(keys, **options)


class SmallModel:
    """A small random model on a mesh."""

    def __init__(self, spec: str = "data=1,model=1", sharpness: float = 1.0):
        rules = make_sharding_rules("tensor", make_mesh(spec), axis_sizes(SMALL_CONFIG))
        self.spec = DecodeSpec(SMALL_CONFIG, rules, "float32")
        self.params = init_params(SMALL_CONFIG, 0, rules)
        with mesh_context(rules.mesh):
            self.params["head"]["kernel"] = self.params["head"]["kernel"] * sharpness

    def draw(
        self, sampling_params: SamplingParams, ids: np.ndarray, seed: int = 0, num_slots: int | None = None, **options
    ):
        num_slots = len(ids) // self.spec.sharding_rules.data_parallelism if num_slots is None else num_slots
        keys = per_sample_keys(seed, ids)
        return draw_samples(self.spec, sampling_params, self.params, keys, num_slots=num_slots, **options)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Compute logits [B, T, V] by the full forward pass, the reference."""
        with mesh_context(self.spec.sharding_rules.mesh):
            return np.asarray(_full_logits(self.spec, self.params, jnp.asarray(tokens)))


@partial(jax.jit, static_argnums=0)
def _full_logits(spec, params, tokens):
    hidden = forward(spec.config, spec.sharding_rules, params, tokens)
    return unembed(spec.config, spec.sharding_rules, params, hidden)
