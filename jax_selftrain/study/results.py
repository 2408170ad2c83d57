"""The results of a study: `results.json` (fields: docs/study.md).

Every student is compared with its own base, item by item. A claim about a recipe rests on seeds: a measure's change is
computed for each seed, and its interval is Student's t over seeds. Intervals over items speak of one pair of models.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain import hub, training
from jax_selftrain.config import ModelConfig, StudyConfig, yaml_io
from jax_selftrain.config.metadata import Role, fields_with_role
from jax_selftrain.evals.item_results import ScoreResult, Split, load_score_result
from jax_selftrain.io import json_files
from jax_selftrain.io.jsonl import read_log
from jax_selftrain.io.manifest import read_manifest
from jax_selftrain.models import count_params
from jax_selftrain.stats import estimators
from jax_selftrain.stats.noninferiority import benjamini_hochberg
from jax_selftrain.study import extraction_results, paired_results, proxies
from jax_selftrain.study import measure_names as names
from jax_selftrain.study.contrasts import (
    CellKey,
    ItemChanges,
    Pairs,
    contrast_effect,
    contrast_values,
    reported_contrasts,
    unrelated_sources,
)
from jax_selftrain.study.design import Design, StudyCell
from jax_selftrain.study.eval_hooks import summarize_curve
from jax_selftrain.study.flipped_items import collect_flips
from jax_selftrain.study.generations import measure_tails
from jax_selftrain.study.memorization_contrasts import judge_decoupling
from jax_selftrain.study.paired_results import Pair
from jax_selftrain.study.preregistration import VERDICT_ALPHA, claim_contrasts, judge_claims
from jax_selftrain.study.proxy_relations import relate_proxies
from jax_selftrain.study.proxy_stages import ProxyStages
from jax_selftrain.study.registration import Registration
from jax_selftrain.version import versions

FORMAT = "jax-selftrain results"
VERSION = 5
EXAMPLES = 6
"""Samples shown of each corpus."""
LOG_POINTS = 256
"""Upper bound of the logged training steps of a cell in `results.json`, to within a factor of two."""


def collect_study(config: StudyConfig, design: Design, registration: Registration) -> dict[str, Any]:
    """Collect the results of all stages of a study, which are done.

    `registration` is what the study declared at its first run. Raises InputError if a stage's output is missing or
    damaged.
    """
    bases = {
        name: load_score_result(str(design.folder(stage) / "score.json")) for name, stage in design.score_base.items()
    }
    questions = [question for task in proxies.questions_by_task(config.score).values() for question in task]
    corpora = _describe_corpora(design, questions)
    for key, tail in measure_tails(config, design).items():
        corpora[key]["statistics"] = {**corpora[key]["statistics"], "tail": tail}
    items: dict[CellKey, dict[str, dict[str, np.ndarray]]] = {}
    classes: dict[CellKey, np.ndarray] = {}
    cells = [_describe_cell(config, design, bases, corpora, cell, items, classes) for cell in design.cells]
    texts = [name.removeprefix("text/") for name in names.common_measures(cells) if name.startswith("text/")]
    only = texts[0] if len(texts) == 1 else ""
    damage_texts = {name: design.models[name].damage_text or only for name in design.students}
    noise = [arm.name for arm in config.arms if arm.kind == "noise"]
    stronger = [pair for pair in design.pairs if _is_stronger(bases, *pair)]
    claims = [*config.claims, *registration.withdrawn]
    claimed = claim_contrasts(claims, design.models, design.pairs, stronger)
    machine = fields_with_role(StudyConfig, Role.OUTPUT | Role.EXECUTION)
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": config.title or _make_title(design),
        "config": {name: value for name, value in yaml_io.to_dict(config).items() if name not in machine},
        "design": {
            "models": [_describe_model(model) for model in design.models.values()],
            "students": list(design.students),
            "sources": list(design.sources),
        },
        "base_ability": {
            name: {task: numbers["acc"] for task, numbers in scored.result["tasks"].items() if "acc" in numbers}
            | {text: numbers["bits_per_byte"] for text, numbers in scored.result["texts"].items()}
            for name, scored in bases.items()
        },
        "cells": cells,
        "effects": treatment_effects(cells, items),
        "relations": relation_effects(cells, design.models, design.pairs, stronger, items),
        "deviations": list(registration.deviations),
        "claims": judge_claims(config, cells, claimed, registration, items),
        "swap_effects": extraction_results.swap_effects(design),
        "decontamination": extraction_results.decontamination_effect(config, cells),
        "fragility": extraction_results.fragility(cells),
        "aa_repeats": extraction_results.aa_flip_rate(design),
        "damage_texts": damage_texts,
        "decoupling": judge_decoupling(cells, noise, damage_texts, items, classes),
        "proxies": relate_proxies(cells, design.models, design.students, design.sources, bases),
        "corpora": corpora,
        "flips": collect_flips(config, design, bases),
        "stages": [{"label": stage.label, "key": stage.key} for stage in design.ordered_stages],
        "versions": versions(),
    }


def load_results(path: Path) -> dict[str, Any]:
    """Read `results.json`. Raises InputError if another version of this program wrote it."""
    return read_manifest(path, FORMAT, VERSION, {}, remedy="run the study again in a new folder")


def _make_title(design: Design) -> str:
    if len(design.students) > 1 or len(design.sources) > 1:
        return "Whose text can a model learn from?"
    (student,), (source,) = design.students, design.sources
    return f"{student}, trained on {'its own text' if source == student else f'text by {source}'}"


def _describe_model(model: ModelConfig) -> dict[str, Any]:
    opened = hub.open_model(model.model)
    config = opened.config
    return {
        **{key: value for key, value in asdict(model).items() if key not in ("model", "mesh", "revisions")},
        "family": model.family or opened.raw_config["model_type"],
        "parameters": count_params(config),
        "layers": config.num_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
        "fingerprint": opened.fingerprint,
        "commit": opened.commit,
    }


def _describe_corpora(design: Design, questions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Describe every training corpus, by the key of its stage."""
    found: dict[str, dict[str, Any]] = {}
    for stage in (cell.corpus for cell in design.cells):
        if stage is None or stage.key in found:
            continue
        corpus = design.read_corpus(stage)
        manifest, seed = corpus.manifest, corpus.manifest["seed"]
        shown = set(proxies.hash_sample(len(corpus), EXAMPLES, seed))
        found[stage.key] = {
            "label": stage.label,
            "samples": len(corpus),
            "tokens": corpus.n_tokens,
            "sampling_params": None if seed is None else manifest["policy"],
            "seed": seed,
            "statistics": manifest["statistics"],
            "contamination": proxies.contaminated_share(corpus.iter_texts(), questions),
            "retokenized": manifest.get("retokenized"),
            "retokenization_mismatches": manifest["retokenization_mismatches"],
            "examples": [
                vars(sample)
                | {"tokens": len(sample.tokens), "logprob": None if math.isnan(sample.logprob) else sample.logprob}
                for sample in corpus.iter_samples()
                if sample.sample_id in shown
            ],
        }
    return found


