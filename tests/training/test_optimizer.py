"""The optimizer: schedules, decay mask, zero updates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_selftrain.config import TrainConfig
from jax_selftrain.hub import open_model
from jax_selftrain.models import abstract_params
from jax_selftrain.training.optimizer import apply_updates, decay_mask, make_schedule


def compute_rates(steps: int, **options) -> list[float]:
    schedule = make_schedule(TrainConfig(learning_rate=1.0, **options), steps)
    return [float(schedule(n)) for n in range(steps)]


def test_constant_schedule_warms_up_in_equal_steps_and_stays():
    assert compute_rates(8, warmup_ratio=0.5) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    assert compute_rates(3, warmup_ratio=0.0) == [1, 1, 1]


def test_linear_schedule_ends_at_the_final_rate():
    expected = [0.5, 1, 0.8, 0.6, 0.4, 0.2]
    assert compute_rates(6, warmup_ratio=1 / 3, schedule="linear", final_learning_rate=0.2) == pytest.approx(expected)


def test_cosine_schedule_ends_at_the_final_rate():
    fractions = np.arange(1, 9) / 8
    expected = 0.1 + 0.9 * (1 + np.cos(np.pi * fractions)) / 2
    found = compute_rates(8, warmup_ratio=0.0, schedule="cosine", final_learning_rate=0.1)
    assert found == pytest.approx(expected.tolist(), abs=1e-6)  # computed in fp32
    assert found[-1] == pytest.approx(0.1)


def test_warmup_over_all_steps_reaches_the_peak_at_the_last():
    for schedule in ("constant", "linear", "cosine"):
        assert compute_rates(4, warmup_ratio=1.0, schedule=schedule)[:3] == pytest.approx([0.25, 0.5, 0.75])


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3"])
def test_weight_decay_excludes_norms_and_biases(family: str, tiny_model):
    config = open_model(tiny_model(family)).config
    mask = decay_mask(abstract_params(config))
    assert mask["embed"]["embedding"]
    assert mask["layers"]["attn"]["q"]["kernel"]
    assert mask["head"]["kernel"]
    exempt = {jax.tree_util.keystr(path) for path, decayed in jax.tree_util.tree_leaves_with_path(mask) if not decayed}
    assert exempt == {path for path in exempt if path.endswith(("['scale']", "['bias']"))}
    assert any("norm" in path for path in exempt)


def test_weight_decay_can_exclude_the_embedding(tiny_model):
    config = open_model(tiny_model("llama")).config
    mask = decay_mask(abstract_params(config), embeddings=False)
    assert not mask["embed"]["embedding"]
    assert mask["layers"]["mlp"]["up"]["kernel"]


def test_zero_update_keeps_negative_zero():
    params = {"w": jnp.array([-0.0, 0.0, 1.5], jnp.float32)}
    updated = apply_updates(params, {"w": jnp.zeros(3)})
    assert np.asarray(updated["w"]).tobytes() == np.asarray(params["w"]).tobytes()
