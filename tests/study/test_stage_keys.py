"""Stage keys hold everything that decides an output; golden keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jax_selftrain.config import (
    ArmConfig,
    ExtractConfig,
    MemorizationConfig,
    ModelConfig,
    SampleConfig,
    ScoreConfig,
    StudyConfig,
    TrainConfig,
)
from jax_selftrain.study import dag
from jax_selftrain.study.dag import Stage
from jax_selftrain.study.proxy_stages import measure_student
from jax_selftrain.study.stage_factory import StageFactory
from jax_selftrain.study.study_model import StudyModel
from jax_selftrain.study.weight_changes import change_weights
from jax_selftrain.version import versions

ENVIRONMENT = {
    "jax": "0.10.2",
    "jaxlib": "0.10.2",
    "platform": "tpu",
    "device_kind": "TPU v5 lite",
    "flags": ["--xla_tpu_example=true"],
    "options": {"jax_enable_x64": False},
}

GOLDEN = {
    "continue": "a535dc86d89ac91a",
    "decontaminate": "e1c1691731e9bfe3",
    "extract": "c63310acd0a26bd0",
    "import": "a26d270ced8bbcc4",
    "import_sequences": "474a3ab402931157",
    "merge": "b4f8d9952cad3981",
    "noise": "8491a20954261fd8",
    "proxies": "56c64dcdbaead30c",
    "retokenize": "729ebf21e23a7fe7",
    "sample": "39058e26a92153d5",
    "score": "b1549bbdee669e3d",
    "shuffle": "e7a21fb6f269a411",
    "size_matched": "76e7180bd4b4d3ea",
    "train": "1a8bd08c774f5f05",
}
"""First 16 digits. After an intended change of a stage's output, raise `dag.STAGE_FORMAT` and copy the new keys."""


@pytest.fixture
def factory(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., StageFactory]:
    """`factory(environment)`: stages of a study with files of fixed content, in an environment."""
    for name, row in (
        ("tasks", {"context": "a", "choices": [" b", " c"], "answer": 0}),
        ("texts", {"text": "A text."}),
        ("sequences", {"text": "Another text."}),
    ):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    config = StudyConfig(
        out=str(tmp_path / "out"),
        models=(ModelConfig("a", str(tiny_model("llama"))),),
        sample=SampleConfig(samples=8, max_tokens=16),
        train=TrainConfig(steps=2, batch_size=4, seq_len=32),
        score=ScoreConfig(tasks=(str(tmp_path / "tasks.jsonl"),), texts=(str(tmp_path / "texts.jsonl"),)),
        extract=ExtractConfig(sequences=str(tmp_path / "sequences.jsonl"), prefix=4, suffix=4, greedy_decode=False),
        memorization=MemorizationConfig(unseen_text=str(tmp_path / "texts.jsonl")),
    )

    def make(environment: Mapping[str, Any] = ENVIRONMENT) -> StageFactory:
        monkeypatch.setattr(dag, "numerical_environment", lambda: environment)
        return StageFactory(config)

    return make


def all_stages(stages: StageFactory) -> dict[str, Stage]:
    """Return one stage of every kind, with fixed model fingerprints."""
    ref = stages.config.models[0].model
    base = StudyModel(ref, "f" * 64, "a", "e" * 64, ref)
    arm = ArmConfig("text", "text", text=stages.config.memorization.unseen_text)
    corpus = stages.sample_for(base, base, ArmConfig(), 100)
    student = stages.train(base, [corpus], ArmConfig(), 100)
    found = [
        stages.sample(base, ArmConfig(), 100),
        corpus,
        stages.import_text(base, arm),
        stages.shuffle(base, corpus, 100),
        stages.decontaminate(base, corpus, 100, size_matched=False),
        stages.decontaminate(base, corpus, 100, size_matched=True),
        student.fingerprint,
        change_weights(stages, base, student, ArmConfig(kind="noise"), 100).fingerprint,
        change_weights(stages, base, student, ArmConfig(kind="extrapolate", weight=-1.0), 100).fingerprint,
        stages.score(student),
        stages.extract(student, [corpus], base),
        stages.continue_unseen_text(base),
        measure_student(stages, base, corpus),
        stages.import_shown_half(base),
    ]
    return {stage.command: stage for stage in found if isinstance(stage, Stage)}


