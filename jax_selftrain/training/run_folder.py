"""What a run is, and whether a run folder is that run: everything that can be refused is refused here, before training.

A run is determined by the base's weights, the corpus, and the options that change the arithmetic (`run.json` holds the
fingerprints and options). The mesh, the checkpoint interval and their like may change from launch to launch; each
launch is recorded in `launches.jsonl`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_selftrain import hub, settings, storage
from jax_selftrain.config import Packing, TrainConfig
from jax_selftrain.corpus import Corpus, Rows, build_rows, open_corpus
from jax_selftrain.errors import InputError, UnavailableError
from jax_selftrain.mesh import Layout, make_layout, make_mesh
from jax_selftrain.models import DecoderConfig, axis_sizes
from jax_selftrain.training.hooks import check_evaluation
from jax_selftrain.training.step import abstract_batch

FORMAT = 1

CHANGEABLE = ("mesh", "preset", "remat", "attention", "checkpoint_every", "keep", "keep_every", "log_every", "wandb")
"""Options that may differ between the launches of one run: the results they give differ by rounding at most."""

_BY_FINGERPRINT = ("model", "corpus", "out", "eval_texts", "eval_tasks", "eval_sequences")
"""Options that are compared by content, not by name: a folder may have been moved."""


@dataclass(frozen=True)
class Inputs:
    """What a run reads, found to be sound and to fit together."""

    config: TrainConfig
    model: DecoderConfig
    raw_config: dict[str, Any]
    layout: Layout
    corpus: Corpus
    fingerprints: dict[str, str]
    """Of `model` (weights; for a fresh initialisation its config), `tokenizer`, `corpus` and, where something is
    measured on the way, `evaluation`."""
    evaluation: Sequence[Mapping[str, Any]] = ()
    """What is measured on the way: `Hook.measured`."""


@dataclass(frozen=True)
class Run:
    """A run folder that belongs to us, with everything needed to train in it."""

    folder: Path
    config: TrainConfig
    """As given, with `steps` and `checkpoint_every` resolved."""
    inputs: Inputs
    rows: Rows
    identity: str
    """Fingerprint of everything that determines the result."""

    @property
    def finished(self) -> bool:
        """Whether the final model is there."""
        return (self.folder / "model").exists()


def read_inputs(config: TrainConfig, evaluation: Sequence[Mapping[str, Any]] = ()) -> Inputs:
    """Open and check everything that a run reads; nothing is written.

    Args:
      config: the run's options.
      evaluation: what its hooks measure.

    Raises:
      InputError: an option is out of range, a file is missing or damaged, or model, corpus, batch and mesh do not fit.
    """
    settings.require(config, "model", "corpus", "out")
    check_ranges(config)
    model, raw_config = hub.read_config(config.model)
    layout = make_layout(config.preset, make_mesh(config.mesh), axis_sizes(model))
    abstract_batch(config, layout)  # refuses a batch that does not divide
    if config.seq_len > model.max_positions:
        raise InputError(
            f"--seq-len {config.seq_len}: {config.model} has only {model.max_positions} positions; "
            f"give at most --seq-len {model.max_positions}"
        )
    tokenizer = hub.tokenizer_fingerprint(config.model)
    corpus = open_corpus(config.corpus, tokenizer_fingerprint=tokenizer)
    _check_token_ids(config, corpus, model.vocab_size)
    weights = storage.fingerprint(raw_config) if config.init == "scratch" else hub.model_fingerprint(config.model)
    fingerprints = {"model": weights, "tokenizer": tokenizer, "corpus": corpus.fingerprint}
    if evaluation:
        fingerprints["evaluation"] = storage.fingerprint(evaluation)
    return Inputs(config, model, raw_config, layout, corpus, fingerprints, evaluation)


@contextmanager
def claim(inputs: Inputs) -> Iterator[Run]:
    """Take the run folder for this process (group): start it, or recognise it as the same run.

    Raises:
      InputError: the folder holds something else, or a run of other inputs or options; says which.
      UnavailableError: another process is training in it.
    """
    folder = Path(inputs.config.out)
    if jax.process_index():
        barrier("run folder is ready")
        yield _recognise(folder, inputs, build_rows(inputs.corpus, folder / "rows", *_row_shape(inputs.config)))
        return
    _refuse_foreign(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from error
    with storage.lease(folder / ".lease") as ours:
        if not ours:
            raise UnavailableError(f"{folder}: another process is training there; wait for it, or choose another --out")
        if (folder / "run.json").exists():
            _refuse_other_run(folder, inputs)
        rows = build_rows(inputs.corpus, folder / "rows", *_row_shape(inputs.config))
        run = _recognise(folder, inputs, rows)
        if not (folder / "run.json").exists():
            settings.save(folder / "config.yaml", run.config)
            storage.write_json(folder / "run.json", _description(run))
        barrier("run folder is ready")
        yield run


def barrier(name: str) -> None:
    """Wait for all processes; nothing where there is one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _row_shape(config: TrainConfig) -> tuple[int, Packing]:
    return config.seq_len, config.packing


def _recognise(folder: Path, inputs: Inputs, rows: Rows) -> Run:
    config = inputs.config
    steps = config.steps or math.ceil(len(rows.tokens) / config.batch_size)
    every = config.checkpoint_every or math.ceil(steps / 10)
    config = dataclasses.replace(config, steps=steps, checkpoint_every=every)
    identity = storage.fingerprint({**inputs.fingerprints, "options": _settled(config)})
    return Run(folder, config, inputs, rows, identity)


