"""Tests of `study` on several devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jax_selftrain.config import (
    MemorizationConfig,
    ModelConfig,
    RunConfig,
    StudyConfig,
)
from jax_selftrain.study.stage_factory import StageFactory
from jax_selftrain.study.validation import check_study

Make = Callable[..., StudyConfig]


@pytest.fixture(scope="module")
def make(options: Callable[..., RunConfig], tiny_model: Callable[..., Path], inputs: dict[str, str]) -> Make:
    """`make(out, **changes)`: two students with different tokenizers, two seeds."""
    small = options(Path("unused"))

    def config(out: Path, **changes: Any) -> StudyConfig:
        return replace(
            StudyConfig(
                out=str(out),
                models=(
                    ModelConfig("llama", str(tiny_model("llama")), size="tiny"),
                    ModelConfig("neox", str(tiny_model("gpt_neox", vocab_size=320))),
                ),
                seeds=(100, 101),
                mesh="data=1",
                sample=replace(small.sample, seed=0),
                train=replace(small.train, steps=2, checkpoint_every=2, seed=0, max_epochs=1.0),
                score=replace(small.score, tasks=(inputs["choices"],)),
                extract=replace(small.extract, sequences=inputs["texts"], prefix=6, suffix=4, greedy_decode=False),
            ),
            **changes,
        )

    return config


def test_the_key_of_continuations_holds_their_options_and_relearning_may_use_a_named_data_set(
    make: Make, inputs: dict[str, str], tmp_path: Path
):
    probes = MemorizationConfig(unseen_text=inputs["texts"], relearn_corpus="datasets:none/of-these")
    config = make(tmp_path / "out", memorization=probes)
    check_study(config)

    def keys(**changes: Any) -> set[str]:
        kinds = StageFactory(replace(config, extract=replace(config.extract, **changes)))
        return {kinds.continue_unseen_text(kinds.base(name)).key for name in ("llama", "neox")}

    plain = keys()
    changes: tuple[dict[str, Any], ...] = ({"dtype": "bfloat16"}, {"prefix": 5}, {"suffix": 5}, {"start_token": "bos"})
    assert len(plain) == 2
    assert len(plain.union(*(keys(**one) for one in changes))) == 2 * (1 + len(changes))
    assert keys(batch_tokens=512, mesh="data=2") == plain  # rounding, at most
