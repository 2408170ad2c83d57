"""Names and values of treatments and measures in `results.json`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jax_selftrain.config import ArmConfig, MemorizationConfig

Cells = Sequence[Mapping[str, Any]]
"""`cells` of `results.json`."""

MAIN_EFFECT = "source "
"""Prefix of the treatment of a main cell: `source NAME`."""
OWN_TEXT = "own text"
"""Treatment of a claim about several bases: each is trained on its own text."""
HELD_OUT = "H"
"""Suffix of measures of the held-out half of the sequences: `exact_match/H`."""
EMITTED = "H_emitted"
"""Suffix of measures of the sequences of H that the self-trained student's corpus contains, in part at least."""
REPRODUCED = "reproduced_held_out"
"""Suffix of measures of the held-out sequences that the base reproduces: exact match is 1 before training."""
SEQUENCES = "sequences"
"""Name of the extraction set, where tasks are named."""
UNSEEN = "unseen"
"""Name of the probe with continuations of unseen text."""
AFTER_RELEARNING, AFTER_RELEARNING_H = "after_relearning", "after_relearning_H"
"""Beginnings of the names of probes after short trainings: `after_relearning 50`, on unrelated text; and
`after_relearning_H 50`, on one half of H, measured on the other half."""
NOT_SHOWN = "H_not_shown"
"""Suffix of measures of that other half of H, before relearning."""
FORMATTED, GROUP = "format ", "group "
"""Prefixes: `exact_match/format NAME`, `exact_match/group NAME`."""


def name_generations(arm: str, n: int) -> list[str]:
    """Return the treatments of an arm's generations; the last has its name."""
    return [*(f"{arm}, generation {generation}" for generation in range(1, n)), arm]


def expand_generations(arms: Iterable[ArmConfig]) -> list[ArmConfig]:
    """Replace each arm of kind `generations` by one for every generation."""
    return [
        replace(arm, name=name, generations=generation) if arm.kind == "generations" else arm
        for arm in arms
        for generation, name in enumerate(
            name_generations(arm.name, arm.generations if arm.kind == "generations" else 1), 1
        )
    ]


def group_cells(cells: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Return the cells of each student and treatment."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["student"], cell["treatment"]), []).append(cell)
    return groups


def seed_values(cells: Cells, measure: str, side: str = "change") -> dict[int, float]:
    """Return a measure by seed; empty if a cell lacks it."""
    if not all(measure in cell["measures"] for cell in cells):
        return {}
    return {cell["seed"]: cell["measures"][measure][side]["value"] for cell in cells}


def common_measures(cells: Cells) -> list[str]:
    """Return the measures that all cells (or effects) have."""
    return [name for name in cells[0]["measures"] if all(name in cell["measures"] for cell in cells)]


def main_measure(results: Mapping[str, Any]) -> str:
    """Return the headline measure: accuracy, else a text, else exact match."""
    names = common_measures(results["cells"])
    texts = [name for name in names if name.startswith("text/")]
    return "accuracy" if "accuracy" in names else (texts or names)[0]


def is_primary_format(measure: str) -> bool:
    """Return True unless the measure is of some sequences or tasks."""
    return not measure.startswith(("exact_match/", "log_pz/", "pz/", "log_odds/"))


def is_secondary(measure: str) -> bool:
    """Return True if the measure is of another format or after relearning."""
    kind, _, part = measure.partition("/")
    return kind in ("exact_match", "log_pz", "pz") and part.startswith((FORMATTED, AFTER_RELEARNING))


def relearning_probes(options: MemorizationConfig) -> list[str]:
    """Return the names of the probes after short trainings."""
    kinds = {AFTER_RELEARNING: options.relearn_corpus, AFTER_RELEARNING_H: options.relearn_sequences}
    return [f"{kind} {steps}" for kind, is_set in kinds.items() if is_set for steps in options.relearn_steps]


def display_scale(measure: str) -> float:
    """Return the factor to display a measure (100 for shares)."""
    return 100.0 if measure.startswith(("accuracy", "task/", "exact_match", "pz")) else 1.0
