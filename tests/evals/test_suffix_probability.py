"""p_z and the (n, p) curve agree with sampling."""

import jax
import numpy as np
import pytest

from jax_selftrain import hub
from jax_selftrain.errors import InputError
from jax_selftrain.evals import extraction_metrics
from jax_selftrain.evals.suffix_probability import (
    N_SAMPLES,
    P_LEVELS,
    n_p_discoverable,
    parse_sampling_policies,
    summarize_suffix_probability,
)
from jax_selftrain.sampling import warp_logits


@pytest.fixture(scope="module")
def model(tiny_model):
    return hub.load_model(tiny_model(), "data=1")


def test_policies_have_one_name_each():
    words = ["top-k=40,temperature=1.0", "temperature=0.70", "top-p=0.9 , min-p=0.05", "temperature=1"]
    assert list(parse_sampling_policies(words)) == [
        "temperature=1,top-k=40",
        "temperature=0.7",
        "temperature=1,top-p=0.9,min-p=0.05",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["top-k"], "write temperature, top-k, top-p or min-p"),
        (["beam=4"], "write temperature, top-k, top-p or min-p"),
        (["top-k=4,top-k=5"], "each once"),
        (["top-k=many"], "top-k: expected a whole number, found 'many'"),
        (["temperature=0"], "temperature 0.0: must be a finite number above 0"),
        (["top-p=2"], "top-p 2.0: must be above 0"),
        (["top-k=4", "temperature=1.0,top-k=4"], "temperature=1,top-k=4 is given twice"),
    ],
)
def test_unusable_policies_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        parse_sampling_policies(words)


def test_discoverable_follows_the_definition_and_survives_tiny_probabilities():
    p_z = np.array([0.0, 1e-5, 1e-3, 0.05, 0.5, 0.95, 1.0])
    with np.errstate(divide="ignore"):
        found = n_p_discoverable(np.log(p_z))
    for key, flags in found.items():
        n, p = key.split("@")
        assert flags.tolist() == (1 - (1 - p_z) ** int(n) >= float(p)).tolist(), key
    assert set(found) == {f"{n}@{p}" for n in N_SAMPLES for p in P_LEVELS}
    assert set(N_SAMPLES) >= {1, 10, 100, 1000, 10_000}
    # 1 − p_z is 1 in floating point here, and yet 10^4 tries find it with probability 10^4·p_z.
    assert not n_p_discoverable(np.array([np.log(1e-6)]))["10000@0.1"].any()
    assert n_p_discoverable(np.array([np.log(1.06e-5)]))["10000@0.1"].all()  # log1p(−0.1)/10^4 = −1.0536e-5
    assert not n_p_discoverable(np.array([np.log(1.05e-5)]))["10000@0.1"].any()
    assert not n_p_discoverable(np.array([-1e4]))["10000@0.1"].any()
    assert not n_p_discoverable(np.array([-np.inf]))["10000@0.1"].any()


def test_a_suffix_that_a_policy_excludes_has_probability_zero(model):
    """One token of the suffix is not among the two most probable."""
    rng = np.random.default_rng(3)
    sequence = rng.integers(3, 512, (1, 12))
    for at in range(6, 12):
        order = np.argsort(-np.asarray(model.logits(sequence[:, :at]))[0, -1])
        sequence[0, at] = order[2 if at == 8 else 1]
    policies = parse_sampling_policies(["top-k=2", "top-k=3"])
    measured = extraction_metrics(model, sequence, 6, policies=policies)
    assert measured["logprob temperature=1,top-k=2"][0] == -np.inf
    assert measured["logprob"][0] < measured["logprob temperature=1,top-k=3"][0] < 0
    summary = summarize_suffix_probability(np.array([-np.inf, np.log(0.5)]))
    assert (summary["pz"], summary["logprob"]) == (0.25, np.log(0.5))
    assert summary["discoverable"]["10000@0.9"] == 0.5
    assert summarize_suffix_probability(np.array([-np.inf]))["logprob"] is None


DRAWS = 40_000


@pytest.mark.parametrize(
    "word",
    [
        "temperature=1",
        pytest.param("temperature=0.3", marks=pytest.mark.nightly),
        pytest.param("temperature=0.6,top-k=5", marks=pytest.mark.nightly),
        "temperature=0.5,top-p=0.7",
    ],
)
def test_p_z_and_the_curve_agree_with_direct_sampling(model, word):
    """The suffix is the most frequent sample, so p_z is not tiny."""
    length, suffix = 8, 2
    prefix = np.random.default_rng(5).integers(3, 512, length)
    policies = parse_sampling_policies([word])
    drawn = np.empty((DRAWS, suffix), np.int64)
    rng = np.random.default_rng(6)
    shape = jax.jit(warp_logits, static_argnums=1)
    for token in range(suffix):
        before, group = np.unique(drawn[:, :token], axis=0, return_inverse=True)
        contexts = np.concatenate([np.tile(prefix, (len(before), 1)), before], axis=1).astype(np.int32)
        logits = model.logits(contexts)[:, -1]
        masked = np.asarray(shape(logits, *policies.values()) if policies else logits, np.float64)
        odds = np.exp(masked - masked.max(axis=1, keepdims=True)).cumsum(axis=1)
        sought = rng.random(DRAWS) * odds[group, -1]
        drawn[:, token] = [np.searchsorted(odds[row], at, side="right") for row, at in zip(group, sought, strict=True)]
    half = DRAWS // 2
    values, counts = np.unique(drawn[:half], axis=0, return_counts=True)
    chosen = values[np.argmax(counts)]  # chosen on one half of the draws, counted on the other
    hits = (drawn[half:] == chosen).all(axis=1)
    measured = extraction_metrics(model, np.concatenate([prefix, chosen])[None], length, policies=policies)
    logprob = measured[" ".join(["logprob", *policies])]
    p_z = float(np.exp(logprob[0]))
    for n in (1, 5, 20, 100):
        groups = hits[: half // n * n].reshape(-1, n).any(axis=1)
        expected = 1 - (1 - p_z) ** n
        error = np.sqrt(expected * (1 - expected) / len(groups))
        assert abs(groups.mean() - expected) < 4 * error + 1e-12, (n, p_z)  # one in 16,000 by chance
        for p in P_LEVELS:
            if n in N_SAMPLES and abs(expected - p) > 4 * error:
                assert n_p_discoverable(logprob)[f"{n}@{p}"][0] == (groups.mean() >= p)
