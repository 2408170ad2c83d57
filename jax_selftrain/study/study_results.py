"""What a study found, as plain data: `results.json`, from which its report is made and nothing else.

For every cell the student is laid beside its own base, answer by answer. A claim about a recipe rests on seeds, not on
items: the change of a measure is worked out per seed, and its interval is Student's t over seeds (one seed has none).
The interval over items of each single pair of checkpoints stands beside it in the tables.

**The interaction.** A source is *at home* with a student of its lineage. Where every lineage of the students is also a
source, home − away is the change on home text minus that on the other sources' text, averaged over students, seed by
seed. A source that is simply bad is bad for all students and moves both sides; only text that suits its own kind
better moves the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain.config import StudyConfig, yaml_io
from jax_selftrain.config.metadata import Role, roles
from jax_selftrain.corpus import Corpus, open_corpus
from jax_selftrain.evals import load_score_result
from jax_selftrain.evals.item_results import ScoreResult
from jax_selftrain.io import atomic
from jax_selftrain.stats import estimators
from jax_selftrain.study.decoupling import judge_decoupling
from jax_selftrain.study.design import MAIN_EFFECT, Design, StudyCell
from jax_selftrain.study.measure_names import common_measures, main_measure
from jax_selftrain.study.memorization_results import (
    aa_flip_rate,
    cell_memorization,
    decontamination_effect,
    fragility,
    memorization_measures,
    swap_effects,
)
from jax_selftrain.study.ngram_contamination import contaminated_share
from jax_selftrain.study.paired_results import describe_text, ineligibility_reason, pair_results
from jax_selftrain.study.preregistration import judge_claims
from jax_selftrain.study.proxies import EXPECTED_SIGN, cell_proxies, task_questions
from jax_selftrain.study.proxy_relation import cell_arrays, judge_relations, reliability
from jax_selftrain.study.results import compare_tasks, hash_sample, macro_change, read_records
from jax_selftrain.version import versions

FORMAT = "jax-selftrain study"
VERSION = 3
EXAMPLES = 3
"""Samples shown of each corpus."""

PairedChange = Mapping[str, Any]


def collect_study(config: StudyConfig, design: Design, post_hoc: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that the finished stages have to say; `post_hoc` names claims that were not declared at the first run.

    Raises:
        InputError: a stage's output is missing or damaged.
    """
    bases = {name: _load_scores(design.folder(stage)) for name, stage in design.score_base.items()}
    cells = [_describe(config, design, bases, cell) for cell in design.cells]
    crossed = interactions(cells, {name: model.lineage or name for name, model in design.models.items()})
    options = {
        name: value
        for name, value in yaml_io.to_dict(config).items()
        if not roles(StudyConfig)[name] & (Role.OUTPUT | Role.EXECUTION)
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "title": config.title or "Whose text can a model learn from?",
        "config": options,
        "design": {
            "models": [
                {key: value for key, value in asdict(model).items() if key != "model"}
                for model in design.models.values()
            ],
            "students": list(design.students),
            "sources": list(design.sources),
        },
        "strength": _base_ability(bases),
        "cells": cells,
        "effects": treatment_effects(cells),
        "interaction": crossed,
        "verdicts": judge_claims(config, cells, crossed, post_hoc),
        "swaps": swap_effects(design),
        "scrubbed": decontamination_effect(config, cells),
        "fragility": fragility(cells),
        "again": aa_flip_rate(design),
        "decoupling": judge_decoupling(cells, [arm.name for arm in config.arms if arm.kind == "noise"]),
        "proxies": _proxies(cells, design, bases),
        "corpora": _corpora(design, task_questions(config.score)),
        "stages": [{"label": stage.label, "key": stage.key} for stage in design.ordered_stages],
        "versions": versions(),
    }


# One cell -------------------------------------------------------------------------------------------------------


