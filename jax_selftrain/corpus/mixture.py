"""Mixtures of corpora: an endless sequence of rows by weight.

Counting alone decides the corpus of a row. Of the first k rows the first corpus has ⌊w·k + ½⌋, w being its weight; of
the k' others, the second has ⌊w'·k' + ½⌋, w' being its weight among the remaining corpora; and so on (Bresenham's
line). A batch is thus found in time proportional to its size. In any prefix, the count of corpus i (0, 1, …) deviates
from its share by at most (i + 1) / 2 rows. Weights are fractions and counts Python integers, so nothing is rounded.
"""

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache, partial

import numpy as np

from jax_selftrain.corpus.packing import PackedRows
from jax_selftrain.errors import InputError
from jax_selftrain.io.rng import random_permutation


@dataclass(frozen=True, eq=False)
class Mixture:
    """Rows of one or several corpora, and their weights."""

    components: tuple[PackedRows, ...]
    """Rows of each corpus, the main corpus first; all of one length."""
    weights: tuple[Fraction, ...]
    """Share of the training rows from each corpus; positive, with sum 1."""

    def draws_before(self, positions: Iterable[int]) -> np.ndarray:
        """Count the rows of each corpus among the first k rows.

        Args:
            positions: the numbers k ≥ 0.

        Returns:
            int64 [corpora, positions].
        """
        left, total = np.array(list(positions), object), Fraction(1)  # Python integers of any size
        counts = []
        for weight in self.weights[:-1]:
            part = weight / total
            counts.append((2 * part.numerator * left + part.denominator) // (2 * part.denominator))
            left, total = left - counts[-1], total - weight
        return np.array([*counts, left], np.int64)

    def batch(self, batch_size: int, seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of batch `n`.

        A pure function of its arguments, the weights and the numbers of rows. Each epoch of a corpus visits every row
        once in a random order; batches are consecutive pieces of the endless sequence of epochs.

        Returns:
            (corpus index, row index) of each row of the batch, int64 [batch_size] each.
        """
        counts = self.draws_before(range(n * batch_size, (n + 1) * batch_size + 1))
        source = np.diff(counts).argmax(axis=0)
        visit = counts[source, np.arange(batch_size)]
        row = np.empty(batch_size, np.int64)
        for corpus in np.unique(source).tolist():
            size = len(self.components[corpus])
            for epoch in np.unique(visit[source == corpus] // size).tolist():
                chosen = (source == corpus) & (visit // size == epoch)
                row[chosen] = _orders(corpus)(size, seed, epoch)[visit[chosen] % size]
        return source, row

    def epochs(self, rows: int) -> tuple[Fraction, ...]:
        """Return the epochs of each corpus in the first `rows` training rows."""
        return tuple(
            Fraction(count, len(part))
            for count, part in zip(self.draws_before([rows])[:, 0].tolist(), self.components, strict=True)
        )

    def count_steps(self, epochs: int, batch_size: int) -> int:
        """Return the fewest steps with `epochs` visits of each main row."""
        # ⌊w·k + ½⌋ ≥ rows holds from k = (rows − ½) / w on.
        rows = epochs * len(self.components[0])
        return math.ceil(math.ceil(Fraction(2 * rows - 1, 2) / self.weights[0]) / batch_size)

    def max_steps(self, max_epochs: Fraction, batch_size: int, steps: int) -> int:
        """Return the most steps with at most `max_epochs` of any corpus."""
        return bisect.bisect_left(
            range(1, steps + 1), True, key=lambda n: max(self.epochs(n * batch_size)) > max_epochs
        )


@cache
def _orders(corpus: int) -> Callable[[int, int, int], np.ndarray]:
    """Cache the last two orders; a batch may span two epochs."""
    return lru_cache(maxsize=2)(partial(_epoch_order, corpus))


def _epoch_order(corpus: int, n_rows: int, seed: int, epoch: int) -> np.ndarray:
    # This key, not that of `make_rng`, so that stored runs resume with the same batches.
    bits = np.random.Philox(key=np.array([seed % 2**64, (corpus << 32) + epoch], np.uint64))
    return random_permutation(np.random.Generator(bits), n_rows)


def parse_mixture(entries: Sequence[str]) -> tuple[tuple[str, Fraction], ...]:
    """Parse entries `FOLDER=SHARE` into (folder, share).

    Raises:
        InputError: an entry has another form, a share is not between 0 and 1, a folder is repeated, or the shares sum
            to 1 or more.
    """
    mix: dict[str, Fraction] = {}
    for entry in entries:
        folder, equals, text = entry.rpartition("=")
        if not (folder and equals and text):
            raise InputError(f"--mixture {entry}: give FOLDER=SHARE, for instance stories=0.1")
        if folder in mix:
            raise InputError(f"--mixture {entry}: {folder} is given twice; give each corpus once, with its whole share")
        mix[folder] = _read_share(entry, text)
    if sum(mix.values()) >= 1:
        raise InputError(
            f"--mixture: the shares sum to {float(sum(mix.values())):g}; they must sum to less than 1, because "
            "--corpus supplies the rest of the rows"
        )
    return tuple(mix.items())


def _read_share(entry: str, text: str) -> Fraction:
    try:
        if 0 < float(text) < 1:  # checked first, because Fraction("1e-999999999") would fill the memory
            return Fraction(text)
    except ValueError:
        pass
    raise InputError(f"--mixture {entry}: the share {text} must be a number more than 0 and less than 1")
