"""`compare`: paired comparison of scored models, for one pair or several seeds.

The result separates statements about one pair of checkpoints, over documents (`pairs`), and about a recipe, over seeds
(`recipe`). A verdict applies the rule of `stats.noninferiority` to a margin that was declared in advance. A comparison
of the same models under another declaration is marked post hoc.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain.config import CompareConfig, yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.evals.item_results import ScoreResult, load_score_result
from jax_selftrain.evals.result_files import output_paths
from jax_selftrain.io import json_files
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.stats import estimators
from jax_selftrain.stats.estimators import Effect
from jax_selftrain.stats.noninferiority import NoninferiorityResult, decide, evidence_level, noninferiority_test
from jax_selftrain.study import paired_results
from jax_selftrain.study.paired_results import Interval, Pair
from jax_selftrain.study.preregistration import adjust_p_values
from jax_selftrain.version import versions

FORMAT = "jax-selftrain comparison"
VERSION = 2
SCOPE_ONE_PAIR = (
    "This is a statement about one pair of checkpoints and documents like these, not about a recipe. Seeds of one "
    "recipe differ: at a spread of 0.5 or 1 point, McNemar's test calls 12 or 29 % of pairs significant by chance."
)
SCOPE_RECIPE = (
    "Differences are paired by seed; intervals and p-values are Student's t over seeds. A verdict needs five seeds, an "
    "exploration three. Every seed needs its own corpus and order."
)
NO_ITEMS = "it has no results by item, since a document has no single right answer, or a metric that is not 0 or 1"

Pairs = Mapping[str, Pair]
"""Tasks and texts of a base and a student, by name."""


def compare(config: CompareConfig) -> dict[str, Any]:
    """Compare scored models; write `FILE.json` and `FILE.config.yaml`.

    The same input gives the same bytes.

    Returns the content of `FILE.json`: `declaration`, `pairs` (one entry per base and student), `recipe` (None for one
    pair), `versions`. Accuracies, changes and margins are fractions, not points. Raises InputError if an option is out
    of range, a file is missing, damaged or not a result of `score`, or the models were scored on different documents.
    """
    scored = _load(config)
    pairs = [paired_results.pair_results(base, student) for base, student in scored]
    for base, _ in scored[1:]:
        paired_results.pair_results(scored[0][0], base)
    _check_names(config, pairs[0], _tasks_without_items(scored))
    path, config_file = output_paths(config.out, "config.yaml")
    models = [[one.fingerprint("model") for one in both] for both in scored]
    result: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "declaration": _declaration(config, models, path),
        "pairs": [
            {"base": _summarize(base), "student": _summarize(student), **_compare_pair(config, pair)}
            for (base, student), pair in zip(scored, pairs, strict=True)
        ],
        "not_compared": dict.fromkeys(_tasks_without_items(scored), NO_ITEMS),
        "recipe": _compare_seeds(config, pairs) if len(pairs) > 1 else None,
        "versions": versions(),
    }
    yaml_io.save(config_file, config)
    json_files.write_json(path, result)
    return result


def _load(config: CompareConfig) -> list[tuple[ScoreResult, ScoreResult]]:
    """Return the scores of each base and its student."""
    yaml_io.require(config)
    if len(config.base) not in (1, len(config.student)):
        raise InputError(
            f"{len(config.base)} --base and {len(config.student)} --student cannot be paired; give one base for all "
            "students, or one for each, in the same order"
        )
    out = output_paths(config.out)[0].resolve()
    if overwritten := [file for file in (*config.base, *config.student) if Path(file).resolve() == out]:
        raise InputError(f"--out {config.out}: would overwrite {overwritten[0]}, an input; choose another name")
    bases, students = ([load_score_result(file) for file in files] for files in (config.base, config.student))
    scored = list(zip(bases * (len(students) // len(bases)), students, strict=True))
    models = [[one.fingerprint("model") for one in both] for both in scored]
    counts = Counter(student for base, student in models if student != base)  # the base against itself is a control
    for _, student in scored:
        if counts[student.fingerprint("model")] > 1:
            raise InputError(f"{student.path}: is given twice under --student; one checkpoint is one seed")
    return scored


def _tasks_without_items(scored: Sequence[tuple[ScoreResult, ScoreResult]]) -> list[str]:
    """Return the scored tasks that have no results by item."""
    return sorted({name for both in scored for one in both for name in one.result["tasks"].keys() - one.items.keys()})


def _check_names(config: CompareConfig, pairs: Pairs, without_items: Sequence[str]) -> None:
    tasks = [name for name, pair in pairs.items() if pair.base.kind != "text"]
    for pair in pairs.values():
        pair.part(config.split)
    for name in config.primary_tasks:
        if name in without_items:
            raise InputError(f"--primary-tasks {name}: cannot be compared: {NO_ITEMS}")
        if name not in tasks:
            known = f"; scored were {', '.join(tasks)}" if tasks else "; no task was scored"
            raise InputError(
                f"--primary-tasks {name}: is not a scored task{yaml_io.did_you_mean(name, tasks) or known}"
            )


def _declaration(config: CompareConfig, models: Sequence[Sequence[str]], path: Path) -> dict[str, Any]:
    """Return the declaration; `post_hoc` if `FILE.json` compares these models under another one."""
    declared = {
        "margin_macro": config.margin_macro / 100,
        "margin_task": config.margin_task / 100,
        "primary": list(config.primary_tasks),
        "split": config.split,
    }
    now = declared | {"fingerprint": hash_json(declared), "post_hoc": False}
    if not path.exists():
        return now
    earlier = json_files.read_json(path)
    if not isinstance(earlier, dict) or earlier.get("format") != FORMAT:
        raise InputError(f"--out {path}: exists and is not a comparison; choose another name")
    try:
        compared = [[pair[side]["fingerprint"] for side in ("base", "student")] for pair in earlier["pairs"]]
        before = earlier["declaration"]
        changed = bool(before["post_hoc"]) or before["fingerprint"] != now["fingerprint"]
    except (KeyError, TypeError):
        raise InputError(f"--out {path}: is a damaged comparison; delete it and run the same command again") from None
    return now | {"post_hoc": changed and compared == models}


def _summarize(scored: ScoreResult) -> dict[str, Any]:
    fingerprints = {"fingerprint": scored.fingerprint("model"), "items": scored.fingerprint("items")}
    return {"model": scored.result["model"], **fingerprints}


def _ineligible(pairs: Pairs) -> dict[str, str | None]:
    """Return the reason that a task is ineligible, or None, by task."""
    return {name: paired_results.ineligibility_reason(pair) for name, pair in pairs.items() if pair.base.kind != "text"}


def _compare_pair(config: CompareConfig, whole: Pairs) -> dict[str, Any]:
    identical = all(pair.identical() for pair in whole.values())
    pairs = {name: pair.part(config.split) for name, pair in whole.items()}
    bootstrap = partial(estimators.bootstrap, resamples=config.resamples, seed=config.seed)
    reasons = _ineligible(whole)
    effects = {name: _effect(pairs[name], identical) for name in reasons}
    entries = [
        {
            **_task(pairs[name], effects[name], bootstrap),
            "not_eligible": reason,
            "non_inferiority": asdict(_judge_task(effects[name], pairs[name], config.margin_task / 100)),
        }
        for name, reason in reasons.items()
    ]
    _correct_multiplicity(entries, config.primary_tasks)
    for entry in entries:
        if entry["not_eligible"] == paired_results.AT_CHANCE and not identical:
            _withdraw_verdicts(entry["non_inferiority"])
    eligible = {name: pairs[name] for name, reason in reasons.items() if reason is None}
    return {
        "identical": identical,
        "scope": SCOPE_ONE_PAIR,
        "tasks": entries,
        "macro": _macro(eligible, effects, config.margin_macro / 100) if eligible else None,
        "texts": [_text(pair, bootstrap) for name, pair in pairs.items() if name not in reasons],
    }


def _effect(pair: Pair, identical: bool) -> Effect:
    """Estimate the change of accuracy; exactly zero without error for identical models."""
    if identical:
        return Effect(0.0, 0.0, 0.0, np.inf, pair.base.count)
    return estimators.paired_proportion_effect(*pair.right, pair.base.cluster)


def _judge_task(effect: Effect, pair: Pair, margin: float) -> NoninferiorityResult:
    moved = estimators.mcnemar_table(*pair.right)
    return noninferiority_test(effect, margin, (moved.lost, moved.gained))


def _task(pair: Pair, effect: Effect, bootstrap: Interval) -> dict[str, Any]:
    entry = paired_results.describe_task(pair, bootstrap)
    entry["accuracy"]["change"] = asdict(effect.estimate())
    entry |= {"clusters": None, "p": entry["flips"]["mcnemar_p"]}
    if pair.base.cluster is not None:
        old, new = (right.astype(np.int64) for right in pair.right)
        gains = estimators.sum_by_cluster(new - old, pair.base.cluster)
        p, mid_p = estimators.sign_flip_test(np.rint(gains))
        entry |= {"clusters": gains.size, "p": p, "mid_p": mid_p}
    if "accuracy_norm" in entry:
        old, new = (right.astype(np.float64) for right in pair.columns("acc_norm"))
        entry["accuracy_norm"]["bootstrap"] = asdict(bootstrap(new - old, None, pair.base.cluster))
    elif "word_loglikelihood" in entry:
        entry["perplexity"] = _perplexity(entry["word_loglikelihood"], -1.0)
    return entry


def _text(pair: Pair, bootstrap: Interval) -> dict[str, Any]:
    entry = paired_results.describe_text(pair, bootstrap)
    return entry | {"perplexity": entry["nll"] and _perplexity(entry["nll"], 1.0)}


def _perplexity(nats: Mapping[str, Any], sign: float) -> dict[str, Any]:
    """Return exp(sign · nats) before and after, and their ratio.

    A number that overflows is None.
    """
    change = nats["change"]
    ends = ("low", "high") if sign > 0 else ("high", "low")
    value, low, high = (
        estimators.finite_exp(None if change[end] is None else sign * change[end]) for end in ("value", *ends)
    )
    levels = {side: estimators.finite_exp(sign * nats[side]["value"]) for side in ("before", "after")}
    return levels | {"ratio": {"value": value, "low": low, "high": high, "n": change["n"]}}


def _correct_multiplicity(entries: Sequence[dict[str, Any]], primary: Sequence[str]) -> None:
    """Add roles, and p-values and verdicts that are corrected within each role."""
    for entry in entries:
        entry["role"] = "primary" if entry["name"] in primary else "exploratory"
    tested = [entry for entry in entries if entry["non_inferiority"]]
    rules = [entry["non_inferiority"] for entry in tested]
    for key, records in (("p", tested), ("p_preserved", rules), ("p_degraded", rules)):
        adjusted = adjust_p_values([one[key] for one in records], [entry["role"] == "primary" for entry in tested])
        for record, p in zip(records, adjusted, strict=True):
            record[f"{key}_adjusted"] = p
    for rule in rules:
        rule["verdict_adjusted"] = decide(rule["p_preserved_adjusted"], rule["p_degraded_adjusted"])


def _withdraw_verdicts(rule: dict[str, Any]) -> None:
    """Remove the verdicts on a task that the base cannot do."""
    rule |= dict.fromkeys(("verdict", "verdict_adjusted"), "not eligible")


def _macro(pairs: Pairs, effects: Mapping[str, Effect], margin: float) -> dict[str, Any]:
    """Compare chance-normalized accuracy over the eligible tasks."""
    scales = [pair.chance_scale for pair in pairs.values()]
    effect = estimators.macro_effect([effects[name] for name in pairs], scales)
    judgment = noninferiority_test(effect, margin)
    if len(pairs) == 1:  # the rule for one task takes rare flips into account
        ((name, pair),) = pairs.items()
        judgment = _judge_task(effects[name], pair, margin / scales[0])
        lower, upper = (None if end is None else end * scales[0] for end in (judgment.lower, judgment.upper))
        judgment = replace(judgment, margin=judgment.margin * scales[0], lower=lower, upper=upper)
    before, after = (
        np.mean([(float(pair.right[side].mean()) - pair.chance) * pair.chance_scale for pair in pairs.values()])
        for side in (0, 1)
    )
    return {
        "tasks": list(pairs),
        "n": effect.n,
        "before": float(before),
        "after": float(after),
        "change": asdict(effect.estimate()),
        "non_inferiority": asdict(judgment),
    }


def _compare_seeds(config: CompareConfig, whole: Sequence[Pairs]) -> dict[str, Any]:
    """Compare over seeds; macro tasks are those eligible with every base."""
    reasons = [_ineligible(pairs) for pairs in whole]
    seeds = [{name: pair.part(config.split) for name, pair in pairs.items()} for pairs in whole]
    right = {name: [pairs[name].right for pairs in seeds] for name in reasons[0]}
    changes = {name: [float(np.mean(new.astype(float) - old)) for old, new in both] for name, both in right.items()}
    same = all(pair.identical() for pairs in whole for pair in pairs.values())
    steps = {name: 0.0 if same else 1 / seeds[0][name].base.count for name in changes}
    tasks = [
        {"name": name, **_over_seeds(values, config.margin_task / 100, steps[name])} for name, values in changes.items()
    ]
    _correct_multiplicity(tasks, config.primary_tasks)
    for entry in tasks:
        at_chance = any(one[entry["name"]] == paired_results.AT_CHANCE for one in reasons)
        if at_chance and entry["non_inferiority"] and not same:
            _withdraw_verdicts(entry["non_inferiority"])
    eligible = [name for name in changes if not any(one[name] for one in reasons)]
    macro: dict[str, Any] | None = None
    if eligible:
        scales = np.array([seeds[0][name].chance_scale for name in eligible])
        averages = scales @ np.array([changes[name] for name in eligible]) / len(eligible)
        step = float(np.linalg.norm(scales * [steps[name] for name in eligible])) / len(eligible)
        macro = {"tasks": eligible, **_over_seeds(averages.tolist(), config.margin_macro / 100, step)}
    level = evidence_level(len(seeds))
    for entry in [*tasks, *([macro] if macro else [])]:
        rule = entry["non_inferiority"]
        entry["verdict"] = rule.get("verdict_adjusted", rule["verdict"]) if level == "headline" else None
    return {
        "scope": SCOPE_RECIPE,
        "seeds": len(seeds),
        "evidence_level": level,
        "tasks": tasks,
        "macro": macro,
        "texts": [
            {"name": name, "unit": "bits per byte", **_over_seeds([_bits_change(pairs[name]) for pairs in seeds], None)}
            for name in seeds[0]
            if name not in changes
        ],
    }


def _over_seeds(changes: Sequence[float], margin: float | None, step: float = 0.0) -> dict[str, Any]:
    """Estimate the mean change by Student's t; tests need three seeds.

    Accuracies change in steps of one question, so seeds may agree by rounding. The standard deviation over seeds is at
    least that of rounding to the step, step / √12.
    """
    effect = estimators.mean_effect(changes, step)
    enough = evidence_level(len(changes)) != "none"
    return {
        "changes": list(changes),
        "change": asdict(effect.estimate()),
        "p": min(1.0, 2 * min(effect.p_greater(0.0), effect.p_less(0.0))) if enough else None,
        "non_inferiority": asdict(noninferiority_test(effect, margin)) if enough and margin is not None else None,
    }


def _bits_change(pair: Pair) -> float:
    """Return the change of a text file's bits per byte."""
    return float((pair.base.loglikelihood - pair.student.loglikelihood).sum() / np.log(2) / pair.base.bytes.sum())
