"""A study that is measured on tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from harness_sets import CHOICE, hf_backend, task, write_jsonl, write_tasks

from jax_selftrain.config import ExtractConfig, ModelConfig, RunConfig, StudyConfig
from jax_selftrain.errors import InputError
from jax_selftrain.study import run_study
from jax_selftrain.study.design import make_design

SHOTS = {"animals": 3, "colors": 1}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two multiple-choice tasks with few-shot examples, over local data sets."""
    folder = tmp_path_factory.mktemp("harness")
    specs = []
    for name, words in (("animals", ("fox", "bear", "owl")), ("colors", ("red", "blue", "green"))):
        rows = [
            {
                "context": f"Number {i} of the {name} was",
                "choices": [f"{word} {i % 5}" for word in words],
                "answer": i % 3,
            }
            for i in range(45)
        ]
        file = write_jsonl(folder / f"{name}.jsonl", rows[:36])
        shots = write_jsonl(folder / f"{name}-shots.jsonl", rows[36:])
        spec = task(name, file, "multiple_choice", CHOICE, fewshot_split="train", fewshot_config={"sampler": "first_n"})
        spec["dataset_kwargs"]["data_files"]["train"] = str(shots)
        specs.append(spec)
    write_tasks(folder / "tasks", specs)
    return folder


@pytest.fixture(
    scope="module", params=[(100,), pytest.param((100, 101), marks=pytest.mark.nightly)], ids="seeds {}".format
)
def config(
    request: pytest.FixtureRequest,
    task_folder: Path,
    options: Callable[..., RunConfig],
    tiny_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> StudyConfig:
    small = options(Path("unused"))
    tasks = tuple(f"{name}@{shots}" for name, shots in SHOTS.items())
    return StudyConfig(
        out=str(tmp_path_factory.mktemp("study") / "out"),
        models=(ModelConfig("llama", str(tiny_model("llama"))),),
        seeds=request.param,
        mesh="data=1",
        sample=replace(small.sample, seed=0),
        train=replace(small.train, steps=2, checkpoint_every=2, seed=0, max_epochs=1.0),
        score=replace(small.score, tasks=tasks, texts=(), task_folder=str(task_folder / "tasks")),
        extract=ExtractConfig(),
    )


@pytest.fixture(scope="module")
def finished(config: StudyConfig) -> Path:
    return run_study(config)


def test_accuracies_are_those_of_the_harness_with_its_hf_backend(finished: Path, config: StudyConfig):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=config.score.task_folder, include_defaults=False)
    cells = json.loads((finished / "results.json").read_text())["cells"]
    assert len(cells) == len(config.seeds)
    design = make_design(config)
    for cell, planned in zip(cells, design.cells, strict=True):
        folders = {"before": config.models[0].model, "after": str(design.folder(planned.train) / "model")}
        for side, folder in folders.items():
            lm = hf_backend(folder, batch_size=16)
            for name, shots in SHOTS.items():
                found = simple_evaluate(lm, tasks=[name], num_fewshot=shots, task_manager=manager, bootstrap_iters=0)
                expected = found["results"][name]["acc,none"]
                assert cell["measures"][f"task/{name}"][side]["value"] == pytest.approx(expected, abs=1e-9)
        assert {task["name"]: task["n"] for task in cell["tasks"]} == {"animals": 36, "colors": 36}


def test_a_finished_study_is_not_computed_again_and_new_data_are(
    finished: Path, config: StudyConfig, task_folder: Path, tmp_path: Path
):
    before = {path: path.stat().st_mtime_ns for path in (finished / "stages").rglob("*.parquet")}
    run_study(config)
    assert {path: path.stat().st_mtime_ns for path in (finished / "stages").rglob("*.parquet")} == before

    def score_keys(changed: StudyConfig) -> list[str]:
        return [stage.key for stage in make_design(changed).ordered_stages if stage.command == "score"]

    keys = score_keys(config)
    fewer = replace(config, score=replace(config.score, tasks=("animals@2", "colors@1")))
    assert not set(keys) & set(score_keys(fewer))
    file = task_folder / "animals.jsonl"
    content = file.read_text()
    try:
        file.write_text(content.replace("Number 7 ", "Number 8 "))
        assert not set(keys) & set(score_keys(config))
    finally:
        file.write_text(content)
    assert score_keys(config) == keys


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (("animals@all",), "give the number of few-shot examples"),
        pytest.param(  # indexes all tasks of the harness
            ("animals@3", "color@1"), "task 'color' is neither a file nor a task", marks=pytest.mark.nightly
        ),
    ],
    ids=["count", "name"],
)
def test_tasks_that_cannot_be_loaded_are_refused_before_anything_is_written(
    config: StudyConfig, tmp_path: Path, tasks: tuple[str, ...], message: str
):
    changed = replace(config, out=str(tmp_path / "out"), score=replace(config.score, tasks=tasks))
    for dry_run in (False, True):
        with pytest.raises(InputError, match=message):
            run_study(replace(changed, dry_run=dry_run))
    assert not (tmp_path / "out").exists()
