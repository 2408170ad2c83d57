"""The commands `study` and `run`; a run has one cell.

The folder holds `config.yaml`, `claims.json` (the claims at the first run), `stages/`, `results.json` and, where the
study has one cell, the trained student in `model/`. The configuration may grow: with another arm or seed, the same
command runs the new stages only. Several processes may share one folder, at the same time or one after the other.
"""

import filecmp
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax

from jax_selftrain import evals, hub, likelihood, sampling, training
from jax_selftrain.config import (
    MemorizationConfig,
    ModelConfig,
    PairConfig,
    RunConfig,
    SampleConfig,
    StudyConfig,
    TrainConfig,
    fill_options,
    yaml_io,
)
from jax_selftrain.config.metadata import Role, fields_with_role
from jax_selftrain.corpus import Corpus, check_subset, open_corpus, parse_mixture
from jax_selftrain.distributed import broadcast_one_to_all
from jax_selftrain.distributed.mesh import make_mesh
from jax_selftrain.errors import InputError
from jax_selftrain.evals.harness_index import make_task_manager
from jax_selftrain.evals.lm_eval_tasks import load_lm_eval_tasks, refuse_unsafe_code
from jax_selftrain.evals.task_names import split_names
from jax_selftrain.hub.model_ref import MODEL_CARD
from jax_selftrain.io import atomic, json_files, lease
from jax_selftrain.io.remote_paths import paths_relative_to
from jax_selftrain.study.claim_power import describe_power
from jax_selftrain.study.dag import check_processes, list_remaining, peak_bytes, run_all, verify_results
from jax_selftrain.study.design import Design, expand_revisions, make_design
from jax_selftrain.study.eval_hooks import evaluation_hooks, with_default_evals
from jax_selftrain.study.measure_names import expand_generations
from jax_selftrain.study.option_checks import (
    check_arm,
    check_memorization,
    check_relearned_half,
    readable_texts,
    require_text,
)
from jax_selftrain.study.preregistration import check_claims, check_contrasts
from jax_selftrain.study.proxies import check_proxies
from jax_selftrain.study.registration import Registration, register
from jax_selftrain.study.results import collect_study, load_results
from jax_selftrain.study.stage_factory import format_options
from jax_selftrain.training.flops import PEAK_FLOPS


def run(config: RunConfig) -> Path:
    """Sample, train, and measure before and after: a study with one cell.

    Returns the folder, with `results.json` and `model`. Raises InputError if an option, model or file is missing or
    does not fit, or the folder has a run with other options.
    """
    study, path = one_cell_study(config), Path(config.out) / "config.yaml"
    if path.exists():
        earlier = _identity(yaml_io.load(StudyConfig, path))
        now = _identity(study)
        for name in now | earlier:  # an option may be omitted at its default
            if earlier.get(name) != now.get(name):
                found = (
                    f"{path.parent}: contains a run with {name} = {earlier.get(name)!r}, this one has {now.get(name)!r}"
                )
                raise InputError(f"{found}; repeat the earlier options, or choose another --out")
    return run_study(study)


def one_cell_study(config: RunConfig) -> StudyConfig:
    """Translate a run into a study with one cell.

    The student is trained on the sampled tokens if it has the source's tokenizer. Unset `train.steps` is one pass over
    the corpus. Raises InputError if an option is missing, or the seeds of sampling and training differ.
    """
    yaml_io.require(config)
    if config.sample.seed != config.train.seed:
        raise InputError(
            f"sample.seed is {config.sample.seed} and train.seed is {config.train.seed}: a run has one seed; set both "
            "to the same number"
        )
    ids: dict[str, Any] = {name: getattr(config.sample, name) for name in ("stop_ids", "start_id", "start_text")}
    student, source = Path(config.model).name, Path(config.source or config.model).name
    models = [ModelConfig(student, config.model)]
    if config.source in ("", config.model):
        models = [replace(models[0], **ids)]
    else:
        source += " (source)" if source == student else ""
        models.append(ModelConfig(source, config.source, **ids))
    return StudyConfig(
        models=tuple(models),
        students=(student,),
        sources=(source,),
        seeds=(config.sample.seed,),
        keep_source_tokens=True,
        sample=replace(config.sample, seed=0, stop_ids=None, start_id=None, start_text=None),
        train=replace(config.train, seed=0),
        memorization=MemorizationConfig(aa_repeat=False),
        **{
            name: getattr(config, name)
            for name in ("out", "title", "decontaminate", "subset", "score", "extract", "mesh", "preset", "dtype")
        },
    )


