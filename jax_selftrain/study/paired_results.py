"""Paired results of two models: levels and paired changes.

Studies use Student's t and linearized ratios for intervals of means; `compare` uses the bootstrap.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np

from jax_selftrain.errors import InputError
from jax_selftrain.evals.item_results import ItemResults, ScoreResult, Split
from jax_selftrain.stats import estimators
from jax_selftrain.stats.estimators import Estimate, mean_and_stderr, ratio_and_stderr
from jax_selftrain.study.preregistration import refuse_first

OptionalArray = np.ndarray | None
Interval = Callable[[np.ndarray, OptionalArray, OptionalArray], Estimate]
"""(numerators, denominators or None for a mean, clusters or None) → estimate."""

ABOVE_CHANCE, CEILING = 4.0, 0.95
"""A task is eligible for the macro average if the base is more than 4 standard errors above chance and below 95 %."""
AT_CHANCE = "the base is not 4 standard errors above chance"
"""Reason of a task that the base cannot do, so that no loss can show."""


class Pair(NamedTuple):
    """Results of the base and the student for the same documents."""

    base: ItemResults
    student: ItemResults

    @property
    def right(self) -> tuple[np.ndarray, np.ndarray]:
        """Correct answers of a task, bool [n], before and after."""
        return self.columns("acc")

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing; 0 without choices."""
        return self.base.chance_accuracy or 0.0

    @property
    def chance_scale(self) -> float:
        """Factor of chance-normalized changes."""
        return 1 / (1 - self.chance)

    def columns(self, name: str) -> tuple[Any, Any]:
        """Return an array of `ItemResults` [n], before and after."""
        return getattr(self.base, name), getattr(self.student, name)

    def identical(self) -> bool:
        """Return True if all results are bitwise equal."""
        return all(np.array_equal(*self.columns(name)) for name in ("loglikelihood", "acc", "acc_norm", "log_odds"))

    def part(self, split: Split) -> "Pair":
        """Return the documents of a split. Raises InputError if there are none."""
        found = Pair(self.base.select(split), self.student.select(split))
        if not found.base.count:
            raise InputError(
                f"{self.base.name}: none of its {self.base.count:,} documents is in the {split} split; use split all"
            )
        return found


def pair_results(base: ScoreResult, student: ScoreResult) -> dict[str, Pair]:
    """Pair the tasks and texts of two results by name.

    Raises InputError if the two were scored on different documents (the message names the difference).
    """
    where = f"{base.path} and {student.path}"
    for one, other in ((base, student), (student, base)):
        for name in one.items:
            if name not in other.items:
                raise InputError(
                    f"{other.path}: {name} was not scored, but it was in {one.path}; score both on the same files"
                )
    pairs = {name: Pair(items, student.items[name]) for name, items in base.items.items()}
    for name, (before, after) in pairs.items():
        old, new = (scored.result["fingerprints"]["files"][name] for scored in (base, student))
        counts = f"{before.count:,} and {after.count:,}"
        same_items = np.array_equal(before.item_hash, after.item_hash) and before.kind == after.kind
        problems = {
            f"{name} differs ({old[:8]}… and {new[:8]}…); score both on the same file": old != new,
            f"{name} has {counts} documents; score both with the same limit": before.count != after.count,
            f"{name} has different questions although its file is the same; score both again": not same_items,
            f"different parts of {name} were scored; score both with the same --text-max-tokens, or without it if "
            "their tokenizers differ": not np.array_equal(before.bytes, after.bytes),
        }
        refuse_first(where, problems)
    return pairs