def _describe_cell(
    config: StudyConfig,
    design: Design,
    bases: Mapping[str, ScoreResult],
    corpora: Mapping[str, Mapping[str, Any]],
    cell: StudyCell,
    items: dict[CellKey, dict[str, dict[str, np.ndarray]]],
    classes: dict[CellKey, np.ndarray],
) -> dict[str, Any]:
    """Describe a cell; add to `items` and `classes`."""
    pairs: dict[str, Pair] = {}
    scored: ScoreResult | None = None
    if cell.score:
        scored = load_score_result(str(design.folder(cell.score) / "score.json"))
        pairs = paired_results.pair_results(bases[cell.student], scored)
    extracted = extraction_results.cell_extraction(config, design, cell)
    changes = paired_results.item_changes(list(pairs.values()), config.split) | extracted.pop("items")
    key = cell.student, cell.treatment, cell.seed
    items[key] = changes
    if (own_classes := extracted.pop("own_classes")) is not None:
        classes[key] = own_classes
    found: dict[str, Any] = {
        **{name: getattr(cell, name) for name in ("student", "treatment", "source", "seed")},
        "corpus": cell.corpus and cell.corpus.key,
        "model": scored.fingerprint("model") if scored else None,
        **_compare_tasks([pair for pair in pairs.values() if pair.base.kind != "text"], config.split),
        "texts": [
            paired_results.describe_text(pair.part(config.split)) for pair in pairs.values() if pair.base.kind == "text"
        ],
        **extracted,
        "identical": extracted["identical"] and all(pair.identical() for pair in pairs.values()),
        "training": cell.train and _describe_training(design.folder(cell.train)),
        "proxies": None,
        "task_proxies": None,
    }
    if cell.proxies:
        found |= _describe_proxies(design, cell.proxies, corpora[found["corpus"]]["statistics"])
    if found["identical"]:
        found = _remove_widths(found)
    return found | {"measures": cell_measures(found)}


