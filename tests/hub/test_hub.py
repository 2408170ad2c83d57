"""Models from the cache of the Hugging Face hub, and uploads to it, over a server on loopback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_factory import write_jsonl
from hub_server import HubServer, run_online
from model_params import load_tensors
from models_factory import tiny_texts, write_tiny_hf_model
from safetensors.numpy import save_file

from jax_selftrain import hub
from jax_selftrain.config import ModelConfig, RunConfig, ScoreConfig, StudyConfig
from jax_selftrain.corpus import open_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.evals import score
from jax_selftrain.hub.model_ref import _download, _download_weights
from jax_selftrain.io import json_files
from jax_selftrain.report import write_report
from jax_selftrain.study import run_study

CARD = "---\nlicense: apache-2.0\n---\nA model.\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> HubServer:
    """One model with two revisions and a pull request; another without weights."""
    server, folder = HubServer(), tmp_path_factory.mktemp("repos")
    for seed, revision in enumerate(("main", "step1000", "refs/pr/1")):
        model = write_tiny_hf_model(folder / str(seed), "llama", seed=seed)
        (model / "README.md").write_text(CARD)
        server.add_folder("org/tiny", revision, model)
    (model / "model.safetensors").unlink()
    server.add_folder("org/empty", "main", model)
    return server


@pytest.fixture(scope="module")
def cache(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of huggingface_hub after a download of all revisions."""
    folder = tmp_path_factory.mktemp("home") / "hub"
    refs = ["org/tiny", "org/tiny@step1000", "org/tiny@refs/pr/1", "org/empty"]
    with server.serve():
        code = f"from jax_selftrain import hub\nfor ref in {refs}: hub.open_model(ref).has_weights"
        finished = run_online(code, server, folder)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    _download.cache_clear()
    _download_weights.cache_clear()
    return cache


def test_each_revision_is_its_own_model_with_its_commit(offline: Path, server: HubServer):
    found = {revision: hub.open_model(f"org/tiny@{revision}") for revision in ("main", "step1000", "refs/pr/1")}
    assert hub.open_model("org/tiny").fingerprint == found["main"].fingerprint
    assert len({model.fingerprint for model in found.values()}) == 3
    for revision, model in found.items():
        commit, _ = server.find("org/tiny", revision) or ("", {})
        assert model.commit == commit
        assert model.license == "apache-2.0"
        assert (model.folder / "model.safetensors").is_symlink()
    assert hub.open_model(f"org/tiny@{found['step1000'].commit}").fingerprint == found["step1000"].fingerprint


def test_weights_are_downloaded_when_they_are_used(server: HubServer, tmp_path: Path):
    """`import` and `plan` read config and tokenizer; the index names the weights, whatever their names."""
    model, cache = write_tiny_hf_model(tmp_path / "model", "llama"), tmp_path / "home" / "hub"
    tensors = load_tensors(model)
    (model / "model.safetensors").unlink()
    halves = {"part.a.safetensors": sorted(tensors)[::2], "b-weights.safetensors": sorted(tensors)[1::2]}
    for name, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, model / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, keys in halves.items() for key in keys}}
    json_files.write_json(model / "model.safetensors.index.json", index, checksum=False)
    server.add_folder("org/sharded", "main", model)
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in tiny_texts(5)])

    commands = (
        ["plan", "--model", "org/sharded", "--topology", "h100:8", "--stage", "sample"],
        ["import", "--source", texts, "--model", "org/sharded", "--out", str(tmp_path / "corpus")],
        ["score", "--model", "org/sharded", "--texts", texts, "--out", str(tmp_path / "score.json")],
    )
    code = (
        f"import json, pathlib, sys\nfrom jax_selftrain.cli import main\nfor words in {commands}:\n"
        "    assert main(words) == 0\n"
        f"    found = pathlib.Path({str(cache)!r}).glob('models--org--sharded/snapshots/*/*')\n"
        "    print(json.dumps([path.name for path in found]), file=sys.stderr)"
    )
    with server.serve():
        finished = run_online(code, server, cache)
    assert finished.returncode == 0, finished.stderr
    *_, planned, imported, scored = (set(json.loads(line)) for line in finished.stderr.splitlines() if line[:1] == "[")
    assert planned == imported == scored - {"model.safetensors.index.json", *halves}
    assert not any("safetensors" in name for name in planned)
    local = score(ScoreConfig(model=str(model), texts=(texts,), out=str(tmp_path / "local.json")))
    assert json_files.read_json(tmp_path / "score.json")["texts"] == local["texts"]


