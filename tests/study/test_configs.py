"""Every configuration in `configs/` loads and follows the protocol."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
from models_factory import tiny_config

from jax_selftrain import hub
from jax_selftrain.config import RunConfig, StudyConfig, yaml_io
from jax_selftrain.distributed.sharding import make_sharding_rules
from jax_selftrain.errors import InputError
from jax_selftrain.evals.task_names import SUITES, split_names
from jax_selftrain.hub.hf_config import parse_config
from jax_selftrain.models import axis_sizes
from jax_selftrain.study import run_study
from jax_selftrain.study.design import expand_revisions

FOLDER = Path(__file__).parents[2] / "configs"
STORIES_PIPELINES = [FOLDER / f"study-{name}-stories260k.yaml" for name in ("paper", "grid")]
STUDIES = sorted([*FOLDER.glob("study-*.yaml"), *FOLDER.glob("paper-*.yaml")])
CONFIGS = sorted(set(FOLDER.glob("*.yaml")) - set(STUDIES))
PYTHIA = {  # layers, width, heads, vocabulary rows, final learning rate: EleutherAI/pythia, models/*/*.yml
    "14m": (6, 128, 4, 50304, 1e-4),
    "31m": (6, 256, 8, 50304, 1e-4),
    "70m": (6, 512, 8, 50304, 1e-4),
    "160m": (12, 768, 12, 50304, 6e-5),
    "410m": (24, 1024, 16, 50304, 3e-5),
    "1b": (16, 2048, 8, 50304, 2.5e-5),
    "1.4b": (24, 2048, 16, 50304, 2e-5),
    "2.8b": (32, 2560, 32, 50304, 1.6e-5),
    "6.9b": (32, 4096, 32, 50432, 1.2e-5),
    "12b": (36, 5120, 40, 50688, 1.2e-5),
}


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("JAX_SELFTRAIN_DATA", "/data")
    return yaml_io.load(RunConfig, path)


def test_every_pythia_and_stories260k_has_a_config() -> None:
    assert {path.stem for path in CONFIGS} == {"stories260k", *(f"pythia-{size}" for size in PYTHIA)}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_follows_the_protocol(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_SELFTRAIN_DATA", "/data")
    monkeypatch.setenv("CANARIES", "/canaries")
    config = yaml_io.load(StudyConfig, path)
    assert (config.out, config.mesh) == ("", ""), "a config does not depend on the machine"
    is_paper = config.sample.min_tokens > 0
    is_small = path in STORIES_PIPELINES or path.stem.startswith(("paper-", "study-smollm2"))
    assert (config.sample.top_k, config.sample.top_p, config.sample.min_p) == (0, 1, 0)
    assert config.sample.temperature == (1.25 if is_paper else 1)
    assert (config.train.schedule, config.train.warmup_ratio) == (("cosine", 0.1) if is_paper else ("constant", 0.05))
    assert (config.train.weight_decay, config.train.packing) == (0.0, "packed" if is_paper else "masked")
    assert config.train.epochs if is_paper else config.train.steps
    assert min(config.seeds) >= 100  # those below are for pilots
    assert any(arm.learning_rate == 0 for arm in config.arms)
    if not is_small:
        assert {"text", "shuffled", "noise", "extrapolate"} <= {arm.kind for arm in config.arms}
        assert any(arm.random_loss_sign for arm in config.arms)


def test_the_grid_has_every_temperature_with_every_number_of_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_SELFTRAIN_DATA", "/data")
    config = yaml_io.load(StudyConfig, FOLDER / "study-grid-stories260k.yaml")
    grid = {(arm.temperature, arm.epochs) for arm in config.arms if arm.temperature is not None}
    grid.add((config.sample.temperature, config.train.epochs))
    assert grid == {(temperature, epochs) for temperature in (0.7, 1.0, 1.25, 1.5) for epochs in (1, 10, 40)}


SHAPES = {  # config.json of the models: layers, width, heads, key/value heads, MLP, vocabulary
    "qwen-0.5b": ("qwen2", 24, 896, 14, 2, 4864, 151936),
    "llama-1b": ("llama", 16, 2048, 32, 8, 8192, 128256),
    "qwen-7b": ("qwen2", 28, 3584, 28, 4, 18944, 152064),
    "qwen3-8b": ("qwen3", 36, 4096, 32, 8, 12288, 151936),
    **{
        size: ("gpt_neox", layers, width, heads, heads, 4 * width, vocabulary)
        for size, (layers, width, heads, vocabulary, _) in PYTHIA.items()
    },
}


@pytest.fixture
def plan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """`plan(name)`: the dry run of a study with shapes of the published models, without weights."""

    def run(name: str) -> str:
        monkeypatch.delenv("JAX_SELFTRAIN_DATA", raising=False)
        config = expand_revisions(yaml_io.load(StudyConfig, FOLDER / f"{name}.yaml"))
        models = []
        for model in config.models:
            family, layers, width, heads, kv_heads, mlp, vocabulary = SHAPES[model.name.partition("@")[0]]
            folder = tmp_path / model.name
            folder.mkdir()
            for file in ("tokenizer.json", "tokenizer_config.json"):  # any tokenizer
                shutil.copy(data_dir / "pythia-tokenizer" / file, folder)
            own = {} if family == "gpt_neox" else {"num_key_value_heads": kv_heads}
            own |= {"head_dim": 128} if family == "qwen3" else {}
            raw = tiny_config(
                cast(Any, family), vocab_size=vocabulary, num_hidden_layers=layers, hidden_size=width,
                num_attention_heads=heads, intermediate_size=mlp, bos_token_id=0, eos_token_id=0,
                max_position_embeddings=32768, **own,
            )  # fmt: skip
            (folder / "config.json").write_text(json.dumps(raw))
            models.append(replace(model, model=str(folder)))
        if config.extract.sequences:
            np.save(tmp_path / "memorized.npy", np.arange(64_000, dtype=np.int32).reshape(1000, 64) % 50_000)
            extract = replace(config.extract, sequences=str(tmp_path / "memorized.npy"))
            config = replace(config, extract=extract)
        run_study(replace(config, models=tuple(models), out=str(tmp_path / "out"), dry_run=True))
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().out

    return run


def count_stages(printed: str) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1].replace(",", "")) for line in printed.splitlines() if "done" in line}


@pytest.mark.xdist_group("plans")  # one worker builds the index of harness tasks
def test_the_paper_is_planned_from_configs_and_tokenizers_alone(plan: Callable[[str], str]) -> None:
    printed = plan("study-paper")
    assert "150 cells" in printed  # (2 students × (4 sources + 10 arms) + 2 starts) × 5 seeds
    # Each seed draws its subset from shared samples: 4 sources, 4 further temperatures of both students, 2 starts; and
    # from the real text of both students.
    counts = count_stages(printed)
    assert (counts["sample"], counts["decontaminate_tasks"], counts["subset"]) == (14, 14, 80)
    flops = sum(float(line.split()[-2]) for line in printed.splitlines() if line.endswith("FLOPs"))
    (chip_hours,) = (line for line in printed.splitlines() if line.startswith("chip-hours at 40% of peak"))
    hours = re.search(r"([\d.,e+]+) \(H100\)", chip_hours)
    assert hours
    assert float(hours[1].replace(",", "")) == pytest.approx(flops / (0.4 * 989.4e12) / 3600, rel=0.06)  # 2 digits
    # Llama 3.2 1B (1,235,814,400 parameters; here with a head of its own): a student that the noise of its seed reads,
    # and one run with weights and two checkpoints.
    size = 4 * (1_235_814_400 + 2048 * 128_256) * (1 + 7) / 1e9
    assert f"disk: {size:,.3g} GB of models and checkpoints (keep_models: none)" in printed


@pytest.mark.nightly
@pytest.mark.xdist_group("plans")
@pytest.mark.parametrize(
    ("name", "cells", "models"),
    [
        ("paper-qwen2.5-0.5b", 3 * 2, {"score": 1 + 3 * 2, "sample": 1}),
        ("paper-llama-3.2-1b", 3 * 2, {"score": 1 + 3 * 2, "sample": 1}),
        # Six models, each with own text and eleven arms; the samples are those of own text.
        ("study-pythia-memorization", 5 * 6 * 12, {"sample": 5 * 6, "decontaminate": 5 * 6, "noise": 5 * 6 * 4}),
    ],
)
def test_other_studies_of_the_paper_are_planned(
    plan: Callable[[str], str], name: str, cells: int, models: dict[str, int]
) -> None:
    printed = plan(name)
    assert f"{cells} cells" in printed
    assert models.items() <= count_stages(printed).items()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_is_consistent(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(path, monkeypatch)
    assert (config.out, config.source, config.mesh) == ("", "", ""), "a config does not depend on the machine"
    assert not any(
        (config.sample.model, config.sample.out, config.train.corpus, config.score.model, config.extract.model)
    )
    # The fixed recipe: the model's own distribution, one epoch, warmup then constant, no weight decay, a pilot's seed.
    assert (config.sample.temperature, config.sample.top_k, config.sample.top_p, config.sample.min_p) == (1, 0, 1, 0)
    assert (config.train.steps, config.train.schedule, config.train.warmup_ratio) == (None, "constant", 0.05)
    assert (config.train.weight_decay, config.train.packing) == (0.0, "masked")
    assert 0 <= config.sample.seed == config.train.seed <= 9
    assert config.train.seq_len <= config.sample.max_tokens
    assert config.train.batch_size % 4 == 0
    assert config.score.tasks
    assert config.score.texts
    files, names = split_names(config.score.tasks)
    if path.stem == "stories260k":
        assert all("/data/" in file for file in (*files, *config.score.texts))
        assert not names
    else:  # nothing but the hub and lm-evaluation-harness
        assert not files
        assert set(names) <= {*SUITES["pythia"]}
        assert all(hub.parse_dataset_split(text) for text in config.score.texts)


@pytest.mark.parametrize("size", PYTHIA)
def test_a_pythia_trains_at_its_own_final_rate_and_divides_as_hinted(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = FOLDER / f"pythia-{size}.yaml"
    config, text = load(path, monkeypatch), path.read_text()
    layers, width, heads, vocabulary, rate = PYTHIA[size]
    assert config.model == f"EleutherAI/pythia-{size}"
    assert config.train.learning_rate == rate
    assert f"(L {layers}, D {width})" in text
    assert max(config.sample.max_tokens, config.train.seq_len) <= 2048
    assert config.dtype == ("float32" if size.endswith("m") else "bfloat16")
    raw = {
        "model_type": "gpt_neox",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
    }
    hint = re.search(r"^# mesh: data=(\d+),model=(\d+)$", text, re.MULTILINE)
    data, model = map(int, hint.groups()) if hint else (1, 1)
    axes = (jax.sharding.AxisType.Explicit,) * 2
    # Rules and sizes need no devices, so that a pod's mesh can be checked here.
    mesh = cast(jax.sharding.Mesh, jax.sharding.AbstractMesh((data, model), ("data", "model"), axis_types=axes))
    for preset in {config.sample.preset, config.train.preset, config.score.preset}:
        make_sharding_rules(preset, mesh, axis_sizes(parse_config(raw, "config.json")))
    assert config.train.batch_size % data == 0


def test_the_stories_run_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(FOLDER / "stories260k.yaml", monkeypatch)
    assert (config.sample.samples, config.sample.max_tokens, config.sample.stop_ids) == (2048, 256, (1, 2))
    assert (config.score.text_limit, config.score.text_max_tokens) == (400, 320)
    assert sum(task.startswith("blimp:") for task in config.score.tasks) == 8
    assert config.extract.sequences == "/data/tinystories/train.jsonl"


NEEDS_DATA = sorted(path for path in (*CONFIGS, *STUDIES) if "${" in path.read_text())


def test_pythia_and_the_paper_need_no_data_folder() -> None:
    assert not [path.stem for path in NEEDS_DATA if "stories260k" not in path.stem and "smollm2" not in path.stem]


@pytest.mark.parametrize("path", NEEDS_DATA, ids=lambda path: path.stem)
def test_an_unset_data_folder_is_named_with_its_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_SELFTRAIN_DATA", raising=False)
    monkeypatch.setenv("CANARIES", "/canaries")
    with pytest.raises(InputError, match="JAX_SELFTRAIN_DATA is not set; export it first \\(a folder with ") as error:
        yaml_io.load(RunConfig if path in CONFIGS else StudyConfig, path)
    files = set(re.findall(r"\$\{JAX_SELFTRAIN_DATA\}/([\w./-]+)", path.read_text()))
    assert files
    named = re.sub(r"blimp/\w+", "blimp/*", " ".join(sorted(files)))
    assert {file for file in named.split() if file not in str(error.value)} == set()
