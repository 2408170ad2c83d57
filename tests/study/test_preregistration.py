"""Verdicts on simulated studies, and refusals of claims."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_selftrain.config import ArmConfig, ClaimConfig, StudyConfig
from jax_selftrain.errors import InputError
from jax_selftrain.stats.noninferiority import minimum_detectable_effect
from jax_selftrain.study.preregistration import check_claims, describe_power, freeze_claims, judge_claims

SEEDS = tuple(range(100, 105))
WOBBLE = (0.001, -0.002, 0.0015, 0.0, -0.0005)
OWN = "source A"


def make_study(*claims: ClaimConfig, **changes: Any) -> StudyConfig:
    options: dict[str, Any] = {
        "claims": claims,
        "arms": (ArmConfig("real"), ArmConfig("shuffled")),
        "positive_controls": ("real",),
        "negative_controls": ("shuffled",),
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
            "measures": {"accuracy": {"change": {"value": change + WOBBLE[(n + place) % 5]}}},
        }
        for place, (treatment, change) in enumerate(effects.items())
        for n, seed in enumerate(seeds)
    ]


def verdict(
    config: StudyConfig, cells: list[dict[str, Any]], interaction: dict[str, Any] | None = None
) -> tuple[str, str]:
    (found,) = judge_claims(config, cells, interaction, ())
    return found["verdict"], found["reason"]


KEEPS = ClaimConfig("keeps", OWN, "A", direction="preserves", margin=0.01)
RAISES = ClaimConfig("raises", OWN, "A")


@pytest.mark.parametrize(
    ("claim", "change", "expected"),
    [
        (KEEPS, 0.0, "supported"),
        (KEEPS, 0.03, "supported"),  # a change for the better is no loss
        (KEEPS, -0.0097, "cannot tell"),
        (KEEPS, -0.03, "contradicted"),
        (RAISES, 0.02, "supported"),
        (RAISES, 0.0, "cannot tell"),
        (RAISES, -0.02, "contradicted"),
        (ClaimConfig("lowers", OWN, "A", direction="lowers"), -0.02, "supported"),
        (ClaimConfig("more", OWN, "A", comparator="real"), 0.02, "contradicted"),
    ],
    ids=str,
)
def test_the_rule_decides(claim: ClaimConfig, change: float, expected: str) -> None:
    assert verdict(make_study(claim), make_cells(own=change))[0] == expected


def test_four_seeds_or_missing_cells_are_not_tested() -> None:
    config = make_study(RAISES)
    assert verdict(config, make_cells(SEEDS[:4], own=0.5)) == ("not tested", "4 seeds; a verdict needs 5.")
    missing = [cell for cell in make_cells() if cell["treatment"] != OWN]
    assert verdict(config, missing) == ("not tested", "the study does not have these cells or this measure.")
    unpaired = [cell for cell in make_cells() if (cell["treatment"], cell["seed"]) != ("real", 104)]
    assert verdict(make_study(ClaimConfig("x", OWN, "A", comparator="real")), unpaired)[0] == "not tested"


def test_a_failed_or_missing_control_makes_the_assay_insensitive() -> None:
    config = make_study(RAISES)
    for name, wanted in (("real", "raise"), ("shuffled", "lower")):
        found, why = verdict(config, make_cells(own=0.5, **{name: 0.0}))
        assert found == "assay insensitive"
        assert why.startswith(f"{name} did not {wanted} accuracy of A")
    found, why = verdict(make_study(RAISES, negative_controls=()), make_cells(own=0.5))
    assert (found, why) == ("assay insensitive", "A has no arm in negative_controls with this measure.")
    cells = make_cells(real=0.0)
    for cell in cells:  # what it remembers is not what the assay speaks of
        cell["measures"]["log_pz"] = {"change": {"value": -1.0 + cell["measures"]["accuracy"]["change"]["value"]}}
    forgets = ClaimConfig("forgets", OWN, "A", measure="log_pz", direction="lowers")
    assert verdict(make_study(forgets), cells)[0] == "supported"


def test_the_interaction_is_judged_over_its_seeds() -> None:
    claim = ClaimConfig("own kind", "home - away")
    crossed = {"measures": {"accuracy": {"seeds": [0.02 + x for x in WOBBLE]}}}
    assert verdict(make_study(claim), make_cells(), crossed)[0] == "supported"
    assert verdict(make_study(claim), make_cells(), None)[0] == "not tested"


def test_primary_claims_are_corrected_separately_by_holm() -> None:
    weak = 0.0016  # p of about .03 alone
    claims = [ClaimConfig(f"c{n}", OWN, "A") for n in range(3)]
    alone = judge_claims(make_study(claims[0]), make_cells(own=weak), None, ())[0]
    together = judge_claims(make_study(*claims), make_cells(own=weak), None, ())
    assert alone["p_adjusted"] == alone["p"] < 0.05
    assert together[0]["p_adjusted"] == pytest.approx(3 * alone["p"])
    assert [one["verdict"] for one in (alone, *together)] == ["supported", *["cannot tell"] * 3]
    late = judge_claims(make_study(*claims), make_cells(own=weak), None, ["c1", "c2"])
    assert [one["evidence_level"] for one in late] == ["primary", "exploratory", "exploratory"]
    assert late[0]["p_adjusted"] == alone["p"]


def test_false_positives_are_held_over_three_claims() -> None:
    """The familywise error of three null claims is at most .06."""
    rng, wrong = np.random.default_rng(0), 0
    claims = [ClaimConfig(f"c{n}", f"t{n}", "A", measure="log_pz") for n in range(3)]
    for _ in range(2000):
        cells = [
            {
                "student": "A",
                "treatment": f"t{n}",
                "seed": seed,
                "measures": {"log_pz": {"change": {"value": float(rng.normal(0, 0.01))}}},
            }
            for n in range(3)
            for seed in SEEDS
        ]
        wrong += any(one["verdict"] == "supported" for one in judge_claims(make_study(*claims), cells, None, ()))
    assert 0.03 <= wrong / 2000 <= 0.06


# ---------------------------------------------------------------- declared beforehand


def test_claims_are_frozen_at_the_first_run(tmp_path: Path) -> None:
    assert freeze_claims(tmp_path, [KEEPS], "all") == []
    assert freeze_claims(tmp_path, [KEEPS], "all") == []
    edited = ClaimConfig("keeps", OWN, "A", direction="preserves", margin=0.05)
    assert freeze_claims(tmp_path, [edited, RAISES], "all") == ["keeps", "raises"]
    path = tmp_path / "claims.json"
    text = path.read_text()
    path.write_text(text.replace("0.01", "0.05"))
    with pytest.raises(InputError, match="was changed after it was written"):
        freeze_claims(tmp_path, [edited], "all")


def test_claims_about_tasks_may_change_while_only_dev_items_are_seen(tmp_path: Path) -> None:
    memory = ClaimConfig("memory", OWN, "A", measure="exact_match/H")
    flipped = replace(memory, direction="lowers")
    assert freeze_claims(tmp_path, [KEEPS, memory], "dev") == []
    (tmp_path / "results.json").write_text("{}")
    assert freeze_claims(tmp_path, [RAISES, memory], "dev") == []
    assert freeze_claims(tmp_path, [RAISES, KEEPS, flipped], "test") == ["memory"]  # its results are of all sequences
    assert freeze_claims(tmp_path, [RAISES, memory], "test") == []
    for split in ("all", "dev"):
        assert freeze_claims(tmp_path, [RAISES, memory], split) == ["raises"]
    path = tmp_path / "claims.json"
    path.write_text(path.read_text().replace('"test"', '"all"'))
    with pytest.raises(InputError, match="was changed after it was written"):
        freeze_claims(tmp_path, [RAISES], "all")


def test_all_items_after_dev_items_make_claims_post_hoc(tmp_path: Path) -> None:
    assert freeze_claims(tmp_path, [KEEPS], "dev") == []
    assert freeze_claims(tmp_path, [KEEPS], "all") == ["keeps"]


def test_claims_of_another_version_are_refused(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parents[2] / "docs/micro-world/claims.json", tmp_path)
    with pytest.raises(InputError, match="another version"):
        freeze_claims(tmp_path, [KEEPS], "all")


def test_claims_after_the_first_results_are_post_hoc(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    assert freeze_claims(tmp_path, [KEEPS], "all") == ["keeps"]
    assert json.loads((tmp_path / "claims.json").read_text())["claims"] == []


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ([ClaimConfig()], "a unique `name`"),
        ([RAISES, RAISES], "a unique `name`"),
        ([ClaimConfig("x", student="A")], "`treatment` is required"),
        ([ClaimConfig("x", OWN)], "`student` is required"),
        ([ClaimConfig("x", "home - away", "A")], "which has none"),
        ([ClaimConfig("x", "home - away", direction="preserves", margin=1.0)], "no margin"),
        ([ClaimConfig("x", OWN, "A", direction="preserves")], "`margin` is required for"),
        ([ClaimConfig("x", OWN, "A", margin=0.1)], "`margin` is required for"),
        ([ClaimConfig(f"c{n}", OWN, "A") for n in range(4)], "at most 3 can be primary"),
    ],
    ids=str,
)
def test_bad_claims_are_refused(claims: list[ClaimConfig], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_claims(make_study(*claims))


# ---------------------------------------------------------------- power


GAINS = ClaimConfig("raises", "source a", "a")
HOLDS = ClaimConfig("keeps", "source a", "a", direction="preserves", margin=0.01)
CONFIG = StudyConfig(seeds=(100, 101, 102, 103, 104), claims=(GAINS, HOLDS))


def test_a_dry_run_describes_the_power_of_each_claim() -> None:
    lines = "\n".join(describe_power(CONFIG))
    assert "over 5 seeds at 0.05, with Holm's method for 2 primary claims" in lines
    assert "40 to 58 % for 1 point, 91 to 97 % for 2 points" in lines  # with one of a point
    # With a standard deviation of half a point.
    assert "91 to 97 % to show a change within 1 point if nothing changes" in lines
    assert describe_power(replace(CONFIG, claims=())) == ["no claims are declared: there will be no verdicts"]
    assert describe_power(replace(CONFIG, seeds=(100,))) == ["no claim gets a verdict with 1 seed: a verdict needs 5"]
    nats = replace(CONFIG, claims=(replace(GAINS, measure="log_pz"),))
    assert "unknown without a pilot" in describe_power(nats)[1]


def test_a_pilot_gives_the_standard_deviation_over_seeds() -> None:
    changes = {0: 0.004, 1: -0.004, 2: 0.0}
    cells = [
        {
            "student": "a",
            "treatment": "source a",
            "seed": seed,
            "measures": {"accuracy": {"change": {"value": change}}},
        }
        for seed, change in changes.items()
    ]
    (_, line, _) = describe_power(CONFIG, {"cells": cells, "interaction": None})
    assert "with a standard deviation of 0.4 points (measured)" in line
    best, worst = (100 * minimum_detectable_effect(0.004, 5, level) for level in (0.05, 0.025))
    assert f"80 % for a change of {best:.3g} points at best, {worst:.3g} points at worst" in line
