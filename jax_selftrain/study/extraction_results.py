"""Extraction results of a study: students compared with their bases (fields: docs/study.md).

**H** is half of the set, assigned by hash before sampling. It is reported where an arm is decontaminated.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain import evals
from jax_selftrain.config import ExtractConfig, StudyConfig
from jax_selftrain.errors import InputError
from jax_selftrain.evals.extraction import CLASSES, THRESHOLDS, classify
from jax_selftrain.evals.suffix_probability import n_p_discoverable
from jax_selftrain.io.jsonl import read_jsonl
from jax_selftrain.io.tables import load_table
from jax_selftrain.stats import estimators
from jax_selftrain.study import measure_names as names
from jax_selftrain.study.dag import Stage
from jax_selftrain.study.design import Design, StudyCell
from jax_selftrain.study.memorization_contrasts import (
    CONTINUATIONS,
    compare_with_matched,
    find_loops,
    naive_difference,
    swap_effect,
)
from jax_selftrain.study.paired_results import paired_means, paired_proportions

Arrays = dict[str, np.ndarray]


def compare_sequences(before: Arrays, after: Arrays, members: np.ndarray | slice = slice(None)) -> dict[str, Any]:
    """Compare the sequences in `members` (bool [N], or all) before and after.

    The result has only `n` if there are none.
    `logprob` is the mean of log p_z, which improbable sequences dominate. `pz` is the mean of p_z: the share of
    sequences that one sample reproduces.
    """
    old, new = ({name: side[name][members] for name in side} for side in (before, after))
    exact = old["exact_match"], new["exact_match"]
    if not exact[0].size:
        return {"n": 0}
    means = ("token_accuracy", "teacher_forced_accuracy", "logprob")
    return {
        "n": exact[0].size,
        "exact_match": paired_proportions(*exact),
        "flips": asdict(estimators.mcnemar_table(*exact)),
        **{name: paired_means(old[name], new[name]) for name in means if name in old},
        "pz": paired_means(np.exp(old["logprob"]), np.exp(new["logprob"])),
    }


def extraction_measures(cell: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the measures of a cell's extraction.

    `exact_match` and `log_pz` are of all sequences and, as `/NAME`, of each class, group and probe; `pz`, the mean of
    p_z, is of all sequences, H, the classes and after relearning.
    """
    extraction = cell["extraction"]
    if not extraction:
        return {}
    classes = extraction["classes"]
    parts = classes | {f"{names.GROUP}{part['name']}": part for part in extraction["groups"]}
    relearned = {name for name in cell["probes"] if name.startswith(names.AFTER_RELEARNING)}
    parts |= {n if n in relearned else f"{names.FORMATTED}{n}": part for n, part in cell["probes"].items()}
    return {
        measure if name == "all" else f"{measure}/{name}": part[key]
        for name, part in parts.items()
        for measure, key in (("exact_match", "exact_match"), ("log_pz", "logprob"), ("pz", "pz"))
        if part["n"] and (measure != "pz" or name in classes or name in relearned)
    }


