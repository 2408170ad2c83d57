"""The run folder and the inputs of a run, checked before training.

The weights of the base, the corpora and the options that change the result determine a run; `run.json` holds their
fingerprints. Execution options such as the mesh may change between launches; `launches.jsonl` records each launch.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
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
from jax_selftrain.io import atomic, json_files, lease
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.io.remote_paths import restore_uris
from jax_selftrain.models import axis_sizes
from jax_selftrain.training.lora import check_lora_targets
from jax_selftrain.training.optimizer import learning_rates
from jax_selftrain.training.step import abstract_batch
from jax_selftrain.version import versions

FORMAT = 2


@dataclass(frozen=True)
class TrainInputs:
    """Checked inputs of a run."""

    config: TrainConfig
    source: hub.ModelRef
    sharding_rules: ShardingRules
    corpora: tuple[Corpus, ...]
    """The corpus, followed by the corpora of `--mixture`."""
    mixture_weights: tuple[Fraction, ...]
    """Share of the rows of each corpus."""
    fingerprints: dict[str, str | None]
    """Keys: `model` (weights, or config for `--init scratch`), `tokenizer`, `corpus`, `mixture`, `evaluation`."""
    evaluation: Sequence[Mapping[str, Any]] = ()
    """Descriptions of the evaluations (`Hook.measured`)."""


@dataclass(frozen=True)
class Run:
    """An acquired run folder, with everything that training needs."""

    folder: Path
    config: TrainConfig
    """The run's options, with `steps` and, without `epochs`, `checkpoint_every` resolved."""
    inputs: TrainInputs
    rows: Mixture
    epoch_ends: tuple[int, ...]
    """The last step of each epoch, with the option `epochs`."""
    run_hash: str
    """Fingerprint of everything that determines the result."""


def load_inputs(config: TrainConfig, evaluation: Sequence[Mapping[str, Any]] = ()) -> TrainInputs:
    """Open everything that a run reads; refuse what does not fit."""
    source = hub.open_model(config.model)
    model = source.config
    check_lora_targets(config, model)
    rules = make_sharding_rules(config.preset, make_mesh(config.mesh), axis_sizes(model))
    abstract_batch(config, rules)  # raises if the batch does not divide
    if config.seq_len > model.max_positions:
        raise InputError(f"--seq-len {config.seq_len}: {config.model} has only {model.max_positions} positions")
    tokenizer = source.tokenizer_fingerprint if source.has_tokenizer else None
    mixture = parse_mixture(config.mixture)
    folders = [config.corpus, *(folder for folder, _ in mixture)]
    corpora = tuple(_open_corpus(config, folder, tokenizer, model.vocab_size) for folder in folders)
    for n, corpus in enumerate(corpora):
        for twin in corpora[:n]:
            if corpus.fingerprint == twin.fingerprint:
                raise InputError(f"--mixture {corpus.folder}: holds the same corpus as {twin.folder}; list it once")
    shares = tuple(share for _, share in mixture)
    weights = hash_json(source.raw_config) if config.init == "scratch" else source.fingerprint
    fingerprints = {"model": weights, "tokenizer": tokenizer, "corpus": corpora[0].fingerprint}
    if mixture:
        mixed = [[str(share), corpus.fingerprint] for share, corpus in zip(shares, corpora[1:], strict=True)]
        fingerprints["mixture"] = hash_json(mixed)
    if evaluation:
        fingerprints["evaluation"] = hash_json(evaluation)
    shares = (1 - sum(shares, Fraction(0)), *shares)
    return TrainInputs(config, source, rules, corpora, shares, fingerprints, evaluation)


