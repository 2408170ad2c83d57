"""Token records: the scores of each token of each document (`FILE.tokens.parquet`).

`score --token-records` writes them for texts, `extract --token-records` for suffixes. What follows from likelihoods is
computed from the file without a forward pass: `evals.membership`, `evals.token_gap`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jax_selftrain import hub
from jax_selftrain.errors import InputError
from jax_selftrain.io import json_files
from jax_selftrain.io.tables import hash_table, load_table
from jax_selftrain.likelihood.engine import Likelihood, LoglikelihoodRequest, TokenScores
from jax_selftrain.likelihood.resumable import split_lists

RECORDS = pa.schema(
    [
        ("set", pa.string()),
        ("document", pa.int64()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("pieces", pa.list_(pa.string())),
        ("logprob", pa.list_(pa.float32())),
        ("mean_logprob", pa.list_(pa.float32())),
        ("std_logprob", pa.list_(pa.float32())),
        ("greedy", pa.list_(pa.int32())),
    ]
)
"""One row per document of each set, in the order of the set.

| column | content |
|---|---|
| set | name of the text file; `sequences` or `controls` of an extraction |
| document | index in the set |
| text | scored part of the document; the decoded suffix of a sequence |
| tokens | scored token ids |
| pieces | text of each token |
| logprob, mean_logprob, std_logprob, greedy | `likelihood.engine.TokenScores` |
"""

_FINGERPRINTS, _KEYS = ("model", "tokenizer"), ["set", "document"]


@dataclass(frozen=True)
class TokenRecords:
    """A file of token records."""

    path: Path
    table: pa.Table
    fingerprints: Mapping[str, str]
    """SHA-256 of `model` and `tokenizer`."""

    def select(self, name: str) -> "TokenRecords":
        """Return the documents of one set.

        Raises:
          InputError: the file has no such set.
        """
        if name not in self.sets:
            raise InputError(f"{self.path}: has no set {name!r}; its sets are {', '.join(self.sets)}")
        return self.filter(pc.equal(self.table["set"], name))

    def filter(self, members: Any) -> "TokenRecords":
        """Return the documents where `members`, bool [D], is true."""
        return TokenRecords(self.path, self.table.filter(members), self.fingerprints)

    @property
    def sets(self) -> list[str]:
        """Names of the sets, in the order of the file."""
        return self.table["set"].unique().to_pylist()

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each document, int64."""
        return pc.list_value_length(self.table["tokens"]).to_numpy().astype(np.int64)

    def arrays(self, name: str) -> list[np.ndarray]:
        """Return a column of numbers as one array per document."""
        return split_lists(self.table[name])


def decode_pieces(tokenizer: Any, tokens: np.ndarray) -> list[str]:
    """Decode each token of [n] ids on its own.

    A token is decoded after itself, because decoders drop the space before the first token of a text. Bytes that are no
    whole character become U+FFFD.
    """
    unique, index = np.unique(tokens, return_inverse=True)
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    once, twice = (
        tokenizer.batch_decode([[token] * count for token in unique.tolist()], **options) for count in (1, 2)
    )
    pieces = [both[len(first) :] for first, both in zip(once, twice, strict=True)]
    return [pieces[i] for i in index.tolist()]


def tabulate_records(
    source: hub.ModelRef,
    tokenizer: Any,
    documents: Sequence[tuple[str, int, str]],
    lengths: np.ndarray,
    tokens: np.ndarray,
    scores: TokenScores,
) -> pa.Table:
    """Return the table `RECORDS` with the model's fingerprints as metadata.

    Args:
      source: the model.
      tokenizer: decodes the tokens.
      documents: set, index and text of each of D documents.
      lengths: number of tokens of each document, [D].
      tokens: ids of all documents, [n].
      scores: of these tokens, arrays [n].
    """
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    lists = {"tokens": tokens, "pieces": decode_pieces(tokenizer, tokens), **scores._asdict()}
    columns = dict(zip(("set", "document", "text"), zip(*documents, strict=True), strict=True))
    for name, values in lists.items():
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(values, RECORDS.field(name).type.value_type))
    fingerprints = {"model": source.fingerprint, "tokenizer": source.tokenizer_fingerprint}
    return pa.table(columns, RECORDS).replace_schema_metadata(fingerprints)


