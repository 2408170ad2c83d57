"""One round from end to end: it measures what the stages measured, restarts anywhere, and refuses what does not fit."""

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

from jax_selftrain.config import ImportCorpusConfig, RunConfig, yaml_io
from jax_selftrain.corpus import import_text, open_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.study.round import run

Options = Callable[..., RunConfig]
COMPARED = ("results.json", "report.html")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in COMPARED}


def stage_files(folder: Path) -> dict[str, int]:
    """When each stage's output was written."""
    parts = ("corpus", "train", "score", "extract")
    return {
        str(path): path.stat().st_mtime_ns for part in parts for path in (folder / part).rglob("*") if path.is_file()
    }


def test_a_round_leaves_everything_it_promises(finished: Path, options: Options) -> None:
    for name in (
        "config.yaml",
        "corpus/corpus.json",
        "train/model/model.json",
        "score/base.json",
        "score/student.json",
        "extract/base.json",
        "extract/student.json",
        "results.json",
        "timings.json",
        "report.html",
        "figures/tasks.svg",
        "tables/tasks.csv",
    ):
        assert (finished / name).is_file(), name
    assert yaml_io.load(RunConfig, finished / "config.yaml") == options(finished)
    assert not list(finished.rglob(".*"))
    timings = atomic.read_json(finished / "timings.json")
    assert set(timings) == {"score-base", "sample", "train", "score-student", "extract-base", "extract-student"}


def test_results_say_what_the_stages_measured(finished: Path) -> None:
    results = atomic.read_json(finished / "results.json")
    sides = {"before": "base", "after": "student"}
    for side, who in sides.items():
        scores = atomic.read_json(finished / "score" / f"{who}.json")
        for task in results["tasks"]:
            measured = scores["tasks"][task["name"]]
            assert task["accuracy"][side]["value"] == pytest.approx(measured["acc"])
            assert task["n"] == measured["n"]
            if task["kind"] == "choice":
                assert task["accuracy_norm"][side]["value"] == pytest.approx(measured["acc_norm"])
                assert task["chance"] == pytest.approx(measured["chance"])
            else:
                assert np.exp(-task["word_loglikelihood"][side]["value"]) == pytest.approx(measured["perplexity"])
        for text in results["texts"]:
            measured = scores["texts"][text["name"]]
            assert text["nll"][side]["value"] == pytest.approx(measured["nll"])
            assert (text["documents"], text["tokens"]) == (measured["n"], measured["tokens"])
        extracted = atomic.read_json(finished / "extract" / f"{who}.json")
        for name, part in results["extraction"]["classes"].items():
            measured = extracted if name == "all" else extracted[name]
            assert part["n"] == measured["n"]
            if part["n"]:
                assert part["exact_match"][side]["value"] == pytest.approx(measured["exact_match"])
                assert part["logprob"][side]["value"] == pytest.approx(measured["logprob"])
        for entry in results["extraction"]["discoverable"]:
            key = f"{entry['draws']}@{entry['p']}"
            assert entry[side]["value"] == pytest.approx(extracted["discoverable"][key])
    assert [group["name"] for group in results["extraction"]["groups"]] == ["rarely", "often"]


def test_every_change_is_after_minus_before(finished: Path) -> None:
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

    gather(atomic.read_json(finished / "results.json"))
    assert len(found) > 20
    for node in found:
        expected = node["after"]["value"] - node["before"]["value"]
        assert node["change"]["value"] == pytest.approx(expected, abs=1e-12)  # rounding of sums of a few hundred
        assert node["change"]["low"] <= node["change"]["value"] <= node["change"]["high"]
        assert node["change"]["n"] == node["before"]["n"] == node["after"]["n"]


def test_training_changed_something(finished: Path) -> None:
    results = atomic.read_json(finished / "results.json")
    assert not results["identical"]
    assert results["texts"][0]["nll"]["change"]["value"] != 0.0


