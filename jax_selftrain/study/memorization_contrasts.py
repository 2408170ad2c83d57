"""Contrasts that separate forgetting from damage, and being seen from selection (docs/study.md).

Any change of the weights breaks some greedy reproductions. Forgetting is a larger loss than that of controls: weight
noise of equal damage (`judge_decoupling`), or the base's own greedy continuations of text that no model was trained on,
which it reproduces by construction (`compare_with_matched`). A model emits what it memorized best, so seen − held-out
within one student is confounded by selection. `swap_effect` compares every sequence with itself.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jax_selftrain import evals, hub
from jax_selftrain.config import ExtractConfig
from jax_selftrain.corpus import LazilyTokenized
from jax_selftrain.errors import InputError
from jax_selftrain.io.tables import write_table
from jax_selftrain.sampling import SamplingParams, generate
from jax_selftrain.stats import estimators
from jax_selftrain.stats.estimators import Effect, Estimate
from jax_selftrain.stats.noninferiority import HEADLINE
from jax_selftrain.study.contrasts import CellKey, ItemChanges, contrast_effect
from jax_selftrain.study.measure_names import SEQUENCES, Cells, group_cells
from jax_selftrain.study.preregistration import VERDICT_ALPHA

CONTINUATIONS = "continuations.parquet"
CALIPER = 0.25
"""Maximum difference of log p_z of a match, in nats; sequences without a match are counted."""
MIN_SEQUENCES = 50
"""Minimum number of sequences for a matched comparison, and for an interval of the swap estimator."""
DECOUPLED, NOT_SHOWN, NOT_TESTED = "decoupled", "not shown", "not tested"
FAILURES = {
    "accuracy": "capability is not shown to be preserved within 1 point",
    "exact_match": "held-out exact match is not below the control's",
    "pz": "held-out mean p_z is not below the control's",
    "pz_change": "held-out mean p_z has not fallen",
}
"""The four conditions, and the reason if one is not shown."""
MARGIN = 0.01
"""Largest loss of chance-normalized accuracy that counts as preserved."""
DAMAGE_RATIO = 1.25
"""Largest ratio of the damage of a control to that of the student, either way."""
BRACKET_RATIO = 5.0
"""Largest ratio of the damages of two controls between which a control of equal damage is interpolated."""
ROUNDING = 1e-12
"""A change of this size is none."""

Arrays = Mapping[str, np.ndarray]


def judge_decoupling(
    cells: Cells,
    controls: Sequence[str],
    damage_texts: Mapping[str, str],
    items: ItemChanges,
    classes: Mapping[CellKey, np.ndarray],
) -> list[dict[str, Any]]:
    """Judge every student and treatment: verdict, reason and four differences.

    A student is **decoupled** if its capability is preserved, held-out exact match and mean p_z are below those of
    weight noise of equal damage, and held-out mean p_z has fallen (each at .025). Held-out sequences are those that its
    corpus does not contain; the controls are measured on the same ones. For each seed, the control is the arm whose
    damage is that of the student within a ratio of 1.25, or is interpolated between two arms.

    Args:
      cells: of all students.
      controls: names of the arms of kind `noise`.
      damage_texts: by student, the text whose bits per byte measure damage; empty: unknown.
      items: changes of exact match and p_z of every sequence.
      classes: overlap class of every sequence, of the cells with a corpus.
    """
    found = []
    for (student, treatment), members in group_cells(cells).items():
        if treatment not in controls:
            noisy = [cell for cell in cells if cell["student"] == student and cell["treatment"] in controls]
            verdict, reason, differences = _judge_cells(members, noisy, f"text/{damage_texts[student]}", items, classes)
            entry = {"student": student, "treatment": treatment, "verdict": verdict, "reason": reason}
            found.append({**entry, **dict.fromkeys(FAILURES), "controls": [], **differences})
    return found


def _judge_cells(
    members: Cells,
    noisy: Cells,
    damage_text: str,
    items: ItemChanges,
    classes: Mapping[CellKey, np.ndarray],
) -> tuple[str, str, dict[str, Any]]:
    measures = members[0]["measures"]
    keys = [_cell_key(cell) for cell in members]
    problems = {
        "there is no extraction set.": "exact_match" not in measures,
        "the text that measures damage is not known: set `damage_text`.": damage_text not in measures,
        "there is no eligible task to show that capability is preserved.": "accuracy" not in measures,
        "it has no corpus, so no sequence is held out.": any(key not in classes for key in keys),
    }
    for problem, is_present in problems.items():
        if is_present:
            return NOT_TESTED, problem, {}
    rows, chosen, fewest = [], [], math.inf
    for cell, key in zip(members, keys, strict=True):
        damage = _damage(cell, damage_text)
        others = {_cell_key(one): _damage(one, damage_text) for one in noisy if one["seed"] == cell["seed"]}
        weights, held_out = match_damage(damage, others), classes[key] == "held_out"
        if not weights or not held_out.any():
            problem = "has no control of equal damage" if held_out.any() else "has no held-out sequence"
            return NOT_TESTED, f"the student of seed {cell['seed']} {problem}.", {}
        chosen += [treatment for _, treatment, _ in weights]
        fewest = min(fewest, int(held_out.sum()))
        after = {name: items[key][name][SEQUENCES][held_out].mean() for name in ("exact_match", "pz")}
        gaps = [
            after[name] - sum(weight * items[one][name][SEQUENCES][held_out].mean() for one, weight in weights.items())
            for name in after
        ]
        rows.append([*gaps, after["pz"]])
    names = [name for name in FAILURES if name != "accuracy"]
    effects = {
        name: estimators.mean_effect(gaps, math.sqrt(2) / fewest if name == "exact_match" else 0.0)
        for name, gaps in zip(names, zip(*rows, strict=True), strict=True)
    }
    accuracy = contrast_effect(members, {keys[0][:2]: 1.0}, "accuracy", items)
    assert accuracy is not None
    found: dict[str, Any] = {name: asdict(effect.estimate()) for name, effect in effects.items()}
    found |= {"accuracy": asdict(accuracy.estimate()), "controls": list(dict.fromkeys(chosen))}
    if len(members) < HEADLINE:
        return NOT_TESTED, f"{len(members)} seed{'s' * (len(members) > 1)}; a verdict needs {HEADLINE}.", found
    p_values = {name: effect.p_less(-ROUNDING) for name, effect in effects.items()}
    p_values["accuracy"] = accuracy.p_greater(-MARGIN)
    failed = [words for name, words in FAILURES.items() if p_values[name] > VERDICT_ALPHA]
    if failed:
        return NOT_SHOWN, f"{' and '.join(failed)}.", found
    return DECOUPLED, "capability is preserved, and held-out text is lost that equal damage does not take.", found


def match_damage(damage: float, controls: Mapping[CellKey, float]) -> dict[CellKey, float]:
    """Return the weights of the controls whose changes sum to this damage.

    The nearest control within `DAMAGE_RATIO`, times the rest of the ratio: a student with 10 % more damage than its
    control would otherwise be called decoupled for it. Else the two nearest ones, below and above, within
    `BRACKET_RATIO` of each other. Empty if there are none, or without damage.
    """
    ratios = {one: other / damage for one, other in controls.items() if other > 0} if damage > 0 else {}
    nearest = min(ratios, key=lambda one: abs(math.log(ratios[one])), default=None)
    if nearest is None:
        return {}
    if 1 / DAMAGE_RATIO <= ratios[nearest] <= DAMAGE_RATIO:
        return {nearest: 1 / ratios[nearest]}
    below = max((one for one in ratios if ratios[one] < 1), key=lambda one: ratios[one], default=None)
    above = min((one for one in ratios if ratios[one] > 1), key=lambda one: ratios[one], default=None)
    if below is None or above is None or ratios[above] > BRACKET_RATIO * ratios[below]:
        return {}
    share = (1 - ratios[below]) / (ratios[above] - ratios[below])
    return {below: 1 - share, above: share}


def _cell_key(cell: Mapping[str, Any]) -> CellKey:
    return cell["student"], cell["treatment"], cell["seed"]


def _damage(cell: Mapping[str, Any], text: str) -> float:
    """Return the rise of bits per byte."""
    return float(cell["measures"][text]["change"]["value"]) if text in cell["measures"] else 0.0


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
    write_table(out / CONTINUATIONS, pa.table({"tokens": list(found)}))


def find_loops(tokens: np.ndarray) -> np.ndarray:
    """Find rows whose second half repeats itself, bool [N].

    Small models often continue greedily in loops, which damage hardly breaks: they are no controls of memory.

    Args:
        tokens: int [N, S]. The period of a loop is at most S / 4.
    """
    length = tokens.shape[1]
    tail = tokens[:, length - length // 2 :]
    periods = range(1, length // 4 + 1)
    return np.any([(tail[:, p:] == tail[:, :-p]).all(axis=1) for p in periods] or [np.zeros(len(tokens), bool)], axis=0)


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
