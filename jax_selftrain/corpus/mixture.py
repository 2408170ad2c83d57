"""Several corpora in one endless sequence of rows, each with its share of every stretch of it.

Which corpus the row at a place comes from is decided by counting alone. Of the first k places the first corpus has
⌊s·k + ½⌋, s being its share; of the k' places it leaves, the second has ⌊s'·k' + ½⌋, s' being its share of what is
left; and so on, the last corpus taking the rest (Bresenham's line, once per corpus). So a batch is found without
walking from the start, in time proportional to its own size, and each corpus is spread as evenly as whole rows allow:
of any prefix the first has its share within ½ row, corpus i (0, 1, …) within (i + 1) / 2 rows. Shares are exact
fractions and counts are Python's integers; nothing is rounded however long the run.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from jax_selftrain.corpus.packing import PackedRows, epoch_permutation
from jax_selftrain.errors import InputError


@dataclass(frozen=True, eq=False)
class Mixture:
    """Rows of one or several corpora, and how often each of them is drawn from."""

    components: tuple[PackedRows, ...]
    """Rows of each corpus, the main one first; all of one length."""
    weights: tuple[Fraction, ...]
    """Share of the rows of training that come from each corpus; more than 0, their sum is 1."""

    def __post_init__(self) -> None:
        if len(self.components) != len(self.weights) or sum(self.weights) != 1 or min(self.weights) <= 0:
            raise ValueError(f"shares {[str(share) for share in self.weights]} of {len(self.components)} corpora")

    def draws_before(self, places: Iterable[int]) -> np.ndarray:
        """How many of the first k places of the sequence each corpus has.

        Args:
            places: the numbers k ≥ 0.

        Returns:
            int64 [corpora, places].
        """
        left, total = np.array(list(places), object), Fraction(1)  # objects: whole numbers of any size
        counts = []
        for share in self.weights[:-1]:
            part = share / total
            counts.append((2 * part.numerator * left + part.denominator) // (2 * part.denominator))
            left, total = left - counts[-1], total - share
        return np.array([*counts, left], np.int64)

    def batch(self, batch_size: int, seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Which rows are batch `n`: a pure function of its arguments, the shares and the numbers of rows.

        Each corpus is visited epoch by epoch, each epoch in an order of its own that visits every row once; with a
        single corpus this is `batch_indices`.

        Returns:
            Which corpus each row of the batch comes from, and which row of it: two arrays int64 [batch_size].
        """
        counts = self.draws_before(range(n * batch_size, (n + 1) * batch_size + 1))
        source = np.diff(counts).argmax(axis=0)
        visit = counts[source, np.arange(batch_size)]
        row = np.empty(batch_size, np.int64)
        for corpus in np.unique(source).tolist():
            chosen = source == corpus
            row[chosen] = epoch_permutation(len(self.components[corpus]), seed, visit[chosen], corpus=corpus)
        return source, row

    def epochs(self, rows: int) -> tuple[Fraction, ...]:
        """How often each corpus is passed over in the first `rows` rows of training."""
        return tuple(
            Fraction(count, len(part))
            for count, part in zip(self.draws_before([rows])[:, 0].tolist(), self.components, strict=True)
        )

    def steps_per_epoch(self, batch_size: int) -> int:
        """The fewest steps in which every row of the first corpus is visited."""
        # ⌊s·k + ½⌋ ≥ rows holds from k = (rows − ½) / s on.
        return math.ceil(math.ceil(Fraction(2 * len(self.components[0]) - 1, 2) / self.weights[0]) / batch_size)

    def max_steps(self, max_epochs: Fraction, batch_size: int, steps: int) -> int:
        """The most steps, up to `steps`, in which no corpus is passed over more than `max_epochs` times."""
        return bisect.bisect_left(
            range(1, steps + 1), True, key=lambda taken: max(self.epochs(taken * batch_size)) > max_epochs
        )


def parse_mixture(entries: Sequence[str]) -> tuple[tuple[str, Fraction], ...]:
    """The (folder, share) that each `FOLDER=SHARE` spells.

    Raises:
        InputError: an entry is not of that form, its share is not between 0 and 1, a folder comes twice, or the
            shares leave nothing to the main corpus.
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
            f"--mixture: the shares sum to {float(sum(mix.values())):g}; they must sum to less than 1, as the rest of the "
            "rows is the corpus' own"
        )
    return tuple(mix.items())


def _read_share(entry: str, text: str) -> Fraction:
    try:
        if 0 < float(text) < 1:  # looked at first: the exact value of 1e-999999999 would fill the memory
            return Fraction(text)
    except ValueError:
        pass
    raise InputError(f"--mixture {entry}: the share {text} must be a number more than 0 and less than 1")
