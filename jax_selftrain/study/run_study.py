"""`jax-selftrain study`: who learns from whom, with controls, restartable, in a report.

| part of the folder | what it is |
|---|---|
| `config.yaml` | the study |
| `claims.json` | what was claimed at the first run (`study.claims`) |
| `stages/` | every piece of work, named by what decides it (`study.stages`) |
| `results.json`, then `report.html`, `figures/`, `tables/` | the cells laid side by side (`study.transfer`) |

The configuration may grow – another arm, another seed – and the same command then does what is new. Several processes
may be started on one folder, at once or one after the other: they share the stages, and the last one writes the report.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax

from jax_selftrain import evals, hub, training
from jax_selftrain.config import ArmConfig, StudyConfig, yaml_io
from jax_selftrain.config.metadata import Role, applicable_kinds, fields_with_role
from jax_selftrain.errors import InputError
from jax_selftrain.evals.result_files import read_jsonl
from jax_selftrain.io import atomic, lease
from jax_selftrain.study.dag import POLL_SECONDS, is_done, run_all
from jax_selftrain.study.design import MAIN_EFFECT, Design, make_design
from jax_selftrain.study.memorization_results import check_memorization
from jax_selftrain.study.power_analysis import describe_power
from jax_selftrain.study.preregistration import check_claims, freeze_claims
from jax_selftrain.study.round_config import with_default_evals
from jax_selftrain.study.study_results import FORMAT, collect_study


def run_study(config: StudyConfig) -> Path:
    """Do a study in `config.out`, or complete it; with `dry_run`, say what there is to do and what it can find.

    Returns:
        The folder, which holds `results.json` and `report.html`.

    Raises:
        InputError: something cannot be used, or is missing.
    """
    check_study(config)
    design = make_design(config)
    folder = Path(config.out)
    if config.dry_run:
        print("\n".join([format_plan(design), *describe_power(config, _load_earlier_run(folder))]))
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be made ({error.strerror}); choose another place") from error
    atomic.remove_stale_temp_files(folder)
    yaml_io.save(folder / "config.yaml", config)
    post_hoc = freeze_claims(folder, config.claims)
    run_all(design.base_model, design.ordered_stages)
    while True:  # whoever else has finished this very study writes the same
        with lease.lease(folder / ".report.lease") as ours:
            if ours:
                atomic.write_json(folder / "results.json", collect_study(config, design, post_hoc))
                from jax_selftrain.report import write_report

                write_report(folder)
                return folder
        time.sleep(POLL_SECONDS)


def check_study(config: StudyConfig) -> None:
    """Refuse what can be known to be wrong before anything is done.

    Raises:
        InputError: the first thing that is missing, unknown or does not fit.
    """
    yaml_io.require(config, "out", "models", "seeds")
    if jax.process_count() > 1:
        raise InputError("a study runs in processes of one host each; start the command on every host, without them")
    for model in config.models:
        if not (model.name and model.model):
            raise InputError(
                f"models: every one needs `name` and `model` ({model.name or model.model or 'one has neither'})"
            )
    if not all(arm.name for arm in config.arms):
        raise InputError("arms: every one needs a `name`")
    names = [model.name for model in config.models]
    _check_unique("model", names)
    _check_unique("seed", config.seeds)
    _check_unique("arm", [arm.name for arm in config.arms])
    for option, given in (("students", config.students), ("sources", config.sources)):
        _check_known(option, given, names)
    for section in ("sample", "train", "score", "extract"):
        given, default = getattr(config, section), getattr(StudyConfig(), section)
        for field in fields_with_role(type(given), Role.SET_BY_STUDY):
            if getattr(given, field) != getattr(default, field):
                raise InputError(f"{section}.{field} is set by the study; remove it")
    if not (config.score.tasks or config.score.texts or config.extract.sequences):
        raise InputError("nothing to measure: set score.tasks, score.texts or extract.sequences")
    if config.train.steps is None:
        raise InputError("train.steps is required: all cells of a study are trained for the same number of steps")
    for arm in config.arms:
        _check_arm(arm, config, names)
    check_memorization(config)
    check_claims(config)
    for option in ("positive_controls", "negative_controls"):
        _check_known(option, getattr(config, option), [arm.name for arm in config.arms])
    training.check_ranges(with_default_evals(config.train, config.score, config.extract))
    evals.load_tasks(config.score.tasks, config.score.limit)
    evals.load_texts(config.score.texts, config.score.text_limit)
    tokenizers = {model.name: hub.tokenizer_fingerprint(model.model) for model in config.models}
    if config.extract.sequences and len({tokenizers[name] for name in config.students or names}) > 1:
        _require_text(config.extract.sequences)
    for model in config.models:
        decoder, _ = hub.read_config(model.model)
        if config.train.seq_len > decoder.max_positions:
            raise InputError(
                f"train.seq_len {config.train.seq_len}: {model.name} has only {decoder.max_positions} positions; "
                "shorten the rows"
            )


def _require_text(sequences: str) -> None:
    """Refuse token ids where they would be another text to another student."""
    path = Path(sequences)
    rows = read_jsonl(path, 1) if path.suffix == ".jsonl" else ()
    if not any("text" in row and "tokens" not in row for _, row in rows):
        raise InputError(
            f"extract.sequences {sequences}: the students have different tokenizers, to which token ids are different "
            "texts; give JSONL with `text`"
        )


def _check_arm(arm: ArmConfig, config: StudyConfig, names: list[str]) -> None:
    _check_known(f"arms: {arm.name}: students", arm.students, config.students or names)
    if arm.name.startswith(MAIN_EFFECT):
        raise InputError(
            f"arms: {arm.name!r}: names that begin with {MAIN_EFFECT!r} are those of the matrix; choose another"
        )
    if (arm.kind == "text") != bool(arm.text):
        raise InputError(f"arms: {arm.name}: `text` names the file of an arm of kind `text`, and of no other")
    if arm.kind == "extrapolate" and arm.weight is None:
        raise InputError(f"arms: {arm.name}: an arm of kind `extrapolated` needs its `weight`")
    if arm.kind not in ("extrapolate", "noise") and arm.weight is not None:
        raise InputError(f"arms: {arm.name}: `weight` belongs to arms of kind `extrapolated` and `noise` alone")
    if arm.kind == "noise" and arm.weight is not None and not 0 < arm.weight < math.inf:
        raise InputError(f"arms: {arm.name}: the weight of noise is {arm.weight}; it must be a positive number")
    for field in fields(arm):
        kinds = applicable_kinds(ArmConfig, field.name)
        if kinds and arm.kind not in kinds and getattr(arm, field.name) != field.default:
            raise InputError(
                f"arms: {arm.name}: `{field.name}` does not apply to an arm of kind `{arm.kind}`; remove it"
            )
    if arm.kind in ("scrubbed", "size_matched") and not config.extract.sequences:
        raise InputError(f"arms: {arm.name}: of kind `{arm.kind}` needs extract.sequences, half of which is held out")
    if arm.generations < 1:
        raise InputError(f"arms: {arm.name}: generations is {arm.generations}; it must be at least 1")


def _check_unique(what: str, values: Iterable[object]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise InputError(f"{what} {value!r} is there twice; name each once")


def _check_known(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            raise InputError(
                f"{option}: {name!r} is unknown{yaml_io.did_you_mean(name, known) or '; known: ' + ', '.join(known)}"
            )


def _load_earlier_run(folder: Path) -> Mapping[str, Any] | None:
    """The results of the study so far: what a plan may learn from. Raises InputError if they cannot be read."""
    path = folder / "results.json"
    found = atomic.read_json(path) if path.exists() else None
    if found is not None and not (isinstance(found, dict) and found.get("format") == FORMAT):
        raise InputError(f"{path}: holds no results of a study; choose another --out")
    return found


def format_plan(design: Design) -> str:
    """What there is to do: stages by kind, how many are done, and tokens to draw and to train on."""
    stages = design.ordered_stages
    lines = [f"{len(design.cells):,} cells, {len(stages):,} stages"]
    for kind in dict.fromkeys(stage.command for stage in stages):
        members = [stage for stage in stages if stage.command == kind]
        done = sum(is_done(design.base_model, stage) for stage in members)
        tokens = sum(stage.tokens for stage in members if not is_done(design.base_model, stage))
        flops = sum(stage.flops for stage in members if not is_done(design.base_model, stage))
        size = f", at most {tokens:,} tokens to go: {flops:.2g} FLOPs" if tokens else ""
        lines.append(f"  {kind:<12}{len(members):>6,}   {done:,} done{size}")
    seconds = [
        atomic.read_json(path)["seconds"] / stage.tokens
        for stage in stages
        if stage.tokens and (path := design.base_model / f"{stage.name}.seconds.json").exists()
    ]
    if seconds:
        left = (
            sum(stage.tokens for stage in stages if not is_done(design.base_model, stage)) * sum(seconds) / len(seconds)
        )
        lines.append(
            f"by the stages that are done, sampling and training will take about {left / 60:,.0f} minutes more"
        )
    return "\n".join(lines)
