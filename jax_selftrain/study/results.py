"""The results of a study: `results.json`, the only input of the report.

Every student is compared with its own base, item by item. A claim about a recipe rests on seeds: a measure's change is
computed for each seed, and its interval is Student's t over seeds. Intervals over items speak of one pair of models.

| field | content |
|---|---|
| `config` | the StudyConfig without its output and execution options |
| `design` | `models` (as configured, with size and fingerprint), `students`, `sources` |
| `base_ability` | {model: {task or text: accuracy or bits per byte}} |
| `cells` | `student`, `treatment` (`source NAME` or an arm), `source`, `seed`, `corpus` (key of `corpora`), \
results of scoring, extraction and training; `measures`: the numbers that cells are compared by |
| `effects` | changes of every measure over seeds, by student and treatment |
| `interaction` | home − away over seeds |
| `claims` | the declared claims with their verdicts |
| `swap_effects`, `decontamination`, `fragility`, `aa_repeats` | see `study.extraction_results` |
| `decoupling`, `proxies` | see `study.decoupling`, `study.proxy_relation` |
| `corpora` | by key: sizes, sampling params, statistics, contamination, examples |
| `stages`, `versions` | keys of all stages; versions of the libraries |

**Interaction.** A source is at *home* with a student of its lineage. Home − away is the change on home text minus the
change on the other sources' text, averaged over students. A bad source is bad for all students and moves both sides;
only text that suits its own lineage moves the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_selftrain import hub
from jax_selftrain.config import ModelConfig, StudyConfig, yaml_io
from jax_selftrain.config.metadata import Role, fields_with_role
from jax_selftrain.corpus import Corpus, open_corpus
from jax_selftrain.evals import ScoreResult, load_score_result
from jax_selftrain.io import atomic
from jax_selftrain.io.jsonl import read_jsonl
from jax_selftrain.models import abstract_params
from jax_selftrain.stats import estimators
from jax_selftrain.study.curve_summary import summarize_curve
from jax_selftrain.study.decoupling import judge_decoupling
from jax_selftrain.study.design import Design, StudyCell
from jax_selftrain.study.extraction_results import (
    aa_flip_rate,
    cell_extraction,
    decontamination_effect,
    extraction_measures,
    fragility,
    swap_effects,
)
from jax_selftrain.study.measure_names import MAIN_EFFECT, common_measures, main_measure
from jax_selftrain.study.ngram_contamination import contaminated_share
from jax_selftrain.study.paired_results import describe_text, ineligibility_reason, pair_results
from jax_selftrain.study.preregistration import judge_claims
from jax_selftrain.study.proxies import EXPECTED_SIGN, cell_proxies, hash_sample, task_questions
from jax_selftrain.study.proxy_relation import cell_arrays, judge_relations, reliability
from jax_selftrain.study.task_results import compare_tasks, macro_change
from jax_selftrain.version import versions

FORMAT = "jax-selftrain results"
VERSION = 4
EXAMPLES = 6
"""Samples shown of each corpus."""
LOG_POINTS = 256
"""Upper bound of the logged training steps of a cell in `results.json`, to within a factor of two."""

PairedChange = Mapping[str, Any]


def collect_study(config: StudyConfig, design: Design, post_hoc: Sequence[str] = ()) -> dict[str, Any]:
    """Collect the results of all stages of a study.

    Args:
        config: the study.
        design: its cells, whose stages are done.
        post_hoc: names of claims that were not declared at the first run.

    Raises:
        InputError: a stage's output is missing or damaged.
    """
    bases = {name: _load_scores(design.folder(stage)) for name, stage in design.score_base.items()}
    cells = [_cell(config, design, bases, cell) for cell in design.cells]
    crossed = interactions(cells, {name: model.lineage or name for name, model in design.models.items()})
    machine = fields_with_role(StudyConfig, Role.OUTPUT | Role.EXECUTION)
    options = {name: value for name, value in yaml_io.to_dict(config).items() if name not in machine}
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": config.title or _default_title(design),
        "config": options,
        "design": {
            "models": [_model(model) for model in design.models.values()],
            "students": list(design.students),
            "sources": list(design.sources),
        },
        "base_ability": _base_ability(bases),
        "cells": cells,
        "effects": treatment_effects(cells),
        "interaction": crossed,
        "claims": judge_claims(config, cells, crossed, post_hoc),
        "swap_effects": swap_effects(design),
        "decontamination": decontamination_effect(config, cells),
        "fragility": fragility(cells),
        "aa_repeats": aa_flip_rate(design),
        "decoupling": judge_decoupling(cells, [arm.name for arm in config.arms if arm.kind == "noise"]),
        "proxies": _proxies(cells, design, bases),
        "corpora": _corpora(design, task_questions(config.score)),
        "stages": [{"label": stage.label, "key": stage.key} for stage in design.ordered_stages],
        "versions": versions(),
    }


def _default_title(design: Design) -> str:
    if len(design.students) > 1 or len(design.sources) > 1:
        return "Whose text can a model learn from?"
    (student,), (source,) = design.students, design.sources
    return f"{student}, trained on {'its own text' if source == student else f'text by {source}'}"


def _model(model: ModelConfig) -> dict[str, Any]:
    opened = hub.open_model(model.model)
    config, raw = opened.config, opened.raw_config
    return {
        **{key: value for key, value in asdict(model).items() if key != "model"},
        "family": raw["model_type"],
        "parameters": sum(prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config))),
        "layers": config.num_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
        "fingerprint": opened.fingerprint,
    }


# One cell -------------------------------------------------------------------------------------------------------


def _cell(config: StudyConfig, design: Design, bases: Mapping[str, ScoreResult], cell: StudyCell) -> dict[str, Any]:
    found: dict[str, Any] = {
        "student": cell.student,
        "treatment": cell.treatment,
        "source": cell.source,
        "seed": cell.seed,
        "texts": [],
        "tasks": [],
        "macro": None,
        "training": None,
        "corpus": None if cell.corpus is None else cell.corpus.key,
        "identical": True,
    }
    if cell.score is not None:
        pairs = pair_results(bases[cell.student], _load_scores(design.folder(cell.score)))
        found["identical"] &= all(pair.identical() for pair in pairs.values())
        tasks = [pair for pair in pairs.values() if pair.base.kind != "text"]
        reasons = [ineligibility_reason(pair) for pair in tasks]
        compared = zip(compare_tasks(tasks), reasons, strict=True)
        found["tasks"] = [entry | {"not_eligible": reason or None} for entry, reason in compared]
        eligible = [pair for pair, reason in zip(tasks, reasons, strict=True) if not reason]
        found["macro"] = macro_change(eligible) if eligible else None
        found["texts"] = [describe_text(pair) for pair in pairs.values() if pair.base.kind == "text"]
    extracted = cell_extraction(config, design, cell)
    found["identical"] &= extracted.pop("identical")
    found |= extracted
    if cell.train is not None:
        found["training"] = _training(design.folder(cell.train))
    found["proxies"] = None
    if cell.proxies is not None and cell.corpus is not None:
        student, source = (atomic.read_json(design.folder(stage) / "proxies.json") for stage in cell.proxies)
        found["proxies"] = cell_proxies(student, source, open_corpus(design.folder(cell.corpus)))
    found["measures"] = cell_measures(found)
    return found


def _training(run: Path) -> dict[str, Any]:
    description, lines = atomic.read_json(run / "run.json"), _read_records(run / "metrics.jsonl")
    logged = lines[:: max(1, len(lines) // LOG_POINTS)]
    evaluations = description.get("evaluation", {}).get("measured", ())
    return {
        "steps": description["steps"],
        "rows": description["rows"],
        "targets": sum(int(line["tokens"]) for line in lines) if len(lines) == description["steps"] else None,
        "log": {key: [line[key] for line in logged] for key in ("step", "loss", "learning_rate", "grad_norm")},
        "evaluations": summarize_curve(_read_records(run / "curve.jsonl"), evaluations),
    }


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSONL file that may not exist."""
    return [row for _, row in read_jsonl(path)] if path.exists() else []