@contextmanager
def acquire_run_folder(inputs: TrainInputs) -> Iterator[Run]:
    """Acquire the run folder: create it, or resume the same run.

    Raises:
      InputError: the folder holds other files, or a run with other inputs or options; names the first difference.
      UnavailableError: another process trains in it.
    """
    folder = Path(inputs.config.out)
    if jax.process_index():
        barrier("run folder is acquired")
        yield _prepare_run(folder, inputs)
        return
    _refuse_foreign(folder)
    with atomic.os_errors_as_input_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with lease.lease(folder / ".lease") as is_acquired:
        if not is_acquired:
            raise UnavailableError(f"{folder}: another process is training there; wait for it, or choose another --out")
        record = json_files.read_json(folder / "run.json") if (folder / "run.json").exists() else None
        if record is not None:
            _refuse_other_run(folder, record, inputs)
        run = _prepare_run(folder, inputs)
        description = _describe_run(run)
        if record is not None and description["steps"] > record["steps"]:
            atomic.remove_folder(folder / "model")  # the last checkpoint holds it, too
            description["continues"] = [*record.get("continues", ()), record["identity"]]
            record = None
        if record is None:
            yaml_io.save(folder / "config.yaml", run.config)
            json_files.write_json(folder / "run.json", description)
        barrier("run folder is acquired")
        yield run


def _prepare_run(folder: Path, inputs: TrainInputs) -> Run:
    """Pack the rows of the corpora and resolve the default options."""
    config = inputs.config
    components = tuple(
        build_packed_rows(corpus, folder / (f"rows-{n}" if n else "rows"), config.seq_len, config.packing)
        for n, corpus in enumerate(inputs.corpora)
    )
    rows = Mixture(components, inputs.mixture_weights)
    steps = config.steps or rows.count_steps(config.epochs or 1, config.batch_size)
    epoch_ends = tuple(rows.count_steps(n + 1, config.batch_size) for n in range(config.epochs or 0))
    if config.checkpoint_every is None and not epoch_ends:
        config = dataclasses.replace(config, checkpoint_every=math.ceil(steps / 10))
    config = dataclasses.replace(config, steps=steps)
    _check_epochs(config, inputs.corpora, rows, steps)
    run_hash = hash_json({**inputs.fingerprints, "options": yaml_io.to_dict(config, Role.IDENTITY)})
    return Run(folder, config, inputs, rows, epoch_ends, run_hash)


def _check_epochs(config: TrainConfig, corpora: tuple[Corpus, ...], rows: Mixture, steps: int) -> None:
    """Refuse a run that repeats a corpus more than `max_epochs` times."""
    if config.max_epochs is None or config.epochs:
        return
    limit = Fraction(str(config.max_epochs))
    epochs = rows.epochs(steps * config.batch_size)
    worst = epochs.index(max(epochs))
    if epochs[worst] <= limit:
        return
    most = rows.max_steps(limit, config.batch_size, steps)
    remedy = f"use at most --steps {most}" if most else "not even one step is allowed: use a smaller --batch-size"
    raise InputError(
        f"{corpora[worst].folder}: {steps} steps of {config.batch_size} rows are {float(epochs[worst]):.4g} epochs, "
        f"more than --max-epochs {config.max_epochs:g} allows; {remedy}"
    )


def _describe_run(run: Run) -> dict[str, Any]:
    config, inputs, fingerprints = run.config, run.inputs, run.inputs.fingerprints
    epochs = run.rows.epochs((config.steps or 1) * config.batch_size)
    main, *mixed = [
        {
            "ref": str(corpus.folder),
            "fingerprint": corpus.fingerprint,
            "samples": corpus.manifest["samples"],
            "tokens": corpus.manifest["tokens"],
            "share": str(share),
            "rows": len(rows),
            "epochs": float(visits),
        }
        for corpus, share, rows, visits in zip(
            inputs.corpora, inputs.mixture_weights, run.rows.components, epochs, strict=True
        )
    ]
    record = {
        "format": FORMAT,
        "versions": versions(),
        "model": {
            "ref": config.model,
            "init": config.init,
            "fingerprint": fingerprints["model"],
            "commit": inputs.source.commit,
        },
        "tokenizer_fingerprint": fingerprints["tokenizer"],
        "corpus": main,
        "mixture": mixed,
        "rows": len(run.rows.components[0]),
        "steps": config.steps,
        "options": yaml_io.to_dict(config, Role.IDENTITY),
        "identity": run.run_hash,
    }
    if inputs.evaluation:
        record["evaluation"] = {"fingerprint": fingerprints["evaluation"], "measured": list(inputs.evaluation)}
    return record


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder with other files than those of a new run."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; give a folder")
    if not folder.exists() or (folder / "run.json").exists():
        return
    allowed = re.compile(r"\..*|rows(-\d+)?|config\.yaml")
    foreign = sorted(path.name for path in folder.iterdir() if not allowed.fullmatch(path.name))
    if foreign:
        raise InputError(f"--out {folder}: holds {foreign[0]} and is not a run folder; choose another")