def test_a_model_with_a_manifest_is_loaded_from_the_hub(server: HubServer, finished_run: Path, tmp_path: Path):
    """As `push` uploads it: the weights, which the manifest lists, are downloaded before they are verified."""
    model = finished_run / "model"
    server.add_folder("org/pushed", "main", model)
    code = (
        "from jax_selftrain import hub\n"
        "print(sum(leaf.size for leaf in __import__('jax').tree.leaves(hub.load_model('org/pushed', 'data=1').params)))"
    )
    with server.serve():
        finished = run_online(code, server, tmp_path / "home" / "hub")
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) == sum(tensor.size for tensor in load_tensors(model).values())


def test_extraction_sets_are_read_from_the_hub(server: HubServer, tmp_path: Path):
    """As EleutherAI/pythia-memorized-evals: a split for each model, in `data`."""
    rows = np.random.default_rng(0).integers(3, 512, (20, 64))
    for split, part in (("duped.70m", rows[:12]), ("duped.1.4b", rows[12:])):
        (tmp_path / "repo" / "data").mkdir(parents=True, exist_ok=True)
        table = pa.table({"index": np.arange(len(part)), "tokens": part.tolist()})
        pq.write_table(table, tmp_path / "repo" / "data" / f"{split}-00000-of-00001-abc.parquet")
    server.add_folder("org/memorized", "main", tmp_path / "repo")
    code = (
        "from jax_selftrain.evals.sequences import *\n"
        "import sys\n"
        "def load(name):\n"
        "    return load_sequences(name, PromptWindow(32, 32), vocab_size=512, tokenizer=None)\n"
        "for name in ('org/memorized:duped.1.4b', 'org/memorized@main:duped.70m', 'org/memorized', 'org/gone:a'):\n"
        "    try:\n"
        "        print(load(name).tokens.sum(), len(sequences_fingerprint(name)))\n"
        "    except InputError as error:\n"
        "        print(error)\n"
    )
    with server.serve():
        finished = run_online(code, server, tmp_path / "home" / "hub")
    assert finished.returncode == 0, finished.stderr
    first, second, whole, gone = finished.stdout.splitlines()
    assert (first, second) == (f"{rows[12:].sum()} 64", f"{rows[:12].sum()} 64")
    assert whole == "org/memorized: no such file or folder"  # the hub needs a split
    assert gone.startswith("org/gone:a: no such local folder, and the download from the Hugging Face hub failed")


def test_a_revision_that_is_not_in_the_cache_is_one_error_sentence(offline: Path):
    with pytest.raises(InputError, match="org/tiny@step2000: no such local folder, and the download"):
        hub.open_model("org/tiny@step2000")


def test_a_revision_without_weights_is_named(offline: Path):
    model = hub.open_model("org/empty")
    assert not model.has_weights
    with pytest.raises(InputError, match=r"org--empty.*holds no weights"):
        hub.load_model("org/empty", "data=1")


