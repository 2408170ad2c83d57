"""Samples, without benchmark overlap, drawn to a budget: one corpus for all seeds."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from corpus_factory import write_jsonl
from models_factory import tiny_texts

from jax_selftrain.config import (
    ArmConfig,
    DecontaminateConfig,
    ExtractConfig,
    ModelConfig,
    RunConfig,
    StudyConfig,
    SubsetConfig,
)
from jax_selftrain.corpus import open_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.io.jsonl import read_log
from jax_selftrain.report import write_report
from jax_selftrain.study import run, run_study
from jax_selftrain.study.dag import run_all
from jax_selftrain.study.design import make_design


@pytest.fixture(
    scope="module", params=[("llama",), pytest.param(("llama", "neox"), marks=pytest.mark.nightly)], ids=" ".join
)
def config(
    request: pytest.FixtureRequest,
    options: Callable[..., RunConfig],
    tiny_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> StudyConfig:
    """Own text with two starts, two seeds, one or three epochs of 300 tokens; every night also a second source."""
    small, folder = options(Path("unused")), tmp_path_factory.mktemp("pipeline")
    texts = write_jsonl(folder / "benchmark.jsonl", [{"text": "The benchmark has these five words."}])
    return StudyConfig(
        out=str(folder / "out"),
        models=(
            ModelConfig("llama", str(tiny_model("llama")), start_text="<s>"),
            ModelConfig("neox", str(tiny_model("gpt_neox", vocab_size=320))),
        ),
        students=("llama",),
        sources=request.param,
        arms=(
            ArmConfig("one epoch", epochs=1),
            ArmConfig("one epoch, cool, from a text", epochs=1, temperature=0.7, start_text="the cat"),
        ),
        seeds=(100, 101),
        mesh="data=1",
        sample=replace(small.sample, seed=0, min_tokens=9, temperature=1.25),
        sample_seed=7,
        decontaminate=DecontaminateConfig(texts=(texts,), ngram=3),
        subset=SubsetConfig(tokens=300),
        train=replace(small.train, seed=0, epochs=3, checkpoint_every=None, schedule="cosine", warmup_ratio=0.1),
        score=small.score,
        extract=ExtractConfig(),
    )


@pytest.fixture(scope="module")
def finished(config: StudyConfig) -> Path:
    return run_study(config)


def test_seeds_share_the_samples_and_draw_their_own_subsets(finished: Path, config: StudyConfig):
    design = make_design(config)
    kinds = [stage.command for stage in design.ordered_stages]
    corpora = 1 + len(config.sources)  # of each source, and of the arm with another start
    assert [kinds.count(kind) for kind in ("sample", "decontaminate_tasks", "subset")] == [
        corpora,
        corpora,
        2 * corpora,
    ]
    for stage in design.ordered_stages:
        if stage.command == "subset":
            (clean,) = stage.dependencies
            subset, source = open_corpus(design.folder(stage)), open_corpus(design.folder(clean))
            assert 300 <= subset.n_tokens < 300 + 24
            assert set(subset.iter_texts()) <= set(source.iter_texts())
            assert subset.manifest["policy"]["min_tokens"] == 9
            assert (design.folder(clean) / "decontamination.json").exists()
            sampled = clean.dependencies[0].identity
            assert subset.manifest["policy"]["temperature"] == sampled["temperature"]
            assert (sampled["start_text"], sampled["temperature"]) in {("<s>", 1.25), ("the cat", 0.7), (None, 1.25)}
    results = json.loads((finished / "results.json").read_text())
    assert len(results["cells"]) == 2 * (len(config.sources) + len(config.arms))
    assert len({cell["corpus"] for cell in results["cells"]}) == 2 * corpora


def test_real_text_has_the_budget_of_the_subsets(config: StudyConfig, tmp_path: Path):
    """With epochs, the length of the text decides the number of steps, which controls share with their treatment."""
    real = write_jsonl(tmp_path / "real.jsonl", [{"text": text} for text in tiny_texts(60)])
    arms = (ArmConfig("real text", "text", text=real),)
    design = make_design(replace(config, out=str(tmp_path / "out"), sources=("llama",), arms=arms))
    subset, other = (cell.train.dependencies[-1] for cell in design.cells if cell.treatment == "real text")
    (imported,) = subset.dependencies
    assert (subset.command, imported.command) == ("subset", "import")
    run_all(tmp_path / "out" / "stages", [imported, subset, other])
    first, second, whole = (open_corpus(design.folder(stage)) for stage in (subset, other, imported))
    assert whole.n_tokens > 600
    assert 300 <= first.n_tokens < 300 + 64
    assert 300 <= second.n_tokens < 300 + 64
    assert list(first.iter_texts()) != list(second.iter_texts())


def test_every_epoch_is_evaluated(finished: Path, config: StudyConfig):
    for cell in make_design(config).cells:
        epochs = 1 if "one epoch" in cell.treatment else 3
        folder = finished / "stages" / cell.train.name
        steps = json.loads((folder / "run.json").read_text())["steps"]
        lines = read_log(folder / "curve.jsonl")
        assert [line["step"] for line in lines][-1] == steps
        assert len(lines) == 1 + epochs
        assert "animals/acc" in lines[0]


def test_arms_that_vary_sampling_and_training_make_a_response_surface(finished: Path):
    write_report(finished)
    with (finished / "tables" / "response_llama.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = [(row["start_text"], float(row["temperature"]), int(row["epochs"])) for row in rows]
    assert sorted(found) == [("<s>", 1.25, 1), ("<s>", 1.25, 3), ("the cat", 0.7, 1)]
    effects = {one["treatment"]: one for one in json.loads((finished / "results.json").read_text())["effects"]}
    for row, name in zip(rows, ("one epoch", "one epoch, cool, from a text", "source llama"), strict=True):
        change = effects[name]["measures"]["text/stories"]["change"]
        assert float(row["text/stories"]) == change["value"]
    assert (finished / "figures" / "response_llama.svg").exists()
    assert "Response surface" in (finished / "report.html").read_text()


def test_a_run_takes_the_same_options(options: Callable[..., RunConfig], config: StudyConfig, tmp_path: Path):
    small = options(tmp_path / "run", decontaminate=config.decontaminate, subset=config.subset, extract=ExtractConfig())
    folder = run(replace(small, train=replace(small.train, checkpoint_every=None, epochs=2)))
    kinds = {path.name.split("-")[0] for path in (folder / "stages").iterdir() if path.is_dir()}
    assert {"sample", "decontaminate_tasks", "subset", "train"} <= kinds
    with pytest.raises(InputError, match=r"contains a run with subset\.tokens = 300"):
        run(replace(small, subset=SubsetConfig(tokens=301)))


def test_options_of_the_study_are_refused(config: StudyConfig, tmp_path: Path):
    for changed, message in (
        ({"subset": SubsetConfig(tokens=300, seed=4)}, r"subset\.seed is set by the study"),
        ({"decontaminate": replace(config.decontaminate, control="c")}, r"decontaminate\.control is set by the study"),
        ({"decontaminate": replace(config.decontaminate, texts=("none.jsonl",))}, "none.jsonl"),
    ):
        with pytest.raises(InputError, match=message):
            run_study(replace(config, out=str(tmp_path / "out"), **changed))
        assert not (tmp_path / "out").exists()
