"""The `token-gap` command: tokens that a student predicts worse.

The gap is the log-probability under the student minus that under its base. It is reported by class of token.

A token has the class of the word that its first letter, digit or incomplete byte (U+FFFD) is part of. A word is a run
of these, with apostrophes between them. The first class that applies is the token's:

| class | word |
|---|---|
| whitespace_punctuation | none: the token has no letter, digit or incomplete byte |
| number | has a digit |
| name | begins with a capital letter, is not "I" or "I'…", and does not start a sentence |
| rare_word | occurs fewer than `rare_count` times in all texts of the records, without regard to case |
| other | any other |

A word starts a sentence if it is the first of the document, follows a line break, or follows one of . ! ? : or a quote
or bracket, after any white space.
"""

import re
import time
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

from jax_selftrain.config import TokenGapConfig, yaml_io
from jax_selftrain.evals.result_files import output_paths, with_stderr, write_results
from jax_selftrain.evals.token_records import TokenRecords, check_same_tokens, load_records
from jax_selftrain.io.manifest import sha256_file
from jax_selftrain.stats.estimators import ratio_and_stderr
from jax_selftrain.version import versions

TOKEN_CLASSES = ("whitespace_punctuation", "number", "name", "rare_word", "other")
CONTEXT = 60
"""Characters of text before a token in the table of tokens."""
_LETTER = r"(?:[^\W_]|\ufffd)"
_WORD = re.compile(rf"{_LETTER}+(?:['’]{_LETTER}+)*")
_SENTENCE_START = re.compile(r"[\n.!?:\"'“”‘’«»(\[]\s*$")
_PRONOUN = re.compile(r"I(?:['’]|$)")


def measure_token_gap(config: TokenGapConfig) -> dict[str, Any]:
    """Compare the records of base and student, and write the result.

    Writes `FILE.json`, `FILE.top_documents.parquet` (documents with the largest loss per token),
    `FILE.top_tokens.parquet` (tokens with the largest loss), `FILE.config.yaml`, `FILE.timings.json`.

    Returns:
      The content of `FILE.json`: `sets`, for each set and each class that it has (and `total`): `tokens`, `documents`
      with such tokens, mean log-probability of `base` and `student`, and `difference` (student − base, nats per token;
      negative where the student lost) with its standard error over documents; `rare_count`, `fingerprints`,
      `versions`.

    Raises:
      InputError: a file that is no token records, or records of different tokens.
    """
    yaml_io.require(config)
    output_paths(config.out)
    started = time.monotonic()
    base, student = load_records(config.base), load_records(config.student)
    check_same_tokens(base, student)
    pieces = base.table["pieces"].to_pylist()
    classes = classify_tokens(pieces, config.rare_count)
    names = np.array(base.table["set"].to_pylist(), object)
    before, after = ([one.astype(np.float64) for one in side.arrays("logprob")] for side in (base, student))
    fingerprints = {side: sha256_file(one.path) for side, one in (("base", base), ("student", student))}
    fingerprints |= {f"{side}_model": one.fingerprints["model"] for side, one in (("base", base), ("student", student))}
    result = {
        "base": config.base,
        "student": config.student,
        "rare_count": config.rare_count,
        "sets": {
            name: _summarize_classes(
                *([rows[i] for i in np.flatnonzero(names == name).tolist()] for rows in (classes, before, after))
            )
            for name in base.sets
        },
        "fingerprints": fingerprints | {"tokenizer": base.fingerprints["tokenizer"]},
        "versions": versions(),
    }
    tables = {
        "top_documents": _rank_documents(base, before, after, config.top),
        "top_tokens": _rank_tokens(base, pieces, classes, before, after, config.top),
    }
    write_results(config.out, config, result, tables, {"seconds": time.monotonic() - started})
    return result


def classify_tokens(documents: Sequence[Sequence[str]], rare_count: int) -> list[np.ndarray]:
    """Return the class of each token, an index into `TOKEN_CLASSES`.

    Args:
      documents: text of each token, by document.
      rare_count: number of occurrences from which a word is not rare.
    """
    texts = ["".join(pieces) for pieces in documents]
    counts = Counter(word.lower() for text in texts for word in _WORD.findall(text))
    return [_classify_document(*one, counts, rare_count) for one in zip(texts, documents, strict=True)]


