"""Groups of a JSONL extraction set are those of the sequences that were measured."""

from __future__ import annotations

import numpy as np
import pytest
from corpus_factory import write_jsonl

from jax_selftrain.config import ExtractConfig
from jax_selftrain.errors import InputError
from jax_selftrain.evals.sequences import PromptWindow, load_sequences
from jax_selftrain.study.extraction_results import duplicate_groups


@pytest.mark.parametrize("with_ids", [True, False])
def test_groups_follow_a_subsample(tmp_path, with_ids):
    rows = [{"tokens": [3 + i] * 8, "group": f"group {i % 3}"} for i in range(20)]
    if with_ids:
        rows = [{"index": 100 - i, **row} for i, row in enumerate(rows)]
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    found = load_sequences(path, PromptWindow(4, 4), vocab_size=512, tokenizer=lambda: None, subsample=6)
    groups = duplicate_groups(ExtractConfig(sequences=path, subsample=6), found.sequence_id)
    assert groups == [f"group {(tokens[0] - 3) % 3}" for tokens in found.tokens]
    write_jsonl(tmp_path / "set.jsonl", rows[:1])
    with pytest.raises(InputError, match="has changed"):
        duplicate_groups(ExtractConfig(sequences=path), found.sequence_id)


def test_sets_without_groups_have_none(tmp_path):
    lines = write_jsonl(tmp_path / "set.jsonl", [{"tokens": [3] * 8}])
    for path in (lines, str(tmp_path / "pile.idx"), str(tmp_path / "set.parquet")):
        assert duplicate_groups(ExtractConfig(sequences=path), np.arange(1)) == []
