"""Table of items: expected rows, dev/test split, refusal of damaged results."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_factory import write_jsonl
from models_factory import tiny_texts

from jax_selftrain.config import ScoreConfig
from jax_selftrain.errors import InputError
from jax_selftrain.evals import load_tasks, load_texts, score
from jax_selftrain.evals.item_results import (
    ITEMS,
    REQUESTS,
    dev_test_split,
    item_hash,
    load_score_result,
    tabulate_items,
)
from jax_selftrain.io import json_files
from jax_selftrain.io.tables import load_table, write_table


def requests(*rows: tuple) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, REQUESTS, strict=True)], schema=REQUESTS)


def test_items_have_the_expected_rows(tmp_path):
    choices = [
        {"context": "The sky is", "choices": [" blue", " a fish tank"], "answer": 0, "cluster": "sky"},
        {"context": "Ravens are", "choices": [" né", " black", " x"], "answer": 1, "cluster": None},
    ]
    words = [{"context": "Once upon a", "continuation": " time"}]
    tasks = load_tasks([write_jsonl(tmp_path / "choices.jsonl", choices), write_jsonl(tmp_path / "words.jsonl", words)])
    texts = load_texts([write_jsonl(tmp_path / "stories.jsonl", [{"text": "Once, a féline."}, {"text": "end"}])])
    table = tabulate_items(
        [*tasks, *texts],
        {"stories": ["Once, a fé", "end"]},  # the first is truncated
        requests(
            ("choices", 0, 0, -3.0, False, 1),
            ("choices", 0, 1, -4.8, False, 4),  # better per character than the right choice, worse in sum
            ("choices", 1, 0, -1.0, True, 2),
            ("choices", 1, 1, -1.8, False, 3),
            ("choices", 1, 2, -9.0, False, 1),
            ("words", 0, 0, -0.5, True, 2),
            ("stories", 0, 0, -4.0, False, 2),
            ("stories", 0, 1, -2.5, False, 1),  # the second window of one text
            ("stories", 1, 0, -7.0, False, 1),
        ),
    )
    assert table.schema.equals(ITEMS)
    assert table.select([name for name in ITEMS.names if name not in ("item_hash", "log_odds")]).to_pylist() == [
        dict(zip([n for n in ITEMS.names if n not in ("item_hash", "log_odds")], row, strict=True))
        for row in [
            ("choices", 0, "sky", 2, True, False, -3.0, 1, 5),
            ("choices", 1, None, 3, False, True, -1.8, 3, 6),
            ("words", 0, None, 1, True, None, -0.5, 2, 5),
            ("stories", 0, None, 0, None, None, -6.5, 3, 11),
            ("stories", 1, None, 0, None, None, -7.0, 1, 3),
        ]
    ]
    log_odds = table["log_odds"].to_pylist()
    assert log_odds[:2] == [
        pytest.approx(-3.0 + 4.8),
        pytest.approx(np.log(np.exp(-1.8) / (np.exp(-1.0) + np.exp(-9.0)))),
    ]
    assert log_odds[2:] == [None, None, None]
    assert table["item_hash"].to_pylist() == [
        item_hash("The sky is", [" blue", " a fish tank"]),
        item_hash("Ravens are", [" né", " black", " x"]),
        item_hash("Once upon a", [" time"]),
        item_hash("", ["Once, a féline."]),
        item_hash("", ["end"]),
    ]


def test_the_split_depends_on_content_only_and_is_thirty_to_seventy():
    items = [item_hash(f"question {i}", [" yes", " no"]) for i in range(20_000)]
    halves = [dev_test_split(item) for item in items]
    share = halves.count("dev") / len(halves)
    assert abs(share - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 20_000)
    assert set(halves) == {"dev", "test"}
    assert [dev_test_split(item) for item in reversed(items)] == halves[::-1]
    # A changed split would put dev items into the test split.
    assert [dev_test_split(item_hash(f"question {i}", [" yes", " no"])) for i in range(8)] == FROZEN
    assert item_hash("a", ["b", "c"]) != item_hash("a", ["c", "b"]) != item_hash("ab", ["", "c"])


FROZEN = ["test", "dev", "test", "dev", "dev", "dev", "test", "test"]


def test_a_cluster_must_be_a_text(tmp_path):
    file = write_jsonl(tmp_path / "t.jsonl", [{"context": "a", "choices": [" b", " c"], "answer": 0, "cluster": 3}])
    with pytest.raises(InputError, match=r"t\.jsonl:1: the cluster must be a text or null, not 3"):
        load_tasks([file])


@pytest.fixture(scope="module")
def result_file(tmp_path_factory, tiny_model):
    """`FILE.json` of a scored model."""
    folder = tmp_path_factory.mktemp("scored")
    stories = list(tiny_texts(12, seed=3))
    task = write_jsonl(
        folder / "task.jsonl",
        [
            {"context": s[:40], "choices": [s[40:60], " red lamp"], "answer": 0, "cluster": f"c{i % 3}" if i else None}
            for i, s in enumerate(stories)
        ],
    )
    words = write_jsonl(folder / "a_word.jsonl", [{"context": s[:40], "continuation": s[40:50]} for s in stories])
    texts = write_jsonl(folder / "stories.jsonl", [{"text": s} for s in stories])
    out = str(folder / "result.json")
    options = {"tasks": (task, words), "texts": (texts,), "out": out}
    score(ScoreConfig(str(tiny_model()), **options, batch_tokens=2048, mesh="data=1"))
    return Path(out)


def test_loaded_items_reproduce_the_metrics(result_file):
    found = load_score_result(str(result_file))
    assert list(found.items) == ["task", "a_word", "stories"]
    task, words, stories = found.items.values()
    result = json_files.read_json(result_file)
    assert (task.kind, words.kind, stories.kind) == ("choice", "last_word", "text")
    assert task.acc.mean() == pytest.approx(result["tasks"]["task"]["acc"])
    assert task.acc_norm.mean() == pytest.approx(result["tasks"]["task"]["acc_norm"])
    assert task.chance_accuracy == result["tasks"]["task"]["chance"] == 0.5
    assert words.acc.mean() == pytest.approx(result["tasks"]["a_word"]["acc"])
    assert np.exp(-words.loglikelihood.mean()) == pytest.approx(result["tasks"]["a_word"]["perplexity"])
    assert -stories.loglikelihood.sum() / stories.tokens.sum() == pytest.approx(result["texts"]["stories"]["nll"])
    assert stories.bytes.sum() == result["texts"]["stories"]["bytes"]
    assert words.cluster is None
    assert len(set(task.cluster)) == 4  # three labels, and one item without a label
    dev, test = (task.select(half) for half in ("dev", "test"))
    assert sorted([*dev.item_hash, *test.item_hash]) == sorted(task.item_hash)
    assert {dev_test_split(item) for item in test.item_hash} == {"test"}
    assert dev.count == dev.acc.size == dev.log_odds.size == dev.cluster.size


def rewrite(path: Path, **marks: object) -> None:
    result = json_files.read_json(path)
    result["fingerprints"] |= marks
    json_files.write_json(path, result)


def replace_json(folder: Path) -> None:
    (folder / "result.json").write_text('{"model": "m"}')


def delete(folder: Path) -> None:
    (folder / "result.items.parquet").unlink()


def truncate(folder: Path) -> None:
    file = folder / "result.items.parquet"
    file.write_bytes(file.read_bytes()[:-100])


def exchange(folder: Path) -> None:
    """Replace the items by others, in a whole file."""
    path = folder / "result.items.parquet"
    write_table(path, load_table(path, remedy="").slice(1))


def change(folder: Path) -> None:
    file = folder / "result.items.parquet"
    table = pq.read_table(file)
    right = pa.array([None if value is None else True for value in table["acc"].to_pylist()])
    pq.write_table(table.set_column(5, "acc", right), file)


def make_older(folder: Path) -> None:
    rewrite(folder / "result.json", items=None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replace_json, r"result\.json: is not a result of `jax-selftrain score`"),
        (delete, r"result\.items\.parquet is missing; score the model again"),
        (truncate, r"result\.items\.parquet: cannot be read"),
        (change, r"result\.items\.parquet: the file is damaged: it does not match its checksum"),
        (exchange, r"result\.items\.parquet: does not match result\.json"),
        (make_older, "was written by an older version"),
    ],
)
def test_damage_is_named(result_file, tmp_path, damage, message):
    folder = Path(shutil.copytree(result_file.parent, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_score_result(str(folder / "result.json"))
