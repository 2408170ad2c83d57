"""The decode loop: the right distribution, the right log-probabilities, the right ends, and rows that stay apart."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jax_selftrain.mesh import make_layout, make_mesh
from jax_selftrain.models import DecoderConfig, RopeConfig, axis_sizes, forward, init_params, project
from jax_selftrain.sampling.decode import Architecture, capacities, decode
from jax_selftrain.sampling.policy import Policy, mask_logits
from jax_selftrain.sampling.words import sample_keys

CONFIG = DecoderConfig(
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
    qk_norm=False,
    tied=False,
    initializer_range=0.4,
)
PLAIN = Policy(start_id=1, stop_ids=(), max_tokens=2)


class Model:
    """A small random model on a mesh."""

    def __init__(self, spec: str = "data=1,model=1", sharpness: float = 1.0):
        layout = make_layout("tensor", make_mesh(spec), axis_sizes(CONFIG))
        self.architecture = Architecture(CONFIG, layout, "float32")
        self.params = init_params(CONFIG, 0, layout)
        with jax.set_mesh(layout.mesh):
            self.params["head"]["kernel"] = self.params["head"]["kernel"] * sharpness

    def draw(self, policy: Policy, ids: np.ndarray, seed: int = 0, active: np.ndarray | None = None):
        active = np.ones(len(ids), bool) if active is None else active
        return decode(self.architecture, policy, self.params, sample_keys(seed, ids), active)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Of the full forward pass [B, T, V]: the reference that shares no cache, page or loop with decoding."""
        with jax.set_mesh(self.architecture.layout.mesh):
            return np.asarray(_full_logits(self.architecture, self.params, jnp.asarray(tokens)))


@partial(jax.jit, static_argnums=0)
def _full_logits(architecture, params, tokens):
    hidden = forward(architecture.config, architecture.layout, params, tokens)
    return project(architecture.config, architecture.layout, params, hidden)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


# ---------------------------------------------------------------- distribution


@pytest.mark.parametrize("sharpness", [0.3, 2.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.8},
        {"top_k": 20},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.2, "top_k": 100, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=str,
)
def test_first_and_second_tokens_follow_the_exact_distribution(sharpness, options):
    """Chi-square of first tokens, and of (first, second) pairs, against probabilities from the full forward pass.

    Samples are those of one fixed seed, so that the outcome is fixed; a right sampler had a chance of 1e-4 per test to
    fail. Cells are sorted by probability and merged until 20 samples are expected in each.
    """
    model, policy, n = Model(sharpness=sharpness), replace(PLAIN, **options), 16_384
    drawn = model.draw(policy, np.arange(n), seed=3)
    assert drawn.lengths.min() == 2

    def probabilities(tokens):
        masked = np.asarray(mask_logits(jnp.asarray(model.logits(tokens)[:, -1]), policy))
        return np.exp(_log_softmax(masked))

    vocabulary = np.arange(CONFIG.vocab_size)
    first = probabilities(np.array([[PLAIN.start_id]]))[0]
    second = probabilities(np.stack([np.full_like(vocabulary, PLAIN.start_id), vocabulary], axis=1))
    pairs = drawn.tokens[:, 0] * CONFIG.vocab_size + drawn.tokens[:, 1]
    assert _chi_square(np.bincount(drawn.tokens[:, 0], minlength=CONFIG.vocab_size), first) > 1e-4
    assert _chi_square(np.bincount(pairs, minlength=CONFIG.vocab_size**2), (first[:, None] * second).ravel()) > 1e-4
    # The test can fail: it rejects a temperature five percent off.
    wrong = first ** (1 / 1.05) / (first ** (1 / 1.05)).sum()
    assert (first > 0).sum() < 3 or _chi_square(np.bincount(drawn.tokens[:, 0], minlength=CONFIG.vocab_size), wrong) < 1e-4


def _chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    assert not counts[p == 0].any(), "an excluded token was drawn"
    order = np.argsort(-p)
    expected = (p * counts.sum())[order]
    cell = np.minimum(np.cumsum(expected) // 20, np.cumsum(expected)[-1] // 20 - 1).astype(int)
    observed, wanted = np.bincount(cell, counts[order]), np.bincount(cell, expected)
    return stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue
