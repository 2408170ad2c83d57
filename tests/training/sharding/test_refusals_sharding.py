"""Tests of `refusals` on several devices."""

from collections.abc import Callable
from pathlib import Path

import pytest

from jax_selftrain.config import TrainConfig
from jax_selftrain.errors import InputError
from jax_selftrain.training import train


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 7}, "--batch-size 7 .* must be a multiple of 2"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"seq_len": 4096}, "only 1024 positions"),
        ({"learning_rate": -1.0}, "--learning-rate -1.0: must be 0 or more"),
        ({"warmup_ratio": 2.0}, "--warmup-ratio"),
        ({"beta2": 1.0}, "--beta2"),
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"corpus": "nowhere"}, "nowhere"),
        ({"model": "nowhere"}, "nowhere"),
        ({"mesh": "data=64"}, "64 devices"),
        ({"corpus": ""}, "--corpus"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(
    change: dict, message: str, options: Callable[..., TrainConfig]
):
    config = options(**change)
    with pytest.raises(InputError, match=message) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not Path(config.out).exists()
