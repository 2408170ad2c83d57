"""Two worlds with the same grammar, and a study of their models."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from jax_selftrain.config import DemoConfig
from jax_selftrain.errors import InputError
from jax_selftrain.experiments.microworld import demo
from jax_selftrain.experiments.microworld.lines_and_questions import World, WorldConfig
from jax_selftrain.experiments.microworld.microworld_study import (
    CROSSOVER_SCALE,
    ONE_MODEL_SCALE,
    MicroScale,
    ModelSpec,
    add_temperatures,
    make_study,
    make_worlds,
    write_worlds,
)
from jax_selftrain.hub import open_model
from jax_selftrain.io import json_files
from jax_selftrain.io.jsonl import read_log
from jax_selftrain.study.design import make_design
from jax_selftrain.study.run_study import run_study

_GENERATIONS = (", generation 1", ", generation 2", ", generation 3", "")
SMALL = WorldConfig(
    people=16, probe_copies=(1, 8), probes_per_level=3, agreement_lines=300, sum_lines=300, items_per_task=30,
    heldout_documents=30, two_hop=True,
)  # fmt: skip
TINY = replace(
    CROSSOVER_SCALE,
    world=SMALL,
    models=(
        ModelSpec("A1", "A", width=32, layers=1, heads=2, epochs=0.5),
        ModelSpec("A1′", "A", width=32, layers=1, heads=2, epochs=0.5, seed=1),  # the same corpus
        ModelSpec("B1", "B", width=32, layers=1, heads=2, epochs=0.5),
        ModelSpec("C1", "A", family="llama", tokenizer="A", width=32, layers=1, heads=2, epochs=0.5),
    ),
    vocab_size=400,
    study=replace(
        CROSSOVER_SCALE.study,
        students=("A1",),
        sources=("A1", "C1"),
        claims=tuple(claim for claim in CROSSOVER_SCALE.study.claims if claim.student),  # relations need more students
        mesh="data=1",
        sample=replace(CROSSOVER_SCALE.study.sample, samples=24),
        train=replace(CROSSOVER_SCALE.study.train, steps=1, eval_every=1, eval_limit=8),
    ),
)


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    return make_worlds(SMALL)


def test_both_worlds_share_grammar_and_differ_in_people(worlds: dict[str, World]) -> None:
    a, b = worlds["A"], worlds["B"]
    for task in ("agreement", "sums"):
        assert a.tasks[task] == b.tasks[task]
    assert not {fact.who for fact in a.facts} & {fact.who for fact in b.facts}
    assert not {probe.text for probe in a.probes} & {probe.text for probe in b.probes}
    assert len(set(a.documents) & set(b.documents)) < 0.02 * len(a.documents)  # a few lone sums
    text = "\n".join([*b.documents, *b.extra_text])
    for question in a.tasks["sums"]:
        assert f"\n{question.context} " not in text  # a shared question is in neither text


def test_held_out_two_hop_facts_are_true_and_not_in_the_text(worlds: dict[str, World]) -> None:
    world = worlds["A"]
    of = {(fact.who, fact.relation): fact.value for fact in world.facts}
    text = "\n".join([*world.documents, *world.heldout, *world.extra_text])
    in_text = set(re.findall(r"The friend of (\w+) ", text))
    in_questions = set()
    for question in world.tasks["two_hop"]:
        who = question.context.split()[3]
        in_questions.add(who)
        friend = of[who, "friend"]
        assert question.choices[question.answer].strip() in {of[friend, r] for r in ("home", "job", "pet", "meal")}
        assert question.cluster == who
        assert question.context not in text
    assert in_questions
    assert in_text
    assert not in_questions & in_text
    assert in_questions | in_text == {fact.who for fact in world.facts}
    assert all(of[who, "friend"] != who for who in in_questions | in_text)


def test_questions_have_grades(worlds: dict[str, World]) -> None:
    tasks = worlds["A"].tasks
    for question in tasks["sums"]:
        a, b = (int(number) for number in re.findall(r"\d+", question.context))
        carries = int(a % 10 + b % 10 > 9)
        carries += int(a // 10 + b // 10 + carries > 9)
        assert question.grade == f"{carries} carries"
    assert {question.grade for question in tasks["facts"]} == {f"shown {n}×" for n in SMALL.fact_exposures}
    assert {"0 distracting", "1 distracting"} <= {question.grade for question in tasks["agreement"]}


def test_extra_text_has_the_facts_without_the_probes(worlds: dict[str, World]) -> None:
    for world in worlds.values():
        extra = "\n".join(world.extra_text)
        assert not set(world.extra_text) & set(world.documents)
        assert len(extra) > 0.7 * sum(map(len, world.documents))
        assert not any(probe.text in extra or probe.counterfactual in extra for probe in world.probes)
        for fact in world.facts:
            assert re.search(rf"{fact.who} .*{fact.value}\.", extra)


def test_the_claims_of_the_crossover_study_can_be_tested(tmp_path: Path) -> None:
    scale = replace(CROSSOVER_SCALE, world=SMALL, vocab_size=400)
    write_worlds(tmp_path / "world", scale)
    untrained = {model.name: tmp_path / "world" / "untrained" / model.name for model in scale.models}
    study = replace(make_study(tmp_path, scale, range(200, 205), untrained), dry_run=True)  # reads no weights
    run_study(study)
    assert {arm.name for arm in study.arms if arm.students} == {
        *("real text of world A", "real text of world B"),
        *("half real text of world A", "half real text of world B"),
        *("four generations", "four generations of all corpora"),
        *("pretraining corpus of world A", "goldfish loss on the corpus of world A"),
    }
    assert study.positive_controls == ("real text of world A", "real text of world B")
    with pytest.raises(InputError, match="cannot be estimated"):
        run_study(replace(study, sources=("A1", "B1", "C1")))


def test_every_model_at_six_temperatures_is_36_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="add --study"):
        demo(DemoConfig(out=str(tmp_path / "out"), temperatures=(0.7,)))
    scale = add_temperatures(replace(CROSSOVER_SCALE, world=SMALL, vocab_size=400), (0.7, 0.85, 1.15, 1.3, 1.5))
    write_worlds(tmp_path / "world", scale)
    untrained = {model.name: tmp_path / "world" / "untrained" / model.name for model in scale.models}
    study = make_study(tmp_path, scale, (200,), untrained)
    run_study(replace(study, dry_run=True))
    assert len(study.sources) == 36
    assert {model.temperature for model in study.models} == {None, 0.7, 0.85, 1.15, 1.3, 1.5}
    design = make_design(replace(study, dry_run=True))
    assert set(design.score_base) == {model.name for model in scale.models}
    assert {one.identity["temperature"] for one in design.ordered_stages if one.command == "sample"} == {
        *(0.7, 0.85, 1.0, 1.15, 1.3, 1.5)
    }


@pytest.mark.nightly
def test_the_crossover_study_ends_with_a_report(tmp_path: Path) -> None:
    config = DemoConfig(out=str(tmp_path / "out"), study=True, seeds=(0,))
    assert demo(config, TINY) == tmp_path / "out" / "report.html"
    results = json_files.read_json(tmp_path / "out" / "results.json")
    assert {cell["treatment"] for cell in results["cells"]} == {
        *("source A1", "source C1"),
        *(
            "learning rate 0",
            "shuffled tokens",
            "weight noise",
            "matched noise",
            "weight noise ×4",
            "sign-flip",
            "temperature 1.25",
            "many epochs at temperature 1.25",
            "real text of world A",
            "half real text of world A",
            *(f"four generations{which}" for which in _GENERATIONS),
            *(f"four generations of all corpora{which}" for which in _GENERATIONS),
            "pretraining corpus of world A",
            "goldfish loss on the corpus of world A",
        ),
    }
    assert [one["name"] for one in results["claims"]] == [claim.name for claim in TINY.study.claims]
    levels = {(one["verdict"], one["evidence_level"]) for one in results["claims"]}
    assert levels == {("not tested", "exploratory")}  # one seed, of a pilot
    groups = {f"group {world}, {shown}" for world in "AB" for shown in ("shown 1×", "shown 8×", "never shown")}
    for cell in results["cells"]:
        names = cell["measures"].keys()
        assert {f"task/{task}" for task in TINY.tasks} <= names
        assert {f"exact_match/{group}" for group in groups} <= names
    untrained = tmp_path / "out" / "world" / "untrained"
    assert open_model(untrained / "C1").raw_config["model_type"] == "llama"
    vocabularies = {name: open_model(untrained / name).tokenizer.get_vocab() for name in ("A1", "B1", "C1")}
    assert vocabularies["A1"] == vocabularies["B1"] != vocabularies["C1"]
    before = (tmp_path / "out" / "results.json").read_bytes()
    demo(config, TINY)
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    with pytest.raises(InputError, match="another micro-world"):
        write_worlds(tmp_path / "out" / "world", replace(TINY, vocab_size=401))


@pytest.mark.parametrize(
    "scale", [ONE_MODEL_SCALE, pytest.param(CROSSOVER_SCALE, marks=pytest.mark.nightly)], ids=["one model", "crossover"]
)
def test_the_suffix_is_in_the_probe_and_the_prefix_identifies_it(scale: MicroScale, tmp_path: Path) -> None:
    """All tokenizers, at full size: no two prefixes are the same."""
    write_worlds(tmp_path / "world", scale)
    prefix, suffix = scale.study.extract.prefix, scale.study.extract.suffix
    assert prefix
    assert suffix
    rows = read_log(tmp_path / "world" / "probes.jsonl")
    assert len(rows) == 2 * len(scale.world_ids) * 8 * scale.world.probes_per_level
    for model in {model.tokenizer: model for model in scale.models}.values():
        tokenizer = open_model(tmp_path / "world" / "untrained" / model.name).tokenizer
        beginnings = set()
        for row in rows:
            tokens = tokenizer.encode(row["text"], add_special_tokens=False)
            assert len(tokens) >= prefix + suffix
            line, _, inside = row["text"].partition("\n")
            before = len(tokenizer.encode(f"{line}\n", add_special_tokens=False)) if inside else 1
            assert prefix - before >= 6
            beginnings.add(tuple(tokens[before:prefix]))
        assert len(beginnings) == len(rows)
