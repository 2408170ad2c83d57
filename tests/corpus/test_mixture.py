"""Mixtures keep exact shares of every prefix and whole epochs."""

import math
from fractions import Fraction

import numpy as np
import pytest
from corpus_factory import batch_indices, make_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_selftrain.corpus import Mixture, parse_mixture
from jax_selftrain.errors import InputError


def make_mixture(sizes: tuple[int, ...], parts: tuple[int, ...]) -> Mixture:
    """Corpora of these numbers of rows, mixed in proportion to `parts`."""
    return Mixture(tuple(map(make_rows, sizes)), tuple(Fraction(part, sum(parts)) for part in parts))


def walk(shares: tuple[Fraction, ...], positions: int) -> list[int]:
    """Assign a corpus to each row sequentially."""
    rests = [1 - sum(shares[:i], Fraction(0)) for i in range(len(shares))]
    owed = [Fraction(1, 2)] * len(shares)
    taken = []
    for _ in range(positions):
        corpus = 0
        while corpus < len(shares) - 1:
            owed[corpus] += shares[corpus] / rests[corpus]
            if owed[corpus] >= 1:
                owed[corpus] -= 1
                break
            corpus += 1
        taken.append(corpus)
    return taken


mixtures = st.integers(1, 5).flatmap(
    lambda n: st.builds(
        make_mixture,
        st.lists(st.integers(1, 30), min_size=n, max_size=n).map(tuple),
        st.lists(st.integers(1, 40), min_size=n, max_size=n).map(tuple),
    )
)
seeds = st.integers(0, 2**64 - 1)