def _classify_document(text: str, pieces: Sequence[str], counts: Counter[str], rare_count: int) -> np.ndarray:
    class_at = np.zeros(len(text), np.int8)  # of the word at each character
    previous_end = 0
    for word in _WORD.finditer(text):
        between = text[previous_end : word.start()]
        starts_sentence = previous_end == 0 or _SENTENCE_START.search(between)
        found = "other"
        if any(character.isdigit() for character in word[0]):
            found = "number"
        elif word[0][0].isupper() and not _PRONOUN.match(word[0]) and not starts_sentence:
            found = "name"
        elif counts[word[0].lower()] < rare_count:
            found = "rare_word"
        class_at[word.start() : word.end()] = TOKEN_CLASSES.index(found)
        previous_end = word.end()
    classes = np.zeros(len(pieces), np.int8)
    for i, (piece, end) in enumerate(zip(pieces, accumulate(map(len, pieces)), strict=True)):
        if match := _WORD.search(piece):
            classes[i] = class_at[end - len(piece) + match.start()]
    return classes


def _summarize_classes(
    classes: Sequence[np.ndarray], before: Sequence[np.ndarray], after: Sequence[np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Summarize all tokens of a set, and those of each class."""
    document = np.repeat(np.arange(len(classes)), list(map(len, classes)))
    label, old, new = (np.concatenate([np.zeros(0), *rows]) for rows in (classes, before, after))
    groups = {name: label == i for i, name in enumerate(TOKEN_CLASSES)} | {"total": np.ones(len(label), bool)}
    found = {}
    for name, members in groups.items():
        if members.any():
            # Only documents with such tokens are units.
            counts = np.bincount(document[members])
            sums = np.bincount(document[members], (new - old)[members])[counts > 0]
            found[name] = {
                "tokens": int(members.sum()),
                "documents": len(sums),
                "base": float(old[members].mean()),
                "student": float(new[members].mean()),
                **with_stderr("difference", ratio_and_stderr(sums, counts[counts > 0])),
            }
    return found


def _rank_documents(
    records: TokenRecords, before: Sequence[np.ndarray], after: Sequence[np.ndarray], top: int
) -> pa.Table:
    """Return the documents with the largest loss per token, largest first."""
    kept = np.flatnonzero(records.lengths > 0)
    old, new = (np.array([side[i].mean() for i in kept.tolist()]) for side in (before, after))
    order = np.argsort(new - old, kind="stable")[:top]
    columns = {name: records.table[name].take(pa.array(kept[order])) for name in ("set", "document")}
    columns |= {"tokens": records.lengths[kept[order]], "base": old[order], "student": new[order]}
    return pa.table({**columns, "difference": (new - old)[order], "text": records.table["text"].take(kept[order])})


def _rank_tokens(
    records: TokenRecords,
    pieces: Sequence[Sequence[str]],
    classes: Sequence[np.ndarray],
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    top: int,
) -> pa.Table:
    """Return the tokens with the largest loss, largest first."""
    document = np.repeat(np.arange(len(pieces)), records.lengths)
    start = np.cumsum(records.lengths) - records.lengths
    label, old, new = (np.concatenate([np.zeros(0), *rows]) for rows in (classes, before, after))
    order = np.argsort(new - old, kind="stable")[:top]
    rows, position = document[order], order - start[document[order]]
    columns = {name: records.table[name].take(pa.array(rows)) for name in ("set", "document")}
    chosen = list(zip(rows.tolist(), position.tolist(), strict=True))
    return pa.table(
        {
            **columns,
            "position": position,
            "context": ["".join(pieces[row][:i])[-CONTEXT:] for row, i in chosen],
            "piece": [pieces[row][i] for row, i in chosen],
            "class": [TOKEN_CLASSES[int(label[i])] for i in order],
            "base": old[order],
            "student": new[order],
            "difference": (new - old)[order],
        }
    )
