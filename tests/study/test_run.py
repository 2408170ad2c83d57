"""A run is a study with one cell: results, restarts, checks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from bad_input import flip_byte
from run_factory import output_times, refusal, run_design

from jax_selftrain import load_model
from jax_selftrain.config import ImportCorpusConfig, RunConfig, StudyConfig, yaml_io
from jax_selftrain.corpus import import_text, open_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.io import json_files
from jax_selftrain.report import write_report
from jax_selftrain.study import run, run_study
from jax_selftrain.study.run_study import one_cell_study

Options = Callable[..., RunConfig]


def snapshot(folder: Path) -> bytes:
    return (folder / "results.json").read_bytes()


def read_cell(folder: Path) -> dict[str, Any]:
    (cell,) = json_files.read_json(folder / "results.json")["cells"]
    return cell


def without_extraction(config: RunConfig) -> RunConfig:
    return replace(config, extract=replace(config.extract, sequences=""))


def test_a_run_leaves_everything_that_is_promised(finished_run: Path, options: Options) -> None:
    config = options(finished_run)
    for name in ("config.yaml", "results.json", "report.html", "model"):
        assert (finished_run / name).exists(), name
    design = run_design(config)
    commands = sorted(stage.command for stage in design.ordered_stages)
    assert commands == ["extract", "extract", "sample", "score", "score", "train"]
    for stage in design.ordered_stages:
        assert (design.root / f"{stage.name}.json").is_file()
    assert yaml_io.load(StudyConfig, finished_run / "config.yaml") == one_cell_study(config)
    assert not list(finished_run.rglob(".*"))


def test_a_run_folder_is_a_reference_to_its_trained_model(finished_run: Path, options: Options) -> None:
    (cell,) = run_design(options(finished_run)).cells
    tokens = np.arange(3, 40, dtype=np.int32)[None]
    student, base = (load_model(ref, "data=1") for ref in (str(finished_run), options(finished_run).model))
    stage = load_model(str(finished_run / "stages" / cell.train.name), "data=1")
    assert np.array_equal(student.logits(tokens), stage.logits(tokens))
    assert not np.array_equal(student.logits(tokens), base.logits(tokens))


def test_the_student_is_trained_on_the_sampled_tokens_for_one_pass(finished_run: Path, options: Options) -> None:
    (cell,) = run_design(options(finished_run)).cells
    assert cell.corpus.command == "sample"
    description = json_files.read_json(finished_run / "stages" / cell.train.name / "run.json")
    assert description["steps"] == description["rows"] // 4
    assert read_cell(finished_run)["training"]["steps"] == description["steps"]


def test_results_equal_the_measurements_of_the_stages(finished_run: Path, options: Options) -> None:
    design = run_design(options(finished_run))
    (cell,), found = design.cells, read_cell(finished_run)
    scores = {"before": design.score_base["llama"], "after": cell.score}
    for side, stage in scores.items():
        measured = json_files.read_json(design.folder(stage) / "score.json")
        for task in found["tasks"]:
            assert task["accuracy"][side]["value"] == pytest.approx(measured["tasks"][task["name"]]["acc"])
            assert task["n"] == measured["tasks"][task["name"]]["n"]
        for text in found["texts"]:
            assert text["nll"][side]["value"] == pytest.approx(measured["texts"][text["name"]]["nll"])
    extracted = {"before": design.extract_base["llama"], "after": cell.extract}
    for side, stage in extracted.items():
        measured = json_files.read_json(design.folder(stage) / "extract.json")
        part = found["extraction"]["classes"]["all"]
        assert part["n"] == measured["n"]
        assert part["exact_match"][side]["value"] == pytest.approx(measured["exact_match"])
        assert part["logprob"][side]["value"] == pytest.approx(measured["logprob"])
        assert part["token_accuracy"][side]["value"] == pytest.approx(measured["token_accuracy"])
        for entry in found["extraction"]["discoverable"]:
            key = f"{entry['draws']}@{entry['p']}"
            assert entry[side]["value"] == pytest.approx(measured["discoverable"][key])
    assert [group["name"] for group in found["extraction"]["groups"]] == ["rarely", "often"]
    classes = found["extraction"]["classes"]
    assert classes.keys() == {"all", "held_out", "partial", "seen", "reproduced_held_out"}
    reproduced, held_out = classes["reproduced_held_out"], classes["held_out"]
    assert reproduced["n"] == round(held_out["exact_match"]["before"]["value"] * held_out["n"])
    assert not reproduced["n"] or reproduced["exact_match"]["before"]["value"] == 1


def test_every_change_is_after_minus_before(finished_run: Path) -> None:
    found: list[dict[str, Any]] = []

    def gather(node: Any) -> None:
        if isinstance(node, dict):
            if {"before", "after", "change"} <= node.keys():
                found.append(node)
            for child in node.values():
                gather(child)
        elif isinstance(node, list):
            for child in node:
                gather(child)

    gather({name: value for name, value in read_cell(finished_run).items() if name != "measures"})
    assert len(found) > 20
    for node in found:
        expected = node["after"]["value"] - node["before"]["value"]
        assert node["change"]["value"] == pytest.approx(expected, abs=1e-12)  # rounding of sums of a few hundred
        assert node["change"]["low"] <= node["change"]["value"] <= node["change"]["high"]
        assert node["change"]["n"] == node["before"]["n"] == node["after"]["n"]


def test_training_changed_something(finished_run: Path) -> None:
    cell = read_cell(finished_run)
    assert not cell["identical"]
    assert cell["texts"][0]["nll"]["change"]["value"] != 0.0
    log = cell["training"]["log"]
    assert len(log["loss"]) == len(log["step"]) == cell["training"]["steps"]


def test_the_corpus_is_described(finished_run: Path, options: Options) -> None:
    (cell,) = run_design(options(finished_run)).cells
    described = json_files.read_json(finished_run / "results.json")["corpora"][cell.corpus.key]
    samples = {
        sample.sample_id: sample for sample in open_corpus(finished_run / "stages" / cell.corpus.name).iter_samples()
    }
    assert described["samples"] == len(samples)
    assert described["tokens"] == sum(len(sample.tokens) for sample in samples.values())
    assert (described["seed"], described["sampling_params"]["temperature"]) == (3, 1.0)
    assert len(described["examples"]) == 6
    for example in described["examples"]:
        sample = samples[example["sample_id"]]
        assert (example["text"], example["finish_reason"]) == (sample.text, sample.finish_reason)
        assert example["logprob"] == sample.logprob


def test_a_finished_run_does_nothing_again(finished_run: Path, options: Options) -> None:
    before, times = snapshot(finished_run), output_times(finished_run)
    run(options(finished_run))
    assert snapshot(finished_run) == before
    assert output_times(finished_run) == times


def test_the_same_run_in_another_folder_gives_the_same_bytes(
    finished_run: Path, options: Options, tmp_path: Path
) -> None:
    run(options(tmp_path / "elsewhere"))
    assert snapshot(tmp_path / "elsewhere") == snapshot(finished_run)


def test_learning_rate_zero_changes_exactly_nothing(options: Options, tmp_path: Path) -> None:
    config = options(tmp_path / "null")
    config = replace(config, train=replace(config.train, learning_rate=0.0))
    run(config)
    cell = read_cell(tmp_path / "null")
    assert cell["identical"]

    def changes(node: Any) -> list[float]:
        if isinstance(node, dict):
            own = [node["change"]["value"]] if "change" in node else []
            return own + [value for child in node.values() for value in changes(child)]
        return [value for child in node for value in changes(child)] if isinstance(node, list) else []

    assert len(changes(cell)) > 20
    assert set(changes(cell)) == {0.0}
    design = run_design(config)
    for base, stage, table in (
        (design.score_base["llama"], design.cells[0].score, "score.requests.parquet"),
        (design.extract_base["llama"], design.cells[0].extract, "extract.sequences.parquet"),
    ):
        before, after = (pq.read_table(design.folder(one) / table) for one in (base, stage))
        assert before.equals(after.select(before.column_names))


def test_a_folder_of_a_run_with_other_options_is_refused_by_name(
    finished_run: Path, options: Options, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished_run, tmp_path / "copy")
    before, config = output_times(folder), options(folder)
    with pytest.raises(InputError, match=r"contains a run with train.learning_rate = 0.01, this one has 0.02"):
        run(replace(config, train=replace(config.train, learning_rate=2e-2)))
    assert output_times(folder) == before
    run(replace(config, train=replace(config.train, log_every=2)))  # no part of what a run is
    assert output_times(folder) == before


def test_a_changed_file_makes_new_stages(options: Options, inputs: dict[str, str], tmp_path: Path) -> None:
    tasks = tmp_path / "animals.jsonl"
    tasks.write_text(Path(inputs["choices"]).read_text())
    config = options(tmp_path / "out")
    config = without_extraction(replace(config, score=replace(config.score, tasks=(str(tasks),), texts=())))
    keys = {stage.key for stage in run_design(config).ordered_stages}
    tasks.write_text(tasks.read_text().replace('"answer": 0', '"answer": 1'))
    changed = [stage.command for stage in run_design(config).ordered_stages if stage.key not in keys]
    assert changed == ["score", "score"]


def test_a_mixed_corpus_counts_by_content(options: Options, inputs: dict[str, str], tmp_path: Path) -> None:
    config, mixed = options(tmp_path / "out"), tmp_path / "mixed"
    config = without_extraction(replace(config, score=replace(config.score, tasks=())))
    config = replace(config, train=replace(config.train, mixture=(f"{mixed}=0.2",)))
    text = ImportCorpusConfig(source=inputs["texts"], model=config.model, out=str(mixed))
    import_text(text)
    run(config)
    (cell,) = run_design(config).cells
    description = json_files.read_json(tmp_path / "out" / "stages" / cell.train.name / "run.json")
    assert description["mixture"][0]["share"] == "1/5"
    shutil.rmtree(mixed)
    import_text(replace(text, limit=3))
    assert run_design(config).cells[0].train.key != cell.train.key


def test_a_damaged_shard_is_named(finished_run: Path, options: Options, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished_run, folder)
    (shard,) = (folder / "stages").rglob("shard-000001.parquet")
    flip_byte(shard)
    with pytest.raises(InputError, match=r"shard-000001\.parquet"):
        run(options(folder))


def test_a_run_may_measure_texts_alone(options: Options, tmp_path: Path) -> None:
    config = options(tmp_path / "texts")
    run(without_extraction(replace(config, score=replace(config.score, tasks=()))))
    cell = read_cell(tmp_path / "texts")
    assert (cell["tasks"], cell["macro"], cell["extraction"]) == ([], None, None)
    assert cell["texts"]
    write_report(tmp_path / "texts")


def test_another_source_is_sampled(options: Options, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    config = options(tmp_path / "out", source=str(tiny_model("llama", seed=1)))
    config = without_extraction(replace(config, score=replace(config.score, tasks=())))
    run(config)
    results = json_files.read_json(tmp_path / "out" / "results.json")
    assert results["title"] == "llama, trained on text by llama (source)"
    assert (results["design"]["students"], results["design"]["sources"]) == (["llama"], ["llama (source)"])
    assert len({model["fingerprint"] for model in results["design"]["models"]}) == 2
    (cell,) = run_design(config).cells
    assert cell.corpus.command == "sample"


def test_text_of_a_source_with_another_tokenizer_is_retokenized(
    options: Options, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = options(tmp_path / "out", source=str(tiny_model("llama", tokenizer_size=400)))
    (cell,) = run_design(config).cells
    assert cell.corpus.command == "retokenize"


def test_the_stop_and_start_ids_of_a_run_are_those_of_its_source(options: Options, tmp_path: Path) -> None:
    config = options(tmp_path / "out")
    config = replace(config, sample=replace(config.sample, stop_ids=(7, 2), start_id=5))
    sampled = next(stage for stage in run_design(config).ordered_stages if stage.command == "sample")
    assert (sampled.identity["stop_ids"], sampled.identity["start_id"]) == ([7, 2], 5)


# Refusals before anything is written ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "option"),
    [("sample", "model"), ("sample", "out"), ("train", "corpus"), ("score", "model"), ("extract", "corpus")],
)
def test_options_that_the_study_sets_are_refused(options: Options, tmp_path: Path, section: str, option: str) -> None:
    config = options(tmp_path / "out")
    changed = replace(config, **{section: replace(getattr(config, section), **{option: "somewhere"})})
    assert f"{section}.{option} is set by the study" in refusal(changed)


def test_a_run_has_one_seed(options: Options, tmp_path: Path) -> None:
    config = options(tmp_path / "out")
    message = refusal(replace(config, sample=replace(config.sample, seed=4)))
    assert "sample.seed is 4 and train.seed is 3" in message


def test_a_missing_model_is_refused(options: Options, tmp_path: Path) -> None:
    assert "no such model folder" in refusal(replace(options(tmp_path / "out"), model=str(tmp_path / "nothing")))


def test_a_run_without_anything_to_measure_is_refused(options: Options, tmp_path: Path) -> None:
    config = options(tmp_path / "out")
    config = replace(config, score=replace(config.score, tasks=(), texts=()))
    assert "nothing to measure" in refusal(without_extraction(config))


def test_two_files_of_one_name_are_refused(options: Options, inputs: dict[str, str], tmp_path: Path) -> None:
    twin = tmp_path / "animals.jsonl"
    twin.write_text(json.dumps({"text": "A text."}) + "\n")
    config = options(tmp_path / "out")
    assert "'animals'" in refusal(replace(config, score=replace(config.score, texts=(str(twin),))))


def test_a_file_as_out_is_refused(options: Options, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        run(options(tmp_path / "file"))


def test_a_study_of_several_cells_needs_its_steps(options: Options, tmp_path: Path) -> None:
    study = one_cell_study(options(tmp_path / "out"))
    with pytest.raises(InputError, match=r"train\.steps or train\.epochs is required"):
        run_study(replace(study, seeds=(3, 4)))
