"""Tests of `run` on several devices."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_factory import output_times, refusal

from jax_selftrain.config import RunConfig
from jax_selftrain.io import json_files
from jax_selftrain.study import run

Options = Callable[..., RunConfig]


def test_title_mesh_and_sampling_batch_make_no_new_stages(finished_run: Path, options: Options, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished_run, folder)
    before = output_times(folder)
    config = options(folder, title="A better title", mesh="data=2")
    run(replace(config, sample=replace(config.sample, batch_size=4)))
    assert output_times(folder) == before
    assert json_files.read_json(folder / "results.json")["title"] == "A better title"


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("score", {"tasks": ("missing.jsonl",)}, "missing.jsonl"),
        ("score", {"texts": ("missing.jsonl",)}, "missing.jsonl"),
        ("score", {"batch_tokens": 0}, "batch-tokens"),
        ("extract", {"sequences": "missing.npy"}, "missing.npy"),
        ("extract", {"prefix": 1020}, "1024 positions"),
        ("extract", {"prefix": 100}, "tokens, fewer than"),
        ("sample", {"temperature": 0.0}, "temperature"),
        ("sample", {"max_tokens": 5000}, "1024 positions"),
        ("train", {"seq_len": 5000}, "1024 positions"),
        ("train", {"learning_rate": -1.0}, "learning-rate"),
        ("train", {"batch_size": 3, "mesh": "data=2"}, "batch"),
        ("train", {"mesh": "data=3,model=5"}, "mesh"),
        ("train", {"mixture": ("missing=0.1",)}, "missing: no such corpus folder"),
        ("train", {"mixture": ("missing",)}, "FOLDER=SHARE"),
    ],
)
def test_bad_input_is_found_before_sampling(
    options: Options, tmp_path: Path, section: str, changes: dict[str, Any], message: str
) -> None:
    config = options(tmp_path / "out")
    assert message in refusal(replace(config, **{section: replace(getattr(config, section), **changes)}))
