"""A study of two students with all kinds of arms."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus_factory import write_sampled_corpus
from flax.traverse_util import flatten_dict
from launcher import launch
from report_page import without_costs

from jax_selftrain import evals
from jax_selftrain.config import (
    ArmConfig,
    ClaimConfig,
    ExtractConfig,
    MemorizationConfig,
    ModelConfig,
    PairConfig,
    PromptFormat,
    RunConfig,
    ScoreConfig,
    StudyConfig,
    SubsetConfig,
    yaml_io,
)
from jax_selftrain.corpus import Corpus, Sample, open_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.evals import embed_texts, held_out_half, sequences_fingerprint
from jax_selftrain.evals.item_results import load_score_result
from jax_selftrain.hub import open_model
from jax_selftrain.io.manifest import folder_manifest
from jax_selftrain.report import write_report
from jax_selftrain.study import run_study
from jax_selftrain.study.contrasts import Pairs
from jax_selftrain.study.dag import Stage, is_done, run_all
from jax_selftrain.study.design import Design, expand_revisions, make_design
from jax_selftrain.study.proxies import hash_sample, questions_by_task
from jax_selftrain.study.registration import Registration
from jax_selftrain.study.results import collect_study, relation_effects
from jax_selftrain.study.run_study import check_study
from jax_selftrain.study.stage_factory import StageFactory
from jax_selftrain.study.weight_changes import add_matching_noise, search_weight
from jax_selftrain.training import align_gradients

Make = Callable[..., StudyConfig]


@pytest.fixture(scope="module")
def make(options: Callable[..., RunConfig], tiny_model: Callable[..., Path], inputs: dict[str, str]) -> Make:
    """`make(out, **changes)`: two students with different tokenizers, two seeds."""
    small = options(Path("unused"))

    def config(out: Path, **changes: Any) -> StudyConfig:
        return replace(
            StudyConfig(
                out=str(out),
                models=(
                    ModelConfig("llama", str(tiny_model("llama")), size="tiny"),
                    ModelConfig("second", str(tiny_model("llama", tokenizer_size=400, seed=1))),
                ),
                seeds=(100, 101),
                mesh="data=1",
                sample=replace(small.sample, seed=0),
                train=replace(small.train, steps=2, checkpoint_every=2, seed=0, max_epochs=1.0),
                score=replace(small.score, tasks=(inputs["choices"],)),
                extract=replace(small.extract, sequences=inputs["texts"], prefix=6, suffix=4, greedy_decode=False),
            ),
            **changes,
        )

    return config


NULL = ArmConfig("learning rate 0", learning_rate=0.0)
ARMS = tuple(
    replace(arm, students=("llama",))
    for arm in (
        NULL,
        ArmConfig("native tokens", keep_source_tokens=True),
        ArmConfig("cool", temperature=0.7, top_k=40),
        ArmConfig("packed", packing="packed"),
        ArmConfig("sign-flip", random_loss_sign=True),
        ArmConfig("shuffled", "shuffled"),
        ArmConfig("noise", "noise"),
        ArmConfig("noise ×3", "noise", weight=3.0),
        ArmConfig("away", "extrapolate", weight=-0.5),
        ArmConfig("decontaminated", "decontaminated"),
        ArmConfig("size-matched", "size_matched"),
        ArmConfig("two generations", "generations", generations=2, replay="accumulate"),
    )
)


EVERYDAY = ("learning rate 0", "noise", "noise ×3", "decontaminated", "size-matched", "two generations")
EVERYDAY_ARMS = tuple(arm for arm in ARMS if arm.name in EVERYDAY)

CLAIM = ClaimConfig(
    "own text keeps", "source llama", "llama", measure="task/animals", direction="preserves", margin=0.01
)


@pytest.fixture(
    scope="module",
    params=[(EVERYDAY_ARMS, "llama"), pytest.param((ARMS, "gpt_neox"), marks=pytest.mark.nightly)],
    ids=["everyday", "all arms, two families"],
)
def finished_study(
    request,
    make: Make,
    inputs: dict[str, str],
    tiny_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    arms, family = request.param
    real = ArmConfig("real text", "text", students=("llama",), text=inputs["texts"])
    config = make(tmp_path_factory.mktemp("study") / "out", arms=(*arms, real), claims=(CLAIM,), seeds=(100,))
    if family == "gpt_neox":
        other = replace(config.models[1], model=str(tiny_model("gpt_neox", vocab_size=320)))
        config = replace(config, models=(config.models[0], other))
    probes = MemorizationConfig(
        formats=(
            PromptFormat("prefix 4", prefix=4),
            PromptFormat("inside, after BOS", random_offset=True, start_token="bos"),
        ),
        unseen_text=inputs["texts"],
        max_continuations=60,
        relearn_corpus=inputs["texts"],
        relearn_steps=(1,),
    )
    train = replace(config.train, eval_every=1, eval_limit=8)
    proxies = {"embedding_model": config.models[0].model, "proxy_steps": 1}
    folder = run_study(replace(config, train=train, memorization=probes, **proxies))
    write_report(folder)
    return folder


def read_cells(folder: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    cells = json.loads((folder / "results.json").read_text())["cells"]
    return {(cell["student"], cell["treatment"], cell["seed"]): cell for cell in cells}


def test_every_cell_is_measured_and_the_null_is_exactly_zero(finished_study: Path):
    cells = read_cells(finished_study)
    arms = yaml_io.load(StudyConfig, finished_study / "config.yaml").arms
    assert len(cells) == 2 * 2 + len(arms) + 1  # and the first of two generations
    for (_, treatment, _), cell in cells.items():
        assert cell["identical"] == (treatment == "learning rate 0")
        assert {"task/animals", "log_odds/animals", "text/stories", "exact_match", "log_pz"} <= cell["measures"].keys()
        fit = [task for task in cell["tasks"] if task["not_eligible"] is None]
        assert ("accuracy" in cell["measures"]) == bool(fit)  # a task in which the base guesses counts for nothing
        for measure in cell["measures"].values():
            before, after, change = (measure[side]["value"] for side in ("before", "after", "change"))
            assert change == pytest.approx(after - before, abs=1e-9)
            if treatment == "learning rate 0":
                assert [measure["change"][key] for key in ("value", "low", "high")] == [0, 0, 0]
    distinct = {cell["measures"]["log_pz"]["after"]["value"] for cell in cells.values()}
    # No two cells are the same model, with one exception: the text of a random model overlaps with no sequence, so
    # that the decontaminated corpus and the size-matched control are the whole corpus. The first generation is
    # self-training.
    assert len(distinct) == len(cells) - 3


def test_the_tails_of_generations_are_compared_at_equal_tokens(finished_study: Path):
    results = json.loads((finished_study / "results.json").read_text())
    cells = read_cells(finished_study)
    tails = {
        name: results["corpora"][cells["llama", name, 100]["corpus"]]["statistics"]["tail"]
        for name in ("two generations, generation 1", "two generations")
    }
    first, second = tails.values()
    assert first["distinct"]["tokens"] == second["distinct"]["tokens"] > 100
    assert first != second
    assert all(0 < tail["rare_mass"] < 1 for tail in tails.values())  # random models: many tokens are rare
    assert "tail" not in results["corpora"][cells["llama", "real text", 100]["corpus"]]["statistics"]
    page = (finished_study / "report.html").read_text()
    assert "<h2>Generations<" in page
    assert (finished_study / "tables" / "generations_llama.csv").read_text().count("two generations,accumulate,") == 2


def test_cells_share_what_they_have_in_common(finished_study: Path):
    kinds = [path.name.split("-")[0] for path in (finished_study / "stages").iterdir() if path.is_dir()]
    arms = yaml_io.load(StudyConfig, finished_study / "config.yaml").arms
    cool = any(arm.temperature is not None for arm in arms)
    # A corpus of either model, one of the second generation, and perhaps a cool one.
    assert kinds.count("sample") == 2 + 1 + cool
    # Both main corpora are retokenized for both students, each other corpus for its own student.
    assert kinds.count("retokenize") == 2 * 2 + 1 + cool
    # Every main corpus under its student, and both sampled corpora under their source.
    assert kinds.count("proxies") == 2 * 2 + 2
    assert (kinds.count("noise"), kinds.count("merge")) == (2, sum(arm.kind == "extrapolate" for arm in arms))
    cells = len(read_cells(finished_study)) - 1  # the first generation is self-training
    # Two bases, every cell, and the texts alone before and after a few steps on the main corpora.
    assert kinds.count("score") == 2 + cells + 2 + 2 * 2
    # Five times each: the sequences, two formats, continuations, after relearning; and two A/A repeats of both bases.
    assert kinds.count("extract") == 5 * (2 + cells) + 2 * 2
    assert (kinds.count("continue"), kinds.count("decontaminate"), kinds.count("size_matched")) == (2, 1, 1)


def test_a_retokenized_corpus_has_the_text_of_its_source(finished_study: Path):
    design = make_design(yaml_io.load(StudyConfig, finished_study / "config.yaml"))
    for cell in design.cells:
        if cell.corpus is None or cell.corpus.command != "retokenize":
            continue
        retokenized = open_corpus(design.folder(cell.corpus))
        source = open_corpus(design.folder(cell.corpus.dependencies[0]))
        assert list(retokenized.iter_texts()) == [
            text.replace("\N{REPLACEMENT CHARACTER}", "") for text in source.iter_texts()
        ]


def test_memorization_is_probed_in_formats_after_relearning_and_on_unseen_text(finished_study: Path):
    results = json.loads((finished_study / "results.json").read_text())
    design = make_design(yaml_io.load(StudyConfig, finished_study / "config.yaml"))
    cells = read_cells(finished_study)
    probes = {"format prefix 4", "format inside, after BOS", "after_relearning 1"}
    for key, cell in cells.items():
        assert {f"{measure}/{view}" for measure in ("exact_match", "log_pz") for view in probes} <= cell[
            "measures"
        ].keys()
        changed = {cell["measures"][f"log_pz/{view}"]["change"]["value"] != 0 for view in probes}
        assert changed == {key[1] != "learning rate 0"}  # the base and it relearn alike
    # By construction a base reproduces its own continuations; a student does not reproduce all of them.
    for name, seed in ((name, 100) for name in ("llama", "second")):
        of_base = open_table(design, design.base_probes[name, seed]["unseen"])
        assert len(of_base["exact_match"]) == 60
        assert np.mean(of_base["exact_match"]) == 1
        (own,) = (cell for cell in design.cells if (cell.student, cell.treatment) == (name, f"source {name}"))
        assert np.mean(open_table(design, own.probes["unseen"])["logprob"]) != np.mean(of_base["logprob"])
    assert {(one["student"], one["repeat"]) for one in results["aa_repeats"]} == {
        (name, repeat) for name in ("llama", "second") for repeat in ("batch of 24 rows", "bfloat16")
    }
    for one in results["aa_repeats"]:
        assert one["n"] == 30
        assert (one["log_pz"] > 1e-4) == (one["repeat"] == "bfloat16")
    for one in results["decontamination"]:
        assert one["difference"]["value"] == 0
    assert {"log_pz/H", "exact_match/H", "text/stories"} <= {one["measure"] for one in results["decontamination"]}
    halves = {cell["extraction"]["classes"]["H"]["n"] for cell in cells.values()}
    assert len(halves) == 1
    assert halves < set(range(5, 26))
    for cell in cells.values():  # the classes are those of the self-trained student, also for weight noise
        classes = cell["extraction"]["classes"]
        assert classes["H_emitted"]["n"] <= classes["H"]["n"]
        assert sum(classes[name]["n"] for name in ("held_out", "partial", "seen")) == classes["all"]["n"]
    thresholds = cells["llama", "decontaminated", 100]["extraction"]["thresholds"]
    assert thresholds == []  # the suffixes have four tokens, the smallest threshold is eight


def test_the_key_of_continuations_holds_their_options_and_relearning_may_use_a_named_data_set(
    make: Make, inputs: dict[str, str], tmp_path: Path
):
    probes = MemorizationConfig(unseen_text=inputs["texts"], relearn_corpus="datasets:none/of-these")
    config = make(tmp_path / "out", memorization=probes)
    check_study(config)

    def keys(**changes: Any) -> set[str]:
        kinds = StageFactory(replace(config, extract=replace(config.extract, **changes)))
        return {kinds.continue_unseen_text(kinds.base(name)).key for name in ("llama", "second")}

    plain = keys()
    changes: tuple[dict[str, Any], ...] = ({"dtype": "bfloat16"}, {"prefix": 5}, {"suffix": 5}, {"start_token": "bos"})
    assert len(plain) == 2
    assert len(plain.union(*(keys(**one) for one in changes))) == 2 * (1 + len(changes))
    assert keys(batch_tokens=512, mesh="data=2") == plain  # rounding, at most


def open_table(design: Design, stage: Stage) -> dict[str, Any]:
    return pq.read_table(design.folder(stage) / "extract.sequences.parquet").to_pydict()


def test_a_decontaminated_corpus_has_no_overlap_with_h_and_its_control_is_as_large(
    make: Make, tiny_model: Callable[..., Path], tmp_path: Path
):
    rng = np.random.default_rng(0)
    rows = rng.integers(3, 512, (40, 24)).astype(np.int32)
    np.save(tmp_path / "sequences.npy", rows)
    config = make(tmp_path / "out")
    extract = replace(config.extract, sequences=str(tmp_path / "sequences.npy"), prefix=6, suffix=18, min_overlap=16)
    kinds = StageFactory(replace(config, extract=extract))
    order = rng.permutation(40)
    texts = [Sample(n, np.append(rows[i, 6:], 2).astype(np.int32), f"{i}", -1.0, "stop") for n, i in enumerate(order)]
    corpus = Stage("retokenize", "planted", {}, {}, lambda out: None)
    write_sampled_corpus(kinds.root / corpus.name, tiny_model("llama"), texts)
    held_out = set(np.flatnonzero(held_out_half(sequences_fingerprint(tmp_path / "sequences.npy"), np.arange(40))))
    assert 10 < len(held_out) <= 20
    left = {}
    for size_matched in (False, True):
        stage = kinds.decontaminate(kinds.base("llama"), corpus, 100, size_matched=size_matched)
        stage.run(kinds.root / stage.name)
        left[size_matched] = {int(text) for text in open_corpus(kinds.root / stage.name).iter_texts()}
    assert left[False] == set(range(40)) - held_out
    assert held_out <= left[True]
    assert len(left[True]) == len(left[False])


def test_noise_has_the_norm_of_the_change_of_training(finished_study: Path):
    from jax_selftrain import load_model

    design = make_design(yaml_io.load(StudyConfig, finished_study / "config.yaml"))
    weights = set()
    for noise in (one for one in design.ordered_stages if one.command == "noise"):
        weight = noise.identity.get("weight", 1.0)
        weights.add(weight)
        (trained,) = noise.dependencies
        base = flatten_dict(load_model(design.models["llama"].model).params)
        student = flatten_dict(load_model(design.folder(trained)).params)
        noisy = flatten_dict(load_model(design.folder(noise) / "model").params)
        for path, before in base.items():
            change, shift = (np.asarray(after[path]) - np.asarray(before) for after in (student, noisy))
            assert np.linalg.norm(shift) == pytest.approx(weight * np.linalg.norm(change), rel=1e-4)
            assert change.size < 100 or abs(np.vdot(change, shift)) < 0.5 * weight * np.linalg.norm(change) ** 2
    assert weights == {1.0, 3.0}


def test_noise_may_match_the_damage_of_training(finished_study: Path, tmp_path: Path):
    """The weight is searched with real scores; the damage is that of a second score."""
    config = yaml_io.load(StudyConfig, finished_study / "config.yaml")
    design = make_design(config)
    (cell,) = (cell for cell in design.cells if (cell.student, cell.treatment) == ("llama", "source llama"))
    assert cell.train
    base, trained = design.models["llama"].model, str(design.folder(cell.train) / "model")
    options = ScoreConfig(texts=config.score.texts[:1], text_limit=20)

    def damage(model: str) -> float:
        levels = [
            evals.score(replace(options, model=one, out=str(tmp_path / f"{n}.json")))["texts"]
            for n, one in enumerate((base, model))
        ]
        (before,), (after,) = (level.values() for level in levels)
        return after["bits_per_byte"] - before["bits_per_byte"]

    if damage(trained) <= 0:
        base, trained = trained, base  # the damage of undoing the training
    (tmp_path / "noise/search/noise 0").mkdir(parents=True)  # of a killed search
    (tmp_path / "noise/search/base.json").write_text("damaged")
    add_matching_noise(base, trained, tmp_path / "noise", 100, options)
    record = json.loads((tmp_path / "noise/noise.json").read_text())
    assert sorted(path.name for path in (tmp_path / "noise").iterdir()) == ["model", "noise.json"]
    assert 1 / 1.1 <= record["damage"] / record["target"] <= 1.1, record
    assert record["target"] == pytest.approx(damage(trained), rel=1e-5)
    for file in tmp_path.glob("?.json"):
        file.unlink()
    assert record["damage"] == pytest.approx(damage(str(tmp_path / "noise/model")), rel=1e-5)
    add_matching_noise(base, trained, tmp_path / "noise", 100, options)  # done: nothing is scored again


@pytest.mark.parametrize("power", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("target", [1e-4, 0.02, 3.0])
def test_the_search_finds_the_weight_of_a_damage(power: float, target: float):
    tried: list[tuple[float, float]] = []
    weight = search_weight(lambda weight: 0.01 * weight**power - 1e-5, target, tried)
    assert 0.01 * weight**power - 1e-5 == pytest.approx(target, rel=0.1)
    assert len(tried) <= 8
    assert search_weight(lambda weight: weight, -1.0, []) == 1.0  # training did no damage: noise of its size


def test_the_report_is_a_function_of_the_results(finished_study: Path, tmp_path: Path):
    shutil.copy(finished_study / "results.json", tmp_path)
    write_report(tmp_path)
    assert without_costs(tmp_path / "report.html") == without_costs(finished_study / "report.html")
    html = (tmp_path / "report.html").read_text()
    for words in (
        "self − other",
        "two generations",
        "What this cannot show",
        "<strong>own text keeps</strong>",
        "(primary)",
        "1 claim: 1 not tested",
        "1 seed; a verdict needs 5.",
        "exactly that of the base",
        "Prediction of the gain by proxies",
        "Selective forgetting or general damage",
    ):
        assert words in html
    assert str(finished_study) not in html
    assert (tmp_path / "tables" / "relations.csv").exists()
    assert (tmp_path / "figures" / "trajectories_llama.svg").exists()


@pytest.mark.parametrize("seeds", [(100,), pytest.param((100, 101), marks=pytest.mark.nightly)], ids="seeds {}".format)
def test_killed_shared_and_grown_studies_end_with_the_same_tables(make: Make, tmp_path: Path, seeds: tuple[int, ...]):
    """Kill one process, then finish with two and an arm; every night also with another seed.

    The models are removed as soon as they are measured, which changes no result.
    """
    small = partial(make, students=("llama",), sources=("llama",), extract=ExtractConfig())
    grown = partial(small, arms=(NULL,), seeds=seeds)
    whole = run_study(grown(tmp_path / "whole"))
    yaml_io.save(tmp_path / "study.yaml", small(tmp_path / "out", seeds=(100,), keep_models="none"))
    command = ("study", "--config", tmp_path / "study.yaml")
    first = launch(*command)
    stages = tmp_path / "out" / "stages"
    first.wait_until(lambda: len(list(stages.glob("*-*.json"))) >= 2)
    first.kill()
    first.wait()
    yaml_io.save(tmp_path / "study.yaml", grown(tmp_path / "out", keep_models="none"))
    both = [launch(*command) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    assert not list(stages.glob(".*"))  # no lease, nothing half-written
    assert (tmp_path / "out" / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    assert (tmp_path / "out" / "report.html").exists()
    design = make_design(grown(tmp_path / "out"))
    assert all(is_done(design.root, stage) for stage in design.ordered_stages)
    assert [len(list(path.glob("stages/train-*/model"))) for path in (whole, tmp_path / "out")] == [2 * len(seeds), 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ()}, "`models` is required"),
        ({"models": (ModelConfig("a"),)}, "each needs `name` and `model`"),
        ({"claims": (ClaimConfig("x", "source llama"),)}, "`student` is required"),
        ({"claims": (ClaimConfig("x", margin=-1.0),)}, "claims: x: margin -1.0: must be a finite number above 0"),
        ({"proxy_steps": 3, "proxy_sample_size": 0}, "proxy_steps 3: needs several sources"),
        ({"proxy_steps": 3, "sources": ("llama",)}, "proxy_steps 3: needs several sources"),
        ({"proxy_steps": 3, "score": ScoreConfig(tasks=("piqa",))}, "proxy_steps 3: needs several sources"),
        ({"positive_controls": ("real",)}, "positive_controls: 'real' is unknown"),
        ({"arms": (ArmConfig(),)}, "arms: each needs a `name`"),
        ({"students": ("lama",)}, "students: 'lama' is unknown; did you mean `llama`"),
        ({"seeds": (1, 1)}, "seed 1 is given twice"),
        ({"arms": (ArmConfig("x", "text"),)}, "`text` names the file of an arm"),
        ({"arms": (ArmConfig("x", "extrapolate"),)}, "needs its `weight`"),
        ({"arms": (ArmConfig("x", weight=2.0),)}, "`weight` does not apply"),
        ({"arms": (ArmConfig("x", "noise", weight=-1.0),)}, "must be a positive number"),
        ({"arms": (ArmConfig("source llama"),)}, "names of main cells"),
        ({"arms": (ArmConfig("x", "generations", generations=0),)}, "arms: x: generations 0: must be at least 1"),
        (
            {"arms": (ArmConfig("x", "generations"), ArmConfig("x, generation 1"))},
            "arm 'x, generation 1' is given twice",
        ),
        ({"arms": (ArmConfig("x", "mixture", share=0.5),)}, "`text` names the file of an arm"),
        ({"arms": (ArmConfig("x", "mixture", text="t.jsonl"),)}, "`share` is None; a mixture needs a share"),
        ({"arms": (ArmConfig("x", "mixture", text="t.jsonl", share=1.0),)}, "`share` is 1.0; a mixture needs a share"),
        ({"arms": (ArmConfig("x", share=0.5),)}, "`share` does not apply"),
        ({"arms": (ArmConfig("x", "mixture", text="t.jsonl", share=0.5, epochs=2),)}, "`epochs` does not apply"),
        (
            {"arms": (ArmConfig("x", "noise", temperature=0.5),)},
            "`temperature` does not apply to an arm of kind `noise`",
        ),
        ({"arms": (ArmConfig("x", replay="fresh"),)}, "`replay` does not apply"),
        ({"arms": (ArmConfig("x", "decontaminated"),), "extract": ExtractConfig()}, "needs extract.sequences"),
        (
            {"memorization": MemorizationConfig(relearn_steps=(2,)), "extract": ExtractConfig()},
            "memorization: needs extract.sequences",
        ),
        ({"memorization": MemorizationConfig(relearn_steps=(1, 0))}, "--memorization.relearn-steps 0"),
        ({"memorization": MemorizationConfig(relearn_steps=(2, 2))}, r"relearn_steps \[2, 2\]: give each number"),
        ({"memorization": MemorizationConfig(max_continuations=0)}, "--memorization.max-continuations 0"),
        ({"memorization": MemorizationConfig(unseen_text="none.jsonl")}, "none.jsonl"),
        ({"memorization": MemorizationConfig(relearn_corpus="none.jsonl")}, "none.jsonl: no such file"),
        ({"memorization": MemorizationConfig((PromptFormat(prefix=4),))}, "a unique `name`"),
        ({"memorization": MemorizationConfig((PromptFormat("after_relearning", prefix=4),))}, "a unique `name`"),
        (
            {"memorization": MemorizationConfig((PromptFormat("long", prefix=999),))},
            r"formats: long: .* tokens, fewer than prefix \+ suffix",
        ),
        ({"memorization": MemorizationConfig((PromptFormat("as ever"),))}, "as ever: changes nothing"),
        ({"arms": (ArmConfig("x"), ArmConfig("x", keep_source_tokens=True))}, "arm 'x' is given twice"),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_anything_is_written(make: Make, tmp_path: Path, changes, message: str):
    with pytest.raises(InputError, match=message):
        run_study(make(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_an_embedding_model_without_tokenizer_is_refused_before_anything_is_written(make: Make, tmp_path: Path):
    config = make(tmp_path / "out", embedding_model=str(tmp_path / "mute"))
    with pytest.raises(InputError, match="mute: no such"):
        run_study(config)
    (tmp_path / "mute").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "mute" / name).write_bytes((Path(config.models[0].model) / name).read_bytes())
    with pytest.raises(InputError, match="mute: holds no tokenizer"):
        run_study(config)
    assert not (tmp_path / "out").exists()


def test_steps_are_required_and_options_of_the_study_are_refused(make: Make, inputs: dict[str, str], tmp_path: Path):
    config = make(tmp_path / "out")
    with pytest.raises(InputError, match=r"steps or train\.epochs is required"):
        run_study(replace(config, train=replace(config.train, steps=None)))
    # 40 samples are at most 40 rows, or 32 full ones.
    for steps, packing, rows in ((11, "masked", 40), (9, "packed", 32)):
        with pytest.raises(
            InputError, match=rf"train\.steps {steps}: needs {4 * steps} rows, but 40 .* at most {rows} rows"
        ):
            check_study(replace(config, train=replace(config.train, steps=steps, packing=packing)))
        check_study(replace(config, train=replace(config.train, steps=steps - 1, packing=packing)))
    long = replace(config, train=replace(config.train, steps=100))
    check_study(replace(long, subset=SubsetConfig(tokens=100_000)))  # drawn with replacement
    check_study(replace(long, students=("second",), sources=("llama",)))  # another tokenizer may need more tokens
    with pytest.raises(InputError, match=r"sample\.seed is set by the study"):
        run_study(replace(config, sample=replace(config.sample, seed=4)))
    with pytest.raises(InputError, match="different tokenizers"):
        run_study(replace(config, extract=replace(config.extract, sequences=inputs["sequences"])))


def test_every_model_has_its_own_stop_ids(make: Make, tmp_path: Path):
    config = make(tmp_path / "out")
    models = (replace(config.models[0], stop_ids=(7, 2)), config.models[1])
    design = make_design(replace(config, models=models))
    identities = {(one.command, one.label): one.identity for one in design.ordered_stages}
    assert identities["sample", "sample from llama, seed 100"]["stop_ids"] == [7, 2]
    assert identities["sample", "sample from second, seed 100"]["stop_ids"] is None
    ends = {label: identity["stop_id"] for (kind, label), identity in identities.items() if kind == "retokenize"}
    assert {stop for label, stop in ends.items() if "for llama" in label} == {7}
    assert {stop for label, stop in ends.items() if "for second" in label} == {None}


def test_a_source_need_not_be_scored(make: Make, tmp_path: Path):
    config = make(tmp_path / "out", students=("llama",), sources=("llama", "second"))
    assert set(make_design(config).score_base) == {"llama", "second"}
    models = tuple(replace(model, score=False) for model in config.models)
    assert set(make_design(replace(config, models=models)).score_base) == {"llama"}


def test_pairs_are_the_cells_of_the_matrix(make: Make, tmp_path: Path):
    pairs = (PairConfig("llama", "llama"), PairConfig("llama", "second"), PairConfig("second", "second"))
    design = make_design(make(tmp_path / "out", pairs=pairs))
    found = [(cell.student, cell.source) for cell in design.cells]
    assert found == 2 * [("llama", "llama"), ("llama", "second"), ("second", "second")]
    assert len({stage.key for stage in design.ordered_stages if stage.command == "retokenize"}) == 2 * 3
    with pytest.raises(InputError, match="pairs: source: 'gpt' is unknown"):
        check_study(make(tmp_path / "out", pairs=(PairConfig("llama", "gpt"),)))


def test_a_model_has_its_own_rate_dtype_and_mesh(make: Make, tmp_path: Path):
    config = make(tmp_path / "out", arms=(ArmConfig("rate of the arm", learning_rate=0.5),))
    llama = replace(config.models[0], learning_rate=0.25, dtype="bfloat16", mesh="data=1,model=1")
    design, plain = make_design(replace(config, models=(llama, config.models[1]))), make_design(config)

    def identities(design: Design, command: str, option: str) -> dict[str, Any]:
        return {stage.label: stage.identity[option] for stage in design.ordered_stages if stage.command == command}

    for command in ("sample", "train", "score"):  # the A/A repeats extract in bfloat16 anyway
        of_model, of_study = identities(design, command, "dtype"), identities(plain, command, "dtype")
        assert set(of_study.values()) == {"float32"}
        assert {label for label, dtype in of_model.items() if dtype == "bfloat16"} == {
            label for label in of_study if re.match(r"(sample|train|score)( from)? llama", label)
        }
    rates = identities(design, "train", "learning_rate")
    assert {rate for label, rate in rates.items() if "rate of the arm" in label} == {0.5}
    assert {rate for label, rate in rates.items() if re.match(r"train llama .*\(source", label)} == {0.25}
    assert {rate for label, rate in rates.items() if re.match(r"train second .*\(source", label)} == {
        config.train.learning_rate
    }


def test_revisions_of_a_model_are_models(make: Make, tmp_path: Path):
    models = (ModelConfig("pythia", "org/pythia", revisions=("step1", "main")), make(tmp_path).models[1])
    config = make(
        tmp_path / "out",
        models=models,
        students=("pythia",),
        sources=("second", "pythia"),
        pairs=(PairConfig("pythia", "second"), PairConfig("pythia", "pythia")),
        arms=(replace(NULL, students=("pythia", "second")),),
    )
    found = expand_revisions(config)
    assert [(one.name, one.model) for one in found.models[:2]] == [
        ("pythia@step1", "org/pythia@step1"),
        ("pythia@main", "org/pythia@main"),
    ]
    assert {one.lineage for one in found.models[:2]} == {"pythia"}
    both = ("pythia@step1", "pythia@main")
    assert (found.students, found.sources, found.arms[0].students) == (both, ("second", *both), (*both, "second"))
    assert found.pairs == tuple(
        PairConfig(student, source) for student, source in [*product(both, ["second"]), *zip(both, both, strict=True)]
    )
    assert expand_revisions(found) == found
    for ref in (models[1].model, "org/pythia@step2"):
        with pytest.raises(InputError, match="has no `revisions`; give a hub id"):
            expand_revisions(replace(config, models=(replace(models[0], model=ref), models[1])))


def test_more_samples_extend_the_corpora(make: Make, tmp_path: Path):
    small = make(tmp_path / "out", students=("llama",), sources=("llama",), seeds=(100,))
    config = replace(small, sample=replace(small.sample, samples_per_shard=16))
    sampled = []
    for samples in (40, 50):
        design = make_design(replace(config, sample=replace(config.sample, samples=samples)))
        (stage,) = (stage for stage in design.ordered_stages if stage.command == "sample")
        run_all(design.root, [stage])
        sampled.append(design.folder(stage))
    timed = [sorted(path.stem for path in (folder / "timings").iterdir()) for folder in sampled]
    assert timed == [["shard-000000", "shard-000001", "shard-000002"], ["shard-000002", "shard-000003"]]
    assert len(open_corpus(sampled[1])) == 50


def test_the_results_may_be_of_one_split(finished_study: Path):
    config = yaml_io.load(StudyConfig, finished_study / "config.yaml")
    design = make_design(config)
    declared = Registration((), (), (), config.seeds)
    parts = {split: collect_study(replace(config, split=split), design, declared) for split in ("all", "dev", "test")}
    for whole, dev, test in zip(*(part["cells"] for part in parts.values()), strict=True):
        for one, few, many in zip(whole["tasks"], dev["tasks"], test["tasks"], strict=True):
            assert 0 < few["n"] < many["n"]
            assert few["n"] + many["n"] == one["n"]
            assert few["not_eligible"] == many["not_eligible"] == one["not_eligible"]
            totals = [task["n"] * task["accuracy"]["change"]["value"] for task in (one, few, many)]
            np.testing.assert_allclose(totals[0], totals[1] + totals[2], atol=1e-12)
    assert parts["dev"]["config"]["split"] == "dev"


def test_a_dry_run_counts_and_writes_nothing(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_study(make(tmp_path / "out", arms=ARMS, dry_run=True))
    printed = capsys.readouterr().out
    assert "34 cells" in printed  # four main cells, twelve arms and a first generation, each with two seeds
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- relations of source and student


def simulate_cells(effect: Callable[[str, str], float]) -> list[dict[str, Any]]:
    return [
        {
            "student": student,
            "source": source,
            "treatment": f"source {source}",
            "seed": seed,
            "tasks": [{"n": 1000, "chance": 0.0, "not_eligible": None}],
            "measures": {"accuracy": {"change": {"value": effect(student, source) + 0.001 * seed}}},
        }
        for seed in range(3)
        for student in "AB"
        for source in "ABC"
    ]


def estimate_relations(cells: list[dict[str, Any]], stronger: Pairs = (), **models: str) -> dict[str, float]:
    """Return the differences of relations of all students; models have `LINEAGE/FAMILY`."""
    described = {
        name: ModelConfig(name, name, lineage=lineage, family=family)
        for name, value in models.items()
        for lineage, _, family in [value.partition("/")]
    }
    pairs = list(dict.fromkeys((cell["student"], cell["source"]) for cell in cells))
    found = relation_effects(cells, described, pairs, stronger, {}) or {"contrasts": ()}
    for one in found["contrasts"]:
        assert max(map(abs, one["sources"].values())) < 1e-12
    return {
        one["contrast"]: one["measures"]["accuracy"]["contrast"]["value"]
        for one in found["contrasts"]
        if not one["student"]
    }


def test_a_bad_source_is_no_relation_and_an_incompatible_one_is():
    """C is no student's own; it is bad for all, and does not move the difference."""
    models = {"A": "A", "B": "B", "C": "C"}
    bad = estimate_relations(simulate_cells(lambda _, source: -0.1 if source in "BC" else 0.0), **models)
    assert bad == pytest.approx({"self - other": 0.0}, abs=1e-12)
    incompatible = estimate_relations(simulate_cells(lambda *pair: 0.0 if pair[0] == pair[1] else -0.1), **models)
    assert incompatible == pytest.approx({"self - other": 0.1})
    one_student = [cell for cell in simulate_cells(lambda *_: 0.0) if cell["student"] == "A"]
    assert estimate_relations(one_student, **models) == {}  # text that suits A, or better text


