"""`compare`: paired comparison of scored models, for one pair or several seeds.

The result separates two kinds of statement:

* `pairs`: a base and its student, over documents. It speaks of one pair of checkpoints: where the seeds of a recipe
  differ by 0.5 or 1 point, McNemar's test calls 12 or 29 % of pairs significant although the recipe does nothing.
* `recipe`: the differences of all pairs, over seeds, by Student's t. Only this speaks of a recipe.

A verdict applies the rule of `stats.noninferiority` to a margin that was declared in advance. A comparison of the same
models under another declaration is marked post hoc.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain.config import CompareConfig, yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.evals import ScoreResult, load_score_result
from jax_selftrain.evals.result_files import output_paths
from jax_selftrain.io import atomic
from jax_selftrain.io.manifest import hash_json
from jax_selftrain.stats import estimators
from jax_selftrain.stats.estimators import Effect
from jax_selftrain.stats.noninferiority import (
    NoninferiorityResult,
    benjamini_hochberg,
    decide,
    evidence_level,
    holm,
    noninferiority_test,
)
from jax_selftrain.study.paired_results import (
    Interval,
    Pair,
    describe_task,
    describe_text,
    ineligibility_reason,
    pair_results,
)
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


def compare(config: CompareConfig) -> dict[str, Any]:
    """Compare scored models; write `FILE.json` and `FILE.config.yaml`.

    The same input gives the same bytes.

    Returns:
        The content of `FILE.json`: `declaration`, `pairs` (one entry per base and student), `recipe` (None for one
        pair), `versions`. Accuracies, changes and margins are fractions, not points.

    Raises:
        InputError: an option is out of range, a file is missing, damaged or not a result of `score`, or the models
            were scored on different documents.
    """
    bases, students = _load(config)
    pairs = [pair_results(base, student) for base, student in zip(bases, students, strict=True)]
    for other in bases[1:]:
        pair_results(bases[0], other)
    _check_names(config, pairs[0])
    path, config_file = output_paths(config.out, "config.yaml")
    models = [[one.fingerprint("model") for one in both] for both in zip(bases, students, strict=True)]
    declaration = _declaration(config, models, path)
    eligible = [_eligibility(pair) for pair in pairs]
    entries = [
        {**_model_summary(base, student), **_compare_pair(config, pair, fit)}
        for base, student, pair, fit in zip(bases, students, pairs, eligible, strict=True)
    ]
    result: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "declaration": declaration,
        "pairs": entries,
        "recipe": _compare_seeds(config, pairs, eligible) if len(pairs) > 1 else None,
        "versions": versions(),
    }
    yaml_io.save(config_file, config)
    atomic.write_json(path, result)
    return result


# Input ----------------------------------------------------------------------------------------------------------


def _load(config: CompareConfig) -> tuple[list[ScoreResult], list[ScoreResult]]:
    yaml_io.require(config)
    for name in ("margin_macro", "margin_task"):
        if not 0 < getattr(config, name) <= 100:
            raise InputError(f"{yaml_io.flag(name)} is {getattr(config, name):g}; it must be between 0 and 100 points")
    if config.resamples < 100:
        raise InputError(f"--resamples is {config.resamples}; an interval needs at least 100")
    if config.seed < 0:
        raise InputError(f"--seed is {config.seed}; it must not be negative")
    if len(config.base) not in (1, len(config.student)):
        raise InputError(
            f"{len(config.base)} --base and {len(config.student)} --student cannot be paired; give one base for all "
            "students, or one for each, in the same order"
        )
    out = output_paths(config.out)[0].resolve()
    if overwritten := [file for file in (*config.base, *config.student) if Path(file).resolve() == out]:
        raise InputError(f"--out {config.out}: would overwrite {overwritten[0]}, an input; choose another name")
    bases, students = ([load_score_result(file) for file in files] for files in (config.base, config.student))
    bases = bases * len(students) if len(bases) == 1 else bases
    fingerprints = Counter(
        student.fingerprint("model")
        for base, student in zip(bases, students, strict=True)
        if student.fingerprint("model") != base.fingerprint("model")  # the base against itself is a control
    )
    for student in students:
        if fingerprints[student.fingerprint("model")] > 1:
            raise InputError(f"{student.path}: is given twice under --student; one checkpoint is one seed")
    return bases, students


def _check_names(config: CompareConfig, pairs: Mapping[str, Pair]) -> None:
    tasks = [name for name, pair in pairs.items() if pair.base.kind != "text"]
    for name in config.primary_tasks:
        if name not in tasks:
            known = f"; scored were {', '.join(tasks)}" if tasks else "; no task was scored"
            raise InputError(
                f"--primary-tasks {name}: is not a scored task{yaml_io.did_you_mean(name, tasks) or known}"
            )
    for name, pair in pairs.items():
        if pair.part(config.split).base.count == 0:
            raise InputError(
                f"{name}: none of its {pair.base.count:,} documents is in the {config.split} split; use --split all"
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
    earlier = atomic.read_json(path)
    if not isinstance(earlier, dict) or earlier.get("format") != FORMAT:
        raise InputError(f"--out {path}: exists and is not a comparison; choose another name")
    try:
        compared = [[pair[side]["fingerprint"] for side in ("base", "student")] for pair in earlier["pairs"]]
        changed = (
            bool(earlier["declaration"]["post_hoc"]) or earlier["declaration"]["fingerprint"] != now["fingerprint"]
        )
    except (KeyError, TypeError):
        raise InputError(f"--out {path}: is a damaged comparison; delete it and run the same command again") from None
    return now | {"post_hoc": changed and compared == models}


# One pair -------------------------------------------------------------------------------------------------------


def _model_summary(base: ScoreResult, student: ScoreResult) -> dict[str, Any]:
    return {
        side: {
            "model": scored.result["model"],
            "fingerprint": scored.fingerprint("model"),
            "items": scored.fingerprint("items"),
        }
        for side, scored in (("base", base), ("student", student))
    }


def _eligibility(pairs: Mapping[str, Pair]) -> dict[str, str]:
    """Return the reasons that tasks are not in the macro average."""
    return {name: ineligibility_reason(pair) for name, pair in pairs.items() if pair.base.kind != "text"}


def _compare_pair(config: CompareConfig, whole: Mapping[str, Pair], ineligibility: Mapping[str, str]) -> dict[str, Any]:
    identical = all(pair.identical() for pair in whole.values())
    pairs = {name: pair.part(config.split) for name, pair in whole.items()}
    bootstrapped = partial(estimators.bootstrap, resamples=config.resamples, seed=config.seed)
    tasks = {name: pair for name, pair in pairs.items() if name in ineligibility}
    effects = {name: _effect(pair, identical) for name, pair in tasks.items()}
    entries = [
        {
            **_task(pair, effects[name], bootstrapped),
            "not_eligible": ineligibility[name] or None,
            "non_inferiority": asdict(_judge_task(effects[name], pair, config.margin_task / 100)),
        }
        for name, pair in tasks.items()
    ]
    _correct_multiplicity(entries, config.primary_tasks)
    return {
        "identical": identical,
        "scope": SCOPE_ONE_PAIR,
        "tasks": entries,
        "macro": _macro(tasks, effects, [name for name in tasks if not ineligibility[name]], config.margin_macro / 100),
        "texts": [_text(pair, bootstrapped) for name, pair in pairs.items() if name not in ineligibility],
    }


def _effect(pair: Pair, identical: bool) -> Effect:
    """Estimate the change of accuracy; exactly zero without error for identical models."""
    if identical:
        return Effect(0.0, 0.0, 0.0, np.inf, pair.base.count)
    return estimators.paired_proportion_effect(*pair.right, pair.clusters)


def _judge_task(effect: Effect, pair: Pair, margin: float) -> NoninferiorityResult:
    moved = estimators.mcnemar_table(*pair.right)
    return noninferiority_test(effect, margin, (moved.lost, moved.gained))


def _task(pair: Pair, effect: Effect, bootstrapped: Interval) -> dict[str, Any]:
    entry = describe_task(pair, bootstrapped)
    entry["accuracy"]["change"] = asdict(effect.estimate())
    old, new = (right.astype(np.int64) for right in pair.right)
    entry["clusters"] = None
    entry["p"] = entry["flips"]["mcnemar_p"]
    if pair.clusters is not None:
        gains = estimators.sum_by_cluster(new - old, pair.clusters)
        p, mid_p = estimators.sign_flip_test(np.rint(gains))
        entry |= {"clusters": gains.size, "p": p, "mid_p": mid_p}
    if pair.base.acc_norm is not None and pair.student.acc_norm is not None:
        moved = pair.student.acc_norm.astype(np.float64) - pair.base.acc_norm
        entry["accuracy_norm"]["bootstrap"] = asdict(bootstrapped(moved, None, pair.clusters))
    if "word_loglikelihood" in entry:
        word = entry["word_loglikelihood"]
        entry["perplexity"] = {side: float(np.exp(-word[side]["value"])) for side in ("before", "after")} | {
            "ratio": _ratio_of_perplexities(_negative(word["change"]))
        }
    return entry


def _text(pair: Pair, bootstrapped: Interval) -> dict[str, Any]:
    entry = describe_text(pair, bootstrapped)
    nats = entry["nll"]
    entry["perplexity"] = nats and {side: float(np.exp(nats[side]["value"])) for side in ("before", "after")} | {
        "ratio": _ratio_of_perplexities(nats["change"])
    }
    return entry


def _negative(change: Mapping[str, Any]) -> dict[str, Any]:
    low, high = change["low"], change["high"]
    return {
        "value": -change["value"],
        "low": None if high is None else -high,
        "high": None if low is None else -low,
        "n": change["n"],
    }


def _ratio_of_perplexities(nats: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ratio of perplexities: exp of the change of nats."""
    ends = {key: None if nats[key] is None else float(np.exp(nats[key])) for key in ("value", "low", "high")}
    return {**ends, "n": nats["n"]}