def cell_extraction(config: StudyConfig, design: Design, cell: StudyCell) -> dict[str, Any]:
    """Return `extraction`, `probes`, `fragility` of a cell, `identical`.

    Further `items`, the changes of its sequences, and `own_classes`, their overlap classes by its corpus. A student
    without a corpus gets the classes of the self-trained student of its seed.
    """
    if cell.extract is None:
        return {
            "extraction": None,
            "probes": {},
            "fragility": None,
            "identical": True,
            "items": {},
            "own_classes": None,
        }
    before, after = _read_pair(design, design.extract_base[cell.student], cell.extract)
    window, n = evals.make_window(config.extract), before["sequence"].size
    parts: dict[str, Any] = {"all": slice(None)}
    emitted = _self_trained_classes(design, cell)
    classes = after.get("class", emitted)
    if classes is not None:
        parts |= {name: classes == name for name in CLASSES}
        parts[names.REPRODUCED] = np.asarray(before["exact_match"], bool) & parts["held_out"]
    is_decontaminated = any(arm.kind == "decontaminated" for arm in config.arms)
    if is_decontaminated or config.memorization.relearn_sequences:
        fingerprint = evals.sequences_fingerprint(config.extract.sequences)
    if config.memorization.relearn_sequences:
        _, parts[names.NOT_SHOWN] = evals.relearned_halves(fingerprint, before["index"])
    if is_decontaminated:
        parts[names.HELD_OUT] = evals.held_out_half(fingerprint, before["index"])
        if emitted is not None:
            parts[names.EMITTED] = parts[names.HELD_OUT] & (emitted != "held_out")
    groups = np.array(duplicate_groups(config.extract, before["index"]))
    old, new = (n_p_discoverable(side["logprob"]) for side in (before, after))
    extraction: dict[str, Any] = {
        "prefix": window.prefix,
        "suffix": window.suffix,
        "min_overlap": config.extract.min_overlap,
        "n": n,
        "classes": {name: compare_sequences(before, after, members) for name, members in parts.items()},
        "groups": [
            {"name": name, **compare_sequences(before, after, groups == name)}
            for name in dict.fromkeys(groups.tolist())
        ],
        "discoverable": [
            {"draws": int(draws), "p": float(p), **paired_proportions(old[key], new[key])}
            for key in old
            for draws, p in (key.split("@"),)
        ],
    }
    if "overlap" in after:
        extraction["thresholds"] = [
            {"threshold": threshold, "class": name, **compare_sequences(before, after, classes == name)}
            for threshold in THRESHOLDS
            if threshold <= window.suffix
            for classes in (classify(after["overlap"], window.suffix, threshold),)
            for name in CLASSES
        ]
    bases = design.base_probes[cell.student, cell.seed]
    probes = {name: _read_pair(design, bases[name], stage) for name, stage in cell.probes.items()}
    unseen, loops = probes.pop(names.UNSEEN, None), 0
    if unseen is not None:
        made = cell.probes[names.UNSEEN].inputs["sequences"]
        assert isinstance(made, Stage)
        rows = np.stack(list(_read_table(design.folder(made) / CONTINUATIONS)["tokens"]))[unseen[0]["index"]]
        is_loop = find_loops(rows[:, -window.suffix :])
        loops, unseen = int(is_loop.sum()), (_select(unseen[0], ~is_loop), _select(unseen[1], ~is_loop))
    return {
        "extraction": extraction,
        "probes": {
            name: compare_sequences(*pair, parts[names.NOT_SHOWN if names.AFTER_RELEARNING_H in name else "all"])
            for name, pair in probes.items()
        },
        "fragility": None if unseen is None else compare_with_matched((before, after), unseen) | {"loops": loops},
        "identical": np.array_equal(before["logprob"], after["logprob"]),
        "items": {
            "exact_match": {names.SEQUENCES: after["exact_match"].astype(np.float64) - before["exact_match"]},
            "log_pz": {names.SEQUENCES: after["logprob"] - before["logprob"]},
            "pz": {names.SEQUENCES: np.exp(after["logprob"]) - np.exp(before["logprob"])},
        },
        "own_classes": after.get("class"),
    }


def _self_trained_classes(design: Design, cell: StudyCell) -> np.ndarray | None:
    """Return the overlap classes by the corpus of self-training."""
    for other in design.cells:
        is_own = other.treatment == f"{names.MAIN_EFFECT}{cell.student}"
        if is_own and (other.student, other.seed) == (cell.student, cell.seed) and other.extract is not None:
            return _read_sequences(design, other.extract).get("class")
    return None


def duplicate_groups(config: ExtractConfig, index: np.ndarray) -> list[str]:
    """Return the `group` of sequences of a JSONL set, or nothing.

    `index` has the ids of the sequences [N]: `index` of their lines, or the numbers of these.
    """
    path = Path(config.sequences)
    if not path.is_file() or not path.name.endswith((".jsonl", ".jsonl.gz", ".json")):
        return []
    rows = [row for _, row in read_jsonl(path, config.limit)]
    groups = {row.get("index", i): row.get("group") for i, row in enumerate(rows)}
    if len(groups) < len(rows):  # ids that are not unique name no line
        return []
    if missing := sorted({*index.tolist()} - groups.keys()):
        raise InputError(f"{path}: has no sequence {missing[0]}, so it has changed; run the same command again")
    found = [groups[i] for i in index.tolist()]
    return [str(group) for group in found] if all(group is not None for group in found) else []


def _select(table: Arrays, members: np.ndarray) -> Arrays:
    return {name: values[members] for name, values in table.items()}


