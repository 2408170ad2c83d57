"""Simulated studies with one student, for tests of claims."""

from __future__ import annotations

from typing import Any

from jax_selftrain.config import ArmConfig, ClaimConfig, ModelConfig, ScoreConfig, StudyConfig

SEEDS = tuple(range(100, 105))
WOBBLE = (0.001, -0.002, 0.0015, 0.0, -0.0005)
OWN = "source A"
TASKS = [{"n": 10_000, "chance": 0.5, "not_eligible": None}]


def make_study(*claims: ClaimConfig, **changes: Any) -> StudyConfig:
    options: dict[str, Any] = {
        "claims": claims,
        "arms": (ArmConfig("real"), ArmConfig("shuffled")),
        "positive_controls": ("real",),
        "negative_controls": ("shuffled",),
        "models": (ModelConfig("A", "A"),),
        "score": ScoreConfig(tasks=("tasks.jsonl",)),
    }
    return StudyConfig(**options | changes)


def make_cells(seeds: tuple[int, ...] = SEEDS, own: float = 0.0, **changes: float) -> list[dict[str, Any]]:
    """Simulate cells of student A with changes of accuracy by treatment."""
    effects = {OWN: own, "real": 0.05, "shuffled": -0.05} | changes
    return [
        {
            "student": "A",
            "treatment": treatment,
            "seed": seed,
            "tasks": TASKS,
            "measures": {"accuracy": {"change": {"value": change + WOBBLE[(n + place) % 5]}}},
        }
        for place, (treatment, change) in enumerate(effects.items())
        for n, seed in enumerate(seeds)
    ]


KEEPS = ClaimConfig("keeps", OWN, "A", direction="preserves", margin=0.01)
RAISES = ClaimConfig("raises", OWN, "A")