def item_changes(pairs: Sequence[Pair], split: Split) -> dict[str, dict[str, np.ndarray]]:
    """Return the changes of items, by measure and task.

    The mean of a task's array, times its weight, is its part of the measure's change. A cluster counts as one item, and
    the arrays of ratios and of clusters of different sizes are linearized.
    """
    parts = {pair.base.name: pair.part(split) for pair in pairs}
    found: dict[str, dict[str, np.ndarray]] = {}
    average: dict[str, dict[str, np.ndarray]] = {"accuracy": {}, "log_odds": {}}
    for pair in pairs:
        name, part = pair.base.name, parts[pair.base.name]
        if pair.base.kind == "text":
            old, new = part.columns("loglikelihood")
            found[f"text/{name}"] = {name: _linearize((old - new) / np.log(2), part.base.bytes, None)}
            continue
        cluster, is_eligible = part.base.cluster, ineligibility_reason(pair) is None
        old, new = part.right
        changes = _linearize(new.astype(np.float64) - old, None, cluster)
        found[f"task/{name}"] = {name: changes}
        if is_eligible:
            average["accuracy"][name] = part.chance_scale * changes
        if pair.base.kind == "choice":
            old, new = part.columns("log_odds")
            found[f"log_odds/{name}"] = {name: _linearize(new - old, None, cluster)}
            average["log_odds"] |= found[f"log_odds/{name}"] if is_eligible else {}
    means = {measure: {name: one / len(tasks) for name, one in tasks.items()} for measure, tasks in average.items()}
    return found | {measure: tasks for measure, tasks in means.items() if tasks}


def _linearize(changes: np.ndarray, denominators: OptionalArray, clusters: OptionalArray) -> np.ndarray:
    """Linearize a ratio of sums.

    Returns values [units] with its mean and the variance of its linearization.
    """
    sums = [changes.astype(np.float64), np.ones(changes.size) if denominators is None else denominators]
    if clusters is not None:
        sums = [estimators.sum_by_cluster(values, clusters) for values in sums]
    above, below = sums
    ratio = above.sum() / below.sum()
    return ratio + (above - ratio * below) * (below.size / below.sum())


def ineligibility_reason(pair: Pair) -> str | None:
    """Return why a task is not in the macro average, or None.

    The base alone decides, over all items. Clustered questions have the larger of the standard errors over clusters and
    over items.
    """
    right = pair.right[0].astype(np.float64)
    value, error = mean_and_stderr(right)
    if pair.base.cluster is not None and error is not None:
        sums, sizes = (estimators.sum_by_cluster(values, pair.base.cluster) for values in (right, np.ones_like(right)))
        clustered = ratio_and_stderr(sums, sizes)[1]
        error = None if clustered is None else max(error, clustered)
    if error is None or value <= pair.chance + ABOVE_CHANCE * error:
        return AT_CHANCE
    return "the base is at 95 % or above" if value >= CEILING else None


def describe_task(pair: Pair, interval: Interval | None = None) -> dict[str, Any]:
    """Compare accuracy and log-odds of a task; `interval` estimates changes of means."""
    before, clusters = pair.base, pair.base.cluster
    entry: dict[str, Any] = {
        "name": before.name,
        "kind": before.kind,
        "n": before.count,
        "chance": before.chance_accuracy,
        "accuracy": paired_proportions(*pair.right, clusters),
        "flips": asdict(estimators.mcnemar_table(*pair.right)),
    }
    if before.kind == "generation":
        return entry
    if before.kind == "last_word":
        return entry | {"word_loglikelihood": paired_means(*pair.columns("loglikelihood"), None, clusters, interval)}
    return entry | {
        "accuracy_norm": paired_proportions(*pair.columns("acc_norm"), clusters),
        "log_odds": paired_means(*pair.columns("log_odds"), None, clusters, interval),
    }


def describe_text(pair: Pair, interval: Interval | None = None) -> dict[str, Any]:
    """Compare nats per token and bits per byte of a text file.

    Nats per token are None if the tokenizers differ.
    """
    before, after = pair
    old, new = -before.loglikelihood, -after.loglikelihood
    same_tokens = np.array_equal(before.tokens, after.tokens)
    return {
        "name": before.name,
        "documents": before.count,
        "tokens": int(before.tokens.sum()) if same_tokens else None,
        "bytes": int(before.bytes.sum()),
        "nll": paired_means(old, new, before.tokens, None, interval) if same_tokens else None,
        "bits_per_byte": paired_means(old / np.log(2), new / np.log(2), before.bytes, None, interval),
        "documents_better": int((new < old).sum()),
        "documents_worse": int((new > old).sum()),
    }


