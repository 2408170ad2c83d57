"""Sources of tokenized documents: arrays, memory-mapped files, texts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

ENCODE_CHARACTERS = 1 << 20
"""Characters of the texts that are tokenized at once."""


class TokenSource(Protocol):
    """Documents that can be read in order repeatedly, for instance a `Corpus`."""

    def token_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (concatenated tokens, lengths) of batches of documents."""
        ...


@dataclass(frozen=True, eq=False)
class RaggedTokens:
    """Documents concatenated in one array, which may be memory-mapped."""

    tokens: np.ndarray
    """Integer [sum of lengths]."""
    offsets: np.ndarray
    """int64 [N+1]: document d is tokens[offsets[d]:offsets[d+1]]."""

    @classmethod
    def from_list(cls, documents: Iterable[Sequence[int] | np.ndarray]) -> "RaggedTokens":
        """Concatenate documents; the rows of an array [N, T] are not copied."""
        if isinstance(documents, np.ndarray) and documents.ndim == 2:
            rows, length = documents.shape
            return cls(documents.reshape(-1), np.arange(rows + 1, dtype=np.int64) * length)
        arrays = [np.asarray(document, np.int64) for document in documents]
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        return cls(np.concatenate([np.zeros(0, np.int64), *arrays]), offsets)

    def token_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield all documents as one batch."""
        yield self.tokens, np.diff(self.offsets)


@dataclass(frozen=True, eq=False)
class LazilyTokenized:
    """Texts that are tokenized when read; special strings are plain text."""

    texts: Callable[[], Iterator[str]]
    """Function that starts a pass over the texts."""
    tokenizer: Any

    def token_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the tokens of some texts at a time."""
        for rows in encode_texts(self.tokenizer, self.texts()):
            yield np.fromiter(chain.from_iterable(rows), np.int32), np.array([len(row) for row in rows], np.int64)


def encode_texts(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[list[int]]]:
    """Yield the tokens of texts, without added tokens, in batches.

    Special strings are plain text. A batch has about `ENCODE_CHARACTERS` characters.
    """
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= ENCODE_CHARACTERS:
            yield tokenize_batch(tokenizer, batch)["input_ids"]
            batch, characters = [], 0
    if batch:
        yield tokenize_batch(tokenizer, batch)["input_ids"]


def tokenize_batch(tokenizer: Any, texts: list[str]) -> Any:
    """Tokenize texts together; return a `BatchEncoding`."""
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )


def memmap_tokens(documents: TokenSource, folder: Path) -> RaggedTokens:
    """Write documents to a file in a folder, and memory-map it."""
    path, lengths = folder / "tokens.bin", [np.zeros(1, np.int64)]
    with path.open("wb") as file:
        for flat, batch_lengths in documents.token_batches():
            file.write(np.ascontiguousarray(flat, np.int32).tobytes())
            lengths.append(batch_lengths)
    offsets = np.cumsum(np.concatenate(lengths), dtype=np.int64)
    tokens = np.memmap(path, np.int32, "r") if offsets[-1] else np.zeros(0, np.int32)
    return RaggedTokens(tokens, offsets)