def test_the_corpus_is_described_as_it_is(finished: Path) -> None:
    described = atomic.read_json(finished / "results.json")["corpus"]
    samples = list(open_corpus(finished / "corpus").iter_samples())
    lengths = [len(sample.tokens) for sample in samples]
    assert (described["samples"], described["tokens"]) == (len(samples), sum(lengths))
    assert described["length"]["value"] == pytest.approx(np.mean(lengths))
    assert described["stopped"]["value"] == np.mean([sample.finish_reason == "stop" for sample in samples])
    counts = described["length_histogram"]
    assert sum(counts["stop"]) + sum(counts["length"]) == len(samples)
    expected = -sum(sample.logprob for sample in samples) / sum(lengths)
    assert described["surprise_per_token"]["value"] == pytest.approx(expected)
    for n in range(1, 5):
        grams = [tuple(s.tokens[i : i + n].tolist()) for s in samples for i in range(len(s.tokens) - n + 1)]
        assert described["distinct"][str(n)] == {"distinct": len(set(grams)), "total": len(grams)}
    shown = {example["sample_id"]: example for example in described["examples"]}
    assert len(shown) == 6
    assert all(shown[sample.sample_id]["text"] == sample.text for sample in samples if sample.sample_id in shown)


def test_a_finished_round_is_recognised_and_nothing_is_done_again(finished: Path, options: Options) -> None:
    before, files = snapshot(finished), stage_files(finished)
    run(options(finished))
    assert snapshot(finished) == before
    assert stage_files(finished) == files


def test_the_same_round_elsewhere_gives_the_same_bytes(finished: Path, options: Options, tmp_path: Path) -> None:
    run(options(tmp_path / "elsewhere"))
    assert snapshot(tmp_path / "elsewhere") == snapshot(finished)


@pytest.mark.slow
def test_learning_rate_zero_changes_exactly_nothing(options: Options, tmp_path: Path) -> None:
    config = options(tmp_path / "null")
    run(replace(config, train=replace(config.train, learning_rate=0.0)))
    results = atomic.read_json(tmp_path / "null" / "results.json")
    assert results["identical"]

    def changes(node: Any) -> list[float]:
        if isinstance(node, dict):
            own = [node["change"]["value"]] if "change" in node else []
            return own + [value for child in node.values() for value in changes(child)]
        return [value for child in node for value in changes(child)] if isinstance(node, list) else []

    assert len(changes(results)) > 20
    assert set(changes(results)) == {0.0}
    for table in ("score/{}.requests.parquet", "extract/{}.sequences.parquet"):
        base, student = (pq.read_table(tmp_path / "null" / table.format(who)) for who in ("base", "student"))
        assert base.equals(student)
    assert "exactly the same before and after" in (tmp_path / "null" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "lost",
    [
        "score/base.json",
        "score/student.requests.parquet",
        "score/base.documents.parquet",
        "corpus/corpus.json",
        "train/model/model.json",
        "extract/student.json",
        "stages/train.json",
        "results.json",
    ],
)
def test_what_was_lost_is_made_again(finished: Path, options: Options, tmp_path: Path, lost: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    path = folder / lost
    if path.parent.name == "model":
        shutil.rmtree(path.parent)
    else:
        path.unlink()
    run(options(folder))
    assert path.exists()
    assert snapshot(folder) == snapshot(finished)


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [("train", "learning_rate", 0.5), ("sample", "temperature", 0.5), ("score", "limit", 3), ("extract", "prefix", 11)],
)
def test_another_configuration_is_refused_by_name(
    finished: Path, options: Options, section: str, option: str, value: float
) -> None:
    config = options(finished)
    changed = replace(config, **{section: replace(getattr(config, section), **{option: value})})
    earlier = getattr(getattr(config, section), option)
    with pytest.raises(InputError, match=rf"{section}\.{option} = {earlier!r}, this one asks for {value!r}"):
        run(changed)


