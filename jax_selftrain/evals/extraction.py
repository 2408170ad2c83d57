"""The `extract` command: verbatim extraction of suffixes from their prefixes.

Exact match (the greedy continuation is the suffix) also measures how fragile a path is: a little noise breaks it, while
the suffix stays almost as probable. So p_z, the probability of the suffix under sampling, is reported with it. Both are
compared with sequences that no model was trained on (`controls`), with a model that never saw the data (`baseline`),
and with the checkpoint that the set was selected on (`verification`).

The longest verbatim match of a suffix with one document of the training corpora decides its overlap class: `held_out`
(shorter than a threshold), `seen` (the whole suffix), `partial` (between). A model samples what it memorized best, so
the classes are a selected split. A corpus with another tokenizer is matched on its text, tokenized with the model's
tokenizer. A match that begins or ends inside a token loses that token.

Token rows are used as given. A start token is prepended only on request: a format that training did not have looks like
forgetting.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from jax_selftrain import hub
from jax_selftrain.config import ExtractConfig, ExtractWindowsConfig, yaml_io
from jax_selftrain.corpus import Corpus, LazilyTokenized, RaggedTokens, TokenSource, longest_overlaps, open_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.evals.exact_match import extraction_metrics
from jax_selftrain.evals.result_files import describe_mean, output_paths, write_results
from jax_selftrain.evals.score import scoring_mesh
from jax_selftrain.evals.sequences import ExtractionSet, PromptWindow, load_sequences, sequences_fingerprint
from jax_selftrain.evals.suffix_probability import parse_sampling_policies, summarize_suffix_probability
from jax_selftrain.evals.token_records import tabulate_records
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.io.tables import hash_table
from jax_selftrain.likelihood.engine import TokenScores
from jax_selftrain.likelihood.resumable import PartialResults, process_local_if_possible
from jax_selftrain.stats.estimators import mcnemar_table, wilson_interval
from jax_selftrain.version import versions

PROTOCOLS = {None: (32, 32), "pythia": (32, 32), "lm-extraction": (50, 50)}
"""(prefix, suffix): our default; Biderman et al. 2023 (arXiv:2304.11158); google-research/lm-extraction-benchmark."""
CLASSES = ("held_out", "partial", "seen")
THRESHOLDS = (8, 16, 32)
"""Alternative thresholds that are reported, in tokens."""
_RETOKENIZED = 200
_checked: set[str] = set()
"""Hashes of sequences and tokenizer that this process has checked for ids of another tokenizer."""
_logger = logging.getLogger(__name__)
_MODELS = ("model", "untrained_baseline", "base")
_MEANS = (
    *("exact_match", "token_accuracy", "teacher_forced_accuracy", "matched_tokens"),
    *("extraction_strength", "edit_distance", "approximate_match", "longest_common_subsequence"),
)


def extract(config: ExtractConfig) -> dict[str, Any]:
    """Measure extraction, and write the result.

    Writes `FILE.json`, `FILE.sequences.parquet`, `FILE.config.yaml`, `FILE.timings.json`; on request
    `FILE.controls.parquet` and `FILE.tokens.parquet`.

    Returns:
      The content of `FILE.json`: the summary of all sequences (see `summarize`) and

      - with a corpus: `held_out`, `partial`, `seen` (summaries), `thresholds` (exact match of the classes at other
        thresholds), `min_overlap`, `matched_on`;
      - with duplicate counts: `duplicates`, summaries by count;
      - with the options of the same names: `controls`, `baseline` (summaries), `verification`;
      - `protocol`, `prefix`, `suffix`, `offset`, `random_offset`, `start_token`, `num_skipped`, `model`,
        `fingerprints`, `versions`.

    Raises:
      InputError: an input that cannot be read, or sequences that do not fit the model or the options; NaN.
    """
    yaml_io.require(config)
    output_paths(config.out)
    mesh = scoring_mesh(config.mesh)
    with process_local_if_possible(mesh):
        return _extract(config, mesh)


def _extract(config: ExtractConfig, mesh: Mesh) -> dict[str, Any]:
    started = time.monotonic()
    sequences, controls = load_extraction_sets(config)
    _warn_of_other_ids(config, sequences.tokens)
    policies = parse_sampling_policies(config.sampling_policies)
    window, start = make_window(config), find_start_tokens(config)
    files = ("sequences", "control_sequences", "duplicate_counts")
    fingerprints = {name: sequences_fingerprint(ref) for name in files if (ref := getattr(config, name))}
    fingerprints |= {name: hub.open_model(ref).fingerprint for name in _MODELS if (ref := getattr(config, name))}
    fingerprints["tokenizer"] = hub.open_model(config.model).tokenizer_fingerprint
    lengths = documents = None
    matched_on = ""
    if config.corpus:
        corpora = [open_corpus(folder) for folder in (config.corpus, *config.mixed_corpora)]
        names = ("corpus", *(f"mixed corpus {n}" for n in range(len(config.mixed_corpora))))
        fingerprints |= {name: corpus.fingerprint for name, corpus in zip(names, corpora, strict=True)}
        suffixes = sequences.tokens[:, window.prefix :]
        lengths, documents, matched_on = corpus_overlap(corpora, config.model, suffixes, config.min_overlap)
    prepared = time.monotonic()
    parts = PartialResults(output_paths(config.out, "parts")[1])

    def measure(ref: str, *sets: ExtractionSet, token_scores: bool = False) -> list[dict[str, np.ndarray]]:
        """Measure extraction sets with one model, and free its memory."""
        model = hub.load_model(ref, mesh, config.dtype, preset=config.preset)
        return [
            extraction_metrics(
                model,
                np.concatenate([np.tile(start, (len(one.tokens), 1)), one.tokens], axis=1),
                window.prefix + len(start),
                policies=policies,
                batch_tokens=config.batch_tokens,
                greedy_decode=config.greedy_decode,
                token_scores=token_scores,
                parts=parts,
            )
            for one in sets
        ]

    with parts.discard_on_error():
        sets = {"sequences": sequences, **({"controls": controls} if controls else {})}
        results = measure(config.model, *sets.values(), token_scores=config.token_records)
        measured, *control_results = results
        baseline = measure(config.untrained_baseline, sequences)[0] if config.untrained_baseline else None
        verified = measure(config.base, sequences)[0]["exact_match"] if config.base else measured["exact_match"]
    tables = _tabulate_tokens(config.model, window, sets, results) if config.token_records else {}
    fingerprints |= {name: hash_table(table) for name, table in tables.items()}
    result: dict[str, Any] = {
        "model": config.model,
        "commit": hub.open_model(config.model).commit,
        "protocol": config.protocol,
        **asdict(window),
        "start_token": config.start_token,
        "num_skipped": sequences.num_skipped,
        **_summarize_groups(config, measured, sequences, lengths),
        "fingerprints": fingerprints,
        "versions": versions(),
    }
    if lengths is not None and documents is not None:
        result |= {"min_overlap": config.min_overlap, "matched_on": matched_on}
        measured |= {
            "overlap": lengths.astype(np.int32),
            "document": documents,
            "class": classify(lengths, window.suffix, config.min_overlap),
        }
    if controls:
        result["controls"] = {
            **summarize(control_results[0]),
            "sequences": config.control_sequences,
            "num_skipped": controls.num_skipped,
        }
        tables["controls"] = _make_table(control_results[0], controls)
    if baseline is not None:
        summary = _summarize_groups(config, baseline, sequences, lengths)
        result["baseline"] = {"model": config.untrained_baseline, **summary}
        measured |= {f"baseline {name}": baseline[name] for name in ("exact_match", "logprob")}
    if config.verify:
        flips = mcnemar_table(verified, measured["exact_match"])
        result["verification"] = {
            "base": config.base or config.model,
            "verified": int(verified.sum()),
            **{"kept": flips.kept, "lost": flips.lost, "gained": flips.gained, "never": flips.both_wrong},
        }
        measured["verified"] = verified
    tables["sequences"] = _make_table(measured, sequences)
    timings = {
        "prepare_seconds": prepared - started,
        "score_seconds": time.monotonic() - prepared,
        "blocks_by_process": parts.units_by_process,
    }
    parts.finish(lambda: write_results(config.out, config, result, tables, timings))
    return result


def make_window(config: ExtractConfig) -> PromptWindow:
    """Return prefix, suffix and offset of the options.

    Raises:
      InputError: a length contradicts the protocol.
    """
    lengths = {}
    for name, default in zip(("prefix", "suffix"), PROTOCOLS[config.protocol], strict=True):
        given = getattr(config, name)
        if config.protocol and given not in (None, default):
            raise InputError(
                f"--{name} {given} contradicts --protocol {config.protocol}, whose {name} has {default} tokens; drop "
                "one of them"
            )
        lengths[name] = default if given is None else given
    return PromptWindow(**lengths, offset=config.offset, random_offset=config.random_offset)


def load_extraction_sets(config: ExtractConfig) -> tuple[ExtractionSet, ExtractionSet | None]:
    """Load the extraction set and its controls, and check the options.

    Raises:
      InputError: an invalid option, or a set that cannot be read or does not fit the model.
    """
    window = make_window(config)
    if config.base and not config.verify:
        raise InputError(f"--base {config.base} is only read with --verify; set it, or drop --base")
    parse_sampling_policies(config.sampling_policies)
    models = {name: hub.open_model(ref) for name in _MODELS if (ref := getattr(config, name))}
    start = find_start_tokens(config)
    for name, model in models.items():
        if window.length + len(start) > model.config.max_positions:
            start_token = ", the start token" if start else ""
            raise InputError(
                f"a prefix of {window.prefix} tokens{start_token} and a suffix of {window.suffix} are longer than the "
                f"{model.config.max_positions} positions of {model.ref}; shorten one of them"
            )
        if model.tokenizer_fingerprint != models["model"].tokenizer_fingerprint:
            raise InputError(
                f"{yaml_io.flag(name)} {model.ref}: has another tokenizer than {config.model}, so the same tokens are "
                "another text; choose a model with the same tokenizer"
            )

    load = partial(
        load_sequences,
        window=window,
        vocab_size=min(model.config.vocab_size for model in models.values()),
        limit=config.limit,
        subsample=config.subsample,
        tokenizer=lambda: models["model"].tokenizer,
    )
    sequences = load(config.sequences, duplicates=config.duplicate_counts, column=config.column)
    controls = load(config.control_sequences) if config.control_sequences else None
    for one in (sequences, controls) if start else ():
        doubled = 0 if one is None else int((one.tokens[:, 0] == start[0]).sum())
        if doubled and one is not None:
            text = (
                f"--start-token {config.start_token}: {doubled:,} of {len(one.tokens):,} prefixes begin with token "
                f"{start[0]} already"
            )
            if 2 * doubled >= len(one.tokens):
                raise InputError(f"{text}; drop --start-token, or set --offset 1")
            _logger.warning("%s, and have it twice", text)
    return sequences, controls


def _warn_of_other_ids(config: ExtractConfig, tokens: np.ndarray) -> None:
    """Warn if few sequences are tokenized to the same ids again."""
    model = hub.open_model(config.model)
    rows, tokenizer = tokens[:_RETOKENIZED].tolist(), model.tokenizer
    if (key := hash_json([rows, model.tokenizer_fingerprint])) in _checked:
        return  # a study extracts the same sequences from many models
    _checked.add(key)
    texts = tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    kept = sum(row == again for row, again in zip(rows, encoded, strict=True))
    if kept < 0.1 * len(rows):
        _logger.warning(
            "--sequences %s: %d of %d sequences keep their ids when they are decoded and tokenized again; unless they "
            "are random tokens, their ids are of another tokenizer than %s's",
            *(config.sequences, kept, len(rows), config.model),
        )


def find_start_tokens(config: ExtractConfig | ExtractWindowsConfig) -> list[int]:
    """Return the tokens that are prepended to each prefix: none or one."""
    if config.start_token == "none":
        return []
    start = hub.open_model(config.model).special_tokens.bos_token_id
    if start is None:
        raise InputError(f"{config.model}: names no BOS or EOS token to start from; drop --start-token bos")
    return [start]


def summarize(measured: Mapping[str, np.ndarray], members: np.ndarray | slice = slice(None)) -> dict[str, Any]:
    """Average the results of `extraction_metrics` over some sequences.

    Args:
      measured: arrays [N].
      members: bool [N], the sequences to average over; default: all.

    Returns:
      `n`; `exact_match` with its Wilson 95 % interval; `token_accuracy`, `teacher_forced_accuracy`, `matched_tokens`,
      and the near-verbatim measures (see `evals.exact_match`); `summarize_suffix_probability` at temperature 1, and
      under each of `sampling_policies`, with `zeros`, the number of sequences with p_z = 0. Standard errors are under
      `…_stderr`. Means are None if n is 0 or the metric was not computed.
    """
    values = {name: array[members] for name, array in measured.items()}
    exact = values["exact_match"]
    result: dict[str, Any] = {"n": len(exact), "exact_match_interval": wilson_interval(exact) if len(exact) else None}
    for name in _MEANS:
        result |= describe_mean(name, values.get(name, np.zeros(0)))
    result |= summarize_suffix_probability(values["logprob"])
    for name, logprob in values.items():
        if name.startswith("logprob "):
            summary = {"zeros": int(np.isneginf(logprob).sum()), **summarize_suffix_probability(logprob)}
            result.setdefault("sampling_policies", {})[name.removeprefix("logprob ")] = summary
    return result


def _summarize_groups(
    config: ExtractConfig, measured: Mapping[str, np.ndarray], sequences: ExtractionSet, lengths: np.ndarray | None
) -> dict[str, Any]:
    """Summarize all sequences, the overlap classes, and the buckets of duplicates."""
    result = summarize(measured)
    if lengths is not None:
        suffix = make_window(config).suffix
        classes = classify(lengths, suffix, config.min_overlap)
        result |= {name: summarize(measured, classes == name) for name in CLASSES}
        result["thresholds"] = {}
        for threshold in THRESHOLDS:
            classes = classify(lengths, suffix, threshold)
            summaries = {name: summarize(measured, classes == name) for name in CLASSES}
            shown = ("n", "exact_match", "exact_match_interval", "logprob")
            result["thresholds"][str(threshold)] = {
                name: {key: summary[key] for key in shown} for name, summary in summaries.items()
            }
    if sequences.duplicates is not None:
        buckets = duplicate_buckets(sequences.duplicates)
        result["duplicates"] = {name: summarize(measured, members) for name, members in buckets.items()}
    return result


def corpus_overlap(
    corpora: Sequence[Corpus], model: str, suffixes: np.ndarray, min_overlap: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Find the longest matches of suffixes [N, suffix] in any corpus.

    Matches shorter than all thresholds count as none.

    Returns:
      Lengths [N] in tokens; a document [N] with each match, counted over the corpora in order, or −1; and `tokens`, or
      `text` if a corpus has another tokenizer.
    """
    min_length = min(*THRESHOLDS, min_overlap, suffixes.shape[1])
    source, queries, first = hub.open_model(model), RaggedTokens.from_list(suffixes), 0
    lengths, documents, matched_on = np.zeros(len(suffixes), np.int64), np.full(len(suffixes), -1), "tokens"
    for corpus in corpora:
        text: TokenSource = corpus
        if corpus.manifest["tokenizer_fingerprint"] != source.tokenizer_fingerprint:
            text, matched_on = LazilyTokenized(corpus.iter_texts, source.tokenizer), "text"
        found = longest_overlaps(queries, text, min_length=min_length)
        is_longer = found.length > lengths
        lengths = np.where(is_longer, found.length, lengths)
        documents = np.where(is_longer, found.text_doc + first, documents)
        first += len(corpus)
    return lengths, documents, matched_on


