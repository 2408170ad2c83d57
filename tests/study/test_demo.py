"""The demo in small: a world is written, a model learns it, one round is run on it; again: nothing is done twice."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from jax_selftrain import storage
from jax_selftrain.config import DemoConfig, ImportConfig
from jax_selftrain.corpus import import_text
from jax_selftrain.errors import InputError
from jax_selftrain.hub import load_tokenizer, read_config
from jax_selftrain.study import demo
from jax_selftrain.study.demo import DemoScale, write_world
from jax_selftrain.study.world import WorldConfig

TINY = DemoScale(
    world=WorldConfig(
        people=14,
        probe_copies=(1, 2, 8),
        probes_per_level=4,
        agreement_lines=400,
        sum_lines=400,
        items_per_task=40,
        heldout_documents=20,
    ),
    vocabulary=400,
    width=32,
    layers=1,
    heads=2,
    passes=1,
    samples=32,
    mesh="data=1",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    assert demo(DemoConfig(out=str(out), seed=0), TINY) == out / "report.html"
    return out


def test_a_demo_ends_with_a_report(made: Path) -> None:
    results = storage.read_json(made / "results.json")
    assert [task["name"] for task in results["tasks"]] == ["facts", "agreement", "sums"]
    groups = [group["name"] for group in results["extraction"]["groups"]]
    assert groups == ["shown 1×", "shown 2×", "shown 8×", "never shown"]
    assert results["base"]["family"] == "gpt_neox"
    assert "A model of a little world" in (made / "report.html").read_text(encoding="utf-8")


def test_the_base_learnt_something_from_the_text(made: Path) -> None:
    losses = [json.loads(line)["loss"] for line in (made / "little-pythia" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.5


def test_a_second_start_finds_everything_done(made: Path) -> None:
    work = (
        "reading/*.parquet",
        "little-pythia/model/**/*",
        "corpus/*.parquet",
        "train/model/**/*",
        "score/*",
        "extract/*",
    )
    written = {path: path.stat().st_mtime_ns for pattern in ("world/**/*", *work) for path in made.glob(pattern)}
    page = (made / "report.html").read_bytes()
    demo(DemoConfig(out=str(made), seed=0), TINY)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert (made / "report.html").read_bytes() == page


def test_another_seed_needs_another_folder(made: Path) -> None:
    with pytest.raises(InputError, match="another demo"):
        demo(DemoConfig(out=str(made), seed=1), TINY)


def test_a_folder_that_is_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    with pytest.raises(InputError, match="no world of a demo"):
        demo(DemoConfig(out=str(tmp_path)), TINY)


def test_the_extraction_set_stands_in_the_tokens_as_often_as_it_says(made: Path) -> None:
    corpus = import_text(
        ImportConfig(
            source=str(made / "world" / "documents.jsonl"),
            model=str(made / "world" / "blank"),
            out=str(made / "reading"),
        )
    )
    length = TINY.prefix + TINY.suffix
    counts: Counter[tuple[int, ...]] = Counter()
    for document in corpus.documents():
        tokens = (corpus.start_id, *document.tokens.tolist())
        counts.update(tokens[i : i + length] for i in range(len(tokens) - length + 1))
    lines = (made / "world" / "probes.jsonl").read_text(encoding="utf-8").splitlines()
    found = [(counts[tuple(row["tokens"])], row["group"]) for row in map(json.loads, lines)]
    assert all(group == (f"shown {count}×" if count else "never shown") for count, group in found)
    assert Counter(group for _, group in found)["never shown"] == len(found) / 2


def test_the_blank_model_is_a_pythia_in_small(made: Path) -> None:
    config, raw = read_config(made / "little-pythia")
    tokenizer = load_tokenizer(made / "little-pythia")
    assert raw["model_type"] == "gpt_neox"
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (1, 32, len(tokenizer))
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == raw["bos_token_id"] == 0
    assert tokenizer.decode(tokenizer.encode("Mira works: 12 + 7 = 19.")) == "Mira works: 12 + 7 = 19."
    digits = tokenizer.tokenize("27 + 305")
    assert [token for token in digits if token.strip("Ġ+")] == ["2", "7", "3", "0", "5"]


def test_the_same_seed_writes_the_same_world(made: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "world", replace(TINY, world=replace(TINY.world, seed=0)))
    assert storage.hash_folder(tmp_path / "world") == storage.hash_folder(made / "world")