def _correct_multiplicity(entries: Sequence[dict[str, Any]], primary: Sequence[str]) -> None:
    """Add roles, and p-values and verdicts that are corrected within each role."""
    for entry in entries:
        entry["role"] = "primary" if entry["name"] in primary else "exploratory"
    for role, correct in (("primary", holm), ("exploratory", benjamini_hochberg)):
        family = [entry for entry in entries if entry["role"] == role and entry["non_inferiority"]]
        rules = [entry["non_inferiority"] for entry in family]
        for entry, p in zip(family, correct([entry["p"] for entry in family]), strict=True):
            entry["p_adjusted"] = p
        for key in ("p_preserved", "p_degraded"):
            for rule, p in zip(rules, correct([rule[key] for rule in rules]), strict=True):
                rule[f"{key}_adjusted"] = p
        for rule in rules:
            rule["verdict_adjusted"] = decide(rule["p_preserved_adjusted"], rule["p_degraded_adjusted"])


def _macro(
    pairs: Mapping[str, Pair], effects: Mapping[str, Effect], names: Sequence[str], margin: float
) -> dict[str, Any] | None:
    """Compare chance-normalized accuracy over the eligible tasks; None if there are none."""
    if not names:
        return None
    scales = [_scale(pairs[name]) for name in names]
    effect = estimators.macro_effect([effects[name] for name in names], scales)
    judgment = noninferiority_test(effect, margin)
    if len(names) == 1:  # the rule for one task takes rare flips into account
        judgment = _rescale(_judge_task(effects[names[0]], pairs[names[0]], margin / scales[0]), scales[0])
    before, after = (np.mean([_normalize(pairs[name], side) for name in names]) for side in (0, 1))
    return {
        "tasks": list(names),
        "n": effect.n,
        "before": float(before),
        "after": float(after),
        "change": asdict(effect.estimate()),
        "non_inferiority": asdict(judgment),
    }


