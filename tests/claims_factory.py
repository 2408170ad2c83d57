"""Simulated studies with one student, for tests of claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax_selftrain.config import ArmConfig, ClaimConfig, ModelConfig, ScoreConfig, StudyConfig
from jax_selftrain.study.preregistration import claim_contrasts, judge_claims
from jax_selftrain.study.registration import Registration

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


def judge(config: StudyConfig, cells: list[dict[str, Any]], post_hoc: Sequence[str] = ()) -> list[dict[str, Any]]:
    pairs = {(cell["student"], cell["treatment"].removeprefix("source ")) for cell in cells if "source" in cell}
    contrasts = claim_contrasts(config.claims, {model.name: model for model in config.models}, pairs, ())
    return judge_claims(config, cells, contrasts, Registration(tuple(post_hoc), (), (), SEEDS))


KEEPS = ClaimConfig("keeps", OWN, "A", direction="preserves", margin=0.01)
RAISES = ClaimConfig("raises", OWN, "A")
