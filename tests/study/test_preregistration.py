"""Verdicts on simulated studies, and refusals of claims."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from claims_factory import KEEPS, OWN, RAISES, SEEDS, TASKS, WOBBLE, judge, make_cells, make_study

from jax_selftrain.config import (
    ArmConfig,
    ClaimConfig,
    ExtractConfig,
    MemorizationConfig,
    ModelConfig,
    ScoreConfig,
    StudyConfig,
)
from jax_selftrain.errors import InputError
from jax_selftrain.stats.noninferiority import minimum_detectable_effect
from jax_selftrain.stats.noninferiority import power as seeds_power
from jax_selftrain.study.claim_power import describe_power
from jax_selftrain.study.preregistration import check_claims, check_contrasts

SEQUENCES = ExtractConfig(sequences="sequences.jsonl")


def verdict(config: StudyConfig, cells: list[dict[str, Any]]) -> tuple[str, str]:
    (found,) = judge(config, cells)
    return found["verdict"], found["reason"]


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


def test_a_claim_about_bases_counts_bases() -> None:
    bases = ("A", "B", "C", "D", "E")
    claim = ClaimConfig("recipe", "own text", bases=bases, comparator="real", direction="lowers")
    models = tuple(ModelConfig(name, name) for name in bases)
    cells = [
        {**one, "student": base, "treatment": one["treatment"].replace("source A", f"source {base}")}
        | {"measures": {"accuracy": {"change": {"value": one["measures"]["accuracy"]["change"]["value"] + shift}}}}
        for base, shift in zip(bases, (0.0, 0.01, -0.01, 0.02, -0.02), strict=True)
        for one in make_cells(SEEDS[:2], own=-0.02)
    ]
    config = make_study(claim, models=models)
    check_claims(config)
    (found,) = judge(config, cells)
    assert found["verdict"] == "supported"
    assert found["seeds"] == 5
    assert found["reason"].endswith("over 5 bases.")
    assert found["effect"]["value"] == pytest.approx(-0.07, abs=0.002)
    four = replace(claim, bases=bases[:4])
    assert judge(make_study(four, models=models), cells)[0]["reason"] == "4 bases; a verdict needs 5."
    for changes, message in {
        "both": ({"student": "A"}, "exclude each other"),
        "unknown": ({"bases": ("A", "Z")}, "'Z' is not a student"),
        "alone": ({"bases": (), "student": "A"}, "is for claims with `bases`"),
    }.values():
        with pytest.raises(InputError, match=message):
            check_claims(make_study(replace(claim, **changes), models=models))


def test_four_seeds_or_missing_cells_are_not_tested() -> None:
    config = make_study(RAISES)
    assert verdict(config, make_cells(SEEDS[:4], own=0.5)) == ("not tested", "4 seeds; a verdict needs 5.")
    missing = [cell for cell in make_cells() if cell["treatment"] != OWN]
    assert verdict(config, missing) == ("not tested", "the study does not have these cells or this measure.")
    unpaired = [cell for cell in make_cells() if (cell["treatment"], cell["seed"]) != ("real", 104)]
    assert verdict(make_study(ClaimConfig("x", OWN, "A", comparator="real")), unpaired)[0] == "not tested"


def test_a_failed_or_missing_control_makes_the_assay_insensitive() -> None:
    """A gain takes a control that gains, a preserved capability one that loses."""
    for claim, name, wanted, other in ((RAISES, "real", "raise", "shuffled"), (KEEPS, "shuffled", "lower", "real")):
        config = make_study(claim)
        found, why = verdict(config, make_cells(own=0.5, **{name: 0.0}))
        assert found == "assay insensitive"
        assert why.startswith(f"{name} did not {wanted} accuracy of A")
        assert verdict(config, make_cells(own=0.5, **{other: 0.0}))[0] == "supported"
    found, why = verdict(make_study(KEEPS, negative_controls=()), make_cells(own=0.5))
    assert (found, why) == ("assay insensitive", "A has no arm in negative_controls with this measure.")
    cells = make_cells(real=0.0, shuffled=0.0)
    for cell in cells:  # what it remembers is not what the assay speaks of
        cell["measures"]["log_pz"] = {"change": {"value": -1.0 + cell["measures"]["accuracy"]["change"]["value"]}}
    forgets = ClaimConfig("forgets", OWN, "A", measure="log_pz", direction="lowers")
    assert verdict(make_study(forgets), cells)[0] == "supported"


def test_seeds_that_agree_exactly_are_not_certain() -> None:
    """One question of 2,000 gained in each of five seeds, and a continuous measure without variance."""
    cells = make_cells()
    for cell in cells:
        if cell["treatment"] == OWN:
            cell["tasks"] = [{"n": 2_000, "chance": 0.0, "not_eligible": None}]
            cell["measures"] = {"accuracy": {"change": {"value": 1 / 2_000}}, "log_pz": {"change": {"value": 0.5}}}
    assert verdict(make_study(RAISES), cells)[0] == "supported"  # five gains are more than rounding
    for cell in cells:
        if cell["treatment"] == OWN:
            cell["measures"]["accuracy"]["change"]["value"] = 0.1 / 2_000
    assert verdict(make_study(RAISES), cells)[0] == "cannot tell"
    equal = verdict(make_study(replace(RAISES, measure="log_pz")), cells)
    assert equal == ("not tested", "all seeds agree exactly: they are not independent.")


def test_a_difference_of_relations_is_judged_over_its_seeds() -> None:
    claim = ClaimConfig("own kind", "self - other")
    models = tuple(ModelConfig(name, name) for name in "AB")
    cells = [one for one in make_cells() if one["treatment"] != OWN]
    for n, (student, source) in enumerate(itertools.product("AB", repeat=2)):
        for place, seed in enumerate(SEEDS):
            change = 0.02 * (student == source) - 0.1 * (source == "B") + WOBBLE[(n + place) % 5]
            key = {"student": student, "treatment": f"source {source}", "source": source, "seed": seed}
            cells.append(key | {"tasks": TASKS, "measures": {"accuracy": {"change": {"value": change}}}})
    cells += [one | {"student": "B"} for one in make_cells() if one["treatment"] == "shuffled"]
    assert verdict(make_study(claim, models=models), cells)[0] == "supported"
    assert verdict(make_study(claim, models=models), [one for one in cells if one["student"] == "A"])[0] == "not tested"


FORGETS = ClaimConfig(
    "forgets",
    OWN,
    "A",
    measure="exact_match/reproduced_held_out",
    direction="lowers",
    at_least=0.95,
    requires=("keeps",),
)


@pytest.mark.parametrize(
    ("fall", "accuracy", "expected"),
    [
        (0.99, 0.0, "supported"),
        (0.95, 0.0, "cannot tell"),  # exactly the least change
        (0.6, 0.0, "contradicted"),
        (0.99, -0.05, "contradicted"),  # what it requires is contradicted
        (0.99, -0.0097, "cannot tell"),
    ],
)
def test_held_out_text_is_forgotten_by_a_share_while_capability_is_kept(
    fall: float, accuracy: float, expected: str
) -> None:
    """The third finding of arXiv:2605.31126 as one claim."""
    cells = make_cells(own=accuracy)
    for n, cell in enumerate(cells):
        change = -fall + WOBBLE[n % 5] if cell["treatment"] == OWN else 0.0
        cell["measures"]["exact_match/reproduced_held_out"] = {"change": {"value": change, "n": 200}}
    found = judge(make_study(KEEPS, FORGETS), cells)
    assert found[1]["verdict"] == expected
    blind = judge(make_study(KEEPS, FORGETS, negative_controls=()), cells)
    assert [one["verdict"] for one in blind] == ["assay insensitive"] * 2


def test_primary_claims_are_corrected_separately_by_holm() -> None:
    weak = 0.0019  # p of about .018 alone
    claims = [ClaimConfig(f"c{n}", OWN, "A") for n in range(3)]
    alone = judge(make_study(claims[0]), make_cells(own=weak))[0]
    together = judge(make_study(*claims), make_cells(own=weak))
    assert alone["p_adjusted"] == alone["p"] < 0.025
    assert together[0]["p_adjusted"] == pytest.approx(3 * alone["p"])
    assert [one["verdict"] for one in (alone, *together)] == ["supported", *["cannot tell"] * 3]
    late = judge(make_study(*claims), make_cells(own=weak), ["c1", "c2"])
    assert [one["evidence_level"] for one in late] == ["primary", "exploratory", "exploratory"]
    assert late[0]["p_adjusted"] == alone["p"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("claim", "changes", "message"),
    [
        (ClaimConfig("x", "reel", "A"), {}, "'reel' is not a treatment; did you mean `real`?"),
        (ClaimConfig("x", "source B", "A"), {}, "'source B' is not a treatment"),
        (ClaimConfig("x", OWN, "B"), {}, "'B' is not a student"),
        (replace(RAISES, measure="exact_match"), {}, "needs extract.sequences"),
        (RAISES, {"score": ScoreConfig(texts=("t.jsonl",))}, "`accuracy` needs score.tasks"),
        (replace(RAISES, measure="text/t"), {}, "`text/t` needs score.texts"),
        (replace(RAISES, measure="pz/H"), {"extract": SEQUENCES}, "needs an arm of kind `decontaminated`"),
        (replace(RAISES, measure="log_pz/format x"), {"extract": SEQUENCES}, "has no such format; it has none"),
        (replace(RAISES, measure="pz/after_relearning"), {"extract": SEQUENCES}, "needs memorization.relearn_corpus"),
        (
            replace(RAISES, measure="pz/after_relearning 10"),
            {"extract": SEQUENCES, "memorization": MemorizationConfig(relearn_corpus="o.jsonl", relearn_steps=(1, 50))},
            "there are after_relearning 1, after_relearning 50",
        ),
        (
            replace(RAISES, measure="pz/after_relearning_H 50"),
            {"extract": SEQUENCES, "memorization": MemorizationConfig(relearn_corpus="o.jsonl")},
            "there are after_relearning 50",
        ),
        (replace(RAISES, measure="pz/H_not_shown"), {"extract": SEQUENCES}, "needs memorization.relearn_sequences"),
        (
            ClaimConfig("x", "noise", "A", measure="pz/held_out"),
            {
                "extract": SEQUENCES,
                "arms": (ArmConfig("noise", "noise"),),
                "models": (ModelConfig("A", "A"), ModelConfig("B", "B")),
                "sources": ("B",),
            },
            "noise has no corpus",
        ),
        (
            ClaimConfig("x", "hot", "A", comparator="cold"),
            {"arms": (ArmConfig("hot", temperature=1.5, epochs=10), ArmConfig("cold", temperature=0.7, epochs=1))},
            "its two arms differ in more than one option",
        ),
    ],
    ids=str,
)
def test_claims_that_cannot_be_tested_are_refused(claim: ClaimConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_claims(make_study(claim, **changes))


def test_every_generation_can_have_a_claim() -> None:
    changes: dict[str, Any] = {"arms": (ArmConfig("chain", "generations", generations=3),), "positive_controls": ()}
    changes["negative_controls"] = ()
    claim = ClaimConfig("x", "chain", "A", comparator="chain, generation 1")
    check_claims(make_study(claim, **changes))
    with pytest.raises(InputError, match="'chain, generation 3' is not a treatment"):  # it is named chain
        check_claims(make_study(replace(claim, comparator="chain, generation 3"), **changes))


def test_held_out_sequences_of_noise_are_those_of_the_own_text() -> None:
    arms = (ArmConfig("noise", "noise"), ArmConfig("hot", temperature=1.5), ArmConfig("cold", temperature=0.7))
    for claim in (
        ClaimConfig("x", OWN, "A", comparator="noise", measure="pz/held_out"),
        ClaimConfig("y", "hot", "A", comparator="cold"),
    ):
        check_claims(make_study(claim, arms=arms, extract=SEQUENCES))


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ([ClaimConfig()], "a unique `name`"),
        ([RAISES, RAISES], "a unique `name`"),
        ([ClaimConfig("x", student="A")], "`treatment` is required"),
        ([ClaimConfig("x", OWN)], "`student` is required"),
        ([ClaimConfig("x", "self - other", comparator="real")], "no `comparator`"),
        ([ClaimConfig("x", "self - other", direction="preserves", margin=1.0)], "no margin"),
        ([ClaimConfig("x", OWN, "A", direction="preserves")], "`margin` is required for"),
        ([ClaimConfig("x", OWN, "A", margin=0.1)], "`margin` is required for"),
        ([replace(KEEPS, at_least=0.1)], "`at_least` is for directions"),
        ([replace(RAISES, requires=("missing",))], "`requires` must name other claims"),
        ([replace(RAISES, requires=("keeps",)), replace(KEEPS, requires=("raises",))], "cannot have `requires`"),
        ([ClaimConfig(f"c{n}", OWN, "A") for n in range(4)], "at most 3 can be primary"),
    ],
    ids=str,
)
def test_bad_claims_are_refused(claims: list[ClaimConfig], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_claims(make_study(*claims))


def test_a_difference_that_a_design_cannot_estimate_is_refused() -> None:
    models = {name: ModelConfig(name, name, lineage="L" if name in "AC" else name) for name in "ABC"}
    claim = ClaimConfig("kind", "self - same lineage")
    full = list(itertools.product("AB", "ABC"))
    check_contrasts([claim], models, full)
    with pytest.raises(InputError, match="claims: kind: `self - same lineage` cannot be estimated"):
        check_contrasts([claim], models, [pair for pair in full if pair[0] == "A"])
    with pytest.raises(InputError, match="cannot be estimated"):  # no families are known
        check_contrasts([ClaimConfig("x", "same lineage - cross family")], models, full)


# ---------------------------------------------------------------- power


GAINS = ClaimConfig("raises", "source a", "a")
HOLDS = ClaimConfig("keeps", "source a", "a", direction="preserves", margin=0.01)
CONFIG = StudyConfig(seeds=(100, 101, 102, 103, 104), claims=(GAINS, HOLDS))


def power(config: StudyConfig, earlier: dict[str, Any] | None = None) -> list[str]:
    return describe_power(config, {}, [], earlier)


def test_a_dry_run_describes_the_power_of_each_claim() -> None:
    lines = "\n".join(power(CONFIG))
    assert "over 5 seeds, or the bases of a claim, at 0.025, with Holm's method for 2 primary claims" in lines
    for stddev, change, words in (
        (0.01, 0.01, "for 1 point"),
        (0.01, 0.02, "for 2 points"),
        (0.005, 0.01, "to show a change within 1 point if nothing changes"),
    ):
        worst, best = (100 * seeds_power(change, stddev, 5, level) for level in (0.0125, 0.025))
        assert f"{worst:.0f} to {best:.0f} % {words}" in lines
    assert "times the probability that its positive_controls raise the measure, which a pilot shows" in lines
    assert power(replace(CONFIG, claims=())) == ["no claims are declared: there will be no verdicts"]
    assert power(replace(CONFIG, seeds=(100,))) == ["no claim gets a verdict with 1 seed: a verdict needs 5"]
    nats = replace(CONFIG, claims=(replace(GAINS, measure="log_pz"),))
    assert "unknown without a pilot" in power(nats)[1]


def test_a_pilot_gives_the_standard_deviation_over_seeds() -> None:
    changes = {0: 0.004, 1: -0.004, 2: 0.0}
    cells = [
        {
            "student": "a",
            "treatment": "source a",
            "seed": seed,
            "tasks": TASKS,
            "measures": {"accuracy": {"change": {"value": change}}},
        }
        for seed, change in changes.items()
    ]
    harmful = [
        cell | {"treatment": "shuffled", "measures": {"accuracy": {"change": {"value": -0.002}}}} for cell in cells
    ]
    harmful[0]["measures"] = {"accuracy": {"change": {"value": -0.004}}}
    config = replace(CONFIG, negative_controls=("shuffled",))
    (_, line, keeps) = power(config, {"cells": [*cells, *harmful], "relations": None})
    passes = seeds_power(0.008 / 3, float(np.std([0.004, 0.002, 0.002], ddof=1)), 5, 0.025)
    assert f"times {100 * passes:.0f} % that its negative_controls lower the measure" in keeps
    assert "with a standard deviation of 0.4 points (measured)" in line
    best, worst = (100 * minimum_detectable_effect(0.004, 5, level) for level in (0.025, 0.0125))
    assert f"80 % for a change of {best:.3g} points at best, {worst:.3g} points at worst" in line
