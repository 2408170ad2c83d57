"""The commands `study` and `run`.

| part of the folder | content |
|---|---|
| `config.yaml` | the study |
| `claims.json` | the claims at the first run (`study.preregistration`) |
| `stages/` | the outputs of all stages, each named by its key (`study.dag`) |
| `results.json` | all results (`study.results`), from which the report is made |
| `model/` | the trained student, where the study has one cell |

The configuration may grow: with another arm or seed, the same command runs the new stages only. Several processes may
share one folder, at the same time or one after the other. A run is a study with one student, one source and one seed.
"""

from __future__ import annotations

import filecmp
import math
import os
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax

from jax_selftrain.config import MemorizationConfig, ModelConfig, RunConfig, StudyConfig, yaml_io
from jax_selftrain.config.metadata import Role
from jax_selftrain.corpus import open_corpus
from jax_selftrain.distributed import broadcast_one_to_all
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic, lease
from jax_selftrain.io.manifest import read_manifest
from jax_selftrain.study.dag import check_processes, is_done, run_all
from jax_selftrain.study.design import Design, make_design
from jax_selftrain.study.preregistration import describe_power, freeze_claims
from jax_selftrain.study.results import FORMAT, VERSION, collect_study
from jax_selftrain.study.validation import check_study


def run(config: RunConfig) -> Path:
    """Sample, train, and measure before and after: a study with one cell.

    Returns:
        The folder, with `results.json` and `model`.

    Raises:
        InputError: an option, model or file is missing or does not fit, or the folder has a run with other options.
    """
    study, path = one_cell_study(config), Path(config.out) / "config.yaml"
    if path.exists():
        earlier = _identity(yaml_io.load(StudyConfig, path))
        for name, value in _identity(study).items():
            if earlier[name] != value:
                found = f"{path.parent}: contains a run with {name} = {earlier[name]!r}, this one has {value!r}"
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
        **{name: getattr(config, name) for name in ("out", "title", "score", "extract", "mesh", "preset", "dtype")},
    )


def _identity(config: StudyConfig) -> dict[str, Any]:
    """Return the options that change the results of a run."""
    found = {name: getattr(config, name) for name in ("seeds", "students", "sources", "dtype")}
    for section in ("sample", "train", "score", "extract"):
        options = yaml_io.to_dict(getattr(config, section), Role.IDENTITY)
        found |= {f"{section}.{name}": value for name, value in options.items()}
    return found


def run_study(config: StudyConfig) -> Path:
    """Run or complete a study; with `dry_run`, print its plan and power.

    Returns:
        The folder, with `results.json`.

    Raises:
        InputError: an option, model or file is missing or does not fit.
    """
    read_corpus = cache(open_corpus)
    check_study(config, read_corpus)
    design = make_design(config, read_corpus)
    check_processes(design.ordered_stages)
    folder = Path(config.out)
    if config.dry_run:
        print("\n".join([format_plan(design), *describe_power(config, _load_earlier_results(folder / "results.json"))]))
        return folder
    post_hoc = broadcast_one_to_all(lambda: _start(config, folder))
    run_all(design.root, design.ordered_stages)
    if jax.process_index() == 0:
        with lease.wait_for_lease(folder / ".results.lease"):  # other processes write the same bytes
            trained = [cell.train for cell in design.cells]
            if len(trained) == 1 and trained[0] is not None:
                _publish_model(design.folder(trained[0]) / "model", folder / "model")
            atomic.write_json(folder / "results.json", collect_study(config, design, post_hoc))
    return folder


def _start(config: StudyConfig, folder: Path) -> list[str]:
    """Write configuration and claims; return the names of post hoc claims."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be created ({error.strerror}); choose another folder") from error
    atomic.remove_stale_temp_files(folder)
    yaml_io.save(folder / "config.yaml", config)
    return freeze_claims(folder, config.claims)


def _publish_model(source: Path, target: Path) -> None:
    """Make `target` equal to `source`, by hard links or copies."""
    files, published = (
        sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) for folder in (source, target)
    )
    if published == files and all(filecmp.cmp(source / file, target / file) for file in files):
        return
    with atomic.commit_folder(target, overwrite=True) as folder:
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source / file, folder / file)
            except OSError:
                shutil.copy2(source / file, folder / file)


def _load_earlier_results(path: Path) -> dict[str, Any] | None:
    """Return the results of the study so far, or None."""
    remedy = "delete it, or choose another --out"
    return read_manifest(path, FORMAT, VERSION, {}, remedy=remedy) if path.exists() else None


def format_plan(design: Design) -> str:
    """Format the numbers of stages by command, done and remaining."""
    stages = design.ordered_stages
    remaining = [stage for stage in stages if not is_done(design.root, stage)]
    lines = [f"{len(design.cells):,} cells, {len(stages):,} stages"]
    for command in dict.fromkeys(stage.command for stage in stages):
        total, left = ([stage for stage in group if stage.command == command] for group in (stages, remaining))
        tokens, flops = sum(stage.tokens for stage in left), sum(stage.flops for stage in left)
        size = f", at most {tokens:,} tokens remain: {flops:.2g} FLOPs" if tokens else ""
        lines.append(f"  {command:<15}{len(total):>6,}   {len(total) - len(left):,} done{size}")
    rates = [
        atomic.read_json(path)["seconds"] / stage.tokens
        for stage in stages
        if stage.tokens and (path := design.root / f"{stage.name}.seconds.json").exists()
    ]
    if rates:
        minutes = sum(stage.tokens for stage in remaining) * math.fsum(rates) / len(rates) / 60
        lines.append(f"by the finished stages, sampling and training will take about {minutes:,.0f} more minutes")
    return "\n".join(lines)