def _remove_widths(node: Any) -> Any:
    """End the intervals of changes at zero: the model is its base."""
    if isinstance(node, list):
        return [_remove_widths(one) for one in node]
    if not isinstance(node, dict):
        return node
    changed = {name: _remove_widths(value) for name, value in node.items()}
    if isinstance(change := node.get("change"), dict) and change.get("value") == 0:
        changed["change"] = {**change, "low": 0.0, "high": 0.0}
    return changed


def _describe_proxies(design: Design, stages: ProxyStages, statistics: Mapping[str, Any]) -> dict[str, Any]:
    folders = (design.folder(one) for one in (stages.student, stages.source))
    student, source = (json_files.read_json(folder / "proxies.json") for folder in folders)
    found = proxies.cell_proxies(student, source, statistics)
    scored = [load_score_result(str(design.folder(one) / "score.json")) for one in stages[2:] if one is not None]
    if scored:
        found["probe_gain"] = proxies.probe_gain(*scored)
    return {"proxies": found, "task_proxies": student["tasks"]}


def _compare_tasks(pairs: Sequence[Pair], split: Split) -> dict[str, Any]:
    """Compare each task and their average on a split.

    The average is over the eligible tasks, which all items decide. `q` is p after Benjamini and Hochberg's correction
    over the tasks.
    """
    entries = [paired_results.describe_task(pair.part(split)) for pair in pairs]
    adjusted = benjamini_hochberg([entry["flips"]["mcnemar_p"] for entry in entries])
    for pair, entry, q in zip(pairs, entries, adjusted, strict=True):
        entry["flips"]["q"] = q
        entry["not_eligible"] = paired_results.ineligibility_reason(pair)
    eligible = [pair.part(split) for pair, entry in zip(pairs, entries, strict=True) if entry["not_eligible"] is None]
    return {"tasks": entries, "macro": paired_results.average_tasks(eligible)}


