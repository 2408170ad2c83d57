"""Relearning by number of steps, in a study of one student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jax_selftrain.config import MemorizationConfig, ModelConfig, RunConfig, StudyConfig, yaml_io
from jax_selftrain.corpus import open_corpus
from jax_selftrain.evals import relearned_halves, sequences_fingerprint
from jax_selftrain.io import atomic
from jax_selftrain.io.jsonl import read_jsonl
from jax_selftrain.report import write_report
from jax_selftrain.study import run_study
from jax_selftrain.study.dag import Stage
from jax_selftrain.study.design import Design, make_design


@pytest.fixture(scope="module")
def folder(
    options: Callable[..., RunConfig],
    tiny_model: Callable[..., Path],
    inputs: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    small = options(Path("unused"))
    config = StudyConfig(
        out=str(tmp_path_factory.mktemp("study") / "out"),
        models=(ModelConfig("llama", str(tiny_model("llama"))),),
        seeds=(100,),
        mesh="data=1",
        sample=replace(small.sample, seed=0),
        train=replace(small.train, steps=2, checkpoint_every=2, seed=0),
        extract=replace(small.extract, greedy_decode=False),
        memorization=MemorizationConfig(
            relearn_corpus=inputs["texts"], relearn_steps=(1, 2), relearn_sequences=True, aa_repeat=False
        ),
    )
    folder = run_study(config)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def design(folder: Path) -> Design:
    return make_design(yaml_io.load(StudyConfig, folder / "config.yaml"))


@pytest.fixture(scope="module")
def cells(folder: Path) -> dict[str, dict[str, Any]]:
    return {cell["treatment"]: cell for cell in atomic.read_json(folder / "results.json")["cells"]}


def table(design: Design, stage: Stage) -> dict[str, np.ndarray]:
    columns = pq.read_table(design.folder(stage) / "extract.sequences.parquet").to_pydict()
    return {name: np.array(values) for name, values in columns.items()}


def test_one_half_of_h_is_relearned_and_the_other_is_measured(
    design: Design, cells: dict[str, dict[str, Any]], inputs: dict[str, str]
) -> None:
    rows = [row["tokens"] for _, row in read_jsonl(Path(inputs["sequences"]))]
    shown, not_shown = relearned_halves(sequences_fingerprint(inputs["sequences"]), np.arange(len(rows)))
    assert shown.sum() > 3
    assert not_shown.sum() > 3
    assert not (shown & not_shown).any()
    (corpus,) = (stage for stage in design.ordered_stages if stage.command == "import_sequences")
    read = [sample.tokens.tolist() for sample in open_corpus(design.folder(corpus)).iter_samples()]
    assert read == [row for row, is_shown in zip(rows, shown, strict=True) if is_shown]
    (cell,) = design.cells
    measures = cells["source llama"]["measures"]
    for steps in (1, 2):
        name = f"after_relearning_H {steps}"
        before, after = table(design, design.base_probes["llama", 100][name]), table(design, cell.probes[name])
        for side, found in (("before", before), ("after", after)):
            measured = measures[f"log_pz/{name}"][side]
            assert measured["n"] == not_shown.sum()
            assert measured["value"] == pytest.approx(found["logprob"][not_shown].mean())
        gain = after["logprob"][shown].mean() - table(design, cell.extract)["logprob"][shown].mean()
        assert gain > 0, "it was trained on these sequences"
    assert measures["exact_match/H_not_shown"]["change"]["n"] == not_shown.sum()


def test_relearning_is_a_curve_over_steps(folder: Path, cells: dict[str, dict[str, Any]]) -> None:
    measures = cells["source llama"]["measures"]
    values = [measures[f"pz/after_relearning {steps}"]["after"]["value"] for steps in (1, 2)]
    assert len({measures["pz"]["after"]["value"], *values}) == 3
    assert (folder / "figures" / "relearning_llama.svg").is_file()
    assert "after_relearning" not in "".join(cells["source llama"]["extraction"]["classes"])