def test_title_mesh_and_sampling_batch_may_change(finished: Path, options: Options, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    config = options(folder, title="A better title", mesh="data=2")
    run(replace(config, sample=replace(config.sample, batch_size=4)))
    assert "<h1>A better title</h1>" in (folder / "report.html").read_text()


def test_a_changed_input_is_refused_by_name(
    finished: Path, options: Options, inputs: dict[str, str], tmp_path: Path
) -> None:
    folder, tasks = tmp_path / "copy", tmp_path / "animals.jsonl"
    shutil.copytree(finished, folder)
    tasks.write_text(Path(inputs["choices"]).read_text())
    config = options(tmp_path / "fresh")
    config = replace(config, score=replace(config.score, tasks=(str(tasks),), texts=()))
    config = replace(config, extract=replace(config.extract, sequences=""))
    run(config)
    tasks.write_text(tasks.read_text().replace('"answer": 0', '"answer": 1'))
    with pytest.raises(InputError, match=r"score-base was done with another .*animals\.jsonl"):
        run(config)


@pytest.mark.slow
def test_a_changed_mixed_corpus_is_refused_by_name(options: Options, inputs: dict[str, str], tmp_path: Path) -> None:
    config, mixed = options(tmp_path / "out"), tmp_path / "mixed"
    config = replace(config, score=replace(config.score, tasks=()), extract=replace(config.extract, sequences=""))
    config = replace(config, train=replace(config.train, mixture=(f"{mixed}=0.2",)))
    text = ImportCorpusConfig(source=inputs["texts"], model=config.model, out=str(mixed))
    import_text(text)
    run(config)
    assert atomic.read_json(tmp_path / "out" / "train" / "run.json")["mix"][0]["share"] == "1/5"
    shutil.rmtree(mixed)
    import_text(replace(text, limit=3))
    with pytest.raises(InputError, match=f"train was done with another mixed corpus {mixed}"):
        run(config)


def test_a_damaged_shard_is_named(finished: Path, options: Options, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    shard = folder / "corpus" / "shard-000001.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"shard-000001\.parquet"):
        run(options(folder))


def test_tasks_texts_and_extraction_may_each_stand_alone(options: Options, tmp_path: Path) -> None:
    config = options(tmp_path / "texts")
    run(replace(config, score=replace(config.score, tasks=()), extract=replace(config.extract, sequences="")))
    results = atomic.read_json(tmp_path / "texts" / "results.json")
    assert (results["tasks"], results["macro"], results["extraction"]) == ([], None, None)
    assert not (tmp_path / "texts" / "extract").exists()
    page = (tmp_path / "texts" / "report.html").read_text()
    assert "Perplexity" in page
    assert "Verbatim memorization" not in page


def test_a_source_of_its_own_is_sampled(options: Options, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    config = options(tmp_path / "out", source=str(tiny_model("qwen2")))
    config = replace(config, score=replace(config.score, tasks=()), extract=replace(config.extract, sequences=""))
    run(config)
    results = atomic.read_json(tmp_path / "out" / "results.json")
    assert not results["source"]["is_base"]
    assert results["title"] == "llama, trained on text by qwen2"
    assert results["source"]["fingerprint"] != results["base"]["fingerprint"]
    assert "<strong>qwen2</strong> wrote 40 texts" in (tmp_path / "out" / "report.html").read_text()


# Refusals before anything is written ----------------------------------------------------------------------------


def refused(config: RunConfig) -> str:
    with pytest.raises(InputError) as error:
        run(config)
    assert not Path(config.out).exists(), "nothing is written before the inputs are known to be sound"
    return str(error.value)


@pytest.mark.parametrize(
    ("section", "option"),
    [("sample", "model"), ("sample", "out"), ("train", "corpus"), ("score", "model"), ("extract", "corpus")],
)
def test_what_the_round_decides_may_not_be_set(options: Options, tmp_path: Path, section: str, option: str) -> None:
    config = options(tmp_path / "out")
    changed = replace(config, **{section: replace(getattr(config, section), **{option: "somewhere"})})
    assert f"{section}.{option} is decided by the round" in refused(changed)


@pytest.mark.parametrize(
    ("section", "changes", "said"),
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
    options: Options, tmp_path: Path, section: str, changes: dict[str, Any], said: str
) -> None:
    config = options(tmp_path / "out")
    assert said in refused(replace(config, **{section: replace(getattr(config, section), **changes)}))


def test_a_missing_model_is_refused(options: Options, tmp_path: Path) -> None:
    assert "no such model folder" in refused(options(tmp_path / "out", model=str(tmp_path / "nothing")))


def test_nothing_to_measure_is_refused(options: Options, tmp_path: Path) -> None:
    config = options(tmp_path / "out")
    config = replace(config, score=replace(config.score, tasks=(), texts=()))
    assert "nothing to measure" in refused(replace(config, extract=replace(config.extract, sequences="")))


def test_a_source_with_another_tokenizer_is_refused(
    options: Options, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    other = tiny_model("llama", tokenizer_size=400)
    assert "different tokenizers" in refused(options(tmp_path / "out", source=str(other)))


def test_two_files_of_one_name_are_refused(options: Options, inputs: dict[str, str], tmp_path: Path) -> None:
    twin = tmp_path / "animals.jsonl"
    twin.write_text(json.dumps({"text": "A text."}) + "\n")
    config = options(tmp_path / "out")
    assert "'animals'" in refused(replace(config, score=replace(config.score, texts=(str(twin),))))


def test_a_folder_of_something_else_is_refused(options: Options, tmp_path: Path) -> None:
    (tmp_path / "out" / "corpus").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no config\.yaml of a round"):
        run(options(tmp_path / "out"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        run(options(tmp_path / "file"))
