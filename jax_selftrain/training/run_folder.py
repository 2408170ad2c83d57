"""What a run is, and whether a run folder is that run: everything that can be refused is refused here, before training.

A run is determined by the base's weights, the corpora, and the options that change the arithmetic (`run.json` holds the
fingerprints and options). The mesh, the checkpoint interval and their like may change from launch to launch; each
launch is recorded in `launches.jsonl`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_selftrain import hub
from jax_selftrain.config import TrainConfig, yaml_io
from jax_selftrain.config.metadata import Role
from jax_selftrain.corpus import Corpus, Mixture, build_packed_rows, open_corpus, parse_mixture
from jax_selftrain.distributed import barrier
from jax_selftrain.distributed.mesh import make_mesh
from jax_selftrain.distributed.sharding import ShardingRules, make_sharding_rules
from jax_selftrain.errors import InputError, UnavailableError
from jax_selftrain.io import atomic, lease
from jax_selftrain.io.manifest import hash_json
from jax_selftrain.io.remote_paths import restore_uris
from jax_selftrain.models import DecoderConfig, axis_sizes
from jax_selftrain.training.hooks import check_evaluation
from jax_selftrain.training.lora import check_lora
from jax_selftrain.training.step import abstract_batch
from jax_selftrain.version import versions

FORMAT = 2


@dataclass(frozen=True)
class TrainInputs:
    """What a run reads, found to be sound and to fit together."""

    config: TrainConfig
    model: DecoderConfig
    source: hub.ModelRef
    sharding_rules: ShardingRules
    corpora: tuple[Corpus, ...]
    """The corpus, then those that are mixed in."""
    mixture_weights: tuple[Fraction, ...]
    """Share of the rows that come from each of them."""
    fingerprints: dict[str, str]
    """Of `model` (weights; for a fresh initialization its config), `tokenizer`, `corpus` and, where there are such,
    `mix` and `evaluation`."""
    evaluation: Sequence[Mapping[str, Any]] = ()
    """What is measured on the way: `Hook.measured`."""


@dataclass(frozen=True)
class Run:
    """A run folder that belongs to us, with everything needed to train in it."""

    folder: Path
    config: TrainConfig
    """As given, with `steps` and `checkpoint_every` resolved."""
    inputs: TrainInputs
    rows: Mixture
    run_hash: str
    """Fingerprint of everything that determines the result."""

    @property
    def finished(self) -> bool:
        """Whether the final model is there."""
        return (self.folder / "model").exists()


def load_inputs(config: TrainConfig, evaluation: Sequence[Mapping[str, Any]] = ()) -> TrainInputs:
    """Open and check everything that a run reads; nothing is written.

    Args:
      config: the run's options.
      evaluation: what its hooks measure.

    Raises:
      InputError: an option is out of range, a file is missing or damaged, or model, corpus, batch and mesh do not fit.
    """
    yaml_io.require(config)
    check_ranges(config)
    source = hub.open_model(config.model)
    model = source.config
    rules = make_sharding_rules(config.preset, make_mesh(config.mesh), axis_sizes(model))
    abstract_batch(config, rules)  # refuses a batch that does not divide
    if config.seq_len > model.max_positions:
        raise InputError(
            f"--seq-len {config.seq_len}: {config.model} has only {model.max_positions} positions; "
            f"give at most --seq-len {model.max_positions}"
        )
    tokenizer = source.tokenizer_fingerprint
    mix = parse_mixture(config.mixture)
    folders = [config.corpus, *(folder for folder, _ in mix)]
    corpora = tuple(_open_corpus(config, folder, tokenizer, model.vocab_size) for folder in folders)
    _check_unique_corpora(corpora)
    shares = tuple(share for _, share in mix)
    weights = hash_json(source.raw_config) if config.init == "scratch" else source.fingerprint
    fingerprints = {"model": weights, "tokenizer": tokenizer, "corpus": corpora[0].fingerprint}
    if mix:
        marks = [[str(share), corpus.fingerprint] for share, corpus in zip(shares, corpora[1:], strict=True)]
        fingerprints["mixture"] = hash_json(marks)
    if evaluation:
        fingerprints["evaluation"] = hash_json(evaluation)
    shares = (1 - sum(shares, Fraction(0)), *shares)
    return TrainInputs(config, model, source, rules, corpora, shares, fingerprints, evaluation)


@contextmanager
def acquire_run_folder(inputs: TrainInputs) -> Iterator[Run]:
    """Take the run folder for this process (group): start it, or recognize it as the same run.

    Raises:
      InputError: the folder holds something else, or a run of other inputs or options; says which.
      UnavailableError: another process is training in it.
    """
    folder = Path(inputs.config.out)
    if jax.process_index():
        barrier("run folder is ready")
        yield _match_existing_run(folder, inputs)
        return
    _refuse_foreign(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from error
    with lease.lease(folder / ".lease") as ours:
        if not ours:
            raise UnavailableError(f"{folder}: another process is training there; wait for it, or choose another --out")
        if (folder / "run.json").exists():
            _refuse_other_run(folder, inputs)
        run = _match_existing_run(folder, inputs)
        if not (folder / "run.json").exists():
            yaml_io.save(folder / "config.yaml", run.config)
            atomic.write_json(folder / "run.json", _description(run))
        barrier("run folder is ready")
        yield run


def _match_existing_run(folder: Path, inputs: TrainInputs) -> Run:
    config = inputs.config
    places = [folder / "rows", *(folder / f"rows-{n}" for n in range(1, len(inputs.corpora)))]
    parts = [
        build_packed_rows(corpus, place, config.seq_len, config.packing)
        for corpus, place in zip(inputs.corpora, places, strict=True)
    ]
    rows = Mixture(tuple(parts), inputs.mixture_weights)
    steps = config.steps or rows.steps_per_epoch(config.batch_size)
    every = config.checkpoint_every or math.ceil(steps / 10)
    config = dataclasses.replace(config, steps=steps, checkpoint_every=every)
    _check_epochs(config, inputs.corpora, rows, steps)
    identity = hash_json({**inputs.fingerprints, "options": yaml_io.to_dict(config, Role.IDENTITY)})
    return Run(folder, config, inputs, rows, identity)


def _check_epochs(config: TrainConfig, corpora: tuple[Corpus, ...], rows: Mixture, steps: int) -> None:
    """Refuse a run that visits the rows of a corpus more often than the user wants."""
    if config.max_epochs is None:
        return
    limit = Fraction(str(config.max_epochs))
    epochs, visited = rows.epochs(steps * config.batch_size), rows.draws_before([steps * config.batch_size])[:, 0]
    most = epochs.index(max(epochs))
    if epochs[most] <= limit:
        return
    within = rows.max_steps(limit, config.batch_size, steps)
    remedy = f"give at most --steps {within}" if within else "not even one step keeps it: give a smaller --batch-size"
    raise InputError(
        f"{corpora[most].folder}: {steps} steps of {config.batch_size} rows would visit its "
        f"{len(rows.components[most])} rows {visited[most]} times ({float(epochs[most]):.4g} epochs), more than "
        f"--max-epochs {config.max_epochs:g} allows; {remedy}"
    )


def _description(run: Run) -> dict[str, Any]:
    config, fingerprints = run.config, run.inputs.fingerprints
    main, *mixed = _described_corpora(run)
    evaluation = {"fingerprint": fingerprints.get("evaluation"), "measured": list(run.inputs.evaluation)}
    return {
        "format": FORMAT,
        "versions": versions(),
        "model": {"ref": config.model, "init": config.init, "fingerprint": fingerprints["model"]},
        "tokenizer_fingerprint": fingerprints["tokenizer"],
        "corpus": main,
        "mixture": mixed,
        "rows": len(run.rows.components[0]),
        "steps": config.steps,
        "options": yaml_io.to_dict(config, Role.IDENTITY),
        **({"evaluation": evaluation} if run.inputs.evaluation else {}),
        "identity": run.run_hash,
    }


def _described_corpora(run: Run) -> list[dict[str, Any]]:
    inputs, total = run.inputs, (run.config.steps or 1) * run.config.batch_size
    parts = zip(inputs.corpora, inputs.mixture_weights, run.rows.components, run.rows.epochs(total), strict=True)
    return [
        {
            "ref": str(corpus.folder),
            "fingerprint": corpus.fingerprint,
            "samples": corpus.manifest["samples"],
            "tokens": corpus.manifest["tokens"],
            "share": str(share),
            "rows": len(rows),
            "epochs": float(epochs),
        }
        for corpus, share, rows, epochs in parts
    ]


def _refuse_foreign(folder: Path) -> None:
    """A folder is ours if it says so, or if all it holds is what we make before we say so."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; give a folder")
    if not folder.exists() or (folder / "run.json").exists():
        return
    ours = re.compile(r"\..*|rows(-\d+)?|config\.yaml")
    others = sorted(path.name for path in folder.iterdir() if not ours.fullmatch(path.name))
    if others:
        raise InputError(
            f"--out {folder}: holds {others[0]} but no run.json, so it is not a run folder; choose another"
        )


