"""Random damage to what the program writes is named and refused, or harmless.

Bits flip, files end early, blocks are zero, files are exchanged or missing. The outcome is what a user receives:
tensors, tokens, results and pages, not timings.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import Subject, tally
from flax.traverse_util import flatten_dict
from models_factory import tiny_texts
from report_page import without_costs
from training_runs import Interruption, interrupt, run_options

from jax_selftrain import hub
from jax_selftrain.config import (
    CompareConfig,
    ExtractConfig,
    RunConfig,
    SampleConfig,
    ScoreConfig,
)
from jax_selftrain.corpus import Corpus, open_corpus
from jax_selftrain.evals import extract, score
from jax_selftrain.evals.item_results import load_score_result
from jax_selftrain.evals.token_records import load_records
from jax_selftrain.io.process_id import boot_and_pid_namespace
from jax_selftrain.likelihood.resumable import PartialResults
from jax_selftrain.report import write_report
from jax_selftrain.sampling import sample
from jax_selftrain.study import compare, evaluation_hooks, run, train_with_evals
from jax_selftrain.training import Hook, train

Outcome = dict[str, Any]
SEED = int(os.environ.get("JAX_SELFTRAIN_DAMAGE_SEED", "0"))


def hash_bytes(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def hash_params(ref: Path) -> str:
    leaves = flatten_dict(hub.load_model(str(ref), "data=1", "float32").params, sep="/")
    return hash_bytes(*(name.encode() + np.asarray(leaf).tobytes() for name, leaf in sorted(leaves.items())))


def hash_files(folder: Path, *patterns: str) -> Outcome:
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return {path.relative_to(folder).as_posix(): hash_bytes(path.read_bytes()) for path in files}


def describe_corpus(corpus: Corpus) -> Outcome:
    samples = [(s.sample_id, s.tokens.tolist(), s.text, s.logprob, s.finish_reason) for s in corpus.iter_samples()]
    arrays = [array.tobytes() for array in corpus.token_arrays()]
    return {"samples": samples, "arrays": arrays, "fingerprint": corpus.fingerprint, "manifest": dict(corpus.manifest)}


def write_dead_lease(path: Path) -> None:
    """Leave the lease of a process that was killed."""
    path.write_text(f'{{"host": "", "scope": "{boot_and_pid_namespace()}", "pid": 1, "start_time": 1, "token": ""}}')


# ---------------------------------------------------------------- folders


def finished_corpus(model: Path, folder: Path) -> Subject:
    sample(sample_options(model, folder))
    return Subject("corpus", folder, lambda copy: describe_corpus(open_corpus(copy)))


def sample_options(model: Path, out: Path) -> SampleConfig:
    return SampleConfig(
        str(model), str(out), samples=12, max_tokens=12, batch_size=4, samples_per_shard=4, seed=3, mesh="data=1"
    )


def half_done_corpus(model: Path, folder: Path) -> Subject:
    sample(sample_options(model, folder))
    for name in ("corpus.json", "README.md", "shard-000001.parquet", "records/shard-000001.json"):
        (folder / name).unlink()
    write_dead_lease(folder / "records/shard-000001.lease")
    return Subject("half-done corpus", folder, lambda copy: describe_corpus(sample(sample_options(model, copy))))


def model_folder(model: Path, folder: Path, format: Any) -> Subject:
    loaded = hub.load_model(str(model), "data=1", "float32")
    hub.save_model(folder, loaded.params, source=str(model), metadata={"made_by": "test"}, format=format)

    def read(copy: Path) -> Outcome:
        opened = hub.open_model(copy)
        ids = opened.tokenizer(list(tiny_texts(3, seed=2)))["input_ids"]
        special = hub.open_model(copy).special_tokens
        params = hash_params(copy)
        facts = {"config": dict(opened.raw_config), "fingerprint": opened.fingerprint, "license": opened.license}
        return {"ids": ids, "special": special, "params": params, **facts}

    return Subject(f"{format} model", folder, read)


def half_done_training(model: Path, corpus: Path, inputs: dict[str, str], folder: Path) -> Subject:
    evaluation = {"eval_every": 2, "eval_texts": (inputs["texts"],), "eval_sequences": inputs["sequences"]}
    window = {"eval_prefix": 12, "eval_suffix": 8, "eval_min_overlap": 4, "eval_limit": 8}
    options = run_options((model, corpus, folder), keep=2, **evaluation, **window)
    with pytest.raises(Interruption):
        train(options, hooks=[*evaluation_hooks(options), Hook(interrupt, steps=(5,))])
    write_dead_lease(folder / ".lease")

    def read(copy: Path) -> Outcome:
        done = train_with_evals(replace(options, out=str(copy)))
        return {"params": hash_params(done), **hash_files(done, "metrics.jsonl", "curve.jsonl")}

    return Subject("half-done training", folder, read)


def score_options(model: Path, inputs: dict[str, str], out: Path) -> ScoreConfig:
    texts = (inputs["texts"],)
    return ScoreConfig(
        str(model), (inputs["choices"], inputs["words"]), texts=texts, out=str(out), token_records=True,
        mesh="data=1", batch_tokens=256, text_limit=8, limit=16,
    )  # fmt: skip


def extract_options(model: Path, inputs: dict[str, str], out: Path, base: Path) -> ExtractConfig:
    return ExtractConfig(
        str(model), inputs["sequences"], out=str(out), prefix=12, suffix=8, mesh="data=1", batch_tokens=64,
        untrained_baseline=str(base), token_records=True,
    )  # fmt: skip


def stored_results(models: tuple[Path, Path], inputs: dict[str, str], folder: Path) -> Subject:
    for name, model in zip(("base", "student"), models, strict=True):
        score(score_options(model, inputs, folder / f"{name}.json"))
        extract(extract_options(model, inputs, folder / f"{name}-extract.json", models[0]))

    def read(copy: Path) -> Outcome:
        base, student = str(copy / "base.json"), str(copy / "student.json")
        result = compare(CompareConfig((base,), (student,), str(copy.parent / "compare.json"), resamples=100))
        scored = load_score_result(student)
        items = {n: {k: repr(v) for k, v in vars(one).items()} for n, one in scored.items.items()}
        records = {
            str(path): (load_records(str(path)).table.to_pydict(), dict(load_records(str(path)).fingerprints))
            for path in (copy / "base.tokens.parquet", copy / "student-extract.tokens.parquet")
        }
        return {"compare": result, "result": dict(scored.result), "items": items, "records": records}

    return Subject("results", folder, read)


def partial_results(models: tuple[Path, Path], inputs: dict[str, str], folder: Path) -> Subject:
    def commands(out: Path) -> None:
        score(score_options(models[1], inputs, out / "score.json"))
        extract(extract_options(models[1], inputs, out / "extract.json", models[0]))

    def interrupted_finish(self: PartialResults, write: Callable[[], None] = lambda: None) -> None:
        raise Interruption

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialResults, "finish", interrupted_finish)
        for command, options in (
            (score, score_options(models[1], inputs, folder / "score.json")),
            (extract, extract_options(models[1], inputs, folder / "extract.json", models[0])),
        ):
            with pytest.raises(Interruption):
                command(options)
    for parts in sorted(folder.glob("*.parts/*")):
        units = sorted(parts.glob("*.parquet"))
        if len(units) > 1:
            units[0].unlink()
            write_dead_lease(units[0].with_suffix(".lease"))
    assert len(list(folder.rglob("*.parquet"))) > 3

    def read(copy: Path) -> Outcome:
        commands(copy)
        return hash_files(copy, "*.parquet", "score.json", "extract.json")

    return Subject("partial results", folder, read)


def study_outcome(folder: Path) -> Outcome:
    write_report(folder)
    pages = hash_files(folder, "results.json", "tables/*", "figures/*")
    return pages | {"report.html": without_costs(folder / "report.html"), "params": hash_params(folder / "model")}


def run_outcome(folder: Path) -> Outcome:
    return study_outcome(folder) | hash_files(folder, "claims.json")


def finished_run_folder(options: Callable[..., RunConfig], finished: Path, folder: Path) -> Subject:
    shutil.copytree(finished, folder)
    return Subject("run", folder, lambda copy: run_outcome(run(options(copy))))


def half_done_run(options: Callable[..., RunConfig], finished: Path, folder: Path) -> Subject:
    shutil.copytree(finished, folder)
    for name in ("results.json", "report.html"):
        (folder / name).unlink()
    for name in ("model", "tables", "figures"):
        shutil.rmtree(folder / name)
    for path in sorted((folder / "stages").glob("score-*.json"))[:1]:
        if not path.name.endswith(".seconds.json"):
            path.unlink()
            write_dead_lease(path.parent / f".{path.stem}.lease")
    return Subject("half-done run", folder, lambda copy: run_outcome(run(options(copy))))


def report_of_run(finished: Path, folder: Path) -> Subject:
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("stages"))
    return Subject("report", folder, study_outcome)


NIGHTLY = {
    "corpus": 250,
    "half-done corpus": 200,
    "hf model": 200,
    "flax model": 200,
    "half-done training": 300,
    "results": 300,
    "partial results": 200,
    "run": 150,
    "half-done run": 50,
    "report": 150,
}
"""Number of damages to each folder."""
assert sum(NIGHTLY.values()) == 2000


@pytest.fixture(scope="module")
def subject(
    tiny_model: Callable[..., Path],
    inputs: dict[str, str],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Subject]:
    """`subject(name)`: a folder to damage, made once."""
    made: dict[str, Subject] = {}

    def make(name: str) -> Subject:
        folder = tmp_path_factory.mktemp("damage") / name.replace(" ", "-")
        model, other = tiny_model("llama"), tiny_model("llama", seed=1)
        if name == "corpus":
            return finished_corpus(model, folder)
        if name == "half-done corpus":
            return half_done_corpus(model, folder)
        if name.endswith(" model"):
            return model_folder(model, folder, name.split()[0])
        if name == "half-done training":
            corpus = folder.with_name("corpus")
            sample(replace(sample_options(model, corpus), samples=32, max_tokens=40))
            return half_done_training(model, corpus, inputs, folder)
        if name == "results":
            return stored_results((model, other), inputs, folder)
        if name == "partial results":
            return partial_results((model, other), inputs, folder)
        finished: Path = request.getfixturevalue("finished_run")
        if name == "report":
            return report_of_run(finished, folder)
        options = request.getfixturevalue("options")
        return (finished_run_folder if name == "run" else half_done_run)(options, finished, folder)

    def get(name: str) -> Subject:
        if name not in made:
            made[name] = make(name)
        return made[name]

    return get


def check(subject: Subject, n: int, work: Path) -> None:
    found = tally(subject, n, work, SEED)
    print(f"{subject.name}: " + ", ".join(f"{count} {reaction}" for reaction, count in sorted(found.counts.items())))
    assert not found.failures, "\n".join(found.failures)


@pytest.mark.nightly
@pytest.mark.parametrize("name", NIGHTLY)
def test_two_thousand_damages_are_refused_or_harmless(name: str, subject: Callable[[str], Subject], tmp_path: Path):
    check(subject(name), int(os.environ.get("JAX_SELFTRAIN_DAMAGES", NIGHTLY[name])), tmp_path / "work")


EVERYDAY = {
    "corpus": 20,
    "half-done corpus": 12,
    "hf model": 15,
    "flax model": 15,
    "half-done training": 4,
    "results": 12,
    "partial results": 5,
}


@pytest.mark.parametrize("name", EVERYDAY)
def test_damage_is_refused_or_harmless(name: str, subject: Callable[[str], Subject], tmp_path: Path):
    check(subject(name), EVERYDAY[name], tmp_path / "work")


@pytest.mark.parametrize("name", ["run", "report"])
def test_damage_to_a_run_is_refused_or_harmless(
    name: str, finished_run: Path, subject: Callable[[str], Subject], tmp_path: Path
):
    check(subject(name), 2, tmp_path / "work")
