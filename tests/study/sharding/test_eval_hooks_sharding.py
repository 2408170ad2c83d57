"""Tests of `eval_hooks` on several devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from process_group import start_processes, wait_for_all

from jax_selftrain.config import ImportCorpusConfig, TrainConfig, yaml_io
from jax_selftrain.corpus import import_text
from jax_selftrain.study import train_with_evals


@pytest.fixture(scope="module")
def training(
    tiny_model: Callable[..., Path], inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> TrainConfig:
    """Four steps with evaluation every second step."""
    folder, model = tmp_path_factory.mktemp("training"), str(tiny_model("llama"))
    import_text(ImportCorpusConfig(source=inputs["texts"], model=model, out=str(folder / "corpus")))
    return TrainConfig(
        model=model,
        corpus=str(folder / "corpus"),
        out=str(folder / "run"),
        steps=4,
        batch_size=4,
        seq_len=32,
        learning_rate=1e-2,
        checkpoint_every=2,
        keep=9,
        mesh="data=1",
        eval_every=2,
        eval_texts=(inputs["texts"],),
        eval_tasks=(inputs["choices"], inputs["words"]),
        eval_sequences=inputs["sequences"],
        eval_prefix=12,
        eval_suffix=8,
        eval_limit=20,
    )


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


@pytest.mark.nightly
def test_two_processes_evaluate_together(training: TrainConfig, tmp_path: Path) -> None:
    config = replace(training, mesh="data=2", steps=2, eval_every=1, checkpoint_every=2, eval_limit=8)
    config = replace(config, eval_tasks=config.eval_tasks[:1], eval_sequences="")
    alone, together = (replace(config, out=str(tmp_path / name)) for name in ("alone", "together"))
    train_with_evals(alone)
    yaml_io.save(tmp_path / "train.yaml", together)
    codes, message = wait_for_all(start_processes(["train", "--config", tmp_path / "train.yaml"], 2, devices=1))
    assert codes == [0, 0], message
    # Gloo sums in another order than one process does; the learning rate amplifies the rounding.
    for measured, expected in zip(curve(Path(together.out)), curve(Path(alone.out)), strict=True):
        assert measured == pytest.approx(expected, rel=1e-3)