def _can_continue(config: TrainConfig, before: int | None) -> bool:
    """Return True if more steps leave the first `before` unchanged."""
    if config.steps is None or before is None or config.steps <= before:
        return False
    return np.array_equal(learning_rates(config, config.steps)[:before], learning_rates(config, before))


def _refuse_other_run(folder: Path, record: Any, inputs: TrainInputs) -> None:
    """Refuse a folder whose `run.json` has other options or fingerprints.

    More steps are accepted if the learning rates of the earlier steps stay the same.
    """
    remedy = "repeat its options, or choose another --out"
    try:
        if record["format"] != FORMAT:
            raise InputError(f"{folder}: has run format {record['format']}, not {FORMAT}; choose another --out")
        before = dict(record["options"])
        hashes = {name: record[name]["fingerprint"] for name in ("model", "corpus")}
        hashes |= {"tokenizer": record["tokenizer_fingerprint"]}
        if inputs.evaluation:
            hashes["evaluation"] = record.get("evaluation", {}).get("fingerprint")
        mixture = [(entry["ref"], Fraction(entry["share"]), entry["fingerprint"]) for entry in record["mixture"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / 'run.json'}: is damaged (no {error}); choose another --out") from error
    now, found = yaml_io.to_dict(inputs.config, Role.IDENTITY), dict(inputs.fingerprints)
    if inputs.config.steps is None:
        now["steps"] = before.get("steps")  # epochs, corpus, packing and batch size imply it
    elif _can_continue(inputs.config, before.get("steps")):
        now["steps"] = before["steps"]
    components = zip(inputs.corpora, inputs.mixture_weights, strict=True)
    other = [(restore_uris(str(corpus.folder)), share, corpus.fingerprint) for corpus, share in components][1:]
    if [entry[1:] for entry in mixture] != [entry[1:] for entry in other]:  # a corpus may have moved
        for entries, options, fingerprints in ((mixture, before, hashes), (other, now, found)):
            options["mixture"] = " ".join(f"{name}={float(share):g}" for name, share, _ in entries) or "none"
            fingerprints |= {f"content of the mixed corpus {name}": value for name, _, value in entries}
    for name in sorted(now.keys() | before.keys()):
        old, new = before.get(name), now.get(name)
        if old != new:
            if name == "steps" and old is not None and new is not None and old < new:
                remedy += "; more steps need --schedule constant and --warmup-ratio 0 from the start"
            raise InputError(f"{folder}: was started with {yaml_io.flag(name)} {old}, not {new}; {remedy}")
    for name, old in hashes.items():
        if old != found[name]:
            values = f"fingerprint {str(old)[:8]}…, now {str(found[name])[:8]}…"
            raise InputError(f"{folder}: was started with another {name} ({values}); {remedy}")


def _open_corpus(config: TrainConfig, folder: str, tokenizer: str | None, vocab_size: int) -> Corpus:
    """Open a corpus; check its tokenizer and token ids.

    Without a tokenizer, both the model and the corpus must have none.
    """
    corpus = open_corpus(folder, tokenizer_fingerprint=tokenizer)
    if tokenizer is None and corpus.manifest["tokenizer_fingerprint"] is not None:
        raise InputError(f"{config.model}: holds no tokenizer, but {folder} was made with one; copy its files there")
    tokens, offsets, _ = corpus.token_arrays()
    if corpus.start_id >= vocab_size:
        raise InputError(f"{folder}: its start id {corpus.start_id} is not a token of {config.model} ({vocab_size})")
    bad = np.flatnonzero((tokens >= vocab_size) | (tokens < 0))
    if bad.size:
        document = int(np.searchsorted(offsets, bad[0], side="right")) - 1
        raise InputError(
            f"{folder}: document {document} holds token id {tokens[bad[0]]}, but {config.model} has only "
            f"{vocab_size} tokens; use a model with the tokenizer of the corpus"
        )
    return corpus
