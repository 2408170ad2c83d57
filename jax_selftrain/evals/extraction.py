"""Extraction: does a model reproduce the suffix of a known sequence from its prefix?

Two numbers, since either alone misleads. *Exact match*: the greedy continuation of the prefix is the suffix. *p_z*: the
probability of the suffix under sampling. Exact match also measures how fragile a path is: a model can lose it to a
little noise while the suffix stays almost as probable. Beside them stand what they must be compared with: sequences
that nobody was trained on (`controls`), a model that never saw the data (`baseline`), and the checkpoint the set was
selected on (`verification`).

Token rows are used exactly as they stand. A start token is put before them only if asked for, since a format that
training did not have looks like forgetting.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh

from jax_selftrain import hub
from jax_selftrain.config import ExtractConfig, yaml_io
from jax_selftrain.corpus import open_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.evals.exact_match import kept_lost_gained
from jax_selftrain.evals.overlap_classes import (
    CLASSES,
    THRESHOLDS,
    CorpusOverlap,
    classify,
    corpus_overlap,
    duplicate_buckets,
    to_columns,
)
from jax_selftrain.evals.result_files import output_paths, write_results
from jax_selftrain.evals.resumable_extraction import extract_resumable
from jax_selftrain.evals.score import check_batch, scoring_mesh
from jax_selftrain.evals.sequences import ExtractionSet, PromptWindow, load_sequences, sequences_fingerprint
from jax_selftrain.evals.suffix_probability import (
    NamedSamplingParams,
    column_name,
    n_p_discoverable_rate,
    read_policies,
    summarise_policy,
)
from jax_selftrain.io import atomic
from jax_selftrain.io.manifest import sha256_file
from jax_selftrain.likelihood.resumable import PartialResults, process_local_if_possible
from jax_selftrain.stats.standard_errors import mean_and_stderr, wilson_interval
from jax_selftrain.version import versions

PROTOCOLS = {"pythia": (32, 32), "lm-extraction": (50, 50)}
"""(prefix, suffix): Biderman et al. 2023 (arXiv:2304.11158); google-research/lm-extraction-benchmark."""
PROTOCOL_LENGTHS = (32, 32)
"""Where neither flags nor a protocol say otherwise."""


def extract(config: ExtractConfig) -> dict[str, Any]:
    """Measure extraction; write `FILE.json`, `FILE.sequences.parquet`, `FILE.config.yaml`, `FILE.timings.json`.

    Returns:
      What stands in `FILE.json`: the summary of all sequences (see `summarize`) and

      - with a corpus: under `held_out`, `partial`, `seen` those of its classes, under `thresholds` exact match of the
        classes at other thresholds, `matched_on`;
      - with duplicates: under `duplicates` the summaries by how often sequences were shown;
      - with `controls`, `baseline`, `verify`: `controls` and `baseline` with summaries of their own, `verification`;
      - `protocol`, `prefix`, `suffix`, `offset`, `random_offset`, `start_token`, `left_out`, `model`, `fingerprints`,
        `versions`.

    Raises:
      InputError: an input that cannot be read, or sequences that do not fit the model or the request; NaN.
    """
    yaml_io.require(config)
    started = time.monotonic()
    found, controls = load_extraction_sets(config)
    output_paths(config.out)
    mesh = scoring_mesh(config.mesh)
    with process_local_if_possible(mesh):
        return _extract(config, mesh, found, controls, started)


def _extract(
    config: ExtractConfig, mesh: Mesh, found: ExtractionSet, controls: ExtractionSet | None, started: float
) -> dict[str, Any]:
    policies = read_policies(config.sampling_policies)
    fingerprints = extraction_fingerprints(config)
    window, start = make_window(config), start_token(config)
    seen = None
    if config.corpus:
        corpus = open_corpus(config.corpus)
        fingerprints["corpus"] = corpus.fingerprint
        seen = corpus_overlap(corpus, config.model, found.tokens[:, window.prefix :], config.min_overlap)
    loading = time.monotonic()
    parts = PartialResults(output_paths(config.out, "parts")[1], {})

    def examine(model: str, sets: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Measure sets of sequences by a model, which does not outlive it."""
        loaded = hub.load_model(model, mesh, config.dtype, preset=config.preset)
        prefix = window.prefix + len(start)
        rows = [np.concatenate([np.tile(start, (len(tokens), 1)), tokens], axis=1) for tokens in sets]
        put = partial(
            extract_resumable,
            prefix=prefix,
            parts=parts,
            policies=policies,
            batch_tokens=config.batch_tokens,
            free_running=config.greedy_decode,
        )
        return [put(loaded, part) for part in rows]

    try:
        measured, *of_controls = examine(config.model, [found.tokens, *([controls.tokens] if controls else [])])
        baseline = examine(config.untrained_baseline, [found.tokens])[0] if config.untrained_baseline else None
        verified = examine(config.base, [found.tokens])[0]["exact_match"] if config.base else measured["exact_match"]
    except InputError:  # a model cannot be measured: nothing of it is worth keeping
        parts.finish()
        raise
    result: dict[str, Any] = {
        "model": config.model,
        "protocol": config.protocol,
        "prefix": window.prefix,
        "suffix": window.suffix,
        "offset": window.offset,
        "random_offset": window.random_offset,
        "start_token": config.start_token,
        "left_out": found.num_skipped,
        **_summaries(measured, found, seen, window, config.min_overlap, policies),
        "fingerprints": fingerprints,
        "versions": versions(),
    }
    if seen:
        result |= {"overlap": config.min_overlap, "matched_on": seen.matched_on}
        measured |= to_columns(seen, window.suffix, config.min_overlap)
    if controls:
        everything = np.ones(len(controls.tokens), bool)
        result["controls"] = {
            **summarize(of_controls[0], everything, policies),
            "sequences": config.control_sequences,
            "left_out": controls.num_skipped,
        }
    if baseline is not None:
        result["baseline"] = {
            "model": config.untrained_baseline,
            **_summaries(baseline, found, seen, window, config.min_overlap, policies),
        }
        measured |= {f"baseline {name}": baseline[name] for name in ("exact_match", "logprob")}
    if config.verify:
        result["verification"] = {
            "base": config.base or config.model,
            "verified": int(verified.sum()),
            **kept_lost_gained(verified, measured["exact_match"]),
        }
        measured["verified"] = verified
    timings = {
        "prepare_seconds": loading - started,
        "score_seconds": time.monotonic() - loading,
        "blocks_of_process": dict(sorted(parts.units.items())),
    }

    def write() -> None:
        if controls:
            with atomic.commit_file(output_paths(config.out, "controls.parquet")[1]) as aside:
                pq.write_table(_table(of_controls[0], controls), aside, compression="zstd")
        write_results(config.out, config, result, _table(measured, found), "sequences", timings)

    parts.finish(write)
    return result


