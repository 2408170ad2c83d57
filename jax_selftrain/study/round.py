"""One self-training round: sample → train → measure before and after → report, restartable at any point.

A round is a folder, and each stage fills a part of it:

| part | stage | made from |
|---|---|---|
| `score/base.json` | score the base | base, task and text files |
| `corpus/` | sample the source | source |
| `train/` | train the student | base, corpus |
| `score/student.json` | score the student | student, task and text files |
| `extract/base.json`, `extract/student.json` | extraction, if asked for | model, corpus, extraction set |
| `results.json`, then `report.html`, `figures/`, `tables/` | lay side by side | all of these |

The base is scored first: it is cheap, and whatever is wrong with a task shows before hours of sampling. A finished
stage leaves a note in `stages/` that names what it was made from and what it made, both by SHA-256; run again, the
round skips stages whose note still holds, refuses to go on where inputs have changed, and lets unfinished stages
resume by their own means. `results.json` and the report hold no clock and no place; wall-clock is in `timings.json`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jax_selftrain import hub
from jax_selftrain.config import ExtractConfig, RunConfig, ScoreConfig, TrainConfig, yaml_io
from jax_selftrain.config.metadata import Role, fields_with_role
from jax_selftrain.corpus import open_corpus, parse_mixture
from jax_selftrain.distributed import broadcast_one_to_all
from jax_selftrain.errors import InputError, UnavailableError
from jax_selftrain.evals import extract, extraction_fingerprints, score
from jax_selftrain.evals.result_files import output_paths
from jax_selftrain.io import atomic, lease
from jax_selftrain.io.manifest import hash_json, sha256_file
from jax_selftrain.io.remote_paths import restore_uris
from jax_selftrain.sampling import sample
from jax_selftrain.study.eval_hooks import evaluation_hooks
from jax_selftrain.study.results import collect_round
from jax_selftrain.study.round_checks import check_round
from jax_selftrain.study.round_config import resolve_round
from jax_selftrain.training import train

CHANGEABLE = ("out", "title", "sample.batch_size", *fields_with_role(TrainConfig, Role.EXECUTION))
"""Options, by name or by section and name, that may differ between the launches of one round: they decide where and
how fast it is computed, and change its numbers by rounding at most."""


@dataclass(frozen=True)
class _Stage:
    name: str
    inputs: Callable[[], Mapping[str, str]]
    """Fingerprint of everything the stage reads; asked for when the stages before are done."""
    run: Callable[[], object]
    outputs: Callable[[], Mapping[str, str]]
    """Fingerprint of what it made; FileNotFoundError or InputError: it is not there, or not whole."""


def run(config: RunConfig) -> Path:
    """Do one self-training round in `config.out`, or complete it.

    Returns:
        The folder, which holds `results.json` and `report.html`.

    Raises:
        InputError: something cannot be used, is missing, or the folder holds another round (says what differs).
        UnavailableError: another process works in this folder.
    """
    check_round(config)
    folder = Path(config.out)
    _refuse_other_round(config, folder)
    with _acquire(folder):
        if jax.process_index() == 0:
            yaml_io.save(folder / "config.yaml", config)
        for stage in _stages(config, folder):
            _run_stage(stage, folder)
        if jax.process_index() == 0:
            atomic.write_json(folder / "results.json", collect_round(config, folder))
            from jax_selftrain.report import write_report

            write_report(folder)
    return folder


# Stages ---------------------------------------------------------------------------------------------------------


def _stages(config: RunConfig, folder: Path) -> Iterator[_Stage]:
    plan = resolve_round(config)
    corpus = {"corpus": lambda: open_corpus(folder / "corpus").fingerprint}
    scored = bool(config.score.tasks or config.score.texts)
    if scored:
        yield _scoring_stage("score-base", plan.score_base)
    yield _Stage(
        "sample",
        lambda: _model_marks(plan.sample.model),
        lambda: sample(plan.sample),
        lambda: {"corpus": corpus["corpus"]()},
    )
    yield _training_stage(plan.train, corpus["corpus"])
    if scored:
        yield _scoring_stage("score-student", plan.score_student)
    if config.extract.sequences:
        for name, options in (("extract-base", plan.extract_base), ("extract-student", plan.extract_student)):
            yield _extraction_stage(name, options, corpus["corpus"])


def _training_stage(options: TrainConfig, corpus: Callable[[], str]) -> _Stage:
    hooks, out = evaluation_hooks(options), Path(options.out)
    evaluation = {"evaluation": hash_json([hook.measured for hook in hooks])} if hooks else {}
    records = {name: out / f"{name}.jsonl" for name in ("metrics", *(["curve"] if hooks else []))}
    return _Stage(
        "train",
        lambda: {**_model_marks(options.model), "corpus": corpus(), **_mix_marks(options), **evaluation},
        lambda: train(options, hooks=hooks),
        lambda: {
            "model": hub.model_fingerprint(options.out),
            **{name: sha256_file(path) for name, path in records.items()},
        },
    )


def _scoring_stage(name: str, options: ScoreConfig) -> _Stage:
    out = Path(options.out)
    return _Stage(
        name,
        lambda: {**_model_marks(options.model), **_file_marks(options)},
        lambda: score(options),
        lambda: _files(out, *output_paths(str(out), "requests.parquet", "documents.parquet")[1:]),
    )


def _extraction_stage(name: str, options: ExtractConfig, corpus: Callable[[], str]) -> _Stage:
    out = Path(options.out)
    return _Stage(
        name,
        lambda: {
            "corpus": corpus(),
            **extraction_fingerprints(options),
        },
        lambda: extract(options),
        lambda: _files(out, out.with_name(f"{out.stem}.sequences.parquet")),
    )


def _model_marks(ref: str) -> dict[str, str]:
    return {"model": hub.model_fingerprint(ref), "tokenizer": hub.tokenizer_fingerprint(ref)}


def _mix_marks(options: TrainConfig) -> dict[str, str]:
    return {
        f"mixed corpus {restore_uris(folder)}": open_corpus(folder).fingerprint
        for folder, _ in parse_mixture(options.mixture)
    }


def _file_marks(options: ScoreConfig) -> dict[str, str]:
    paths = [reference.partition(":")[2] if ":" in reference else reference for reference in options.tasks]
    marks = {}
    for path in map(Path, [*paths, *options.texts]):
        for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            marks[restore_uris(str(file))] = sha256_file(file)
    return marks


def _files(*paths: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in paths}


def _run_stage(stage: _Stage, folder: Path) -> None:
    """Run a stage unless its note says that it is done; note what it made of what."""
    path, inputs = folder / "stages" / f"{stage.name}.json", broadcast_one_to_all(lambda: dict(stage.inputs()))
    if broadcast_one_to_all(lambda: path.exists() and _is_done(stage, path, inputs)):
        return
    started = time.monotonic()
    stage.run()
    if jax.process_index() == 0:
        atomic.write_json(path, {"inputs": inputs, "outputs": dict(stage.outputs())})
        _record_seconds(folder / "timings.json", stage.name, time.monotonic() - started)


def _is_done(stage: _Stage, path: Path, inputs: Mapping[str, str]) -> bool:
    """Whether the note at `path` speaks of these inputs (else it is an error) and its outputs are still there."""
    note = atomic.read_json(path)
    if not isinstance(note, dict) or not all(isinstance(note.get(part), dict) for part in ("inputs", "outputs")):
        raise InputError(f"{path}: is damaged; delete it and run the same command again")
    earlier = note["inputs"]
    for name in sorted(earlier.keys() | inputs.keys()):
        if earlier.get(name) != inputs.get(name):
            raise InputError(
                f"{path.parent.parent}: {stage.name} was done with another {name} (fingerprint "
                f"{str(earlier.get(name))[:8]}…, now {str(inputs.get(name))[:8]}…); put the earlier one back, or "
                "choose another --out"
            )
    try:
        return dict(stage.outputs()) == note["outputs"]
    except (FileNotFoundError, InputError):
        # The stage itself knows best what to do about its output: complete it, or name what is damaged.
        return False


def _record_seconds(path: Path, stage: str, seconds: float) -> None:
    timings = atomic.read_json(path) if path.exists() else {}
    atomic.write_json(path, timings | {stage: timings.get(stage, 0.0) + seconds})


# The folder -----------------------------------------------------------------------------------------------------


@contextmanager
def _acquire(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder while this one (with its peers) works in it."""
    if jax.process_index() != 0:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be made ({error.strerror}); choose another place") from error
    atomic.remove_stale_temp_files(folder)
    with lease.lease(folder / ".lease") as ours:
        if not ours:
            raise UnavailableError(
                f"{folder}: another process works on this round; wait for it, or choose another --out"
            )
        yield


def _refuse_other_round(config: RunConfig, folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; give a folder")
    path = folder / "config.yaml"
    if not path.exists():
        others = [part for part in ("corpus", "train", "score", "extract", "stages") if (folder / part).exists()]
        if others:
            raise InputError(f"--out {folder}: holds {others[0]}/ but no config.yaml of a round; choose another folder")
        return
    earlier, now = (_flatten(yaml_io.to_dict(one)) for one in (yaml_io.load(RunConfig, path), config))
    for name in now:
        if earlier[name] != now[name] and not {name, name.rpartition(".")[2]} & set(CHANGEABLE):
            raise InputError(
                f"{folder}: holds a round with {name} = {earlier[name]!r}, this one asks for {now[name]!r}; repeat the "
                "earlier options, or choose another --out"
            )


def _flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
