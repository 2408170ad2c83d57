"""What a study declared: ways of gaming a frozen study are refused or named in the verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from claims_factory import KEEPS, OWN, RAISES, SEEDS, make_cells, make_study

from jax_selftrain.config import ArmConfig, ClaimConfig, StudyConfig, TrainConfig
from jax_selftrain.errors import InputError
from jax_selftrain.io import json_files
from jax_selftrain.study.preregistration import claim_contrasts, judge_claims
from jax_selftrain.study.registration import Registration, register

INPUTS = {"score.0: tasks.jsonl": "a hash"}


def freeze(folder: Path, claims: list[ClaimConfig], split: Any = "all") -> list[str]:
    return list(register(folder, StudyConfig(claims=tuple(claims), split=split), INPUTS).post_hoc)


def judge(config: StudyConfig, registration: Registration, **changes: Any) -> list[dict[str, Any]]:
    """Judge the claims of a study whose cells have the changes by treatment."""
    claims = [*config.claims, *registration.withdrawn]
    cells = make_cells(config.seeds, **changes)
    return judge_claims(config, cells, claim_contrasts(claims, {}, [], ()), registration)


def test_claims_are_frozen_at_the_first_run(tmp_path: Path) -> None:
    assert freeze(tmp_path, [KEEPS]) == []
    assert freeze(tmp_path, [KEEPS]) == []
    edited = ClaimConfig("keeps", OWN, "A", direction="preserves", margin=0.05)
    assert freeze(tmp_path, [edited, RAISES]) == ["keeps", "raises"]
    path = tmp_path / "claims.json"
    text = path.read_text()
    path.write_text(text.replace("0.01", "0.05"))
    with pytest.raises(InputError, match="was changed after it was written"):
        freeze(tmp_path, [edited])


def test_claims_about_tasks_may_change_while_only_dev_items_are_seen(tmp_path: Path) -> None:
    memory = ClaimConfig("memory", OWN, "A", measure="exact_match/H")
    flipped = replace(memory, direction="lowers")
    assert freeze(tmp_path, [KEEPS, memory], "dev") == []
    (tmp_path / "results.json").write_text("{}")
    assert freeze(tmp_path, [RAISES, memory], "dev") == []
    assert freeze(tmp_path, [RAISES, KEEPS, flipped], "test") == ["memory"]  # its results are of all sequences
    assert freeze(tmp_path, [RAISES, memory], "test") == []
    for split in ("all", "dev"):
        assert freeze(tmp_path, [RAISES, memory], split) == ["raises"]
    path = tmp_path / "claims.json"
    path.write_text(path.read_text().replace('"test"', '"all"'))
    with pytest.raises(InputError, match="was changed after it was written"):
        freeze(tmp_path, [RAISES])


def test_all_items_after_dev_items_make_claims_post_hoc(tmp_path: Path) -> None:
    assert freeze(tmp_path, [KEEPS], "dev") == []
    assert freeze(tmp_path, [KEEPS], "all") == ["keeps"]


def test_a_recipe_tuned_on_dev_items_is_declared_with_the_test_items(tmp_path: Path) -> None:
    tuned = StudyConfig(train=TrainConfig(learning_rate=1e-4), seeds=SEEDS, claims=(KEEPS,))
    register(tmp_path, replace(tuned, split="dev", seeds=(0, 1)), INPUTS)
    chosen = replace(tuned, train=TrainConfig(learning_rate=2e-4), split="test")
    assert register(tmp_path, chosen, INPUTS) == Registration((), (), (), SEEDS)
    assert register(tmp_path, replace(tuned, split="test"), INPUTS).deviations == (
        "train.learning_rate 0.0002 → 0.0001",
    )


def test_claims_of_another_version_are_refused(tmp_path: Path) -> None:
    """The first version wrote claims and their hash alone; its tables are in the history of docs/micro-world."""
    claim = {"against": "", "direction": "raises", "margin": None, "measure": "accuracy", "name": "its own kind's text"}
    claim |= {"primary": True, "student": "", "treatment": "home - away"}
    old = {"claims": [claim], "sha256": "d3b8ca9e66c03660"}
    json_files.write_json(tmp_path / "claims.json", old, checksum=False)
    with pytest.raises(InputError, match="another version"):
        freeze(tmp_path, [KEEPS])


def test_claims_after_the_first_results_are_post_hoc(tmp_path: Path) -> None:
    assert freeze(tmp_path, []) == []
    (tmp_path / "results.json").write_text("{}")
    assert freeze(tmp_path, [KEEPS]) == ["keeps"]
    assert json_files.read_json(tmp_path / "claims.json")["claims"] == []


def test_results_without_their_declaration_are_refused(tmp_path: Path) -> None:
    freeze(tmp_path, [KEEPS])
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "claims.json").unlink()
    with pytest.raises(InputError, match="is missing, but the study has results"):
        freeze(tmp_path, [KEEPS])


# ---------------------------------------------------------------- gaming


def test_a_deleted_claim_still_counts(tmp_path: Path) -> None:
    """Without the two failed claims the third would be supported."""
    failed = [ClaimConfig(f"failed {n}", "real", "A", direction="lowers") for n in range(2)]
    config = make_study(RAISES, *failed, seeds=SEEDS)
    assert [one["verdict"] for one in judge(config, register(tmp_path, config, {}), own=0.0019)] == [
        "cannot tell",
        "contradicted",
        "contradicted",
    ]
    fewer = make_study(RAISES, seeds=SEEDS)
    found = judge(fewer, register(tmp_path, fewer, {}), own=0.0019)
    assert [one["verdict"] for one in found] == ["cannot tell", "withdrawn", "withdrawn"]
    alone = judge(fewer, register(tmp_path / "other", fewer, {}), own=0.0019)
    assert [one["verdict"] for one in alone] == ["supported"]
    edited = make_study(replace(RAISES, direction="lowers"), *failed, seeds=SEEDS)
    verdicts = {
        (one["direction"], one["verdict"], one["post_hoc"]) for one in judge(edited, register(tmp_path, edited, {}))
    }
    assert ("raises", "withdrawn", False) in verdicts
    assert any(direction == "lowers" and post_hoc for direction, _, post_hoc in verdicts)


def test_seeds_that_are_added_or_of_pilots_inform_no_verdict(tmp_path: Path) -> None:
    config = make_study(RAISES, seeds=SEEDS)
    declared = judge(config, register(tmp_path, config, {}), own=0.0017)
    assert declared[0]["verdict"] == "cannot tell"
    grown = replace(config, seeds=tuple(range(100, 115)))
    (found,) = judge(grown, register(tmp_path, grown, {}), own=0.0017)
    assert (found["verdict"], found["seeds"]) == ("cannot tell", 5)
    (all_declared,) = judge(grown, register(tmp_path / "other", grown, {}), own=0.0017)
    assert (all_declared["verdict"], all_declared["seeds"]) == ("supported", 15)
    pilot = replace(config, seeds=(0, 1, 2, 3, 4))
    (found,) = judge(pilot, register(tmp_path / "pilot", pilot, {}), own=0.5)
    assert (found["verdict"], found["reason"]) == ("not tested", "the study does not have these cells or this measure.")


@pytest.mark.parametrize(
    ("changes", "inputs", "words"),
    [
        ({"arms": (ArmConfig("real"), ArmConfig("shuffled", "noise"))}, INPUTS, 'arms.shuffled.kind "self" → "noise"'),
        ({"arms": (ArmConfig("real"),)}, INPUTS, "arms.shuffled.kind "),
        ({"seeds": (*SEEDS[1:], 105)}, INPUTS, "seeds 100 removed"),
        ({"train": TrainConfig(steps=7)}, INPUTS, "train.steps null → 7"),
        ({"negative_controls": ("real",)}, INPUTS, 'negative_controls ["shuffled"] → ["real"]'),
        ({}, {"score.0: tasks.jsonl": "another"}, 'score.0: tasks.jsonl "a hash" → "another"'),
    ],
    ids=str,
)
def test_a_changed_design_is_named_in_the_verdict(
    tmp_path: Path, changes: dict[str, Any], inputs: dict[str, str], words: str
) -> None:
    config = make_study(RAISES, seeds=SEEDS)
    assert register(tmp_path, config, INPUTS).deviations == ()
    more_arms = replace(config, arms=(*config.arms, ArmConfig("new")), seeds=(*SEEDS, 105))
    assert register(tmp_path, more_arms, INPUTS).deviations == ()
    later = replace(config, **changes)
    (found,) = judge(later, register(tmp_path, later, inputs), own=0.02)
    assert f"Changed since the first run: {words}" in found["reason"]
    assert found["evidence_level"] == "exploratory"