def _settled(config: TrainConfig) -> dict[str, Any]:
    """The options that determine the result."""
    free = CHANGEABLE + _BY_FINGERPRINT
    return {name: value for name, value in settings.to_dict(config).items() if name not in free}


def _description(run: Run) -> dict[str, Any]:
    config, corpus, fingerprints = run.config, run.inputs.corpus.manifest, run.inputs.fingerprints
    evaluation = {"fingerprint": fingerprints.get("evaluation"), "measured": list(run.inputs.evaluation)}
    return {
        "format": FORMAT,
        "versions": storage.versions(),
        "model": {"ref": config.model, "init": config.init, "fingerprint": fingerprints["model"]},
        "tokenizer_fingerprint": fingerprints["tokenizer"],
        "corpus": {
            "ref": config.corpus,
            "fingerprint": fingerprints["corpus"],
            "samples": corpus["samples"],
            "tokens": corpus["tokens"],
        },
        "rows": len(run.rows.tokens),
        "steps": config.steps,
        "options": _settled(config),
        **({"evaluation": evaluation} if run.inputs.evaluation else {}),
        "identity": run.identity,
    }


def _refuse_foreign(folder: Path) -> None:
    """A folder is ours if it says so, or if all it holds is what we make before we say so."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; give a folder")
    if not folder.exists() or (folder / "run.json").exists():
        return
    others = sorted(
        p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name not in ("rows", "config.yaml")
    )
    if others:
        raise InputError(
            f"--out {folder}: holds {others[0]} but no run.json, so it is not a run folder; choose another"
        )


def _refuse_other_run(folder: Path, inputs: Inputs) -> None:
    remedy = "repeat the options it was started with, or choose another --out"
    before = storage.read_json(folder / "run.json")
    try:
        earlier = {"model": before["model"], "corpus": before["corpus"]}
        if inputs.evaluation:
            earlier["evaluation"] = before.get("evaluation", {"fingerprint": None})
        options, format_version = before["options"], before["format"]
        tokenizer = before["tokenizer_fingerprint"]
        marks = {name: entry["fingerprint"] for name, entry in earlier.items()}
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'run.json'}: is damaged (no {error}); choose another --out") from error
    if format_version != FORMAT:
        raise InputError(f"{folder}: has run format {format_version}, not {FORMAT}; choose another --out")
    now = _settled(inputs.config)
    if inputs.config.steps is None:
        now["steps"] = options.get("steps")  # one epoch of the same corpus, rows and batch size: checked by those
    for name in sorted(now.keys() | options.keys()):
        if now.get(name) != options.get(name):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{folder}: was started with {flag} {options.get(name)}, not {now.get(name)}; {remedy}")
    marks["tokenizer"] = tokenizer
    for name, mark in marks.items():
        found = inputs.fingerprints[name]
        if mark != found:
            raise InputError(
                f"{folder}: was started with another {name} (fingerprint {str(mark)[:8]}…, now {found[:8]}…); {remedy}"
            )


def _check_token_ids(config: TrainConfig, corpus: Corpus, vocab_size: int) -> None:
    tokens, offsets, _ = corpus.token_arrays()
    if corpus.start_id >= vocab_size:
        raise InputError(
            f"{config.corpus}: its start id {corpus.start_id} is no token of {config.model} ({vocab_size})"
        )
    bad = np.flatnonzero((tokens >= vocab_size) | (tokens < 0))
    if bad.size:
        document = int(np.searchsorted(offsets, bad[0], side="right")) - 1
        raise InputError(
            f"{config.corpus}: document {document} holds token id {tokens[bad[0]]}, but {config.model} has only "
            f"{vocab_size} tokens; use the corpus with a model of its own tokenizer"
        )


def check_ranges(config: TrainConfig) -> None:
    """Refuse options that are out of range whatever the model and corpus. Raises InputError naming the first."""

    def positive(value: float) -> bool:
        return 0 < value < math.inf

    def not_negative(value: float) -> bool:
        return 0 <= value < math.inf

    def below_one(value: float) -> bool:
        return 0 <= value < 1

    def share(value: float) -> bool:
        return 0 <= value <= 1

    rules: dict[str, tuple[Callable[[float], bool], str]] = {
        **dict.fromkeys(
            ("steps", "batch_size", "seq_len", "grad_accum", "checkpoint_every", "keep", "keep_every", "log_every"),
            (positive, "at least 1"),
        ),
        **dict.fromkeys(
            ("eval_every", "eval_limit", "eval_prefix", "eval_suffix", "patience"),
            (positive, "at least 1"),
        ),
        **dict.fromkeys(
            ("learning_rate", "final_learning_rate", "weight_decay", "clip_norm"),
            (not_negative, "0 or more"),
        ),
        **dict.fromkeys(
            ("z_loss", "kl_weight", "lora_rank", "lora_alpha"),
            (not_negative, "0 or more"),
        ),
        **dict.fromkeys(("beta1", "beta2", "ema_decay"), (below_one, "in [0, 1)")),
        "warmup_ratio": (share, "in [0, 1]"),
        **dict.fromkeys(("eps", "max_epochs"), (positive, "more than 0")),
    }
    for name, (holds, wanted) in rules.items():
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise InputError(f"--{name.replace('_', '-')} {value}: must be {wanted}")
    check_evaluation(config)