def make_window(config: ExtractConfig) -> PromptWindow:
    """Prefix, suffix and offset that the options ask for.

    Raises:
      InputError: a length contradicts the named protocol: a result must not bear the name of what it is not.
    """
    named = PROTOCOLS[config.protocol] if config.protocol else None
    lengths = {}
    for name, own in zip(("prefix", "suffix"), named or PROTOCOL_LENGTHS, strict=True):
        given = getattr(config, name)
        if named and given not in (None, own):
            raise InputError(
                f"--{name} {given} contradicts --protocol {config.protocol}, whose {name} has {own} tokens; drop one "
                "of them"
            )
        lengths[name] = own if given is None else given
    return PromptWindow(**lengths, offset=config.offset, random_offset=config.random_offset)


def load_extraction_sets(config: ExtractConfig) -> tuple[ExtractionSet, ExtractionSet | None]:
    """The extraction set and its controls, after every check that needs no weights.

    Raises:
      InputError: an impossible option, or a set that cannot be read or does not fit the model.
    """
    window = make_window(config)
    check_batch(
        config.batch_tokens,
        prefix=window.prefix,
        suffix=window.suffix,
        min_overlap=config.min_overlap,
        limit=config.limit,
    )
    if config.offset < 0:
        raise InputError(f"--offset is {config.offset}; it must be at least 0")
    if config.base and not config.verify:
        raise InputError(f"--base {config.base} is only read with --verify; set it, or drop --base")
    read_policies(config.sampling_policies)
    models = {name: ref for name in ("model", "untrained_baseline", "base") if (ref := getattr(config, name))}
    decoders = {ref: hub.open_model(ref).config for ref in models.values()}
    start = start_token(config)
    for ref, decoder in decoders.items():
        if window.length + len(start) > decoder.max_positions:
            before = " + the start token" if start else ""
            raise InputError(
                f"--prefix {window.prefix} + --suffix {window.suffix}{before} is longer than the "
                f"{decoder.max_positions} positions of {ref}; shorten one of them"
            )
    tokenizer = hub.open_model(config.model).tokenizer_fingerprint
    for option, other in models.items():
        if option != "model" and hub.open_model(other).tokenizer_fingerprint != tokenizer:
            raise InputError(
                f"{yaml_io.flag(option)} {other}: has another tokenizer than {config.model}, so the same tokens are "
                "another text to it; choose a model with the same"
            )

    def read(reference: str, duplicates: str) -> ExtractionSet:
        return load_sequences(
            reference,
            window,
            vocab_size=min(decoder.vocab_size for decoder in decoders.values()),
            limit=config.limit,
            tokenizer=lambda: hub.open_model(config.model).tokenizer,
            duplicates=duplicates,
        )

    return read(config.sequences, config.duplicate_counts), read(
        config.control_sequences, ""
    ) if config.control_sequences else None