def stream(mixture: Mixture, batch_size: int, seed: int, batches: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = [mixture.batch(batch_size, seed, n) for n in range(batches)]
    return np.concatenate([source for source, _ in drawn]), np.concatenate([row for _, row in drawn])


@settings(max_examples=80)
@given(mixture=mixtures, batch_size=st.integers(1, 40), seed=seeds)
def test_batches_found_at_once_are_those_of_a_walk(mixture: Mixture, batch_size: int, seed: int):
    source, _ = stream(mixture, batch_size, seed, -(-200 // batch_size))
    assert source.tolist() == walk(mixture.weights, len(source))


@settings(max_examples=80)
@given(mixture=mixtures)
def test_every_prefix_holds_each_corpus_by_its_share(mixture: Mixture):
    counts = mixture.draws_before(range(300))
    assert (counts.sum(axis=0) == np.arange(300)).all()
    for corpus, share in enumerate(mixture.weights):
        bound = Fraction(corpus + 1, 2)
        assert all(abs(int(counts[corpus, k]) - share * k) <= bound for k in range(300))


def test_two_corpora_are_within_half_a_row_of_their_shares():
    mixture = make_mixture((5, 5), (7, 3))
    counts = mixture.draws_before(range(1000))
    assert abs(counts - np.outer([0.7, 0.3], np.arange(1000))).max() <= 0.5 + 1e-9  # products of binary fractions


@settings(max_examples=80)
@given(mixture=mixtures, batch_size=st.integers(1, 40), seed=seeds)
def test_every_epoch_of_every_corpus_visits_each_row_once(mixture: Mixture, batch_size: int, seed: int):
    source, row = stream(mixture, batch_size, seed, -(-400 // batch_size))
    for corpus, part in enumerate(mixture.components):
        visited, size = row[source == corpus], len(part)
        whole = len(visited) // size
        epochs = np.sort(visited[: whole * size].reshape(whole, size), axis=1)
        np.testing.assert_array_equal(epochs, np.tile(np.arange(size), (whole, 1)))
        assert len(set(visited[whole * size :].tolist())) == len(visited) - whole * size


@settings(max_examples=60)
@given(n_rows=st.integers(1, 40), batch_size=st.integers(1, 50), seed=seeds, n=st.integers(0, 2**40))
def test_one_corpus_alone_gives_the_batches_of_one_corpus(n_rows: int, batch_size: int, seed: int, n: int):
    source, row = make_mixture((n_rows,), (1,)).batch(batch_size, seed, n)
    assert not source.any()
    for position, found in enumerate(row.tolist(), start=n * batch_size):  # row by row, by the pinned key of an epoch
        bits = np.random.Philox(key=np.array([seed, position // n_rows], np.uint64))
        assert found == np.argsort(bits.random_raw(n_rows), kind="stable")[position % n_rows]


def test_the_main_corpus_keeps_the_order_it_has_alone():
    mixture = make_mixture((20, 7), (3, 1))
    source, row = stream(mixture, 16, 5, 10)
    alone = np.concatenate([batch_indices(20, 20, 5, epoch) for epoch in range(7)])
    np.testing.assert_array_equal(row[source == 0], alone[: np.count_nonzero(source == 0)])


def test_corpora_of_one_size_have_orders_of_their_own():
    source, row = stream(make_mixture((50, 50, 50), (1, 1, 1)), 150, 0, 2)
    orders = {tuple(row[source == corpus][epoch * 50 : (epoch + 1) * 50]) for corpus in range(3) for epoch in range(2)}
    assert len(orders) == 6


def test_batches_are_cut_from_one_sequence_whatever_their_size():
    mixture = make_mixture((11, 3, 8), (5, 2, 1))
    by_6, by_14 = stream(mixture, 6, 3, 28), stream(mixture, 14, 3, 12)
    np.testing.assert_array_equal(by_6[0], by_14[0])
    np.testing.assert_array_equal(by_6[1], by_14[1])


def test_counts_stay_exact_far_out_and_for_awkward_shares():
    """Counts stay exact beyond float64: 2^55 rows, shares of seventeen digits."""
    ((_, share),) = parse_mixture(["a=0.12345678901234567"])
    assert share == Fraction(12345678901234567, 10**17)
    mixture = Mixture((make_rows(3), make_rows(4)), (1 - share, share))
    k = 2**55 + 1
    main = math.floor((1 - share) * k + Fraction(1, 2))
    assert mixture.draws_before([k]).tolist() == [[main], [k - main]]
    source, row = mixture.batch(1000, 0, k // 1000)
    assert abs(np.count_nonzero(source) - 1000 * share) <= 1
    assert row.max() <= 3


@settings(max_examples=60)
@given(mixture=mixtures, epochs=st.integers(1, 50), batch_size=st.integers(1, 20))
def test_steps_of_epochs_are_the_fewest_that_visit_every_row_of_the_main_corpus_so_often(
    mixture: Mixture, epochs: int, batch_size: int
):
    steps = mixture.count_steps(epochs, batch_size)
    assert mixture.epochs(steps * batch_size)[0] >= epochs > mixture.epochs((steps - 1) * batch_size)[0]


@settings(max_examples=60)
@given(
    mixture=mixtures,
    batch_size=st.integers(1, 20),
    limit=st.fractions(Fraction(1, 10), 5, max_denominator=20),
    steps=st.integers(1, 200),
)
def test_steps_within_a_limit_are_the_most_that_keep_it(mixture, batch_size: int, limit: Fraction, steps: int):
    within = mixture.max_steps(limit, batch_size, steps)
    assert 0 <= within <= steps
    assert max(mixture.epochs(within * batch_size)) <= limit
    assert within == steps or max(mixture.epochs((within + 1) * batch_size)) > limit


def test_the_sequence_is_the_same_in_every_version():
    """Pinned: resuming a run after an upgrade must not reorder its rows."""
    source, row = make_mixture((6, 4), (2, 1)).batch(12, 0, 1)
    assert source.tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert row.tolist() == [2, 0, 4, 1, 1, 0, 2, 2, 1, 3, 3, 5]


def test_shares_are_read_exactly():
    assert parse_mixture(["a/b=0.1", "x=y=2.5e-1"]) == (("a/b", Fraction(1, 10)), ("x=y", Fraction(1, 4)))
    assert parse_mixture(()) == ()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["stories"], "--mixture stories: give FOLDER=SHARE"),
        (["=0.1"], "give FOLDER=SHARE"),
        (["stories="], "give FOLDER=SHARE"),
        (["stories=much"], "the share much must be a number more than 0 and less than 1"),
        (["stories=nan"], "the share nan"),
        (["stories=inf"], "the share inf"),
        (["stories=0"], "the share 0 "),
        (["stories=-0.5"], "the share -0.5"),
        (["stories=1"], "the share 1 "),
        (["stories=1e-999999999"], "the share 1e-999999999"),
        (["a=0.1", "a=0.2"], "--mixture a=0.2: a is given twice"),
        (["a=0.7", "b=0.3"], "the shares sum to 1; they must sum to less than 1"),
    ],
)
def test_a_malformed_mix_is_refused(entries: list[str], message: str):
    with pytest.raises(InputError) as caught:
        parse_mixture(entries)
    assert message in str(caught.value)
