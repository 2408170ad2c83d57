"""Contrasts that separate forgetting from damage, and being seen from selection (docs/study.md).

Any change of the weights breaks some greedy reproductions. Forgetting is a larger loss than that of controls with as
much damage: weight noise (`judge_decoupling`), or the base's own greedy continuations of text that no model was trained
on, which it reproduces by construction (`compare_with_matched`). A model emits what it memorized best, so seen −
held-out within one student is confounded by selection. `swap_effect` compares every sequence with itself.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain import evals, hub
from jax_selftrain.config import ExtractConfig
from jax_selftrain.corpus import LazilyTokenized
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.sampling import SamplingParams, generate
from jax_selftrain.stats import estimators
from jax_selftrain.stats.estimators import Effect, Estimate
from jax_selftrain.stats.noninferiority import ALPHA, HEADLINE
from jax_selftrain.study.measure_names import Cells, group_cells, reference_text

CONTINUATIONS = "continuations.npy"
CALIPER = 0.25
"""Maximum difference of log p_z of a match, in nats; sequences without a match are counted."""
MIN_SEQUENCES = 50
"""Minimum number of sequences for a matched comparison, and for an interval of the swap estimator."""
DECOUPLED, NOT_SHOWN, NOT_TESTED = "decoupled", "not shown", "not tested"
FAILURES = {
    "exact_match": "exact match is not below the control's",
    "pz": "mean p_z is not below the control's",
    "pz_change": "mean p_z has not fallen",
}
"""The three differences, and the reason if one is not below zero."""
ROUNDING = 1e-12
"""A change of this size is none."""

Arrays = Mapping[str, np.ndarray]


def judge_decoupling(cells: Cells, controls: Sequence[str]) -> list[dict[str, Any]]:
    """Judge every student and treatment: verdict, reason and three differences.

    For each seed, the control is the arm in `controls` (of kind `noise`) with the smallest loss on held-out text that
    is not below the student's. A student is **decoupled** if over seeds (one-sided t, each at .05) exact match and mean
    p_z are below the control's and mean p_z has fallen. The loss is that of the text that the base predicts best.
    """
    found = []
    for (student, treatment), members in group_cells(cells).items():
        if treatment not in controls:
            noisy = [cell for cell in cells if cell["student"] == student and cell["treatment"] in controls]
            verdict, reason, differences = _judge_cells(members, noisy)
            entry = {"student": student, "treatment": treatment, "verdict": verdict, "reason": reason}
            found.append({**entry, **dict.fromkeys(FAILURES), "controls": [], **differences})
    return found


def _judge_cells(members: Cells, noisy: Cells) -> tuple[str, str, dict[str, Any]]:
    loss = reference_text({name: measure["before"]["value"] for name, measure in members[0]["measures"].items()})
    if loss is None or "exact_match" not in members[0]["measures"]:
        return NOT_TESTED, "there is no held-out text or no extraction set.", {}
    rows, chosen = [], []
    for cell in members:
        others = [one for one in noisy if one["seed"] == cell["seed"] and _after(one, loss) >= _after(cell, loss)]
        if not others:
            return NOT_TESTED, f"no control is as damaged as the student of seed {cell['seed']}.", {}
        control = min(others, key=lambda one: _after(one, loss))
        chosen.append(control["treatment"])
        gaps = [_after(cell, name) - _after(control, name) for name in ("exact_match", "pz")]
        rows.append([*gaps, cell["measures"]["pz"]["change"]["value"]])
    effects = {name: estimators.mean_effect(gaps) for name, gaps in zip(FAILURES, zip(*rows, strict=True), strict=True)}
    found: dict[str, Any] = {name: asdict(effect.estimate()) for name, effect in effects.items()}
    found["controls"] = list(dict.fromkeys(chosen))
    if len(members) < HEADLINE:
        return NOT_TESTED, f"{len(members)} seed{'s' * (len(members) > 1)}; a verdict needs {HEADLINE}.", found
    failed = [FAILURES[name] for name, effect in effects.items() if effect.p_less(-ROUNDING) > ALPHA]
    if failed:
        return NOT_SHOWN, f"{' and '.join(failed)}.", found
    return DECOUPLED, "extraction is below the controls at no less damage, and p_z falls.", found


def _after(cell: Mapping[str, Any], measure: str) -> float:
    return float(cell["measures"][measure]["after"]["value"])


def swap_effect(outcomes: Sequence[np.ndarray], groups: Sequence[np.ndarray]) -> Estimate | None:
    """Estimate the effect of being seen, from seeds with different corpora.

    Chance decides that the sequences of X∖Y are in the corpus of seed X but not in that of Y. The estimate is the mean
    over all pairs of seeds of

        ½ [ mean over X∖Y of (student of X − student of Y)  +  mean over Y∖X of (student of Y − student of X) ]

    where equal weights of both directions cancel a difference between the students. Its standard error is over
    sequences and speaks of these students.

    Args:
        outcomes: for each seed, the outcome of its student on every sequence [N].
        groups: for each seed, the overlap class of every sequence: `seen`, `partial` or `held_out` [N].

    Returns the estimate with a normal interval (none below 50 sequences); `n` counts the compared sequences. None if no
    pair of seeds has sequences in both directions.
    """
    values = [np.asarray(one, np.float64) for one in outcomes]
    total, pairs = 0.0, 0
    influence, is_used = np.zeros(values[0].size), np.zeros(values[0].size, bool)
    for pair in itertools.combinations(range(len(values)), 2):
        directions = [
            ((groups[i] == "seen") & (groups[j] == "held_out"), values[i] - values[j]) for i, j in (pair, pair[::-1])
        ]
        if not all(members.any() for members, _ in directions):
            continue
        pairs += 1
        for members, difference in directions:
            mean = float(difference[members].mean())
            total += mean / 2
            influence += np.where(members, (difference - mean) / members.sum(), 0.0) / 2
            is_used |= members
    if not pairs:
        return None
    n, value, error = int(is_used.sum()), total / pairs, math.inf
    if n >= MIN_SEQUENCES:
        error = math.sqrt(float(np.sum(influence**2))) / pairs * math.sqrt(n / (n - 1))
    return Effect(value, value, error, math.inf, n).estimate()


def naive_difference(outcomes: Sequence[np.ndarray], groups: Sequence[np.ndarray]) -> float | None:
    """Return seen − held-out within students, which is confounded by selection."""
    found = [
        float(np.mean(values[labels == "seen"]) - np.mean(values[labels == "held_out"]))
        for values, labels in zip(outcomes, groups, strict=True)
        if (labels == "seen").any() and (labels == "held_out").any()
    ]
    return float(np.mean(found)) if found else None


def make_control_continuations(options: ExtractConfig, texts: str, n: int, out: Path) -> None:
    """Write the base's greedy continuations of text as an extraction set, `out/continuations.npy`.

    Args:
        options: model, prefix, suffix, start token, mesh and dtype.
        texts: JSONL with `text`. Prompts are chunks of `prefix` tokens: the first chunk of every text, then the second,
            until there are `n`.
        n: maximum number of continuations.
        out: the folder to write to.

    Raises InputError if a file cannot be read, no text is long enough, or the lengths do not fit the model.
    """
    window = evals.make_window(options)
    (file,) = evals.load_texts([texts])
    encoded = LazilyTokenized(lambda: iter(file.documents), hub.open_model(options.model).tokenizer).token_batches()
    documents = [row for flat, lengths in encoded for row in np.split(flat, np.cumsum(lengths)[:-1])]
    ends = range(window.prefix, max(map(len, documents), default=0) + 1, window.prefix)
    rows = (row[end - window.prefix : end] for end in ends for row in documents if len(row) >= end)
    chunks = np.array(list(itertools.islice(rows, n)), np.int32)
    if not len(chunks):
        raise InputError(
            f"{texts}: no text has {window.prefix} tokens, the length of a prefix; shorten it, or give longer texts"
        )
    start = evals.find_start_tokens(options)
    model = hub.load_model(options.model, options.mesh, options.dtype, preset=options.preset)
    prompts = np.concatenate([np.tile(np.array(start, np.int32), (len(chunks), 1)), chunks], axis=1)
    greedy = SamplingParams(max_tokens=window.suffix, temperature=0)
    found = np.concatenate([chunks, np.array(generate(model, prompts.tolist(), greedy), np.int32)], axis=1)
    with atomic.commit_file(out / CONTINUATIONS) as path, path.open("wb") as handle:
        np.save(handle, found, allow_pickle=False)


def compare_with_matched(memory: tuple[Arrays, Arrays], unseen: tuple[Arrays, Arrays]) -> dict[str, Any]:
    """Compare reproduced sequences with equally probable continuations of unseen text.

    Less probable continuations break more easily, so each reproduced sequence is matched with the continuation whose
    log p_z under the base is nearest.

    Args:
        memory: `exact_match` [N] and `logprob` [N] of the sequences under the base and under the student.
        unseen: the same of the continuations.

    Returns `n`: matched sequences; `unmatched`: sequences without a match; `controls`: distinct continuations; for
    `exact_match` (the share that is kept) and `log_pz` (its change): `sequences`, `controls` and their `difference`, or
    None if `n` is less than `MIN_SEQUENCES`.
    """
    sides = []
    for before, after in (memory, unseen):
        kept = np.asarray(before["exact_match"], bool)
        logprob, new = (np.asarray(side["logprob"], np.float64)[kept] for side in (before, after))
        sides.append((logprob, {"exact_match": after["exact_match"][kept].astype(float), "log_pz": new - logprob}))
    (logprob, outcomes), (other, others) = sides
    found: dict[str, Any] = {"n": 0, "unmatched": len(logprob), "controls": 0, "exact_match": None, "log_pz": None}
    if len(other) < 2 or not len(logprob):
        return found
    order = np.argsort(other, kind="stable")
    right = np.clip(np.searchsorted(other[order], logprob), 1, len(order) - 1)
    nearer_left = logprob - other[order][right - 1] <= other[order][right] - logprob
    nearest = order[np.where(nearer_left, right - 1, right)]
    near = np.abs(other[nearest] - logprob) <= CALIPER
    found |= {"n": int(near.sum()), "unmatched": int((~near).sum()), "controls": len(np.unique(nearest[near]))}
    if found["n"] >= MIN_SEQUENCES:
        for name, values in outcomes.items():
            sequences, controls = float(values[near].mean()), float(others[name][nearest[near]].mean())
            found[name] = {"sequences": sequences, "controls": controls, "difference": sequences - controls}
    return found