def _describe_training(run: Path) -> dict[str, Any]:
    description = json_files.read_json(run / "run.json")
    lines, curve = read_log(run / "metrics.jsonl"), training.read_curve(run)
    logged = lines[:: max(1, len(lines) // LOG_POINTS)]
    return {
        "steps": description["steps"],
        "rows": description["rows"],
        "targets": sum(int(line["tokens"]) for line in lines) if len(lines) == description["steps"] else None,
        "log": {key: [line[key] for line in logged] for key in ("step", "loss", "learning_rate", "grad_norm")},
        "best_step": training.best_step(curve) if description["options"].get("best_epoch") else None,
        "evaluations": summarize_curve(run, description.get("evaluation", {}).get("measured", ())),
    }


def cell_measures(cell: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return before, after and change of every measure of a cell.

    `accuracy` is the chance-normalized macro accuracy over the eligible tasks (`paired_results.ineligibility_reason`;
    absent if there are none), `log_odds` the log-odds of the right choice over the same tasks, `task/NAME` and
    `log_odds/NAME` the values of each task, `text/NAME` bits per byte; further those of `extraction_measures`.
    """
    macro = cell["macro"] or {"chance_normalized": None, "log_odds": None}
    found = {"accuracy": macro["chance_normalized"], "log_odds": macro["log_odds"]}
    found |= {f"task/{task['name']}": task["accuracy"] for task in cell["tasks"]}
    found |= {f"log_odds/{task['name']}": task.get("log_odds") for task in cell["tasks"]}
    found |= {f"text/{text['name']}": text["bits_per_byte"] for text in cell["texts"]}
    return {name: measure for name, measure in found.items() if measure} | extraction_results.extraction_measures(cell)


def treatment_effects(cells: names.Cells, items: ItemChanges) -> list[dict[str, Any]]:
    """Return each measure's change over seeds, by student and treatment.

    `change` has the interval on these items, `crossed` that over seeds and items.
    """
    return [
        {
            "student": student,
            "treatment": treatment,
            "source": members[0]["source"],
            "seeds": [cell["seed"] for cell in members],
            "measures": {
                name: {
                    "before": first["before"]["value"],
                    "change": asdict(estimators.mean(changes)),
                    "crossed": _estimate_crossed(members, (student, treatment), name, items),
                    "seeds": changes,
                    "items": first["change"]["n"],
                    "one_pair": [first["change"]["low"], first["change"]["high"]],
                }
                for name in names.common_measures(members)
                for first, changes in ((members[0]["measures"][name], [*names.seed_values(members, name).values()]),)
            },
        }
        for (student, treatment), members in names.group_cells(cells).items()
    ]


def _estimate_crossed(
    members: names.Cells, key: tuple[str, str], measure: str, items: ItemChanges
) -> dict[str, Any] | None:
    """Estimate a change over seeds and items.

    None where the items differ between seeds, and for one seed.
    """
    if len(members) < 2 or any(measure not in items.get((*key, cell["seed"]), {}) for cell in members):
        return None
    if all(cell["identical"] for cell in members):
        return asdict(estimators.mean([0.0] * len(members)))  # exactly, not to within one item
    effect = contrast_effect(members, {key: 1.0}, measure, items)
    return asdict(effect.estimate()) if effect else None


def relation_effects(
    cells: names.Cells, models: Mapping[str, ModelConfig], pairs: Pairs, stronger: Pairs, items: ItemChanges
) -> dict[str, Any] | None:
    """Estimate the differences of relations that the design has; None if none.

    `sources` has the sum of the weights of each source's cells, which is zero.
    """
    matrix = [cell for cell in cells if cell["treatment"] == f"{names.MAIN_EFFECT}{cell['source']}"]
    found = []
    for treatment, student, contrast in reported_contrasts(models, pairs, stronger):
        sums = {source: 0.0 for _, source in pairs}
        for (_, cell_treatment), weight in contrast.items():
            sums[cell_treatment.removeprefix(names.MAIN_EFFECT)] += weight
        measures = {}
        for name in names.common_measures(matrix):
            effect = contrast_effect(matrix, contrast, name, items)
            if effect is not None:
                seeds = [*contrast_values(matrix, contrast, name).values()]
                measures[name] = {"contrast": asdict(effect.estimate()), "seeds": seeds}
        found.append({"contrast": treatment, "student": student, "sources": sums, "measures": measures})
    if not found:
        return None
    return {"contrasts": found, "stronger": stronger, "unrelated_sources": unrelated_sources(models, pairs)}


def _is_stronger(bases: Mapping[str, ScoreResult], student: str, source: str) -> bool:
    """Test whether the source's base is more accurate than the student's."""
    if student == source or not {student, source} <= bases.keys():
        return False
    pairs = [
        Pair(items, bases[source].items[name]) for name, items in bases[student].items.items() if items.kind != "text"
    ]
    if not pairs:
        return False
    effects = [estimators.paired_proportion_effect(*pair.right, pair.base.cluster) for pair in pairs]
    return estimators.macro_effect(effects, [pair.chance_scale for pair in pairs]).p_greater(0.0) < VERDICT_ALPHA