def _refuse_other_run(folder: Path, inputs: TrainInputs) -> None:
    remedy = "repeat the options it was started with, or choose another --out"
    before = atomic.read_json(folder / "run.json")
    try:
        earlier = {"model": before["model"], "corpus": before["corpus"]}
        if inputs.evaluation:
            earlier["evaluation"] = before.get("evaluation", {"fingerprint": None})
        options, format_version = before["options"], before["format"]
        tokenizer = before["tokenizer_fingerprint"]
        marks = {name: entry["fingerprint"] for name, entry in earlier.items()}
        mixed = [
            (str(entry["ref"]), Fraction(entry["share"]), str(entry["fingerprint"]))
            for entry in before.get("mixture", [])
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / 'run.json'}: is damaged (no {error}); choose another --out") from error
    if format_version != FORMAT:
        raise InputError(f"{folder}: has run format {format_version}, not {FORMAT}; choose another --out")
    now = yaml_io.to_dict(inputs.config, Role.IDENTITY)
    if inputs.config.steps is None:
        now["steps"] = options.get("steps")  # one epoch of the same corpus, rows and batch size: checked by those
    for name in sorted(now.keys() | options.keys()):
        if now.get(name) != options.get(name):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{folder}: was started with {flag} {options.get(name)}, not {now.get(name)}; {remedy}")
    _refuse_other_mix(folder, mixed, inputs, remedy)
    marks["tokenizer"] = tokenizer
    for name, mark in marks.items():
        found = inputs.fingerprints[name]
        if mark != found:
            raise InputError(
                f"{folder}: was started with another {name} (fingerprint {str(mark)[:8]}…, now {found[:8]}…); {remedy}"
            )


