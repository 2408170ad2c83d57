"""Evaluation during training equals `score` and `extract`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus_factory import write_jsonl
from process_group import start_processes, wait_for_all
from run_factory import run_design
from training_runs import curve

from jax_selftrain import cli, hub
from jax_selftrain.config import ExtractConfig, ImportCorpusConfig, RunConfig, ScoreConfig, TrainConfig, yaml_io
from jax_selftrain.corpus import import_text, open_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.evals import extract, score
from jax_selftrain.evals.extraction import CLASSES
from jax_selftrain.evals.item_results import dev_test_split, item_hash
from jax_selftrain.io import json_files
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.sampling import SamplingParams, generate
from jax_selftrain.study import run, train_with_evals
from jax_selftrain.study.eval_hooks import evaluation_hooks, summarize_curve, with_default_evals
from jax_selftrain.training import Hook

MEASURES = ("stories/nll", "animals/acc", "words/acc", "sequences/exact_match", "sequences/log_pz", "sequences/pz")
CLASSED = ("exact_match", "pz")
HELD_OUT = tuple(f"sequences/{metric}/held_out" for metric in CLASSED)


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


@pytest.fixture(scope="module")
def run_folder(training: TrainConfig) -> Path:
    return train_with_evals(training)


def test_the_curve_equals_score_and_extract_of_each_checkpoint(
    run_folder: Path, training: TrainConfig, inputs: dict[str, str], tmp_path: Path
) -> None:
    lines = curve(run_folder)
    assert [line["step"] for line in lines] == [0, 2, 4]
    models = [training.model, *(str(run_folder / "checkpoints" / f"{step:06d}" / "model") for step in (2, 4))]
    for line, model in zip(lines, models, strict=True):
        scored = score(
            ScoreConfig(
                model=model,
                tasks=training.eval_tasks,
                texts=training.eval_texts,
                limit=20,
                text_limit=20,
                out=str(tmp_path / "score.json"),
                mesh="data=1",
            )
        )
        extracted = extract(
            ExtractConfig(
                model=model,
                sequences=inputs["sequences"],
                prefix=12,
                suffix=8,
                limit=20,
                corpus=training.corpus,
                min_overlap=training.eval_min_overlap,
                out=str(tmp_path / "extract.json"),
                mesh="data=1",
            )
        )
        expected = {
            "step": line["step"],
            "stories/nll": scored["texts"]["stories"]["nll"],
            "animals/acc": scored["tasks"]["animals"]["acc"],
            "words/acc": scored["tasks"]["words"]["acc"],
            "sequences/exact_match": extracted["exact_match"],
            "sequences/log_pz": extracted["logprob"],
            "sequences/pz": extracted["pz"],
        }
        for metric, part in product(CLASSED, CLASSES):
            if extracted[part]["n"]:
                expected[f"sequences/{metric}/{part}"] = extracted[part][metric]
        assert list(line) == list(expected)
        assert line == pytest.approx(expected, rel=1e-6)  # parameters under another preset: fp32 sums, reordered
    assert lines[0]["stories/nll"] > lines[2]["stories/nll"], "it was trained on these very stories"


def test_classes_along_training_are_those_of_extract_also_after_a_stop(training: TrainConfig, tmp_path: Path) -> None:
    rng, model = np.random.default_rng(0), hub.load_model(training.model, "data=1")
    prefixes = rng.integers(3, 500, (4, 12)).tolist()
    greedy = generate(model, prefixes, SamplingParams(max_tokens=8, temperature=0))
    documents = [sample.tokens.tolist() for sample in open_corpus(training.corpus).iter_samples()]
    read = [row[:20] for row in documents if len(row) >= 20][:4]
    rows = [[*prefix, *suffix] for prefix, suffix in zip(prefixes, greedy, strict=True)]
    rows += read + [[*row[:18], 0, 0] for row in read]  # the last have 6 of 8 tokens in a row
    sequences = write_jsonl(tmp_path / "planted.jsonl", [{"tokens": row} for row in rows])
    config = replace(training, eval_texts=(), eval_tasks=(), eval_sequences=sequences, eval_min_overlap=6)

    def stop(step: int, _: object) -> None:
        if step == 3:
            raise KeyboardInterrupt

    run_folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train_with_evals(replace(config, out=str(run_folder)), hooks=[Hook(stop, every=1)])
    train_with_evals(replace(config, out=str(run_folder)))
    tables = []
    for step in (0, 2, 4):
        checkpoint = str(run_folder / "checkpoints" / f"{step:06d}" / "model") if step else training.model
        lengths: dict[str, Any] = {"prefix": 12, "suffix": 8, "corpus": training.corpus, "min_overlap": 6}
        extract(ExtractConfig(checkpoint, sequences, str(tmp_path / "extract.json"), **lengths, mesh="data=1"))
        table = pq.read_table(tmp_path / "extract.sequences.parquet").to_pydict()
        tables.append({name: np.array(values) for name, values in table.items()})
    held_out = tables[0]["class"] == "held_out"
    assert held_out.sum() == 4
    assert tables[0]["exact_match"][held_out].all(), "greedy continuations of the base"
    assert not tables[-1]["exact_match"][held_out].all(), "training changes some"
    assert (tables[0]["class"][4:] == ["seen"] * 4 + ["partial"] * 4).all()
    reproduced = held_out & tables[0]["exact_match"]
    for line, table in zip(curve(run_folder), tables, strict=True):
        parts = {name: table["class"] == name for name in CLASSES} | {"reproduced_held_out": reproduced}
        for name, members in parts.items():
            exact, pz = table["exact_match"][members], np.exp(table["logprob"][members])
            assert line[f"planted/exact_match/{name}"] == exact.mean()
            assert line[f"planted/pz/{name}"] == pytest.approx(pz.mean(), rel=1e-5)
    summary = summarize_curve(run_folder, json_files.read_json(run_folder / "run.json")["evaluation"]["measured"])
    assert summary is not None
    sizes = {measure["name"]: measure["n"] for measure in summary["measures"]}
    assert sizes["planted/exact_match"] == 12
    assert all(sizes[f"planted/{metric}/{part}"] == 4 for metric, part in product(CLASSED, parts))


def test_training_by_epochs_is_evaluated_after_each(training: TrainConfig, tmp_path: Path) -> None:
    config = replace(training, steps=None, epochs=2, eval_every=None, eval_sequences="", out=str(tmp_path / "run"))
    folder = train_with_evals(config)
    steps = json_files.read_json(folder / "run.json")["steps"]
    assert [line["step"] for line in curve(folder)] == [0, steps // 2 + steps % 2, steps]
    assert {"animals/acc", "stories/nll"} < curve(folder)[1].keys()


def test_the_run_records_what_was_measured(run_folder: Path) -> None:
    (measured,) = json_files.read_json(run_folder / "run.json")["evaluation"]["measured"]
    assert {kind: {name: entry["n"] for name, entry in files.items()} for kind, files in measured.items()} == {
        "texts": {"stories": 20},
        "tasks": {"animals": 20, "words": 20},
        "sequences": {"sequences": 20},
    }


def test_files_count_by_content(
    run_folder: Path, training: TrainConfig, inputs: dict[str, str], tmp_path: Path
) -> None:
    moved = tmp_path / "stories.jsonl"
    moved.write_text(Path(inputs["texts"]).read_text())
    assert train_with_evals(replace(training, eval_texts=(str(moved),))) == run_folder
    moved.write_text(json.dumps({"text": "Another story."}) + "\n")
    with pytest.raises(InputError, match="started with another evaluation"):
        train_with_evals(replace(training, eval_texts=(str(moved),)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval_texts": ("gone.jsonl",)}, r"gone\.jsonl: no such file"),
        ({"eval_tasks": ("gone.jsonl",)}, r"gone\.jsonl: no such file"),
        ({"eval_sequences": "gone.npy"}, r"gone\.npy: no such file"),
        ({"eval_prefix": 13}, r"fewer than prefix \+ suffix = 21"),
        ({"eval_prefix": 2000}, "a prefix of 2000 tokens and a suffix of 8 are longer than"),
        ({"eval_suffix": 0}, "--eval-suffix 0: must be at least 1"),
        ({"eval_every": None}, "--eval-texts needs --eval-every"),
        ({"eval_texts": (), "eval_tasks": (), "eval_sequences": ""}, "nothing to evaluate"),
    ],
)
def test_bad_evaluation_is_refused_before_anything_is_written(
    training: TrainConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = replace(training, out=str(tmp_path / "out"), **change)
    with pytest.raises(InputError, match=message) as caught:
        train_with_evals(config)
    assert "\n" not in str(caught.value)
    assert not Path(config.out).exists()


def test_two_files_of_one_name_are_refused(training: TrainConfig, inputs: dict[str, str], tmp_path: Path) -> None:
    twin = tmp_path / "animals.jsonl"
    twin.write_text('{"text": "A text."}\n')
    with pytest.raises(InputError, match="'animals'"):
        train_with_evals(replace(training, out=str(tmp_path / "out"), eval_texts=(str(twin),)))


def test_the_train_command_evaluates(training: TrainConfig, tmp_path: Path) -> None:
    words = ["train", "--model", training.model, "--corpus", training.corpus, "--out", str(tmp_path / "run")]
    words += ["--steps", "4", "--batch-size", "4", "--seq-len", "32", "--mesh", "data=1"]
    words += ["--eval-every", "2", "--eval-texts", *training.eval_texts, "--eval-limit", "5"]
    assert cli.main(words) == 0
    assert [tuple(line) for line in curve(tmp_path / "run")] == [("step", "stories/nll")] * 3


@pytest.mark.nightly
def test_two_processes_evaluate_together(training: TrainConfig, tmp_path: Path) -> None:
    config = replace(training, mesh="data=2", steps=2, eval_every=1, checkpoint_every=2, eval_limit=8)
    config = replace(config, eval_tasks=config.eval_tasks[:1], eval_sequences="")
    yaml_io.save(tmp_path / "train.yaml", config)
    alone, together = tmp_path / "alone", tmp_path / "together"
    for out, processes in ((alone, 1), (together, 2)):
        command = ["train", "--config", tmp_path / "train.yaml", "--out", out]
        codes, message = wait_for_all(start_processes(command, processes, devices=2 // processes))
        assert codes == [0] * processes, message
    # Gloo sums in another order than one process does; the learning rate amplifies the rounding.
    for measured, expected in zip(curve(together), curve(alone), strict=True):
        assert measured == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------- a run


def test_a_run_evaluates_during_training_what_it_measures_before_and_after(
    options: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = options(tmp_path / "out")
    config = replace(config, train=replace(config.train, eval_every=3))
    folder, design = run(config), run_design(config)
    (cell,) = design.cells
    lines = curve(design.folder(cell.train))
    assert set(lines[0]) == {"step", *MEASURES, *HELD_OUT}
    measured = (
        (lines[0], design.score_base["llama"], design.extract_base["llama"]),
        (lines[-1], cell.score, cell.extract),
    )
    for line, score_stage, extract_stage in measured:
        scores = json_files.read_json(design.folder(score_stage) / "score.json")
        extracted = json_files.read_json(design.folder(extract_stage) / "extract.json")
        # Training has another sharding and another batch size: rounding.
        assert line["stories/nll"] == pytest.approx(scores["texts"]["stories"]["nll"], rel=1e-5)
        assert line["sequences/log_pz"] == pytest.approx(extracted["logprob"], rel=1e-5)
        assert line["sequences/exact_match"] == extracted["exact_match"]
    assert lines[-1]["sequences/pz/held_out"] == pytest.approx(extracted["held_out"]["pz"], rel=1e-5)
    found = json_files.read_json(folder / "results.json")["cells"][0]["training"]["evaluations"]
    assert found["step"] == [line["step"] for line in lines]
    assert [measure["name"] for measure in found["measures"]] == [*MEASURES, *HELD_OUT]
    assert found["measures"][0]["values"] == [line["stories/nll"] for line in lines]
    assert [measure["n"] for measure in found["measures"]] == [30, 40, 25, 30, 30, 30, 30, 30]


def test_a_run_refuses_bad_evaluation_before_sampling(options: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = options(tmp_path / "out")
    for change, message in (
        ({"eval_every": 2, "eval_texts": ("gone.jsonl",)}, "gone.jsonl"),
        ({"eval_texts": ("gone.jsonl",)}, "--eval-every"),
    ):
        changed = replace(config, train=replace(config.train, **change))
        with pytest.raises(InputError, match=message):
            run(changed)
        assert not Path(config.out).exists()


def test_the_limit_of_the_benchmarks_holds_during_training() -> None:
    score, extraction = ScoreConfig(texts=("texts.jsonl",), limit=500), ExtractConfig(sequences="sequences.npy")
    train = TrainConfig(epochs=3)
    assert with_default_evals(train, score, extraction).eval_limit == 500
    assert with_default_evals(replace(train, eval_limit=50), score, extraction).eval_limit == 50
    for changed in (replace(extraction, column="story"), replace(extraction, subsample=9)):  # training has neither
        assert with_default_evals(train, score, changed).eval_sequences == ""
    named = replace(train, eval_texts=("others.jsonl",))
    assert with_default_evals(named, score, extraction) == named
    assert with_default_evals(TrainConfig(steps=5), score, extraction) == TrainConfig(steps=5)


def test_evaluations_may_be_on_the_items_of_a_split(training: TrainConfig) -> None:
    def measured(split: Any) -> dict[str, Any]:
        (hook,) = evaluation_hooks(replace(training, eval_split=split, eval_limit=None))
        return {name: entry["n"] for kind in ("texts", "tasks") for name, entry in hook.measured[kind].items()}

    whole, dev, test = map(measured, ("all", "dev", "test"))
    assert whole.keys() == dev.keys() == test.keys() == {"stories", "animals", "words"}
    for name, n in whole.items():
        assert 0 < dev[name] < n
        assert dev[name] + test[name] == n
    (hook,) = evaluation_hooks(replace(training, eval_split="dev", eval_limit=None))
    documents = hash_json([row["text"] for row in read_rows(training.eval_texts[0]) if is_dev("", row["text"])])
    assert hook.measured["texts"]["stories"]["fingerprint"] == documents


def read_rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def is_dev(context: str, *continuations: str) -> bool:
    return dev_test_split(item_hash(context, continuations)) == "dev"
