"""The `decontaminate` command, against a count in plain Python."""

from __future__ import annotations

import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpus_factory import write_jsonl, write_sampled_corpus
from harness_sets import write_tasks

from jax_selftrain.config import DecontaminateConfig
from jax_selftrain.corpus import Corpus, Sample, open_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.evals import decontaminate
from jax_selftrain.io import json_files

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("ano", "ela", "iru", "oké", "uf")]
BENCHMARKS = ("birds", "fish")


def normalized(text: str) -> list[str]:
    """The normalization again, character by character."""
    return "".join(c for c in text.lower() if c.isspace() or unicodedata.category(c)[0] in "LMN").split()


def ngrams(text: str, n: int) -> set[str]:
    words = normalized(text)
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}


@pytest.fixture(scope="module")
def documents() -> dict[str, list[dict]]:
    """Two benchmarks of 200 questions; they have a question in common."""
    rng = random.Random(0)

    def sentence(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    rows = {
        name: [{"context": sentence(7), "choices": [f" {sentence(5)}", f" {sentence(9)}."], "answer": 0}] * 1
        + [{"context": sentence(9), "choices": [f" {sentence(3)}", f" {sentence(4)}"], "answer": 1} for _ in range(199)]
        for name in BENCHMARKS
    }
    rows["fish"][7] = rows["birds"][11]
    return rows


def joined(row: dict) -> str:
    return row["context"] + "".join(row["choices"])


def disguise(rng: random.Random, words: list[str]) -> list[str]:
    """Other case, punctuation and spelling of the same words."""
    return [
        rng.choice([word.upper(), f"{word},", f"({word})", f"{word[0]}-{word[1:]}", f"“{word}”", word])
        for word in words
    ]


@pytest.fixture(scope="module")
def planted(documents, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """10,000 samples; a third have 7, 8 or 9 words of a document."""
    rng = random.Random(1)
    texts = []
    for _ in range(10_000):
        words = [rng.choice(WORDS) for _ in range(rng.randrange(3, 40))]
        if rng.random() < 1 / 3:
            found = normalized(joined(rng.choice(documents[rng.choice(BENCHMARKS)])))
            size = rng.choice([7, 8, 9])
            start = rng.randrange(len(found) - size + 1)
            at = rng.randrange(len(words) + 1)
            words[at:at] = disguise(rng, found[start : start + size])
        texts.append(rng.choice([" ", "\n", "\t ", "\N{NO-BREAK SPACE}"]).join(words))
    samples = [
        Sample(i, np.arange(3, 4 + len(text) // 9, dtype=np.int32), text, -1.0, "length")
        for i, text in enumerate(texts)
    ]
    return write_sampled_corpus(tmp_path_factory.mktemp("planted") / "c", tiny_model("llama"), samples, per_shard=2048)


def test_removed_samples_and_shared_ngrams_are_those_of_plain_python(planted, documents, tmp_path):
    files = tuple(write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in documents.items())
    control = str(tmp_path / "control")
    config = DecontaminateConfig(str(planted.folder), str(tmp_path / "out"), tasks=files, control=control, seed=3)
    report = decontaminate(config)
    shared = {name: set().union(*(ngrams(joined(row), 8) for row in rows)) for name, rows in documents.items()}
    samples: dict[str, set[int]] = defaultdict(set)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for i, text in enumerate(planted.iter_texts()):
        for name, known in shared.items():
            if found := ngrams(text, 8) & known:
                samples[name].add(i)
                counts[name].update(found)
    removed = samples["birds"] | samples["fish"]
    assert 1500 < len(removed) < 3000  # two thirds of those planted
    assert samples["birds"] & samples["fish"]
    assert (report["removed"], report["samples"]) == (len(removed), 10_000)
    for name, task in report["tasks"].items():
        assert (task["documents"], task["samples"]) == (200, len(samples[name]))
        assert {entry["ngram"]: entry["samples"] for entry in task["ngrams"]} == counts[name]
        assert [entry["samples"] for entry in task["ngrams"]] == sorted(counts[name].values(), reverse=True)
    kept, controlled = (open_corpus(folder) for folder in (tmp_path / "out", control))
    assert list(kept.iter_texts()) == [text for i, text in enumerate(planted.iter_texts()) if i not in removed]
    assert json_files.read_json(tmp_path / "out" / "decontamination.json") == report
    assert len(controlled) == len(kept)
    left = set(controlled.iter_texts())
    assert all(text in left for i, text in enumerate(planted.iter_texts()) if i in removed)
    assert decontaminate(config) == report
    with pytest.raises(InputError, match="was created with"):
        decontaminate(DecontaminateConfig(str(planted.folder), str(tmp_path / "out"), tasks=files, ngram=7))


def test_all_splits_of_harness_tasks_are_compared(tiny_model: Callable[..., Path], tmp_path: Path):
    """Multiple choice, and a question with its answer."""
    alphabet = [f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    rows = {split: {"q": " ".join(alphabet[i : i + 6]) + "?", "a": f"{alphabet[i + 6]} {alphabet[i + 7]}", "b": "so"}
            for i, split in zip((0, 20, 40), ("train", "validation", "test"), strict=True)}  # fmt: skip
    files = {split: write_jsonl(tmp_path / f"{split}.jsonl", [row]) for split, row in rows.items()}
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        **{
            f"{split if split == 'test' else split.removesuffix('ing')}_split": split
            for split in ("validation", "test")
        },
        "training_split": "train",
        "doc_to_text": "Q: {{q}}",
    }
    choice = common | {
        "task": "choose", "output_type": "multiple_choice", "doc_to_choice": "{{[b, a]}}", "doc_to_target": 1,
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    answer = common | {
        "task": "answer", "output_type": "generate_until", "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["."]}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    folder = write_tasks(tmp_path / "tasks", [choice, answer])
    texts = [" ".join(alphabet[i : i + 8]) for i in (0, 20, 40, 60)] + [" ".join(alphabet[40:47])]
    samples = [Sample(i, np.arange(3, 20, dtype=np.int32), text, -1.0, "length") for i, text in enumerate(texts)]
    corpus = write_sampled_corpus(tmp_path / "corpus", tiny_model("llama"), samples)
    options = {"tasks": ("choose", "answer"), "task_folder": str(folder)}
    report = decontaminate(DecontaminateConfig(str(corpus.folder), str(tmp_path / "out"), **options))
    assert [task["documents"] for task in report["tasks"].values()] == [3, 3]
    # "b" is between question and answer in the first task, so only the second has all eight words.
    assert [task["samples"] for task in report["tasks"].values()] == [0, 3]
    assert list(open_corpus(tmp_path / "out").iter_texts()) == texts[3:]


def test_impossible_requests_are_refused_in_a_sentence(planted, documents, tmp_path):
    corpus, out = str(planted.folder), str(tmp_path / "out")
    for options, message in (
        ({}, "needs --tasks or --texts"),
        ({"tasks": ("nothing.jsonl",)}, "no such file"),
        (
            {"texts": (write_jsonl(tmp_path / "t.jsonl", [{"text": w} for w in WORDS]),), "ngram": 1},
            "none would remain",
        ),
        ({"texts": ("t.jsonl",), "ngram": 0}, "--ngram 0: must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            decontaminate(DecontaminateConfig(corpus, out, **options))
        assert not Path(out).exists()