def _describe(config: StudyConfig, design: Design, bases: Mapping[str, ScoreResult], cell: StudyCell) -> dict[str, Any]:
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
        why_not = [ineligibility_reason(pair) for pair in tasks]
        described = zip(compare_tasks(tasks), why_not, strict=True)
        found["tasks"] = [entry | {"not_eligible": reason or None} for entry, reason in described]
        eligible = [pair for pair, reason in zip(tasks, why_not, strict=True) if not reason]
        found["macro"] = macro_change(eligible) if eligible else None
        found["texts"] = [describe_text(pair) for pair in pairs.values() if pair.base.kind == "text"]
    memory = cell_memorization(config, design, cell)
    found["identical"] &= memory.pop("identical")
    found |= memory
    if cell.train is not None:
        run = design.folder(cell.train)
        lines, curve = read_records(run / "metrics.jsonl"), read_records(run / "curve.jsonl")
        found["training"] = {
            "steps": atomic.read_json(run / "run.json")["steps"],
            "targets": sum(int(line["tokens"]) for line in lines),
            "curve": {name: [line[name] for line in curve] for name in (curve[0] if curve else ())},
        }
    found["proxies"] = None
    if cell.proxies is not None and cell.corpus is not None:
        student, source = (atomic.read_json(design.folder(stage) / "proxies.json") for stage in cell.proxies)
        found["proxies"] = cell_proxies(student, source, open_corpus(design.folder(cell.corpus)))
    found["measures"] = cell_measures(found)
    return found


def cell_measures(cell: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{name: before, after and change} of everything that is compared between cells.

    `accuracy` is the chance-normalized macro accuracy over the tasks that are eligible by the base
    (`pairs.why_not_eligible`; where none is, there is no such measure), `log_odds` those of the right choice over the
    same, `task/NAME` and `log_odds/NAME` those of each task, `text/NAME` bits per byte, and those of
    `memory.memory_measures`.
    """
    found: dict[str, dict[str, Any]] = {}
    if cell["macro"]:
        found["accuracy"] = cell["macro"]["chance_normalized"]
        if cell["macro"]["log_odds"]:
            found["log_odds"] = cell["macro"]["log_odds"]
    found |= {f"task/{task['name']}": task["accuracy"] for task in cell["tasks"]}
    found |= {f"log_odds/{task['name']}": task["log_odds"] for task in cell["tasks"] if "log_odds" in task}
    found |= {f"text/{text['name']}": text["bits_per_byte"] for text in cell["texts"]}
    return found | memorization_measures(cell)


# Over seeds -----------------------------------------------------------------------------------------------------


def treatment_effects(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every student and treatment, each measure's change over seeds: mean and interval, and the seeds' values."""
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
    """Home − away of each measure over seeds; None unless every student has text of its own kind and of another."""
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


# Around the cells -----------------------------------------------------------------------------------------------


def _base_ability(bases: Mapping[str, ScoreResult]) -> dict[str, dict[str, float]]:
    """What each base can do before anything: {model: {task or text: number}}."""
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
    """What the proxies of the matrix have to do with the gain; None where they were not measured."""
    matrix = [cell for cell in cells if cell["proxies"] is not None]
    if not matrix:
        return None
    measure = main_measure({"cells": matrix})
    values, gains, own = cell_arrays(matrix, design.students, design.sources, measure)
    if measure.startswith("text/"):
        gains = -gains  # fewer bits per byte are a gain
    tasks = [
        [documents.acc.mean() for documents in bases[name].documents.values() if documents.acc is not None]
        for name in design.sources
        if name in bases
    ]
    strength = np.mean(tasks, axis=1) if tasks and tasks[0] else None
    return {
        "measure": measure,
        "relations": judge_relations(values, gains, strength, self_mask=own, directions=EXPECTED_SIGN),
        "reliability": reliability(gains),
    }


def _corpora(design: Design, asked: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Every corpus that was trained on, by its stage's key."""
    found: dict[str, dict[str, Any]] = {}
    for cell in design.cells:
        if cell.corpus is not None and cell.corpus.key not in found:
            corpus = open_corpus(design.folder(cell.corpus))
            found[cell.corpus.key] = {
                "label": cell.corpus.label,
                "samples": len(corpus),
                "tokens": corpus.n_tokens,
                "statistics": corpus.manifest["statistics"],
                "contamination": contaminated_share(corpus.iter_texts(), asked),
                "retokenized": corpus.manifest.get("retokenized"),
                "examples": _examples(corpus),
            }
    return found


def _examples(corpus: Corpus) -> list[dict[str, Any]]:
    shown = set(hash_sample(len(corpus), EXAMPLES, corpus.manifest["seed"]))
    return [
        {"sample_id": sample.sample_id, "text": sample.text, "tokens": len(sample.tokens)}
        for sample in corpus.iter_samples()
        if sample.sample_id in shown
    ]


def _load_scores(folder: Path) -> ScoreResult:
    return load_score_result(str(folder / "score.json"))
