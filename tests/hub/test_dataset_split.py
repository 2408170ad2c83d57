"""Texts from data sets of the Hugging Face hub, over a server on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_factory import write_jsonl
from hub_server import HubServer, run_online
from models_factory import tiny_texts

from jax_selftrain import hub
from jax_selftrain.config import (
    ArmConfig,
    ExtractConfig,
    ImportCorpusConfig,
    LeakageConfig,
    ModelConfig,
    RunConfig,
    ScoreConfig,
    StudyConfig,
)
from jax_selftrain.corpus import import_text
from jax_selftrain.errors import InputError
from jax_selftrain.evals import load_texts, measure_leakage, score
from jax_selftrain.hub.dataset_split import _download_file
from jax_selftrain.study import run_study
from jax_selftrain.study.design import make_design
from jax_selftrain.study.input_hashes import InputHashes

TEXTS = list(tiny_texts(12))
STORIES = "org/stories:validation"


def write_split(folder: Path, name: str, texts: list[str], shards: int = 1) -> Path:
    """Write the shards of a split as the hub names them."""
    folder.mkdir(parents=True, exist_ok=True)
    size = len(texts) // shards
    for n in range(shards):
        part = texts[n * size : (n + 1) * size]
        pq.write_table(pa.table({"text": part}), folder / f"{name}-{n:05d}-of-{shards:05d}-abc{n}.parquet")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> HubServer:
    """Stories in three shards; an edited card and an edited story; a data set with two configurations."""
    server, folder = HubServer(), tmp_path_factory.mktemp("repos")
    stories = write_split(folder / "stories/data", "validation", TEXTS, 3).parent
    write_split(stories / "data", "train", TEXTS[:2])
    server.add_folder("org/stories", "main", stories)
    (stories / "README.md").write_text("A card.")
    server.add_folder("org/stories", "card", stories)
    write_split(stories / "data", "validation", [*TEXTS[:-1], "another story"], 3)
    server.add_folder("org/stories", "edited", stories)
    for name in ("large", "small"):
        write_split(folder / "wiki" / name, "test", TEXTS[:2] if name == "small" else TEXTS)
    server.add_folder("org/wiki", "main", folder / "wiki")
    return server


@pytest.fixture
def offline(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`offline(CODE)`: run code with the server as hub, then read its cache without the server."""

    cache = tmp_path / "home" / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    _download_file.cache_clear()

    def fill(code: str) -> Path:
        with server.serve():
            finished = run_online(code, server, cache)
        assert finished.returncode == 0, finished.stderr
        _download_file.cache_clear()
        return cache

    return fill


def download(*references: str) -> str:
    return f"from jax_selftrain import hub\nfor one in {references}: [*hub.text_files(one)]"


def test_a_limit_downloads_the_files_that_have_its_rows(offline: Callable[[str], Path], tiny_model, tmp_path: Path):
    out = tmp_path / "score.json"
    words = ["score", "--model", str(tiny_model()), "--texts", STORIES, "org/wiki/small:test", "--text-limit", "6"]
    cache = offline(f"from jax_selftrain.cli import main\nassert main({[*words, '--out', str(out)]}) == 0")
    shards = sorted(path.name for path in cache.glob("datasets--org--stories/snapshots/*/data/*"))
    assert shards == [f"validation-0000{n}-of-00003-abc{n}.parquet" for n in range(2)]
    found = json.loads(out.read_text())
    assert {name: entry["n"] for name, entry in found["texts"].items()} == {"stories-validation": 6, "small-test": 2}
    local = write_jsonl(tmp_path / "local.jsonl", [{"text": text} for text in TEXTS])
    options = ScoreConfig(model=str(tiny_model()), texts=(local,), text_limit=6, out=str(tmp_path / "local.json"))
    assert score(options)["texts"]["local"] == found["texts"]["stories-validation"]
    (one,) = load_texts([STORIES], 3)  # from the cache
    assert one.documents == TEXTS[:3]
    assert one.fingerprint == hub.hash_files(tuple(hub.text_files(STORIES, 4)))
    with pytest.raises(InputError, match="org/stories:validation: ") as error:  # the third file is not in the cache
        load_texts([STORIES])
    assert "hf download org/stories --repo-type dataset" in str(error.value)