def tabulate_texts(
    source: hub.ModelRef,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    index: Sequence[tuple[str, int, int]],
    requests: Sequence[LoglikelihoodRequest],
    likelihoods: Sequence[Likelihood],
) -> pa.Table:
    """Return the table `RECORDS` of texts; it joins the windows of each.

    Args:
      source, tokenizer: see `tabulate_records`.
      texts: documents of each set.
      index: set, document and window of each request, in this order; requests of tasks are skipped.
      requests: the windows.
      likelihoods: of the requests, with the scores of each token.
    """
    documents = [(name, i, text) for name, members in texts.items() for i, text in enumerate(members)]
    rows = {key[:2]: row for row, key in enumerate(documents)}
    lengths = np.zeros(len(documents), np.int64)
    none = np.zeros(0, np.float32)
    tokens = [np.zeros(0, np.int32)]
    scores = [TokenScores(none, none, none, tokens[0])]
    for (name, i, _), request, likelihood in zip(index, requests, likelihoods, strict=True):
        if (name, i) in rows and likelihood.token_scores is not None:
            lengths[rows[name, i]] += likelihood.tokens
            tokens.append(np.asarray(request.continuation, np.int32))
            scores.append(likelihood.token_scores)
    flat = TokenScores(*map(np.concatenate, zip(*scores, strict=True)))
    return tabulate_records(source, tokenizer, documents, lengths, np.concatenate(tokens), flat)


def load_records(path: str) -> TokenRecords:
    """Read a file of token records.

    Raises:
      InputError: the file is missing, damaged, something else, or of another result than the FILE.json next to it.
    """
    table = load_table(Path(path), remedy="write it again")
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if not table.schema.equals(RECORDS) or not metadata.keys() >= set(_FINGERPRINTS):
        raise InputError(
            f"{path}: holds no token records; give a FILE.tokens.parquet that `score` or `extract` wrote with "
            "--token-records"
        )
    sizes = pc.list_value_length(table["tokens"])
    are_aligned = all(pc.list_value_length(table[name]).equals(sizes) for name in RECORDS.names[3:])
    if not are_aligned or not all(np.isfinite(pc.list_flatten(table[name])).all() for name in RECORDS.names[5:]):
        raise InputError(f"{path}: is damaged (a token without a score, or one that is not finite); write it again")
    result_file = Path(path.removesuffix(".tokens.parquet") + ".json")
    result = json_files.read_json(result_file) if result_file.is_file() else None
    fingerprints = result.get("fingerprints") if isinstance(result, dict) else None
    expected = fingerprints.get("tokens") if isinstance(fingerprints, dict) else None
    if expected not in (None, hash_table(table)):
        raise InputError(f"{path}: does not match {result_file.name}; write it again")
    return TokenRecords(Path(path), table, {name: metadata[name] for name in _FINGERPRINTS})


def check_same_tokens(first: TokenRecords, second: TokenRecords) -> None:
    """Refuse records of other documents or tokens.

    Raises:
      InputError: names the first document that differs.
    """
    remedy = "score the same texts with models that share a tokenizer"
    if not first.table.select(_KEYS).equals(second.table.select(_KEYS)):
        raise InputError(f"{second.path}: its documents are not those of {first.path}; {remedy}")
    names, documents = (first.table[name].to_pylist() for name in _KEYS)
    for name, i, a, b in zip(names, documents, first.arrays("tokens"), second.arrays("tokens"), strict=True):
        if not np.array_equal(a, b):
            where = f"document {i} of {name!r}"
            raise InputError(f"{second.path}: its tokens of {where} differ from those of {first.path}; {remedy}")
