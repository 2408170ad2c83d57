"""What a study says of memory: each student laid beside its base, in every view of it.

| in `results.json` | what it is |
|---|---|
| a cell's `extraction` | all sequences; by class of what the corpus showed (at other thresholds, too), by group, by H |
| a cell's `views` | the same sequences in other formats, and after relearning (beside the base after relearning) |
| a cell's `fragility` | what it keeps beside continuations that were as probable (`study.fragility`) |
| `again` | the share of sequences whose exact match flips when the same base is measured again |
| `scrubbed` | students that could not read of H beside those that could (`corpus.scrub`), over seeds |
| `swaps` | the effect of being seen, by swapped corpora (`study.swap`) |

**H** is half of the set, assigned by hash before anything is sampled. It is told apart where an arm is scrubbed of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain import evals
from jax_selftrain.config import ExtractConfig, PromptFormat, StudyConfig, yaml_io
from jax_selftrain.config.metadata import roles, shared_overrides
from jax_selftrain.errors import InputError
from jax_selftrain.evals.overlap_classes import CLASSES, THRESHOLDS
from jax_selftrain.stats import estimators
from jax_selftrain.study.dag import Stage
from jax_selftrain.study.design import Design, StudyCell
from jax_selftrain.study.matched_fragility import compare_with_matched
from jax_selftrain.study.measure_names import FORMATTED, HELD_OUT, RELEARNED, UNSEEN, is_primary_format, is_secondary
from jax_selftrain.study.results import (
    Arrays,
    check_same_keys,
    compare_extraction,
    compare_sequences,
    duplicate_groups,
    read_table,
)
from jax_selftrain.study.swap_effect import naive_difference, swap_effect

Cells = Sequence[Mapping[str, Any]]


def check_memorization(config: StudyConfig) -> None:
    """Refuse what can be known to be wrong in a study's `memorization` before anything is done.

    Raises:
        InputError: an option without sequences, a name or a number that cannot be, or a file that cannot be read.
    """
    asked, default = config.memorization, StudyConfig().memorization
    if not config.extract.sequences:
        if asked != default:
            raise InputError("memorization: is asked about extract.sequences; set it, or leave the section out")
        return
    names = [form.name for form in asked.formats]
    for form in asked.formats:
        if not form.name or names.count(form.name) > 1 or form.name in (RELEARNED, UNSEEN):
            raise InputError(
                f"memorization.formats: every one needs a `name` of its own ({form.name or 'one has none'})"
            )
        if not shared_overrides(form, ExtractConfig):
            options = ", ".join(name for name in roles(PromptFormat) if name in roles(ExtractConfig))
            raise InputError(f"memorization.formats: {form.name}: changes nothing; set one of {options}")
    for name in ("never_trained_sequences", "relearn_steps"):
        if getattr(asked, name) < 1:
            raise InputError(f"memorization.{name} is {getattr(asked, name)}; it must be at least 1")
    if asked.unseen_text:
        evals.load_texts([asked.unseen_text])
    if asked.relearn_corpus.endswith(".jsonl") and not Path(asked.relearn_corpus).is_file():
        raise InputError(f"memorization.relearn_text {asked.relearn_corpus}: no such file")


# One cell -------------------------------------------------------------------------------------------------------


def cell_memorization(config: StudyConfig, design: Design, cell: StudyCell) -> dict[str, Any]:
    """`extraction`, `views`, `fragility` of a cell, and whether every number is `identical` with the base's."""
    if cell.extract is None:
        return {"extraction": None, "views": {}, "fragility": None, "identical": True}
    before, after = _tables(design, design.extract_base[cell.student], cell.extract)
    told = {name: after[name] for name in after if name in ("overlap", "class")}
    if any(arm.kind == "scrubbed" for arm in config.arms):
        told[HELD_OUT] = evals.held_out_half(evals.sequences_fingerprint(config.extract.sequences), before["index"])
    extraction = compare_extraction(
        {**before, **told}, after, duplicate_groups(config.extract, before["sequence"].size)
    )
    if "overlap" in told:
        extraction["thresholds"] = _by_threshold(before, after, evals.make_window(config.extract).suffix)
    bases = design.views_base[cell.student, cell.seed]
    views = {name: _tables(design, bases[name], stage) for name, stage in cell.probes.items()}
    never = views.pop(UNSEEN, None)
    everything = {name: np.ones(pair[0]["sequence"].size, bool) for name, pair in views.items()}
    return {
        "extraction": extraction,
        "views": {name: compare_sequences(*pair, everything[name]) for name, pair in views.items()},
        "fragility": None if never is None else compare_with_matched((before, after), never),
        "identical": np.array_equal(before["logprob"], after["logprob"]),
    }


def _tables(design: Design, base: Stage, student: Stage) -> tuple[Arrays, Arrays]:
    folders = design.folder(base), design.folder(student)
    before, after = (read_table(folder / "extract.sequences.parquet") for folder in folders)
    check_same_keys(before, after, ("sequence",), folders[1])
    return before, after


def _by_threshold(before: Arrays, after: Arrays, suffix: int) -> list[dict[str, Any]]:
    """The classes of what a corpus showed, were another length of overlap to count."""
    found = []
    for threshold in (one for one in THRESHOLDS if one <= suffix):
        classes = evals.classify(after["overlap"], suffix, threshold)
        for name in CLASSES:
            part = compare_sequences(before, after, classes == name)
            found.append({"threshold": threshold, "class": name, **part})
    return found


