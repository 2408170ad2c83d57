"""Documents as token ids, wherever they lie: in memory, in a mapped file, or in texts that are still to be encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jax_selftrain.corpus.ingest import encode_texts, text_batches

_TEXTS_AT_ONCE = 256


class TokenSource(Protocol):
    """Anything whose documents can be read in order, as often as one likes. `Corpus` is one."""

    def token_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The documents in batches: their tokens end to end, and the length of each."""
        ...


@dataclass(frozen=True, eq=False)
class RaggedTokens:
    """Documents in one array, which may be a memory-mapped file."""

    tokens: np.ndarray
    """Integer [sum of lengths]."""
    offsets: np.ndarray
    """int64 [N+1]: document d is tokens[offsets[d]:offsets[d+1]]."""

    @classmethod
    def from_list(cls, documents: Iterable[Sequence[int] | np.ndarray]) -> RaggedTokens:
        """Documents given one by one, or as the rows of an array [N, T] (then nothing is copied)."""
        if isinstance(documents, np.ndarray) and documents.ndim == 2:
            rows, length = documents.shape
            return cls(documents.reshape(-1), np.arange(rows + 1, dtype=np.int64) * length)
        arrays = [np.asarray(document, np.int64) for document in documents]
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        return cls(np.concatenate([np.zeros(0, np.int64), *arrays]), offsets)

    def token_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """One batch that holds all."""
        yield self.tokens, np.diff(self.offsets)


@dataclass(frozen=True, eq=False)
class LazilyTokenized:
    """Texts in the tokens of a tokenizer, encoded as they are read; special strings in them are plain text."""

    texts: Callable[[], Iterator[str]]
    """Starts a pass over the texts."""
    tokenizer: Any

    def token_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A few hundred texts at a time."""
        batch: list[str] = []
        for text in chain(self.texts(), [None]):
            if text is not None:
                batch.append(text)
            if len(batch) == _TEXTS_AT_ONCE or (text is None and batch):
                for first, last in text_batches(batch):
                    ids = encode_texts(self.tokenizer, batch[first:last])["input_ids"]
                    flat = np.fromiter(chain.from_iterable(ids), np.int32)
                    yield flat, np.array([len(row) for row in ids], np.int64)
                batch = []


def memmap_tokens(documents: TokenSource, folder: Path) -> RaggedTokens:
    """The same documents in a file of the given folder, mapped into memory: for more than one pass over costly ones."""
    path, lengths = folder / "tokens.bin", []
    with path.open("wb") as file:
        for flat, batch_lengths in documents.token_batches():
            file.write(np.ascontiguousarray(flat, np.int32).tobytes())
            lengths.append(batch_lengths)
    offsets = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
    tokens = np.memmap(path, np.int32, "r") if offsets[-1] else np.zeros(0, np.int32)
    return RaggedTokens(tokens, offsets)