def test_a_study_over_revisions_runs_offline(offline: Path, options: Callable[..., RunConfig], tmp_path: Path):
    small = options(Path("unused"))
    config = StudyConfig(
        out=str(tmp_path / "out"),
        models=(ModelConfig("tiny", "org/tiny", revisions=("step1000", "main")),),
        mesh="data=1",
        sample=replace(small.sample, samples=8, seed=0),
        train=replace(small.train, steps=1, checkpoint_every=1, seed=0, max_epochs=9.0),
        score=replace(small.score, texts=()),
    )
    folder = run_study(config)
    cards = [path.read_text() for path in folder.glob("stages/train-*/model/README.md")]
    assert len(cards) == 4
    assert all("base_model: org/tiny\n" in card and "license: apache-2.0\n" in card for card in cards)
    results = json_files.read_json(folder / "results.json")
    models = results["design"]["models"]
    assert {entry["name"]: len(entry["commit"]) for entry in models} == {"tiny@step1000": 40, "tiny@main": 40}
    assert len(results["cells"]) == 4


PUSH = """
import json, sys
from jax_selftrain.io import json_files
from jax_selftrain.cli import main
sys.exit(main(json.loads({arguments!r})))
"""


def push(server: HubServer, cache: Path, *arguments: object, **environment: str) -> tuple[int, str, str]:
    code = PUSH.format(arguments=json.dumps(["push", *map(str, arguments)]))
    with server.serve():
        finished = run_online(code, server, cache, **environment)
    return finished.returncode, finished.stdout, finished.stderr


def test_a_run_is_uploaded_with_its_measured_changes(
    server: HubServer, cache: Path, finished_run: Path, tmp_path: Path
):
    code, out, err = push(server, cache, finished_run, "me/student", "--revision", "v2", HF_TOKEN="hf_secret")
    assert code == 0, err
    assert "/me/student/commit/" in out
    files = server.repos["me/student"]["v2"]
    model = finished_run / "model"
    assert files.keys() == {path.name for path in model.iterdir()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    card = files["README.md"].decode()
    results = json_files.read_json(finished_run / "results.json")
    assert all(f"| {name} | " in card for name in results["cells"][0]["measures"])
    assert hub.open_model(tmp_path).fingerprint == hub.open_model(model).fingerprint
    hub.open_model(tmp_path).verify_weights()
    assert set(server.tokens) == {"hf_secret"}


def test_a_corpus_is_uploaded_as_a_data_set(server: HubServer, cache: Path, finished_run: Path, tmp_path: Path):
    folder = next(path for path in (finished_run / "stages").glob("sample-*") if path.is_dir())
    code, _, err = push(server, cache, folder, "me/texts", HF_TOKEN="hf_secret")
    assert code == 0, err
    for name, content in server.repos["me/texts"]["main"].items():
        path = tmp_path / "again" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert list(open_corpus(tmp_path / "again").iter_texts()) == list(open_corpus(folder).iter_texts())
    assert "data_files: shard-*.parquet" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        pytest.param({}, "there is no token", id="no token"),
        pytest.param(
            {"HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "1"},
            "HF_HUB_OFFLINE is set",
            id="offline",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_nothing_is_uploaded_without_a_token_or_offline(
    environment: dict[str, str], message: str, server: HubServer, cache: Path, tiny_model: Callable[..., Path]
):
    before = json.dumps(sorted(server.repos))
    code, _, err = push(server, cache, tiny_model("llama"), "me/none", **environment)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert json.dumps(sorted(server.repos)) == before


def test_a_damaged_model_is_not_uploaded(server: HubServer, cache: Path, finished_run: Path, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(finished_run / "model", model)
    weights: Any = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = push(server, cache, model, "me/damaged", HF_TOKEN="hf_x")
    assert (code, err.count("\n")) == (2, 1)
    assert "me/damaged" not in server.repos


def test_results_without_the_model_of_a_cell_make_a_card_without_changes(finished_run: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    results = json_files.read_json(folder / "results.json")
    for cell in results["cells"]:
        del cell["model"]
    json_files.write_json(folder / "results.json", results)
    write_report(folder)
    assert "Measured changes" not in (folder / "model" / "README.md").read_text()
    assert "Measured changes" in (finished_run / "model" / "README.md").read_text()