def test_fingerprints_are_of_the_content(offline: Callable[[str], Path]):
    references = [STORIES, "org/stories@card:validation", "org/stories@edited:validation"]
    offline(download(*references))
    whole = [hub.hash_files(tuple(hub.text_files(one))) for one in references]
    assert whole[0] == whole[1] != whole[2]
    first = [InputHashes().texts(one, 4) for one in references]  # the edited story is in the third file
    assert len({*first, *whole}) == 3


def test_corpora_and_leakage_read_a_split(offline: Callable[[str], Path], tiny_model, tmp_path: Path):
    offline(download(STORIES))
    model, local = str(tiny_model()), write_jsonl(tmp_path / "local.jsonl", [{"text": text} for text in TEXTS])
    corpora = {
        name: import_text(ImportCorpusConfig(source=source, model=model, out=str(tmp_path / name), limit=10))
        for name, source in {"hub": STORIES, "file": local}.items()
    }
    assert [*corpora["hub"].iter_texts()] == [*corpora["file"].iter_texts()] == TEXTS[:10]
    found = measure_leakage(
        LeakageConfig(corpus=str(tmp_path / "hub"), texts=STORIES, out=str(tmp_path / "l.json"), tokenizer=model)
    )
    assert found["texts"]["documents"] == 12


def test_references_that_fit_nothing_are_named(offline: Callable[[str], Path], tmp_path: Path):
    cache = offline(download(STORIES, "org/wiki/small:test", "org/wiki/large:test"))
    with pytest.raises(InputError, match=r"org/wiki:test: has this split in the folders large, small; choose one, as "):
        load_texts(["org/wiki:test"])
    with pytest.raises(InputError, match="org/stories:tests: has no file tests-00000-of-"):
        load_texts(["org/stories:tests"])
    with pytest.raises(InputError, match="its cache has no copy") as error:
        load_texts(["org/gone:test"])
    assert "`hf download org/gone --repo-type dataset`" in str(error.value)
    assert str(cache / "datasets--org--gone") in str(error.value)
    (tmp_path / "org").mkdir()
    for local in ("texts.jsonl", "a/b.jsonl:test", f"{tmp_path}/org:test"):
        assert [*hub.text_files(local)] == [Path(local)]


@pytest.fixture
def config(options: Callable[..., RunConfig], tiny_model, tmp_path: Path) -> StudyConfig:
    small = options(Path("unused"))
    return StudyConfig(
        out=str(tmp_path / "out"),
        models=(ModelConfig("llama", str(tiny_model("llama")), damage_text="stories-validation"),),
        seeds=(100,),
        mesh="data=1",
        sample=replace(small.sample, seed=0),
        train=replace(small.train, steps=1, checkpoint_every=1, seed=0, eval_texts=(STORIES,), eval_every=1),
        score=ScoreConfig(texts=(STORIES,), text_limit=4),
        extract=ExtractConfig(),
        arms=(ArmConfig("real text", "text", text=STORIES), ArmConfig("noise", "noise", match_damage=True)),
    )


def test_a_study_is_planned_without_the_hub_and_run_with_it(
    offline: Callable[[str], Path], config: StudyConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    run_study(replace(config, dry_run=True))
    assert "3 cells" in capsys.readouterr().out
    with pytest.raises(InputError, match="org/stories:validation: no such local folder, and the download"):
        run_study(config)
    assert not (tmp_path / "out").exists()
    offline(download(STORIES, "org/stories@edited:validation"))
    out = run_study(config)
    assert "stories-validation" in json.dumps(json.loads((out / "results.json").read_text())["cells"][0])
    changed = replace(config, arms=(ArmConfig("real text", "text", text="org/stories@edited:validation"),))
    keys = [{s.key for s in make_design(c).ordered_stages if s.command == "import"} for c in (config, changed)]
    assert not keys[0] & keys[1]
