"""The results of a study as plain data: `results.json`, the only input of the report.

`run` is a study with one student, one source and one seed: there is one format, "jax-selftrain results" version 4.
COMING (this docstring describes what `run_study` is about to write; the code below follows):

    format, version, title
    config                StudyConfig without out, mesh, dry_run
    design                models [{name, lineage, data, data_order, initialization, tokenizer, architecture, size,
                          family, parameters, layers, width, vocabulary, fingerprint}], students, sources
    base_ability          {model: {task or text: accuracy or bits per byte}}                (was `strength`)
    cells [               student, treatment (an arm, or "source NAME"; was "text of NAME"), source, seed,
                          corpus (key into `corpora` or null), identical
      tasks, macro, texts as before
      extraction          null or {n, prefix, suffix, min_overlap, classes, groups, discoverable, thresholds}
      probes              {name: compared sequences}: formats, "after_relearning"            (was `views`)
      fragility           null or {n, unmatched, controls, exact_match, log_pz: {sequences, controls, difference}}
      training            null or {steps, rows, targets, log {step, loss, learning_rate, grad_norm},
                          evaluations: null or {step, measures [{name, n, values}]}}         (was `curve`)
      proxies             null or {name: number}
      measures            {name: {before, after, change}}: accuracy, log_odds, task/NAME, log_odds/NAME, text/NAME,
                          exact_match, log_pz, pz and /held_out /partial /seen /H "/group NAME" "/format NAME"
                          /after_relearning                         (was "/asked NAME", "/relearned") ]
    effects               as before
    interaction           as before
    claims                ClaimConfig + verdict, reason, evidence_level (was `standing`), post_hoc, seeds, effect, p,
                          p_adjusted                                                         (was `verdicts`)
    swap_effects          as before                                                          (was `swaps`)
    decontamination       [{student, decontaminated, size_matched, measure, difference, seeds, n}] (was `scrubbed`)
    fragility             as before, with the names above
    aa_repeats            [{student, repeat, n, flips, log_pz}]                              (was `again`, `way`)
    decoupling, proxies   as before
    corpora {key:         label, samples, tokens, sampling_params (null for real text), seed, statistics, contamination,
                          retokenized, retokenization_mismatches, examples [{sample_id, text, tokens, finish_reason,
                          logprob}] }
    stages, versions      as before

Arms of kind `scrubbed` become `decontaminated`. Training has no early stopping. `measure_names.py` keeps its constants.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import scipy

from jax_selftrain import hub
from jax_selftrain.config import ExtractConfig, RunConfig, yaml_io
from jax_selftrain.corpus import FINISH_REASONS, Corpus, open_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.evals import load_score_result, n_p_discoverable
from jax_selftrain.evals.overlap_classes import CLASSES
from jax_selftrain.evals.result_files import read_jsonl
from jax_selftrain.io import atomic
from jax_selftrain.stats import estimators
from jax_selftrain.stats.noninferiority import benjamini_hochberg
from jax_selftrain.study.curve_summary import summarize_curve
from jax_selftrain.study.measure_names import HELD_OUT
from jax_selftrain.study.paired_results import (
    Pair,
    describe_task,
    describe_text,
    pair_results,
    paired_means,
    paired_proportions,
)

FORMAT = "jax-selftrain results"
VERSION = 1
EXAMPLES = 6
"""Samples shown in the report."""
DIVERSITY_TOKENS = 2**22
"""Distinct n-grams are counted over at most so many tokens: the number depends on how much text is looked at."""

_STOP = FINISH_REASONS.index("stop")

Arrays = dict[str, np.ndarray]


def collect_round(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Everything that the finished stages in `folder` have to say, with paired differences and intervals.

    Raises:
        InputError: a stage's output is missing or damaged, or base and student were not asked the same.
    """
    corpus = open_corpus(folder / "corpus")
    training = atomic.read_json(folder / "train" / "run.json")
    options = yaml_io.to_dict(config)
    del options["out"]
    found: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "title": config.title or default_title(config),
        "config": options,
        "base": {"ref": config.model, **_architecture(config.model), "fingerprint": training["model"]["fingerprint"]},
        "source": {"is_base": not config.source, **corpus.manifest["source"]},
        "corpus": describe_corpus(corpus),
        "training": _training(folder / "train", training),
        "texts": [],
        "tasks": [],
        "macro": None,
        "extraction": None,
        "evaluations": summarize_curve(
            read_records(folder / "train" / "curve.jsonl"), training.get("evaluation", {}).get("measured", ())
        ),
        "identical": True,
        "fingerprints": {"corpus": corpus.fingerprint, "tokenizer": corpus.manifest["tokenizer_fingerprint"]},
        "versions": {"training": training["versions"]},
    }
    if config.score.tasks or config.score.texts:
        base, student = (load_score_result(str(folder / "score" / f"{who}.json")) for who in ("base", "student"))
        found["versions"] |= {
            "scoring the base": base.result["versions"],
            "scoring the student": student.result["versions"],
        }
        found["fingerprints"] |= {
            "base": base.fingerprint("model"),
            "student": student.fingerprint("model"),
            "files": base.result["fingerprints"]["files"],
        }
        pairs = pair_results(base, student)
        found["identical"] &= all(pair.identical() for pair in pairs.values())
        tasks = [pair for pair in pairs.values() if pair.base.kind != "text"]
        found["tasks"] = compare_tasks(tasks)
        found["macro"] = macro_change(tasks) if len(tasks) > 1 else None
        found["texts"] = [describe_text(pair) for pair in pairs.values() if pair.base.kind == "text"]
    if config.extract.sequences:
        base, student = (atomic.read_json(folder / "extract" / f"{who}.json") for who in ("base", "student"))
        found["fingerprints"] |= {
            "base": base["fingerprints"]["model"],
            "student": student["fingerprints"]["model"],
            "sequences": base["fingerprints"]["sequences"],
        }
        found["versions"] |= {"extraction": student["versions"]}
        before, after = (read_table(folder / "extract" / f"{who}.sequences.parquet") for who in ("base", "student"))
        check_same_keys(before, after, ("sequence", "overlap", "class"), folder / "extract")
        found["identical"] &= np.array_equal(before["logprob"], after["logprob"])
        found["extraction"] = {
            "prefix": base["prefix"],
            "suffix": base["suffix"],
            "overlap": config.extract.min_overlap,
            **compare_extraction(before, after, duplicate_groups(config.extract, before["sequence"].size)),
        }
    return found


