"""Relearning by number of steps, generations and mixtures, in studies of one student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jax_selftrain.config import ArmConfig, MemorizationConfig, ModelConfig, RunConfig, StudyConfig, yaml_io
from jax_selftrain.corpus import open_corpus
from jax_selftrain.evals import relearned_halves, sequences_fingerprint
from jax_selftrain.io import json_files
from jax_selftrain.io.jsonl import read_jsonl
from jax_selftrain.report import write_report
from jax_selftrain.study import run_study
from jax_selftrain.study.dag import Stage, run_all
from jax_selftrain.study.design import Design, make_design

Make = Callable[..., StudyConfig]


@pytest.fixture(scope="module")
def make(options: Callable[..., RunConfig], tiny_model: Callable[..., Path]) -> Make:
    """`make(out, **changes)`: a study of one student and one seed."""
    small = options(Path("unused"))

    def config(out: Path, **changes: Any) -> StudyConfig:
        return replace(
            StudyConfig(
                out=str(out),
                models=(ModelConfig("llama", str(tiny_model("llama"))),),
                seeds=(100,),
                mesh="data=1",
                sample=replace(small.sample, seed=0),
                train=replace(small.train, steps=2, checkpoint_every=2, seed=0),
                extract=replace(small.extract, greedy_decode=False),
            ),
            **changes,
        )

    return config


@pytest.fixture(scope="module")
def folder(make: Make, inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    probes = MemorizationConfig(
        relearn_corpus=inputs["texts"], relearn_steps=(1, 2), relearn_sequences=True, aa_repeat=False
    )
    folder = run_study(make(tmp_path_factory.mktemp("study") / "out", memorization=probes))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def design(folder: Path) -> Design:
    return make_design(yaml_io.load(StudyConfig, folder / "config.yaml"))


@pytest.fixture(scope="module")
def cells(folder: Path) -> dict[str, dict[str, Any]]:
    return {cell["treatment"]: cell for cell in json_files.read_json(folder / "results.json")["cells"]}


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


def test_every_generation_is_a_cell_and_shares_the_stages_of_the_last(make: Make, tmp_path: Path) -> None:
    arms = {
        replay: ArmConfig(replay, "generations", generations=3, replay=replay)
        for replay in ("replace", "accumulate", "fresh")
    }
    design = make_design(make(tmp_path, arms=tuple(arms.values())))
    cells = {cell.treatment: cell for cell in design.cells}
    for name in arms:
        chain = [cells[f"{name}, generation 1"], cells[f"{name}, generation 2"], cells[name]]
        assert chain[0].train is not None
        assert chain[0].train.key == cells["source llama"].train.key, "the first generation is self-training"
        assert len({cell.train.key for cell in chain}) == 3
        inputs = {one.key for one in chain[2].train.dependencies}
        assert (chain[1].corpus.key in inputs) == (name == "accumulate")
        assert (chain[1].train.key in inputs) == (name == "fresh")
        # All corpora that the student has read decide the classes.
        read = [key for key, one in chain[2].extract.inputs.items() if "corpus" in key and isinstance(one, Stage)]
        assert len(read) == (1 if name == "replace" else 3)
    alone = make_design(make(tmp_path, arms=(replace(arms["fresh"], generations=2),)))
    (last,) = (cell for cell in alone.cells if cell.treatment == "fresh")
    assert last.extract.key == cells["fresh, generation 2"].extract.key


def test_a_mixture_has_its_share_of_real_text_and_its_classes_know_it(
    make: Make, inputs: dict[str, str], tmp_path: Path
) -> None:
    config = make(tmp_path, arms=(ArmConfig("half", "mixture", text=inputs["texts"], share=0.25),))
    config = replace(config, extract=replace(config.extract, sequences=inputs["texts"], prefix=6, suffix=4))
    design = make_design(config)
    (cell,) = (cell for cell in design.cells if cell.treatment == "half")
    run_all(design.root, [cell.extract])
    training = json_files.read_json(design.folder(cell.train) / "run.json")
    assert training["mixture"][0]["share"] == "1/4"
    assert training["mixture"][0]["samples"] == 30
    assert training["steps"] == config.train.steps
    assert training["corpus"]["ref"] == str(design.folder(cell.corpus))
    found = json_files.read_json(design.folder(cell.extract) / "extract.json")
    assert found["seen"]["n"] == 30, "the sequences are in the real text"
    assert table(design, cell.extract)["document"].min() >= training["corpus"]["samples"]
    other = make_design(replace(config, arms=(replace(config.arms[0], share=0.5),)))
    assert other.cells[-1].train.key != cell.train.key