def test_own_text_is_not_its_lineages():
    """Own text is better by 3, its lineage's by 1, and a stronger model's by 0.5 than cross-family text."""
    gains = {"self": 0.03, "same lineage": 0.01, "stronger other": 0.005, "cross family": 0.0}
    relations = {"AA": "self", "BB": "self", "AC": "same lineage", "BC": "stronger other", "AB": "cross family"}
    relations["BA"] = "cross family"
    cells = simulate_cells(lambda student, source: gains[relations[student + source]] - 0.2 * (source == "C"))
    models = {"A": "A/x", "C": "A", "B": "B/y"}
    found = estimate_relations(cells, [("B", "C")], **models)
    separable = {"same lineage - stronger other": 0.005, "self - cross family": 0.03}
    assert found == pytest.approx(separable)  # how good the text of C is, is not known apart from its relations
    relations |= {"BC": "cross family"}  # C has a family now
    cells = simulate_cells(lambda student, source: gains[relations[student + source]] - 0.2 * (source == "C"))
    assert estimate_relations(cells, **models | {"C": "A/x"}) == pytest.approx(
        {"self - same lineage": 0.02, "same lineage - cross family": 0.01, "self - cross family": 0.03}
    )


def test_proxies_equal_those_from_plain_logits(finished_study: Path):
    from jax_selftrain import load_model

    config = yaml_io.load(StudyConfig, finished_study / "config.yaml")
    design = make_design(config)
    matrix = [cell for cell in read_cells(finished_study).values() if cell["proxies"]]
    found = {(cell["student"], cell["source"]): cell["proxies"] for cell in matrix}
    assert len(found) == len(matrix) == 4
    embedder = load_model(design.models["llama"].model, "data=1")

    def nats_per_byte(name: str, corpus: Corpus) -> float:
        model = load_model(design.models[name].model, "data=1")
        chosen = set(hash_sample(len(corpus), 256, 0))
        samples = [one for one in corpus.iter_samples() if one.sample_id in chosen and len(one.tokens)]
        rows = np.zeros((len(samples), 1 + max(len(one.tokens) for one in samples)), np.int32)
        for row, sample in zip(rows, samples, strict=True):
            row[: 1 + len(sample.tokens)] = [corpus.start_id, *sample.tokens]
        logits = np.asarray(model.logits(rows), np.float64)[:, :-1]
        logprobs = np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))
        nats = sum(row[: len(sample.tokens)].sum() for row, sample in zip(logprobs, samples, strict=True))
        return float(nats) / sum(len(sample.text.encode()) for sample in samples)

    for cell in design.cells:
        if cell.proxies is not None and cell.corpus is not None:
            proxies = found[cell.student, cell.source]
            own = nats_per_byte(cell.student, open_corpus(design.folder(cell.corpus)))
            others = nats_per_byte(cell.source, open_corpus(design.folder(cell.corpus.dependencies[0])))
            assert proxies["loglikelihood_per_byte"] == pytest.approx(own, rel=1e-4)
            assert proxies["gap_per_byte"] == pytest.approx(own - others, rel=1e-3, abs=1e-6)
            assert 0 < proxies["compression"] < 1.5
            assert 0 <= proxies["similarity"] <= 1
            corpus = open_corpus(design.folder(cell.corpus))
            chosen = set(hash_sample(len(corpus), 256, 0))
            texts = [one.text for one in corpus.iter_samples() if one.sample_id in chosen and one.text.strip()]
            (questions,) = questions_by_task(config.score).values()
            sides = (texts, questions)
            one, other = (embed_texts(embedder, side).mean(axis=0) for side in sides)
            cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            assert proxies["semantic_similarity"] == pytest.approx(float(cosine), abs=1e-5)


