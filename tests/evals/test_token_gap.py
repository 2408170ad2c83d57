"""Token classes, differences and their errors on hand-made records."""

from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
from records_factory import write_records

from jax_selftrain.config import TokenGapConfig
from jax_selftrain.errors import InputError
from jax_selftrain.evals import measure_token_gap
from jax_selftrain.evals.token_gap import TOKEN_CLASSES, classify_tokens
from jax_selftrain.io import json_files

STORY = (
    *("Tom", " met", " An", "na", " and", " 3", "rd", " dogs", ".", " She", " said", ",", ' "', "Come", ",", " Tom"),
    *(
        "!",
        '"',
        "\n",
        "Then",
        " I",
        "'",
        "m",
        " off",
        ",",
        " said",
        " d'",
        "Ar",
        "c",
        " ",
        "\ufffd",
        "\ufffd",
        " zebra",
    ),
)
COMMON = (" met and dogs she said come then off i'm tom anna",) * 2


@pytest.fixture
def options(tmp_path):
    return partial(TokenGapConfig, out=str(tmp_path / "g.json"))


def test_each_token_has_the_class_of_its_word():
    found = classify_tokens([STORY, COMMON], rare_count=3)[0]
    classes = [(piece, TOKEN_CLASSES[label]) for piece, label in zip(STORY, found.tolist(), strict=True)]
    expected = {
        " An": "name", "na": "name", " Tom": "name", " 3": "number", "rd": "number", " zebra": "rare_word",
        "\ufffd": "rare_word", " d'": "rare_word", "Ar": "rare_word", "c": "rare_word",
    }  # fmt: skip
    blank = {".", ",", ' "', "!", '"', "\n", "'", " "}
    for i, (piece, label) in enumerate(classes):
        if piece == "'":  # within a word, but without a letter
            assert label == "whitespace_punctuation"
        elif piece in blank:
            assert label == "whitespace_punctuation", (i, piece)
        else:
            assert label == expected.get(piece, "other"), (i, piece)
    assert TOKEN_CLASSES[classify_tokens([[" zebra"] * 3], 3)[0][0]] == "other"
    assert TOKEN_CLASSES[classify_tokens([[" zebra"] * 2, ["Zebra"]], 3)[0][0]] == "other"  # without regard to case


def test_differences_and_errors_by_document(tmp_path, options):
    rng = np.random.default_rng(0)
    documents = [["Ann", " saw", " 12", " birds", "."][: 3 + i % 3] for i in range(8)]
    before = [-rng.random(len(one)) for one in documents]
    after = [values - rng.random(len(values)) for values in before]
    sets = [{"a": [], "b": []}, {"a": [], "b": []}]
    for side, rows in zip(sets, (before, after), strict=True):
        for i, (pieces, values) in enumerate(zip(documents, rows, strict=True)):
            side["a" if i < 5 else "b"].append({"pieces": pieces, "logprob": values.astype(np.float32)})
    files = [str(write_records(tmp_path / f"{i}.parquet", side, str(i))) for i, side in enumerate(sets)]
    result = measure_token_gap(options(base=files[0], student=files[1], top=4))
    assert json_files.read_json(tmp_path / "g.json") == result
    assert result["fingerprints"]["student_model"] == "1"
    for name, members in (("a", range(5)), ("b", range(5, 8))):
        found = result["sets"][name]
        gaps = [(after[i] - before[i]).astype(float) for i in members]
        numbers = [gap[2] for gap in gaps]  # one in each document: the error of a plain mean
        assert found["number"]["difference"] == pytest.approx(np.mean(numbers), abs=1e-6)
        error = np.std(numbers, ddof=1) / np.sqrt(len(numbers))
        assert found["number"]["difference_stderr"] == pytest.approx(error, abs=1e-6)
        total = found["total"]
        sizes, sums = np.array([len(gap) for gap in gaps]), np.array([gap.sum() for gap in gaps])
        ratio, n = sums.sum() / sizes.sum(), len(gaps)
        error = np.sqrt(n / (n - 1) * np.sum((sums - ratio * sizes) ** 2)) / sizes.sum()
        assert (total["tokens"], total["documents"]) == (sizes.sum(), n)
        assert total["difference"] == pytest.approx(ratio, abs=1e-6)
        assert total["difference_stderr"] == pytest.approx(error, abs=1e-6)
        assert total["student"] - total["base"] == pytest.approx(ratio, abs=1e-6)
        assert sum(part["tokens"] for key, part in found.items() if key != "total") == total["tokens"]
    assert "rare_word" not in result["sets"]["a"]  # each word occurs five times or more
    worst = sorted(
        (float(gap), i, j) for i, (a, b) in enumerate(zip(after, before, strict=True)) for j, gap in enumerate(a - b)
    )
    top = pq.read_table(tmp_path / "g.top_tokens.parquet").to_pylist()
    assert len(top) == 4
    for row, (gap, i, j) in zip(top, worst, strict=False):
        assert (row["set"], row["document"], row["position"]) == ("a" if i < 5 else "b", i % 5, j)
        assert row["difference"] == pytest.approx(gap, abs=1e-6)
        assert (row["context"], row["piece"]) == ("".join(documents[i][:j]), documents[i][j])
    means = [float(np.mean(a - b)) for a, b in zip(after, before, strict=True)]
    top = pq.read_table(tmp_path / "g.top_documents.parquet").to_pylist()
    assert [(row["set"], row["document"]) for row in top] == [
        ("a" if i < 5 else "b", i % 5) for i in np.argsort(means)[:4].tolist()
    ]


def test_records_of_other_tokens_are_refused(tmp_path, options):
    one = {"pieces": ["a", "b"], "logprob": [-1.0, -1.0]}
    base = str(write_records(tmp_path / "a.parquet", {"x": [one]}))
    for sets, message in (
        (
            {"x": [one | {"tokens": [0, 7]}]},
            "its tokens of document 0 of 'x' differ from those of .*a.parquet; score the",
        ),
        ({"x": [one | {"tokens": [0], "pieces": ["a"], "logprob": [-1.0]}]}, "its tokens of document 0 of 'x' differ"),
        ({"y": [one]}, "its documents are not those of"),
    ):
        student = str(write_records(tmp_path / "b.parquet", sets))
        with pytest.raises(InputError, match=message):
            measure_token_gap(options(base=base, student=student))
        assert not list(tmp_path.glob("g.*"))