def cell_measures(cell: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return before, after and change of every measure of a cell.

    `accuracy` is the chance-normalized macro accuracy over the eligible tasks (`paired_results.ineligibility_reason`;
    absent if there are none), `log_odds` the log-odds of the right choice over the same tasks, `task/NAME` and
    `log_odds/NAME` the values of each task, `text/NAME` bits per byte; further those of `extraction_measures`.
    """
    found: dict[str, dict[str, Any]] = {}
    if cell["macro"]:
        found["accuracy"] = cell["macro"]["chance_normalized"]
        if cell["macro"]["log_odds"]:
            found["log_odds"] = cell["macro"]["log_odds"]
    found |= {f"task/{task['name']}": task["accuracy"] for task in cell["tasks"]}
    found |= {f"log_odds/{task['name']}": task["log_odds"] for task in cell["tasks"] if "log_odds" in task}
    found |= {f"text/{text['name']}": text["bits_per_byte"] for text in cell["texts"]}
    return found | extraction_measures(cell)


# Over seeds -----------------------------------------------------------------------------------------------------


def treatment_effects(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each measure's change over seeds, by student and treatment."""
    found = []
    for student, treatment in dict.fromkeys((cell["student"], cell["treatment"]) for cell in cells):
        members = [cell for cell in cells if (cell["student"], cell["treatment"]) == (student, treatment)]
        found.append(
            {
                "student": student,
                "treatment": treatment,
                "source": members[0]["source"],
                "seeds": [cell["seed"] for cell in members],
                "measures": {
                    name: _seed_effect([cell["measures"][name] for cell in members])
                    for name in common_measures(members)
                },
            }
        )
    return found


def _seed_effect(parts: Sequence[PairedChange]) -> dict[str, Any]:
    changes = [part["change"]["value"] for part in parts]
    single = parts[0]["change"]
    return {
        "before": parts[0]["before"]["value"],
        "change": asdict(estimators.mean(changes)),
        "seeds": changes,
        "items": single["n"],
        "one_pair": [single["low"], single["high"]],
    }


def interactions(cells: Sequence[Mapping[str, Any]], lineage: Mapping[str, str]) -> dict[str, Any] | None:
    """Return home − away of each measure over seeds.

    None unless every student has home and away sources.
    """
    matrix = [cell for cell in cells if cell["treatment"] == f"{MAIN_EFFECT}{cell['source']}"]
    students = list(dict.fromkeys(cell["student"] for cell in matrix))
    sides = {
        student: {lineage[cell["source"]] == lineage[student] for cell in matrix if cell["student"] == student}
        for student in students
    }
    if len({lineage[student] for student in students}) < 2 or any(side != {True, False} for side in sides.values()):
        return None
    seeds = list(dict.fromkeys(cell["seed"] for cell in matrix))

    def contrast(name: str, seed: int) -> float:
        differences = []
        for student in students:
            own = [cell for cell in matrix if (cell["student"], cell["seed"]) == (student, seed)]
            home, away = (
                np.mean(
                    [
                        cell["measures"][name]["change"]["value"]
                        for cell in own
                        if (lineage[cell["source"]] == lineage[student]) is side
                    ]
                )
                for side in (True, False)
            )
            differences.append(home - away)
        return float(np.mean(differences))

    names = common_measures(matrix)
    found = {name: [contrast(name, seed) for seed in seeds] for name in names}
    return {
        "students": students,
        "seeds": seeds,
        "measures": {
            name: {"contrast": asdict(estimators.mean(values)), "seeds": values} for name, values in found.items()
        },
    }


# Models and corpora -----------------------------------------------------------------------------------------------


def _base_ability(bases: Mapping[str, ScoreResult]) -> dict[str, dict[str, float]]:
    """Return {model: {task: accuracy, text: bits per byte}} before training."""
    return {
        name: {
            **{task: numbers["acc"] for task, numbers in scored.result["tasks"].items() if "acc" in numbers},
            **{text: numbers["bits_per_byte"] for text, numbers in scored.result.get("texts", {}).items()},
        }
        for name, scored in bases.items()
    }


def _proxies(
    cells: Sequence[Mapping[str, Any]], design: Design, bases: Mapping[str, ScoreResult]
) -> dict[str, Any] | None:
    """Relate the proxies of the main cells to the gain."""
    matrix = [cell for cell in cells if cell["proxies"] is not None]
    if not matrix:
        return None
    measure = main_measure({"cells": matrix})
    values, gains, own = cell_arrays(matrix, design.students, design.sources, measure)
    if measure.startswith("text/"):
        gains = -gains  # fewer bits per byte are a gain
    tasks = [
        [items.acc.mean() for items in bases[name].items.values() if items.acc is not None]
        for name in design.sources
        if name in bases
    ]
    strength = np.mean(tasks, axis=1) if tasks and tasks[0] else None
    return {
        "measure": measure,
        "relations": judge_relations(values, gains, strength, self_mask=own, directions=EXPECTED_SIGN),
        "reliability": reliability(gains),
    }


def _corpora(design: Design, questions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Describe every training corpus, by the key of its stage."""
    found: dict[str, dict[str, Any]] = {}
    for cell in design.cells:
        if cell.corpus is not None and cell.corpus.key not in found:
            corpus = open_corpus(design.folder(cell.corpus))
            found[cell.corpus.key] = {
                "label": cell.corpus.label,
                "samples": len(corpus),
                "tokens": corpus.n_tokens,
                "sampling_params": None if corpus.manifest["seed"] is None else corpus.manifest["policy"],
                "seed": corpus.manifest["seed"],
                "statistics": corpus.manifest["statistics"],
                "contamination": contaminated_share(corpus.iter_texts(), questions),
                "retokenized": corpus.manifest.get("retokenized"),
                "retokenization_mismatches": corpus.manifest["retokenization_mismatches"],
                "examples": _examples(corpus),
            }
    return found


def _examples(corpus: Corpus) -> list[dict[str, Any]]:
    shown = set(hash_sample(len(corpus), EXAMPLES, corpus.manifest["seed"]))
    return [
        {
            "sample_id": sample.sample_id,
            "text": sample.text,
            "tokens": len(sample.tokens),
            "finish_reason": sample.finish_reason,
            "logprob": None if math.isnan(sample.logprob) else float(sample.logprob),
        }
        for sample in corpus.iter_samples()
        if sample.sample_id in shown
    ]


def _load_scores(folder: Path) -> ScoreResult:
    return load_score_result(str(folder / "score.json"))