def test_proxies_of_held_out_text_are_of_dev_documents(finished_study: Path):
    config = yaml_io.load(StudyConfig, finished_study / "config.yaml")
    design, cells = make_design(config), read_cells(finished_study)
    (texts,) = evals.load_texts(config.score.texts)
    dev = list(evals.select_split(texts, "dev").documents)
    assert 0 < len(dev) < len(texts.documents)
    matrix = [cell for cell in design.cells if cell.proxies is not None]
    assert len(matrix) == 4
    for cell in matrix:
        assert cell.corpus is not None
        found = cells[cell.student, cell.treatment, cell.seed]
        assert found["task_proxies"]["animals"]["similarity"] == found["proxies"]["similarity"]  # of one task
        scored = [load_score_result(str(design.folder(stage) / "score.json")) for stage in cell.proxies[2:]]
        assert not scored[0].result["tasks"]
        rates = []
        for one in scored:
            items = one.items["stories"].select("dev")
            assert items.count == len(dev)
            rates.append(-items.loglikelihood.sum() / np.log(2) / sum(len(text.encode()) for text in dev))
        assert found["proxies"]["probe_gain"] == pytest.approx(rates[0] - rates[1], abs=1e-12)
    # The gradient of a corpus of the student's own, from the dev documents and samples as the corpus has them.
    (cell,) = (cell for cell in matrix if cell.student == cell.source == "llama")
    corpus = open_corpus(design.folder(cell.corpus))
    chosen = set(hash_sample(len(corpus), 256, 0))
    samples = [[corpus.start_id, *one.tokens.tolist()] for one in corpus.iter_samples() if one.sample_id in chosen]
    opened = open_model(design.models["llama"].model)
    rows = [[corpus.start_id, *opened.tokenizer.encode(text, add_special_tokens=False)] for text in dev]
    recipe = replace(config.train, model=design.models["llama"].model, mesh="data=1", batch_size=8)
    expected = align_gradients(recipe, samples, rows)
    proxies = cells["llama", "source llama", 100]["proxies"]
    assert proxies["gradient_alignment"] == pytest.approx(expected, abs=1e-5)


def test_a_study_that_moved_goes_on_to_the_same_bytes(finished_study: Path, tmp_path: Path):
    """Only checkpoints (Orbax writes times into them), timings and the folder's own name differ."""
    names = ("checkpoints/", "timings", "seconds.json", "launches.jsonl", "tensorboard/", "report.html")  # has costs
    moved = shutil.copytree(finished_study, tmp_path / "another place")
    records = sorted(path for path in (moved / "stages").glob("*.json") if "seconds" not in path.name)
    for record in records[::3]:
        record.unlink()
        shutil.rmtree(record.with_suffix(""))
    config = yaml_io.load(StudyConfig, finished_study / "config.yaml")
    assert run_study(replace(config, out=str(moved))) == moved
    write_report(moved)
    before, after = (
        {
            name: one
            for name, one in folder_manifest(folder, exclude="config.yaml").items()
            if not any(part in name for part in names)
        }
        for folder in (finished_study, moved)
    )
    assert len(before) > 300
    assert after == before
    text = "".join(path.read_text() for path in (moved / "stages").glob("*/*.json"))
    assert str(moved) not in text
    assert str(finished_study) not in text