def _read_pair(design: Design, base: Stage, student: Stage) -> tuple[Arrays, Arrays]:
    before, after = _read_sequences(design, base), _read_sequences(design, student)
    if not np.array_equal(before["sequence"], after["sequence"]):
        raise InputError(
            f"{design.folder(student)}: base and student were measured on different sequences; delete this folder and "
            "run again"
        )
    return before, after


def _read_sequences(design: Design, stage: Stage) -> Arrays:
    """Read the table of an extraction."""
    return _read_table(design.folder(stage) / "extract.sequences.parquet")


def _read_table(path: Path) -> Arrays:
    """Read the columns of a table that a stage wrote."""
    table = load_table(path, remedy="delete it and run the same command again")
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def aa_flip_rate(design: Design) -> list[dict[str, Any]]:
    """Return the share of flips and |Δ log p_z| of A/A repeats."""
    found = []
    for student, repeats in design.aa_repeats.items():
        for repeat, stage in repeats.items():
            first, second = _read_pair(design, design.extract_base[student], stage)
            flips, shift = first["exact_match"] != second["exact_match"], np.abs(first["logprob"] - second["logprob"])
            means = {"flips": float(np.mean(flips)), "log_pz": float(np.mean(shift))}
            found.append({"student": student, "repeat": repeat, "n": int(shift.size), **means})
    return found


def decontamination_effect(config: StudyConfig, cells: names.Cells) -> list[dict[str, Any]]:
    """Compare students of decontaminated and size-matched corpora, seed by seed."""
    groups, found = names.group_cells(cells), []
    for one, other in product(config.arms, repeat=2):
        if one.kind != "decontaminated" or other != replace(one, name=other.name, kind="size_matched"):
            continue
        for student in dict.fromkeys(cell["student"] for cell in cells):
            treated, control = (groups.get((student, arm.name), []) for arm in (one, other))
            if not treated or [cell["seed"] for cell in treated] != [cell["seed"] for cell in control]:
                continue
            for measure in names.common_measures([*treated, *control]):
                is_format = names.is_primary_format(measure) or names.is_secondary(measure)
                if not is_format and measure.partition("/")[2] not in (names.HELD_OUT, names.EMITTED):
                    continue
                after, matched = (names.seed_values(side, measure, "after") for side in (treated, control))
                seeds = [after[seed] - matched[seed] for seed in after]
                found.append(
                    {
                        "student": student,
                        "decontaminated": one.name,
                        "size_matched": other.name,
                        "measure": measure,
                        "difference": asdict(estimators.mean(seeds)),
                        "seeds": seeds,
                        "n": treated[0]["measures"][measure]["change"]["n"],
                    }
                )
    return found


def swap_effects(design: Design) -> list[dict[str, Any]]:
    """Estimate the effect of being seen by swapped corpora."""
    found = []
    for student, treatment in dict.fromkeys((cell.student, cell.treatment) for cell in design.cells):
        tables = [
            _read_sequences(design, cell.extract)
            for cell in design.cells
            if (cell.student, cell.treatment) == (student, treatment) and cell.extract is not None
        ]
        if len(tables) < 2 or not all("class" in table for table in tables):
            continue
        classes = [table["class"] for table in tables]
        for measure, column in (("exact_match", "exact_match"), ("log_pz", "logprob")):
            outcomes = [table[column] for table in tables]
            if (effect := swap_effect(outcomes, classes)) is not None:
                naive = naive_difference(outcomes, classes)
                entry = {"student": student, "treatment": treatment, "measure": measure, "seeds": len(tables)}
                found.append(entry | {"effect": asdict(effect), "naive": naive})
    return found


def fragility(cells: names.Cells) -> list[dict[str, Any]]:
    """Average the comparison with matched continuations over seeds."""
    found = []
    for (student, treatment), group in names.group_cells(cells).items():
        members = [cell["fragility"] for cell in group]
        if any(one is None for one in members):
            continue
        counts = {
            key: pick(one[key] for one in members)
            for key, pick in (("n", min), ("unmatched", max), ("controls", min), ("loops", max))
        }
        entry = {"student": student, "treatment": treatment, "seeds": len(members), **counts}
        for measure in ("exact_match", "log_pz"):
            entry[measure] = None
            if all(one["exact_match"] for one in members):
                sides = {side: [one[measure][side] for one in members] for side in members[0][measure]}
                entry[measure] = {side: asdict(estimators.mean(values)) for side, values in sides.items()}
        found.append(entry)
    return found