def test_the_keys_are_those_of_the_last_version(factory: Callable[..., StageFactory]) -> None:
    assert {command: stage.key[:16] for command, stage in all_stages(factory()).items()} == GOLDEN


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_every_part_of_the_environment_changes_every_key(factory: Callable[..., StageFactory], name: str) -> None:
    before, after = (
        {command: stage.key for command, stage in all_stages(factory(environment)).items()}
        for environment in (ENVIRONMENT, ENVIRONMENT | {name: "another"})
    )
    assert all(before[command] != after[command] for command in before)


def test_the_format_version_changes_every_key(
    factory: Callable[..., StageFactory], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {command: stage.key for command, stage in all_stages(factory()).items()}
    monkeypatch.setattr(dag, "STAGE_FORMAT", dag.STAGE_FORMAT + 1)
    after = {command: stage.key for command, stage in all_stages(factory()).items()}
    assert all(before[command] != after[command] for command in before)


def test_prefixes_and_suffixes_for_evaluation_change_the_key_of_training(
    factory: Callable[..., StageFactory], tmp_path: Path
) -> None:
    config = factory().config
    pair = [tmp_path / "prefixes.npy", tmp_path / "suffixes.npy"]
    evaluated = replace(config.train, eval_every=1, eval_sequences=":".join(map(str, pair)))
    keys = set()
    for prefix, suffix in ((5, 6), (7, 6), (5, 8)):
        for path, token in zip(pair, (prefix, suffix), strict=True):
            np.save(path, np.full((2, 4), token, np.int32))
        keys.add(all_stages(StageFactory(replace(config, train=evaluated)))["train"].key)
    assert len(keys) == 3


def test_the_temperature_of_a_model_is_that_of_its_text(factory: Callable[..., StageFactory]) -> None:
    stages = factory()
    ref = stages.config.models[0].model
    cool = StudyModel(ref, "f" * 64, "cool", "e" * 64, ref, ModelConfig("cool", ref, temperature=0.7))
    base = replace(cool, options=ModelConfig("base", ref))
    temperatures = {
        name: stages.sample(model, arm, 100).identity["temperature"]
        for name, model, arm in (
            ("unset", base, ArmConfig()),
            ("model", cool, ArmConfig()),
            ("arm of another start", cool, ArmConfig(start_text="It")),
            ("arm", cool, ArmConfig(temperature=1.2)),
        )
    }
    assert temperatures == {"unset": 1.0, "model": 0.7, "arm of another start": 0.7, "arm": 1.2}
    assert stages.sample(base, ArmConfig(temperature=0.7), 100).key == stages.sample(cool, ArmConfig(), 100).key
    assert stages.score(base).key == stages.score(cool).key  # one model, scored once


def test_what_decides_the_proxies_changes_their_keys_alone(factory: Callable[..., StageFactory]) -> None:
    config = factory().config
    alone = replace(config, score=replace(config.score, texts=()))
    changed = [
        config,
        alone,
        replace(config, train=replace(config.train, seq_len=16)),
        replace(config, score=replace(config.score, text_limit=5)),
        replace(config, proxy_sample_size=7),
    ]
    keys = [all_stages(StageFactory(one))["proxies"].key for one in changed]
    assert len(set(keys)) == len(keys)
    # Without texts no gradient is measured, and the recipe of training does not matter.
    assert all_stages(StageFactory(replace(alone, train=changed[2].train)))["proxies"].key == keys[1]
    probed = all_stages(StageFactory(replace(config, proxy_steps=3)))
    assert {command: stage.key for command, stage in probed.items()} == {
        command: stage.key for command, stage in all_stages(factory()).items()
    }


def test_a_short_training_has_nothing_of_the_recipes_evaluation(factory: Callable[..., StageFactory]) -> None:
    config = factory().config
    by_epochs = TrainConfig(epochs=2, best_epoch=True, eval_split="dev", eval_tasks=config.score.tasks)
    stages = StageFactory(replace(config, train=by_epochs))
    ref = config.models[0].model
    base = StudyModel(ref, "f" * 64, "a", "e" * 64, ref)
    corpus = stages.sample_for(base, base, ArmConfig(), 100)
    whole, short = (stages.train(base, [corpus], ArmConfig(), 100, steps).fingerprint for steps in (None, 5))
    assert isinstance(whole, Stage)
    assert isinstance(short, Stage)
    options = ("steps", "epochs", "best_epoch", "eval_split")
    assert [whole.identity[name] for name in options] == [None, 2, True, "dev"]
    assert [short.identity[name] for name in options] == [5, None, False, "all"]


def test_several_relearning_trainings_are_beginnings_of_the_longest(factory: Callable[..., StageFactory]) -> None:
    config = factory().config
    recipe = replace(config.train, schedule="cosine", warmup_ratio=0.1)
    base = StudyModel(config.models[0].model, "f" * 64, "a", "e" * 64, config.models[0].model)

    def probes(*steps: int) -> dict[str, dict[str, Any]]:
        probes = MemorizationConfig(relearn_corpus=config.memorization.unseen_text, relearn_steps=steps)
        stages = StageFactory(replace(config, train=recipe, memorization=replace(probes, relearn_sequences=True)))
        found = stages.extract_probes(base, base, 100)
        trained = {name: stage.inputs["model"] for name, stage in found.items()}
        return {name: dict(stage.identity) for name, stage in trained.items() if isinstance(stage, Stage)}

    found = probes(1, 50)
    assert [*found] == [f"{name} {steps}" for name in ("after_relearning", "after_relearning_H") for steps in (1, 50)]
    for short, long in (
        ("after_relearning 1", "after_relearning 50"),
        ("after_relearning_H 1", "after_relearning_H 50"),
    ):
        assert (found[short].pop("steps"), found[long].pop("steps")) == (1, 50)
        assert found[short] == found[long]
        assert (found[long]["schedule"], found[long]["warmup_ratio"]) == ("constant", 0.0)
    alone = probes(50)["after_relearning 50"]  # the schedule of the recipe, as ever
    assert (alone["schedule"], alone["warmup_ratio"]) == ("cosine", 0.1)


def test_command_identity_and_inputs_change_the_key() -> None:
    stage = Stage("sample", "label", {"seed": 0}, {"model": "f"}, print)
    changes: tuple[dict[str, Any], ...] = (
        {"command": "train"}, {"identity": {"seed": 1}}, {"inputs": {"model": "g"}}, {"inputs": {"model": stage}}
    )  # fmt: skip
    assert len({stage.key, *(replace(stage, **change).key for change in changes)}) == 5
    assert replace(stage, label="another label", tokens=1).key == stage.key


def test_the_environment_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "--xla_force_host_platform_device_count=8 --xla_dump_to=/tmp/x --xla_cpu_enable_fast_math=true"
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_example=1")
    found = dag.numerical_environment.__wrapped__()
    assert found["flags"] == ["--xla_cpu_enable_fast_math=true", "--xla_tpu_example=1"]
    assert (found["jax"], found["jaxlib"]) == (versions()["jax"], versions()["jaxlib"])
    assert (found["platform"], found["device_kind"]) == (jax.devices()[0].platform, jax.devices()[0].device_kind)
    with jax.enable_x64(True):
        assert dag.numerical_environment.__wrapped__()["options"] != found["options"]