def default_title(config: RunConfig) -> str:
    """Headline of a round that was given none."""
    student = Path(config.model).name
    if not config.source:
        return f"{student}, trained on its own text"
    return f"{student}, trained on text by {Path(config.source).name}"


# Tasks and texts ------------------------------------------------------------------------------------------------


def compare_tasks(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Each task before and after; p-values also after Benjamini and Hochberg's correction over the tasks."""
    entries = [describe_task(pair) for pair in pairs]
    adjusted = benjamini_hochberg([entry["flips"]["mcnemar_p"] for entry in entries])
    return [entry | {"flips": {**entry["flips"], "q": q}} for entry, q in zip(entries, adjusted, strict=True)]


def macro_change(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Averages over tasks: accuracy, plain and chance-normalized ((accuracy − chance) / (1 − chance)), and log-odds of
    the right choice, over the tasks that have choices (None where none has)."""
    chances = np.array([pair.base.chance_accuracy or 0.0 for pair in pairs])
    effects = [estimators.paired_proportion_effect(*pair.right, pair.clusters) for pair in pairs]
    levels = [[pair.right[side].astype(np.float64) for pair in pairs] for side in (0, 1)]
    normed = [[(right - chance) / (1 - chance) for right, chance in zip(side, chances, strict=True)] for side in levels]
    return {
        "tasks": len(pairs),
        "n": sum(pair.base.count for pair in pairs),
        "accuracy": {
            "before": asdict(estimators.macro_mean(levels[0])),
            "after": asdict(estimators.macro_mean(levels[1])),
            "change": asdict(estimators.macro_effect(effects).estimate()),
        },
        "chance_normalized": {
            "before": asdict(estimators.macro_mean(normed[0])),
            "after": asdict(estimators.macro_mean(normed[1])),
            "change": asdict(estimators.macro_effect(effects, 1 / (1 - chances)).estimate()),
        },
        "log_odds": _macro_log_odds(pairs),
    }


def _macro_log_odds(pairs: Sequence[Pair]) -> dict[str, Any] | None:
    both = [
        (old, new)
        for before, after in pairs
        if (old := before.log_odds) is not None and (new := after.log_odds) is not None
    ]
    if not both:
        return None
    sides = {
        "before": [old for old, _ in both],
        "after": [new for _, new in both],
        "change": [new - old for old, new in both],
    }
    return {side: asdict(estimators.macro_mean(values)) for side, values in sides.items()}


# Extraction -----------------------------------------------------------------------------------------------------


def compare_extraction(before: Arrays, after: Arrays, groups: Sequence[str] | None) -> dict[str, Any]:
    """All sequences, and by class and (where the set names them) by group: exact match, p_z, token accuracy."""
    everything = np.ones(before["sequence"].size, bool)
    parts = {"all": everything}
    if "class" in before:
        parts |= {name: before["class"] == name for name in CLASSES}
    if HELD_OUT in before:
        parts[HELD_OUT] = before[HELD_OUT]
    of_group = np.array(groups or [])
    old, new = (n_p_discoverable(side["logprob"]) for side in (before, after))
    return {
        "n": everything.size,
        "classes": {name: compare_sequences(before, after, members) for name, members in parts.items()},
        "groups": [
            {"name": name, **compare_sequences(before, after, of_group == name)} for name in dict.fromkeys(groups or [])
        ],
        "discoverable": [
            {"draws": int(draws), "p": float(p), **paired_proportions(old[key], new[key])}
            for key in old
            for draws, p in (key.split("@"),)
        ],
    }


def compare_sequences(before: Arrays, after: Arrays, members: np.ndarray) -> dict[str, Any]:
    """What `members` (bool [N]) of some sequences are before and after; only `n` where there are none.

    `logprob` is the mean of log p_z, which sequences that are hopeless dominate; `pz` that of p_z: the share that one
    draw says.
    """
    if not members.any():
        return {"n": 0}
    old, new = ({name: side[name][members] for name in side} for side in (before, after))
    exact = old["exact_match"], new["exact_match"]
    return {
        "n": int(members.sum()),
        "exact_match": paired_proportions(*exact),
        "flips": asdict(estimators.mcnemar_table(*exact)),
        **{
            name: paired_means(old[name], new[name])
            for name in ("token_accuracy", "teacher_forced_accuracy", "logprob")
            if name in old
        },
        "pz": paired_means(np.exp(old["logprob"]), np.exp(new["logprob"])),
    }


def duplicate_groups(config: ExtractConfig, n: int) -> list[str] | None:
    """The `group` column of a JSONL extraction set, if every line has one."""
    path = Path(config.sequences)
    if not path.is_file() or path.suffix in (".npy", ".parquet") or config.offset:
        return None
    groups = [row.get("group") for _, row in read_jsonl(path, config.limit)]
    if len(groups) != n:
        raise InputError(f"{path}: has changed since it was examined; start the round anew with another --out")
    return [str(group) for group in groups] if all(group is not None for group in groups) else None


# Corpus and training --------------------------------------------------------------------------------------------


def describe_corpus(corpus: Corpus) -> dict[str, Any]:
    """Lengths, endings, diversity and probability of a corpus, and some of its samples drawn by a hash of their ids."""
    tokens, offsets, reasons = corpus.token_arrays()
    lengths = np.diff(offsets)
    stopped = reasons == _STOP
    seed = corpus.manifest["seed"]
    shown = set(hash_sample(len(corpus), EXAMPLES, seed))
    logprobs, examples = np.empty(len(corpus)), []
    for place, sample in enumerate(corpus.iter_samples()):
        logprobs[place] = sample.logprob
        if sample.sample_id in shown:
            examples.append(
                {
                    "sample_id": sample.sample_id,
                    "text": sample.text,
                    "tokens": len(sample.tokens),
                    "finish_reason": sample.finish_reason,
                    "logprob": float(sample.logprob),
                }
            )
    edges = _length_edges(int(lengths.max()))
    documents = [tokens[start:stop].tobytes() for start, stop in pairwise(offsets)]
    return {
        "kind": corpus.manifest["kind"],
        "samples": len(corpus),
        "tokens": corpus.n_tokens,
        "policy": corpus.manifest["policy"],
        "seed": seed,
        "stopped": asdict(estimators.proportion(stopped)),
        "length": asdict(estimators.mean(lengths)),
        "length_histogram": {
            "edges": edges,
            "stop": np.histogram(lengths[stopped], edges)[0].tolist(),
            "length": np.histogram(lengths[~stopped], edges)[0].tolist(),
        },
        "surprise_per_token": asdict(estimators.ratio_of_sums(-logprobs, lengths)),
        "unigram_entropy": _unigram_entropy(tokens),
        "distinct": distinct_ngrams(tokens[:DIVERSITY_TOKENS], offsets),
        "repeated_samples": len(documents) - len(set(documents)),
        "retokenisation_mismatches": corpus.manifest["retokenisation_mismatches"],
        "examples": sorted(examples, key=lambda example: example["sample_id"]),
    }


def distinct_ngrams(tokens: np.ndarray, offsets: np.ndarray, longest: int = 4) -> dict[str, dict[str, int]]:
    """How many different n-grams there are among all n-grams that lie within one document, n = 1 … `longest`.

    Args:
        tokens: int [N], documents one after the other (possibly cut at the end).
        offsets: int [documents + 1], where each document begins and ends.
    """
    document = np.searchsorted(offsets, np.arange(tokens.size), side="right")
    found: dict[str, dict[str, int]] = {}
    names = np.zeros(tokens.size, np.int64)  # names[i]: number of the n-gram that begins at i, within its n
    for n in range(1, longest + 1):
        count = tokens.size - n + 1
        if count < 1:
            break
        grams = names[:count] * (int(tokens.max()) + 1) + tokens[n - 1 :]
        names = np.unique(grams, return_inverse=True)[1]
        inside = document[:count] == document[n - 1 :]
        found[str(n)] = {"distinct": int(np.unique(names[inside]).size), "total": int(inside.sum())}
    return found


def _training(run: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    lines = read_records(run / "metrics.jsonl")
    early = atomic.read_json(run / "model" / "model.json")["metadata"].get("early_stopping")
    trained = early["trained_steps"] if early else description["steps"]
    return {
        "steps": description["steps"],
        "rows": description["rows"],
        "targets": sum(int(line["tokens"]) for line in lines) if len(lines) == trained else None,
        "curve": {key: [line[key] for line in lines] for key in ("step", "loss", "learning_rate", "grad_norm")},
        **({"early_stopping": early} if early else {}),
    }


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none where it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _architecture(ref: str) -> dict[str, Any]:
    from jax_selftrain.models import abstract_params

    config, raw = hub.read_config(ref)
    shapes = _flatten(abstract_params(config))
    return {
        "family": raw["model_type"],
        "parameters": sum(prod(leaf.shape) for leaf in shapes),
        "layers": config.num_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
    }


def _flatten(tree: Any) -> list[Any]:
    if isinstance(tree, Mapping):
        return [leaf for value in tree.values() for leaf in _flatten(value)]
    return [tree]


def _length_edges(longest: int) -> list[float]:
    """Edges, between whole numbers, of up to 32 equally wide bins that cover 1 … `longest`."""
    width = max(1, -(-longest // 32))
    return [0.5 + width * i for i in range(-(-longest // width) + 1)]


def _unigram_entropy(tokens: np.ndarray) -> float:
    counts = np.unique(tokens, return_counts=True)[1]
    return float(scipy.stats.entropy(counts))


def hash_sample(n: int, k: int, seed: int | None) -> list[int]:
    """k of the ids 0 … n−1, the same for everybody and chosen by nobody."""
    return sorted(range(n), key=lambda i: hashlib.sha256(f"shown in the report {seed} {i}".encode()).digest())[:k]


# Tables of requests ---------------------------------------------------------------------------------------------


def read_table(path: Path) -> Arrays:
    """The columns of a Parquet file. Raises InputError if it cannot be read."""
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it and run the same command again") from None
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def check_same_keys(before: Arrays, after: Arrays, keys: Sequence[str], folder: Path) -> None:
    for key in keys:
        if not np.array_equal(before[key], after[key]):
            raise InputError(f"{folder}: base and student were not asked the same ({key} differs); delete this folder")