def _refuse_other_mix(folder: Path, before: list[tuple[str, Fraction, str]], inputs: TrainInputs, remedy: str) -> None:
    """Corpora are compared by share and content, not by name; `before` is (name, share, fingerprint) of each."""
    parts = zip(inputs.corpora, inputs.mixture_weights, strict=True)
    now = [(restore_uris(str(corpus.folder)), share, corpus.fingerprint) for corpus, share in parts][1:]
    if [entry[1:] for entry in before] == [entry[1:] for entry in now]:
        return
    if [entry[:2] for entry in before] != [entry[:2] for entry in now]:
        raise InputError(f"{folder}: was started with {_format_mixture(before)}, not {_format_mixture(now)}; {remedy}")
    for (name, _, mark), (_, _, found) in zip(before, now, strict=True):
        if mark != found:
            raise InputError(
                f"{folder}: was started with another content of the mixed corpus {name} (fingerprint {mark[:8]}…, now "
                f"{found[:8]}…); {remedy}"
            )


def _format_mixture(mix: list[tuple[str, Fraction, str]]) -> str:
    entries = [f"{name}={float(share):g}" for name, share, _ in mix]
    return " ".join(["--mixture", *entries]) if entries else "no --mixture"


def _open_corpus(config: TrainConfig, folder: str, tokenizer: str, vocab_size: int) -> Corpus:
    """A corpus that the model can be trained on: of its tokenizer, and every id a token of the model."""
    corpus = open_corpus(folder, tokenizer_fingerprint=tokenizer)
    tokens, offsets, _ = corpus.token_arrays()
    if corpus.start_id >= vocab_size:
        raise InputError(f"{folder}: its start id {corpus.start_id} is no token of {config.model} ({vocab_size})")
    bad = np.flatnonzero((tokens >= vocab_size) | (tokens < 0))
    if bad.size:
        document = int(np.searchsorted(offsets, bad[0], side="right")) - 1
        raise InputError(
            f"{folder}: document {document} holds token id {tokens[bad[0]]}, but {config.model} has only "
            f"{vocab_size} tokens; use the corpus with a model of its own tokenizer"
        )
    return corpus


def _check_unique_corpora(corpora: tuple[Corpus, ...]) -> None:
    seen: dict[str, Corpus] = {}
    for corpus in corpora:
        twin = seen.setdefault(corpus.fingerprint, corpus)
        if twin is not corpus:
            raise InputError(
                f"--mixture {corpus.folder}: holds the same corpus as {twin.folder}; give each corpus once, with its "
                "whole share"
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
            ("eval_every", "eval_limit", "eval_prefix", "eval_suffix"),
            (positive, "at least 1"),
        ),
        **dict.fromkeys(
            ("learning_rate", "final_learning_rate", "weight_decay", "clip_norm"),
            (not_negative, "0 or more"),
        ),
        **dict.fromkeys(
            ("lora_rank", "lora_alpha"),
            (not_negative, "0 or more"),
        ),
        **dict.fromkeys(("beta1", "beta2"), (below_one, "in [0, 1)")),
        "warmup_ratio": (share, "in [0, 1]"),
        **dict.fromkeys(("eps", "max_epochs"), (positive, "more than 0")),
    }
    for name, (holds, wanted) in rules.items():
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise InputError(f"--{name.replace('_', '-')} {value}: must be {wanted}")
    check_evaluation(config)
    check_lora(config)
