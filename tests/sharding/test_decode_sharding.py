"""Tests of `decode` on several devices."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_reference import draw_samples

from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import make_sharding_rules
from jax_selftrain.models import DecoderConfig, axis_sizes, forward, init_params, unembed
from jax_selftrain.models.config import RopeConfig
from jax_selftrain.sampling.counter_rng import per_sample_keys
from jax_selftrain.sampling.decode import DecodeSpec
from jax_selftrain.sampling.sampling_params import SamplingParams

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
    tie_word_embeddings=False,
    initializer_range=0.4,
)


class Model:
    """A small random model on a mesh."""

    def __init__(self, spec: str = "data=1,model=1", sharpness: float = 1.0):
        rules = make_sharding_rules("tensor", make_mesh(spec), axis_sizes(CONFIG))
        self.spec = DecodeSpec(CONFIG, rules, "float32")
        self.params = init_params(CONFIG, 0, rules)
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


@cache
def small_model(spec: str = "data=1,model=1", sharpness: float = 1.0) -> Model:
    return Model(spec, sharpness)


@pytest.fixture
def model() -> Model:
    return small_model()


ENDING = SamplingParams(start_id=1, stop_ids=(5, 77, 123), max_tokens=70)
"""Three of two hundred ids stop a sample: about two thirds end early, the others fill more than two chunks."""


FIELDS = ("tokens", "lengths", "logprobs", "policy_logprobs", "stopped")


@pytest.mark.parametrize(
    ("spec", "num_slots"),
    [
        pytest.param("data=1,model=1", 16, marks=pytest.mark.nightly),
        pytest.param("data=2,model=1", 16, marks=pytest.mark.nightly),
        ("data=4,model=1", 16),
    ],
)
def test_refilled_slots_draw_the_samples_of_static_batches(spec, num_slots):
    """Samples start at other steps, in other slots, with other neighbors."""
    model, ids = small_model(spec), np.arange(150)
    replicas = model.spec.sharding_rules.data_parallelism
    static = [
        model.draw(ENDING, part, num_slots=num_slots, queue_size=num_slots)
        for part in np.split(ids, range(16 * replicas, 150, 16 * replicas))
    ]
    refilled = model.draw(ENDING, ids, num_slots=num_slots)
    for name in FIELDS:
        expected = np.concatenate([getattr(batch, name) for batch in static])
        np.testing.assert_array_equal(getattr(refilled, name), expected)
    assert refilled.slot_steps < sum(batch.slot_steps for batch in static)
    assert refilled.utilization == refilled.lengths.sum() / refilled.slot_steps