def _identity(config: StudyConfig) -> dict[str, Any]:
    """Return the options that change the results of a run."""
    found = {name: getattr(config, name) for name in ("seeds", "students", "sources", "dtype")}
    for section in ("sample", "decontaminate", "subset", "train", "score", "extract"):
        options = yaml_io.to_dict(getattr(config, section), Role.IDENTITY)
        found |= {f"{section}.{name}": value for name, value in options.items()}
    return found


def run_study(config: StudyConfig) -> Path:
    """Run or complete a study; with `dry_run`, print its plan and power.

    Returns the folder, with `results.json`. Raises InputError if an option, model or file is missing or does not fit.
    """
    config, read_corpus = expand_revisions(config), cache(open_corpus)
    check_study(config, read_corpus)
    design = make_design(config, read_corpus)
    check_contrasts(config.claims, design.models, design.pairs)
    check_processes(design.ordered_stages)
    folder = Path(config.out)
    if config.dry_run:
        earlier = load_results(folder / "results.json") if (folder / "results.json").exists() else None
        power = describe_power(config, design.models, design.pairs, earlier)
        print("\n".join([format_plan(config, design), *power]))
        return folder
    registration = Registration(*broadcast_one_to_all(lambda: _start(config, design, folder)))
    with paths_relative_to(design.root.parent):
        run_all(design.root, design.ordered_stages, config.keep_models)
    if jax.process_index() == 0:
        with lease.wait_for_lease(folder / ".results.lease"):  # other processes write the same bytes
            verify_results(design.root, design.ordered_stages)
            trained = [cell.train for cell in design.cells]
            if len(trained) == 1 and trained[0] is not None:
                _publish_model(design.folder(trained[0]) / "model", folder / "model")
            json_files.write_json(folder / "results.json", collect_study(config, design, registration))
    return folder