def _rescale(judgment: NoninferiorityResult, scale: float) -> NoninferiorityResult:
    lower, upper = (None if end is None else end * scale for end in (judgment.lower, judgment.upper))
    return replace(judgment, margin=judgment.margin * scale, lower=lower, upper=upper)


def _scale(pair: Pair) -> float:
    return 1 / (1 - (pair.base.chance_accuracy or 0.0))


def _normalize(pair: Pair, side: int) -> float:
    """(accuracy − chance) / (1 − chance)."""
    return (float(pair.right[side].mean()) - (pair.base.chance_accuracy or 0.0)) * _scale(pair)


# Several seeds --------------------------------------------------------------------------------------------------


def _compare_seeds(
    config: CompareConfig, whole: Sequence[Mapping[str, Pair]], reasons_by_pair: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """Compare over seeds; macro tasks are those eligible with every base."""
    seeds = [{name: pair.part(config.split) for name, pair in pairs.items()} for pairs in whole]
    changes = {name: [_accuracy_change(pairs[name]) for pairs in seeds] for name in reasons_by_pair[0]}
    same = all(pair.identical() for pairs in whole for pair in pairs.values())
    steps = {name: 0.0 if same else 1 / seeds[0][name].base.count for name in changes}
    tasks = [
        {"name": name, **_over_seeds(values, config.margin_task / 100, steps[name])} for name, values in changes.items()
    ]
    _correct_multiplicity(tasks, config.primary_tasks)
    eligible = [name for name in changes if not any(reasons[name] for reasons in reasons_by_pair)]
    macro: dict[str, Any] | None = None
    if eligible:
        scales = np.array([_scale(seeds[0][name]) for name in eligible])
        averages = scales @ np.array([changes[name] for name in eligible]) / len(eligible)
        step = float(np.linalg.norm(scales * [steps[name] for name in eligible])) / len(eligible)
        macro = {"tasks": list(eligible), **_over_seeds(averages.tolist(), config.margin_macro / 100, step)}
    for entry in [*tasks, *([macro] if macro else [])]:
        rule = entry["non_inferiority"]
        headline = evidence_level(len(seeds)) == "headline"
        entry["verdict"] = rule.get("verdict_adjusted", rule["verdict"]) if headline else None
    return {
        "scope": SCOPE_RECIPE,
        "seeds": len(seeds),
        "evidence_level": evidence_level(len(seeds)),
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
    effect = estimators.mean_effect(changes)
    effect = replace(effect, stderr=max(effect.stderr, step / np.sqrt(12 * len(changes))))
    enough = evidence_level(len(changes)) != "none"
    return {
        "changes": list(changes),
        "change": asdict(effect.estimate()),
        "p": min(1.0, 2 * min(effect.p_greater(0.0), effect.p_less(0.0))) if enough else None,
        "non_inferiority": asdict(noninferiority_test(effect, margin)) if enough and margin is not None else None,
    }


def _accuracy_change(pair: Pair) -> float:
    return float(np.mean(pair.right[1].astype(np.float64) - pair.right[0]))


def _bits_change(pair: Pair) -> float:
    """Return the change of a text file's bits per byte."""
    return float((pair.base.loglikelihood - pair.student.loglikelihood).sum() / np.log(2) / pair.base.bytes.sum())