def average_tasks(pairs: Sequence[Pair]) -> dict[str, Any] | None:
    """Average accuracy, chance-normalized accuracy and log-odds of the right choice over tasks.

    Chance-normalized: (accuracy − chance) / (1 − chance). Log-odds are None if no task has choices; without tasks, all
    is None.
    """
    if not pairs:
        return None
    effects = [estimators.paired_proportion_effect(*pair.right, pair.base.cluster) for pair in pairs]
    normalized = [[(right - pair.chance) / (1 - pair.chance) for right in pair.right] for pair in pairs]
    scales = [pair.chance_scale for pair in pairs]
    odds = [pair.columns("log_odds") for pair in pairs if pair.base.kind == "choice"]
    return {
        "tasks": len(pairs),
        "n": sum(pair.base.count for pair in pairs),
        "accuracy": _macro_sides(
            [pair.right for pair in pairs], estimators.macro_effect(effects).estimate(), [(0.0, 1.0)] * len(pairs)
        ),
        "chance_normalized": _macro_sides(
            normalized,
            estimators.macro_effect(effects, scales).estimate(),
            [(-pair.chance / (1 - pair.chance), 1.0) for pair in pairs],
        ),
        "log_odds": _macro_sides(odds, estimators.macro_mean([new - old for old, new in odds])) if odds else None,
    }


def paired_proportions(before: np.ndarray, after: np.ndarray, clusters: OptionalArray = None) -> dict[str, Any]:
    """Estimate a proportion before and after, and its change."""
    levels = [
        estimators.proportion(side) if clusters is None else clustered_proportion(side, clusters)
        for side in (before, after)
    ]
    return _sides(levels, estimators.paired_proportion_effect(before, after, clusters).estimate())


def clustered_proportion(outcomes: np.ndarray, clusters: np.ndarray) -> Estimate:
    """Estimate a proportion over clusters of items.

    The interval ends at 0 and 1. Where all outcomes agree, it is Wilson's for as many outcomes as clusters.
    """
    found = _ratio(outcomes.astype(np.float64), None, clusters)
    if outcomes.all() or not outcomes.any():
        low, high = estimators.wilson_interval(np.full(found.n, outcomes[0]))
        return replace(found, low=low, high=high)
    if found.low is None or found.high is None:
        return found
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def paired_means(
    before: np.ndarray,
    after: np.ndarray,
    denominators: OptionalArray = None,
    clusters: OptionalArray = None,
    interval: Interval | None = None,
) -> dict[str, Any]:
    """Estimate a mean or ratio before and after, and its change."""
    levels = [_ratio(side, denominators, clusters) for side in (before, after)]
    return _sides(levels, (interval or _ratio)(after - before, denominators, clusters))


def _ratio(numerators: np.ndarray, denominators: OptionalArray, clusters: OptionalArray) -> Estimate:
    """Estimate a mean (Student's t) or ratio (linearized), over clusters."""
    if denominators is None and clusters is None:
        return estimators.mean(numerators)
    sums = [numerators, np.ones(numerators.size) if denominators is None else denominators]
    if clusters is not None:
        sums = [estimators.sum_by_cluster(values, clusters) for values in sums]
    return estimators.ratio_of_sums(*sums)


def _macro_sides(
    tasks: Sequence[Sequence[np.ndarray]], change: Estimate, limits: Sequence[tuple[float, float]] = ()
) -> dict[str, Any]:
    return _sides((estimators.macro_mean(side, limits) for side in zip(*tasks, strict=True)), change)


def _sides(levels: Iterable[Estimate], change: Estimate) -> dict[str, Any]:
    before, after = levels
    return {"before": asdict(before), "after": asdict(after), "change": asdict(change)}