def _start(config: StudyConfig, design: Design, folder: Path) -> Registration:
    """Write configuration and declaration."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be created ({error.strerror}); choose another folder") from error
    atomic.remove_stale_temp_files(folder)
    yaml_io.save(folder / "config.yaml", config)
    return register(folder, config, design.hash_inputs())


def _publish_model(source: Path, target: Path) -> None:
    """Make `target` equal to `source`, by hard links or copies.

    A model that `keep_models` has removed stays as it was published.
    """
    if not source.is_dir():
        return
    files, published = (
        sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) for folder in (source, target)
    )
    same = (filecmp.cmp(source / file, target / file) for file in files if file.name != MODEL_CARD)  # the report's own
    if published == files and all(same):
        return
    hub.open_model(source).verify_weights()  # a damaged model does not replace its whole copy
    with atomic.commit_folder(target, overwrite=True) as folder:
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source / file, folder / file)
            except OSError:
                shutil.copy2(source / file, folder / file)


_MFU = 0.4
_CHIPS = {"v5e": "TPU v5e", "v6e": "TPU v6e", "H100": "NVIDIA H100 80GB HBM3"}


def format_plan(config: StudyConfig, design: Design) -> str:
    """Format the numbers of stages by command, done and remaining."""
    stages = design.ordered_stages
    remaining = list_remaining(design.root, stages)
    lines = [f"{len(design.cells):,} cells, {len(stages):,} stages"]
    for command in dict.fromkeys(stage.command for stage in stages):
        total, left = ([stage for stage in group if stage.command == command] for group in (stages, remaining))
        tokens, flops = sum(stage.tokens for stage in left), sum(stage.flops for stage in left)
        size = f", at most {tokens:,} tokens remain: {flops:.2g} FLOPs" if tokens else ""
        lines.append(f"  {command:<19}{len(total):>6,}   {len(total) - len(left):,} done{size}")
    if flops := sum(stage.flops for stage in remaining):
        hours = (f"{flops / (_MFU * PEAK_FLOPS[kind]) / 3600:,.2g} ({chip})" for chip, kind in _CHIPS.items())
        lines.append(f"chip-hours at {_MFU:.0%} of peak: {', '.join(hours)}; memory makes sampling slower")
    rates = [
        json_files.read_json(path)["seconds"] / stage.tokens
        for stage in stages
        if stage.tokens and (path := design.root / f"{stage.name}.seconds.json").exists()
    ]
    if peak := peak_bytes(remaining, config.keep_models, config.train.keep):
        lines.append(f"disk: {peak / 1e9:,.3g} GB of models and checkpoints (keep_models: {config.keep_models})")
    if rates:
        minutes = sum(stage.tokens for stage in remaining) * math.fsum(rates) / len(rates) / 60
        lines.append(f"by the finished stages, sampling and training will take about {minutes:,.0f} more minutes")
    return "\n".join(lines)


def check_study(config: StudyConfig, read_corpus: Callable[[str], Corpus] = open_corpus) -> None:
    """Check the options, files and models of a study; load no weights.

    `read_corpus` is a cache of `open_corpus`. Raises InputError if something is missing, unknown or does not fit.
    """
    yaml_io.require(config)
    if Path(config.out).is_file():
        raise InputError(f"--out {config.out}: is a file; give a folder")
    models = {model.name: model for model in config.models}
    students = config.students or tuple(models)
    sources = config.sources or students
    _check_names(config)
    _check_known("pairs: student", (pair.student for pair in config.pairs), students)
    _check_known("pairs: source", (pair.source for pair in config.pairs), sources)
    for section in ("sample", "decontaminate", "subset", "train", "score", "extract"):
        given, default = getattr(config, section), getattr(StudyConfig(), section)
        for name in fields_with_role(type(given), Role.SET_BY_STUDY):
            if getattr(given, name) != getattr(default, name):
                raise InputError(f"{section}.{name} is set by the study; remove it")
    if not (config.score.tasks or config.score.texts or config.extract.sequences):
        raise InputError("nothing to measure: set score.tasks, score.texts or extract.sequences")
    if (
        config.train.steps is None
        and config.train.epochs is None
        and (len(students) > 1 or len(sources) > 1 or len(config.seeds) > 1 or config.arms)
    ):
        raise InputError("train.steps or train.epochs is required: all cells of a study are trained alike")
    for arm in config.arms:
        _check_known(f"arms: {arm.name}: students", arm.students, students)
        check_arm(arm, config)
    check_memorization(config)
    check_claims(config)
    check_proxies(config)
    if config.subset.tokens or config.subset.bytes:
        check_subset(config.subset)
    score, audit = config.score, config.decontaminate
    known = [evals.text_name(text) for text in score.texts]
    _check_known("models: damage_text", filter(None, (m.damage_text for m in config.models)), known)
    for options, limit, text_limit in ((score, score.limit, score.text_limit), (audit, None, None)):
        files, names = split_names(options.tasks, options)
        loaded = [*evals.load_tasks(files, limit), *evals.load_texts(readable_texts(config, options.texts), text_limit)]
        paths = evals.paths_by_name(loaded)
        for task in loaded if options is score else ():
            evals.select_split(task, config.split)
        if names and config.dry_run:
            make_task_manager(names, options.task_folder)
        elif names:
            tasks = load_lm_eval_tasks(names, paths, folder=options.task_folder)
            if options is score and not score.confirm_run_unsafe_code:
                refuse_unsafe_code(tasks)
    for model in (hub.open_model(model.model) for model in config.models):
        _ = model.config if config.dry_run else model.fingerprint
    if (
        config.extract.sequences
        and len({hub.open_model(models[name].model).tokenizer_fingerprint for name in students}) > 1
    ):
        require_text(config.extract)
    mixture = [read_corpus(folder) for folder, _ in parse_mixture(config.train.mixture)]
    for name in students:
        _check_student(config, models[name], mixture)
        has_own_text = PairConfig(name, name) in config.pairs if config.pairs else name in sources
        if has_own_text and not (config.subset.tokens or config.subset.bytes):  # a subset may repeat samples
            _check_corpus_size(config.sample, _train_options(config, models[name]))
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
    names, arms = [model.name for model in config.models], [arm.name for arm in expand_generations(config.arms)]
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


def _check_student(config: StudyConfig, model: ModelConfig, mixture: Iterable[Corpus]) -> None:
    """Check a student's training and extraction."""
    options, opened = _train_options(config, model), hub.open_model(model.model)
    if options.seq_len > opened.config.max_positions:
        raise InputError(
            f"train.seq_len {options.seq_len}: {model.model} has only {opened.config.max_positions} positions; lower it"
        )
    training.check_train_config(options)
    for corpus in mixture:
        open_corpus(corpus, tokenizer_fingerprint=opened.tokenizer_fingerprint)
    if len(readable_texts(config, options.eval_texts)) == len(options.eval_texts):
        training.check_hooks(options, evaluation_hooks(options))
    if config.extract.sequences:
        sequences = fill_options(config, config.extract, model.model, model)
        check_relearned_half(config, evals.load_extraction_sets(sequences)[0])
        for form in config.memorization.formats:
            try:
                evals.load_extraction_sets(replace(sequences, **format_options(sequences, form)))
            except InputError as error:
                raise InputError(f"memorization.formats: {form.name}: {error}") from error