def classify(lengths: np.ndarray, suffix: int, min_overlap: int) -> np.ndarray:
    """Return the class [N] of each sequence from its match length."""
    return np.where(lengths >= suffix, "seen", np.where(lengths >= min_overlap, "partial", "held_out"))


def duplicate_buckets(duplicates: np.ndarray) -> dict[str, np.ndarray]:
    """Return the members, bool [N], of buckets 0, 1, 2, 3–4 …."""
    buckets: dict[str, np.ndarray] = {}
    low, high = 0, 0
    while low <= int(duplicates.max(initial=-1)):
        members = (duplicates >= low) & (duplicates <= high)
        if members.any():
            buckets[str(low) if low == high else f"{low}-{high}"] = members
        low, high = high + 1, max(1, 2 * high)
    return buckets


def _tabulate_tokens(
    ref: str, window: PromptWindow, sets: Mapping[str, ExtractionSet], results: Sequence[dict[str, np.ndarray]]
) -> dict[str, pa.Table]:
    """Remove the scores of tokens from the results, and tabulate them."""
    model = hub.open_model(ref)
    suffixes = np.concatenate([one.tokens[:, window.prefix :] for one in sets.values()])
    texts = iter(model.tokenizer.batch_decode(suffixes.tolist(), clean_up_tokenization_spaces=False))
    documents = [(name, i, next(texts)) for name, one in sets.items() for i in range(len(one.tokens))]
    columns = (np.concatenate([one.pop(f"token_{n}").reshape(-1) for one in results]) for n in TokenScores._fields)
    lengths = np.full(len(suffixes), window.suffix)
    scored = suffixes.reshape(-1), TokenScores(*columns)
    return {"tokens": tabulate_records(model, model.tokenizer, documents, lengths, *scored)}


def _make_table(measured: Mapping[str, np.ndarray], sequences: ExtractionSet) -> pa.Table:
    ids = {"sequence": np.arange(len(sequences.tokens)), "index": sequences.sequence_id}
    if sequences.duplicates is not None:
        ids["duplicates"] = sequences.duplicates
    return pa.table({**ids, **measured})
