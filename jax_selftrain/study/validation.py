"""Checks of a study before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import jax

from jax_selftrain import evals, hub, likelihood, sampling, training
from jax_selftrain.config import ArmConfig, ExtractConfig, StudyConfig, TrainConfig, yaml_io
from jax_selftrain.config.metadata import Role, applicable_kinds, fields_with_role, shared_overrides
from jax_selftrain.corpus import Corpus, open_corpus, parse_mixture
from jax_selftrain.distributed.mesh import make_mesh
from jax_selftrain.errors import InputError
from jax_selftrain.io.jsonl import read_jsonl
from jax_selftrain.study.eval_hooks import evaluation_hooks, with_default_evals
from jax_selftrain.study.measure_names import AFTER_RELEARNING, MAIN_EFFECT, UNSEEN
from jax_selftrain.study.preregistration import check_claims, is_positive, refuse_first
from jax_selftrain.study.stage_factory import fill_options


def check_study(config: StudyConfig, read_corpus: Callable[[str], Corpus] = open_corpus) -> None:
    """Check the options, files and models of a study; load no weights.

    `read_corpus` is a cache of `open_corpus`. Raises InputError if something is missing, unknown or does not fit.
    """
    yaml_io.require(config)
    if Path(config.out).is_file():
        raise InputError(f"--out {config.out}: is a file; give a folder")
    models = {model.name: model.model for model in config.models}
    students = config.students or tuple(models)
    sources = config.sources or students
    _check_names(config)
    for section in ("sample", "train", "score", "extract"):
        given, default = getattr(config, section), getattr(StudyConfig(), section)
        for name in fields_with_role(type(given), Role.SET_BY_STUDY):
            if getattr(given, name) != getattr(default, name):
                raise InputError(f"{section}.{name} is set by the study; remove it")
    if not (config.score.tasks or config.score.texts or config.extract.sequences):
        raise InputError("nothing to measure: set score.tasks, score.texts or extract.sequences")
    if config.train.steps is None and (len(students) > 1 or len(sources) > 1 or len(config.seeds) > 1 or config.arms):
        raise InputError("train.steps is required: all cells of a study are trained for the same number of steps")
    for arm in config.arms:
        _check_known(f"arms: {arm.name}: students", arm.students, students)
        _check_arm(arm, config)
    _check_memorization(config)
    check_claims(config)
    score = config.score
    evals.paths_by_name(evals.load_tasks(score.tasks, score.limit), evals.load_texts(score.texts, score.text_limit))
    for ref in models.values():
        _ = hub.open_model(ref).fingerprint
    if config.extract.sequences and len({hub.open_model(models[name]).tokenizer_fingerprint for name in students}) > 1:
        _require_text(config.extract.sequences)
    mixture = [read_corpus(folder) for folder, _ in parse_mixture(config.train.mixture)]
    for name in students:
        _check_student(config, models[name], mixture)
    if not config.dry_run:  # a plan may be made on another machine
        _check_programs(config, [models[name] for name in students], [models[name] for name in sources])


def _check_names(config: StudyConfig) -> None:
    for model in config.models:
        if not (model.name and model.model):
            raise InputError(
                f"models: each needs `name` and `model` ({model.name or model.model or 'one has neither'})"
            )
    if not all(arm.name for arm in config.arms):
        raise InputError("arms: each needs a `name`")
    names, arms = [model.name for model in config.models], [arm.name for arm in config.arms]
    for kind, values in (("model", names), ("seed", config.seeds), ("arm", arms)):
        for value, count in Counter[object](values).items():
            if count > 1:
                raise InputError(f"{kind} {value!r} is given twice; name each once")
    known = {"students": names, "sources": names, "positive_controls": arms, "negative_controls": arms}
    for option, values in known.items():
        _check_known(option, getattr(config, option), values)


def _check_known(option: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise InputError(
                f"{option}: {name!r} is unknown{yaml_io.did_you_mean(name, known) or '; known: ' + ', '.join(known)}"
            )


def _check_arm(arm: ArmConfig, config: StudyConfig) -> None:
    kind, weight = arm.kind, arm.weight
    uses_weight, halves = kind in ("extrapolate", "noise"), kind in ("decontaminated", "size_matched")
    problems = {
        f"names of main cells begin with {MAIN_EFFECT!r}; choose another name": arm.name.startswith(MAIN_EFFECT),
        "`text` names the file of an arm of kind `text`, and of no other kind": (kind == "text") != bool(arm.text),
        "an arm of kind `extrapolate` needs its `weight`": kind == "extrapolate" and weight is None,
        "`weight` belongs to arms of kind `extrapolate` and `noise` only": weight is not None and not uses_weight,
        f"the weight of noise is {weight}; it must be a positive number": kind == "noise" and not is_positive(weight),
        f"kind `{kind}` needs extract.sequences; half of them are held out": halves and not config.extract.sequences,
        f"generations is {arm.generations}; it must be at least 1": arm.generations < 1,
    }
    for field in fields(arm):
        kinds = applicable_kinds(ArmConfig, field.name) or (kind,)
        problem = f"`{field.name}` does not apply to an arm of kind `{kind}`; remove it"
        problems[problem] = kind not in kinds and getattr(arm, field.name) != field.default
    refuse_first(f"arms: {arm.name}", problems)


def _check_memorization(config: StudyConfig) -> None:
    options, default = config.memorization, StudyConfig().memorization
    if not config.extract.sequences:
        if replace(options, aa_repeat=default.aa_repeat) != default:
            raise InputError("memorization: needs extract.sequences; set it, or leave the section out")
        return
    names = [form.name for form in options.formats]
    for form in options.formats:
        if not form.name or names.count(form.name) > 1 or form.name in (AFTER_RELEARNING, UNSEEN):
            raise InputError(f"memorization.formats: each needs a unique `name` ({form.name or 'one has none'})")
        if not shared_overrides(form, ExtractConfig):
            changeable = ", ".join(field.name for field in fields(form) if field.name != "name")
            raise InputError(f"memorization.formats: {form.name}: changes nothing; set one of {changeable}")
    if options.unseen_text:
        evals.load_texts([options.unseen_text])
    if options.relearn_corpus.endswith(".jsonl") and not Path(options.relearn_corpus).is_file():
        raise InputError(f"memorization.relearn_corpus {options.relearn_corpus}: no such file")


def _require_text(sequences: str) -> None:
    """Refuse token ids, which are different texts to students with different tokenizers."""
    path = Path(sequences)
    rows = read_jsonl(path, 1) if path.suffix == ".jsonl" else ()
    if not any("text" in row and "tokens" not in row for _, row in rows):
        raise InputError(
            f"extract.sequences {sequences}: the students have different tokenizers, for which token ids are different "
            "texts; give JSONL with `text`"
        )


def _check_student(config: StudyConfig, model: str, mixture: Iterable[Corpus]) -> None:
    """Check a student's training and extraction."""
    options, opened = _train_options(config, model), hub.open_model(model)
    if options.seq_len > opened.config.max_positions:
        raise InputError(
            f"train.seq_len {options.seq_len}: {model} has only {opened.config.max_positions} positions; shorten it"
        )
    training.check_train_config(options)
    for corpus in mixture:
        open_corpus(corpus, tokenizer_fingerprint=opened.tokenizer_fingerprint)
    training.check_hooks(options, evaluation_hooks(options))
    if config.extract.sequences:
        evals.load_extraction_sets(fill_options(config, config.extract, model))


def _check_programs(config: StudyConfig, students: Iterable[str], sources: Iterable[str]) -> None:
    """Check that programs fit the meshes of this machine."""
    for model in sources:
        sampled = fill_options(config, config.sample, model)
        sampling.abstract_program(sampled, make_mesh(sampled.mesh, devices=jax.local_devices()))
    for model in students:
        trained, scored = _train_options(config, model), fill_options(config, config.score, model)
        training.abstract_train_step(trained, make_mesh(trained.mesh))
        if scored.tasks or scored.texts:
            likelihood.scoring_program(scored, make_mesh(scored.mesh))


def _train_options(config: StudyConfig, model: str) -> TrainConfig:
    return with_default_evals(fill_options(config, config.train, model), config.score, config.extract)