def _check_corpus_size(sampled: SampleConfig, options: TrainConfig) -> None:
    """Refuse more steps than the longest possible corpus of own text allows."""
    if options.steps is None or options.max_epochs is None:
        return
    longest = sampled.max_tokens + 1  # with the start token
    rows = sampled.samples * -(-longest // options.seq_len)
    if options.packing == "packed":
        rows = -(-sampled.samples * longest // options.seq_len)
    needed = options.steps * options.batch_size * (1 - sum(part for _, part in parse_mixture(options.mixture)))
    if needed > rows * options.max_epochs:
        raise InputError(
            f"train.steps {options.steps}: needs {float(needed):,.0f} rows, but {sampled.samples:,} samples of at most "
            f"{sampled.max_tokens:,} tokens are at most {rows:,} rows of {options.seq_len} tokens, and max_epochs is "
            f"{options.max_epochs:g}; sample more, or lower the steps"
        )


def _check_programs(config: StudyConfig, students: Iterable[ModelConfig], sources: Iterable[ModelConfig]) -> None:
    """Check that programs fit the meshes of this machine."""
    for model in sources:
        sampled = fill_options(config, config.sample, model.model, model)
        sampling.abstract_program(sampled, make_mesh(sampled.mesh, devices=jax.local_devices()))
    for model in students:
        trained, scored = _train_options(config, model), fill_options(config, config.score, model.model, model)
        training.abstract_train_step(trained, make_mesh(trained.mesh))
        if scored.tasks or scored.texts:
            likelihood.scoring_program(scored, make_mesh(scored.mesh))


def _train_options(config: StudyConfig, model: ModelConfig) -> TrainConfig:
    return with_default_evals(fill_options(config, config.train, model.model, model), config.score, config.extract)
