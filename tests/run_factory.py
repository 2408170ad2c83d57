"""A run that takes seconds, on a real model with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_factory import write_jsonl
from models_factory import tiny_texts

from jax_selftrain.config import ExtractConfig, RunConfig, SampleConfig, ScoreConfig, TrainConfig
from jax_selftrain.errors import InputError
from jax_selftrain.study import run
from jax_selftrain.study.design import Design, make_design
from jax_selftrain.study.run_study import one_cell_study


def write_inputs(folder: Path) -> dict[str, str]:
    """Write task, text and sequence files and return their paths by name."""
    texts = list(tiny_texts(40, seed=1))
    rng = np.random.default_rng(0)
    choices = [
        {"context": text[:30], "choices": [" fox", " bear", " owl"], "answer": i % 3} for i, text in enumerate(texts)
    ]
    words = [{"context": text.split(" named")[0], "continuation": " named"} for text in texts[:25]]
    tokens = [{"tokens": rng.integers(3, 512, 20).tolist(), "group": "often" if i % 2 else "rarely"} for i in range(30)]
    return {
        "choices": write_jsonl(folder / "animals.jsonl", choices),
        "words": write_jsonl(folder / "words.jsonl", words),
        "texts": write_jsonl(folder / "stories.jsonl", [{"text": text} for text in texts[:30]]),
        "sequences": write_jsonl(folder / "sequences.jsonl", tokens),
    }


def make_run_config(model: Path, inputs: Mapping[str, str], out: Path, **changes: Any) -> RunConfig:
    """Return the small run, with all stages on one device."""
    config = RunConfig(
        model=str(model),
        out=str(out),
        mesh="data=1",
        sample=SampleConfig(samples=40, max_tokens=24, batch_size=8, samples_per_shard=16, seed=3),
        train=TrainConfig(batch_size=4, seq_len=32, learning_rate=1e-2, checkpoint_every=4, seed=3),
        score=ScoreConfig(tasks=(inputs["choices"], inputs["words"]), texts=(inputs["texts"],), batch_tokens=1024),
        extract=ExtractConfig(sequences=inputs["sequences"], prefix=12, suffix=8, min_overlap=4, batch_tokens=1024),
    )
    return replace(config, **changes)


def run_design(config: RunConfig) -> Design:
    """Return the design of a run, with the folders of its stages."""
    return make_design(one_cell_study(config))


def output_times(folder: Path) -> dict[str, int]:
    """Return when each file of a stage was written."""
    files = (path for path in (folder / "stages").rglob("*") if path.is_file())
    return {str(path): path.stat().st_mtime_ns for path in files}


def refusal(config: RunConfig) -> str:
    """Return the error of a run that writes nothing."""
    with pytest.raises(InputError) as error:
        run(config)
    assert not Path(config.out).exists(), "nothing is written before the inputs are checked"
    return str(error.value)