def memorization_measures(cell: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`exact_match` and `log_pz` of a described cell: of all sequences, and `/NAME` of each class, group and view.

    `pz`, the mean of p_z, is told of all sequences, of H and of the classes.
    """
    extraction = cell["extraction"]
    if not extraction:
        return {}
    parts = {"" if name == "all" else name: part for name, part in extraction["classes"].items()}
    parts |= {f"group {part['name']}": part for part in extraction["groups"]}
    parts |= {name if name == RELEARNED else f"{FORMATTED}{name}": part for name, part in cell["views"].items()}
    found = {}
    for name, part in parts.items():
        if part["n"]:
            suffix = f"/{name}" if name else ""
            found[f"exact_match{suffix}"] = part["exact_match"]
            found[f"log_pz{suffix}"] = part["logprob"]
            if name in ("", HELD_OUT, *CLASSES):
                found[f"pz{suffix}"] = part["pz"]
    return found


# Over cells -----------------------------------------------------------------------------------------------------


def aa_flip_rate(design: Design) -> list[dict[str, Any]]:
    """How often exact match flips when the same base is measured again: the A/A rate, and mean |Δ log p_z|."""
    found = []
    for student, formats in design.aa_repeats.items():
        for format, stage in formats.items():
            first, second = _tables(design, design.extract_base[student], stage)
            found.append(
                {
                    "student": student,
                    "way": format,
                    "n": int(first["sequence"].size),
                    "flips": evals.flip_rate(first, second),
                    "log_pz": float(np.mean(np.abs(first["logprob"] - second["logprob"]))),
                }
            )
    return found


def decontamination_effect(config: StudyConfig, cells: Cells) -> list[dict[str, Any]]:
    """For every student: what could not be read of H changes, scrubbed − companion, seed by seed."""
    found = []
    pairs = [
        (one.name, other.name)
        for one in config.arms
        for other in config.arms
        if (one.kind, other.kind) == ("scrubbed", "size_matched") and _same_settings(one, other)
    ]
    for scrubbed, companion in pairs:
        for student in dict.fromkeys(cell["student"] for cell in cells):
            of = {
                arm: {c["seed"]: c["measures"] for c in cells if (c["student"], c["treatment"]) == (student, arm)}
                for arm in (scrubbed, companion)
            }
            if not of[scrubbed] or of[scrubbed].keys() != of[companion].keys():
                continue
            sides = [list(of[arm].values()) for arm in (scrubbed, companion)]
            for measure in sides[0][0]:
                if not all(measure in one for side in sides for one in side):
                    continue
                if not (is_primary_format(measure) or is_secondary(measure) or measure.endswith(f"/{HELD_OUT}")):
                    continue
                seeds = [
                    one[measure]["after"]["value"] - other[measure]["after"]["value"]
                    for one, other in zip(*sides, strict=True)
                ]
                found.append(
                    {
                        "student": student,
                        "scrubbed": scrubbed,
                        "size_matched": companion,
                        "measure": measure,
                        "difference": asdict(estimators.mean(seeds)),
                        "seeds": seeds,
                        "n": sides[0][0][measure]["change"]["n"],
                    }
                )
    return found


def _same_settings(one: Any, other: Any) -> bool:
    """Whether two arms are the same but for name and kind."""
    plain = [{k: v for k, v in yaml_io.to_dict(arm).items() if k not in ("name", "kind")} for arm in (one, other)]
    return plain[0] == plain[1]


def swap_effects(design: Design) -> list[dict[str, Any]]:
    """The effect of being seen on every student whose corpora, one for each seed, hold different sequences."""
    found = []
    for student, treatment in dict.fromkeys((cell.student, cell.treatment) for cell in design.cells):
        tables = [
            read_table(design.folder(cell.extract) / "extract.sequences.parquet")
            for cell in design.cells
            if (cell.student, cell.treatment) == (student, treatment) and cell.extract is not None
        ]
        if len(tables) < 2 or not all("class" in table for table in tables):
            continue
        classes = [table["class"] for table in tables]
        for measure, column in (("exact_match", "exact_match"), ("log_pz", "logprob")):
            outcomes = [table[column] for table in tables]
            effect = swap_effect(outcomes, classes)
            if effect is not None:
                naive = naive_difference(outcomes, classes)
                entry = {"student": student, "treatment": treatment, "measure": measure, "seeds": len(tables)}
                found.append(entry | {"effect": asdict(effect), "naive": naive})
    return found


def fragility(cells: Cells) -> list[dict[str, Any]]:
    """Over seeds, what every treatment leaves of the sequences beside continuations that were as probable."""
    found = []
    for student, treatment in dict.fromkeys((cell["student"], cell["treatment"]) for cell in cells):
        members = [c["fragility"] for c in cells if (c["student"], c["treatment"]) == (student, treatment)]
        if any(one is None for one in members):
            continue
        told = all(one["exact_match"] for one in members)
        found.append(
            {
                "student": student,
                "treatment": treatment,
                "seeds": len(members),
                "n": min(one["n"] for one in members),
                "left_out": max(one["left_out"] for one in members),
                "counterparts": min(one["counterparts"] for one in members),
                **{
                    measure: {
                        side: asdict(estimators.mean([one[measure][side] for one in members]))
                        for side in ("sequences", "never_trained", "difference")
                    }
                    if told
                    else None
                    for measure in ("exact_match", "log_pz")
                },
            }
        )
    return found