def start_token(config: ExtractConfig) -> list[int]:
    """The tokens put before each prefix: none or one."""
    if config.start_token == "none":
        return []
    start = hub.open_model(config.model).special_tokens.bos_token_id
    if start is None:
        raise InputError(f"{config.model}: names no BOS or EOS token to start from; leave out --start-token bos")
    return [start]


def extraction_fingerprints(config: ExtractConfig) -> dict[str, str]:
    """Fingerprints of everything that extraction reads but the corpus."""
    sequences = {
        "model": hub.open_model(config.model).fingerprint,
        "tokenizer": hub.open_model(config.model).tokenizer_fingerprint,
        "sequences": sequences_fingerprint(config.sequences),
    }
    others = {name: ref for name in ("untrained_baseline", "base") if (ref := getattr(config, name))}
    sequences |= {name: hub.open_model(ref).fingerprint for name, ref in others.items()}
    if config.control_sequences:
        sequences["controls"] = sequences_fingerprint(config.control_sequences)
    if config.duplicate_counts:
        sequences["duplicates"] = sha256_file(config.duplicate_counts)
    return sequences


def summarize(
    measured: Mapping[str, np.ndarray], members: np.ndarray, policies: tuple[NamedSamplingParams, ...] = ()
) -> dict[str, Any]:
    """Means over the sequences in `members` (bool [N]) of what `measure` returned, with standard errors.

    Returns:
      `n`; `exact_match` with its Wilson 95 % interval; `token_accuracy`, `teacher_forced_accuracy`, `matched_tokens`,
      `logprob` (the mean of log p_z, which hopeless sequences decide) and `pz` (that of p_z: the share that one draw
      says); `discoverable` by "n@p", at temperature 1; `policies`: `summarise_policy` of each. Standard errors are
      under `…_stderr`. Means are None where n is 0, and of what was not measured.
    """
    n = int(members.sum())
    exact = measured["exact_match"][members]
    result: dict[str, Any] = {"n": n, "exact_match_interval": wilson_interval(exact) if n else None}
    values = {**measured, "pz": np.exp(measured["logprob"])}
    for name in ("exact_match", "token_accuracy", "teacher_forced_accuracy", "matched_tokens", "logprob", "pz"):
        value, stderr = mean_and_stderr(values[name][members]) if n and name in values else (None, None)
        result |= {name: value, f"{name}_stderr": stderr}
    result |= n_p_discoverable_rate(measured["logprob"][members])
    if policies:
        result["policies"] = {named.name: summarise_policy(measured[column_name(named)][members]) for named in policies}
    return result


def _summaries(
    measured: Mapping[str, np.ndarray],
    found: ExtractionSet,
    seen: CorpusOverlap | None,
    window: PromptWindow,
    overlap: int,
    policies: tuple[NamedSamplingParams, ...],
) -> dict[str, Any]:
    """All sequences, the classes of a corpus, and the buckets of duplicates."""
    result = summarize(measured, np.ones(len(found.tokens), bool), policies)
    if seen:
        length = seen.overlaps.length
        classes = classify(length, window.suffix, overlap)
        result |= {name: summarize(measured, classes == name, policies) for name in CLASSES}
        result["thresholds"] = {
            str(threshold): {
                name: _headline(measured, classify(length, window.suffix, threshold) == name) for name in CLASSES
            }
            for threshold in THRESHOLDS
        }
    if found.duplicates is not None:
        buckets = duplicate_buckets(found.duplicates)
        result["duplicates"] = {name: summarize(measured, members, policies) for name, members in buckets.items()}
    return result


def _headline(measured: Mapping[str, np.ndarray], members: np.ndarray) -> dict[str, Any]:
    whole = summarize(measured, members)
    return {name: whole[name] for name in ("n", "exact_match", "exact_match_interval", "logprob")}


def _table(measured: Mapping[str, np.ndarray], found: ExtractionSet) -> pa.Table:
    types = {
        "exact_match": pa.bool_(),
        "verified": pa.bool_(),
        "baseline exact_match": pa.bool_(),
        "matched_tokens": pa.int32(),
        "overlap": pa.int32(),
        "document": pa.int64(),
        "class": pa.string(),
    }
    given = {"sequence": np.arange(len(found.tokens)), "index": found.sequence_id}
    if found.duplicates is not None:
        given["duplicates"] = found.duplicates
    counted = {name: pa.array(values, pa.int64()) for name, values in given.items()}
    return pa.table(
        counted | {name: pa.array(values, types.get(name, pa.float64())) for name, values in measured.items()}
    )
