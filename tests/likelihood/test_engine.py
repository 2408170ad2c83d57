"""The likelihood engine equals transformers, and itself in other shapes."""

import dataclasses
import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scoring_requests import (
    BATCH,
    CONFIG,
    POSITIONS,
    load_with_positions,
    questions,
    random_requests,
    tokenize_all,
    tokenize_request,
)

from jax_selftrain import hub
from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import make_sharding_rules
from jax_selftrain.errors import InputError
from jax_selftrain.likelihood import LoglikelihoodRequest, loglikelihoods, token_scores
from jax_selftrain.likelihood.batching import (
    BUFFER_BATCHES,
    PROJECTION_CHUNK,
    SMALL_BATCHES,
    UNIT_BATCHES,
    UNIT_TOKENS,
    plan_units,
)
from jax_selftrain.likelihood.engine import deduplicate
from jax_selftrain.likelihood.prefix_trie import (
    MAX_BUCKETS,
    MAX_TARGETS,
    adjacent_lcp,
    bin_pack,
    choose_bucket_lengths,
    group_by_prefix,
    measure_groups,
    pack_trie,
    round_up_to_bucket,
)
from jax_selftrain.likelihood.resumable import PartialResults
from jax_selftrain.models import axis_sizes, forward, unembed

FAMILIES = ("gpt_neox", "llama")


def edge_requests(tokens: np.ndarray, positions: int) -> list[LoglikelihoodRequest]:
    """Return requests of edge lengths, some with truncated contexts."""
    shapes = [(1, 1), (1, 31), (1, 32), (1, 33), (31, 33), (64, 1), (97, 31), (positions - 1, 1), (positions, 1)]
    shapes += [(positions - 3, 4), (positions + 5, 3), (2 * positions, 129), (1, positions), (positions, positions)]
    ids = tokens.tolist()
    return [
        LoglikelihoodRequest(ids[:context], ids[context : context + continuation]) for context, continuation in shapes
    ]


def reference(folder, requests, positions):
    """`HFLM._loglikelihood_tokens` of lm-eval 0.4.13, one request at a time, in torch."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    results = []
    with torch.no_grad():
        for context, continuation in requests:
            whole = [*context, *continuation][-(positions + 1) :]
            logprobs = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)[-len(continuation) :]
            wanted = torch.tensor(np.asarray(continuation))
            total = float(logprobs.gather(1, wanted[:, None]).double().sum())
            results.append((total, bool((logprobs.argmax(-1) == wanted).all())))
    return results


@pytest.fixture(scope="module")
def load(tiny_model):
    return partial(load_with_positions, tiny_model)


@pytest.mark.parametrize("family", FAMILIES)
def test_loglikelihoods_equal_those_of_transformers(load, tiny_model, family):
    pytest.importorskip("torch")
    model = load(family)
    requests = edge_requests(np.random.default_rng(1).integers(0, 512, 2 * POSITIONS + 129), POSITIONS)
    found = loglikelihoods(model, requests, batch_tokens=BATCH)
    expected = reference(tiny_model(family, max_position_embeddings=POSITIONS), requests, POSITIONS)
    for answer, (loglikelihood, is_greedy), request in zip(found, expected, requests, strict=True):
        # DESIGN's promise: 1e-3 in fp32, for sums over up to 640 tokens whose logits have a spread of about 2.
        assert answer.loglikelihood == pytest.approx(loglikelihood, abs=1e-3)
        assert answer.is_greedy == is_greedy
        assert answer.tokens == len(request.continuation)


def test_loglikelihoods_of_a_trained_model_equal_those_of_transformers(data_dir, stories260k):
    pytest.importorskip("torch")
    model = hub.load_model(stories260k, "data=1")
    stories = (json.loads(line)["text"] for line in (data_dir / "tinystories/heldout.jsonl").open())
    tokens = np.array([1, *itertools.chain.from_iterable(map(model.tokenizer.encode, itertools.islice(stories, 10)))])
    requests = edge_requests(tokens, 512)
    found = loglikelihoods(model, requests, batch_tokens=BATCH)
    for answer, (loglikelihood, is_greedy) in zip(found, reference(stories260k, requests, 512), strict=True):
        assert answer.loglikelihood == pytest.approx(loglikelihood, abs=1e-3)
        assert answer.is_greedy == is_greedy


def test_batch_size_does_not_matter(load):
    requests = random_requests(40, 512, 64)
    large = np.array([answer.loglikelihood for answer in loglikelihoods(load(), requests, batch_tokens=4096)])
    small = np.array([answer.loglikelihood for answer in loglikelihoods(load(), requests, batch_tokens=64)])
    np.testing.assert_allclose(large, small, atol=1e-4)  # sums over up to 32 tokens, each off by rounding of about 1e-6


def test_scores_do_not_depend_on_order_and_up_to_rounding_on_other_requests(load):
    for requests in (random_requests(30, 512, 64), questions(5)):
        everyone = loglikelihoods(load(), requests, batch_tokens=BATCH)
        assert loglikelihoods(load(), requests[::-1], batch_tokens=BATCH) == everyone[::-1]
        few = loglikelihoods(load(), requests[:5], batch_tokens=BATCH)
        for alone, among in zip(few, everyone[:5], strict=True):
            # sums over up to 32 tokens, each off by rounding of about 1e-6
            assert alone.loglikelihood == pytest.approx(among.loglikelihood, abs=1e-4)
            assert alone.is_greedy == among.is_greedy
    assert loglikelihoods(load(), [], batch_tokens=BATCH) == []


def test_scores_of_tokens_sum_to_those_of_requests_and_are_kept_apart(load, tmp_path):
    requests = [*random_requests(30, 512, 64), *questions(5)]
    whole = loglikelihoods(load(), requests, batch_tokens=BATCH)
    found = token_scores(load(), requests, batch_tokens=BATCH)
    assert [scores.sum() for scores in found] == whole
    assert any(scores.is_greedy.any() and not scores.is_greedy.all() for scores in found)
    parts = PartialResults(tmp_path / "parts")
    assert loglikelihoods(load(), requests, batch_tokens=BATCH, parts=parts) == whole
    for _ in range(2):  # computed, then read
        for kept, scores in zip(token_scores(load(), requests, batch_tokens=BATCH, parts=parts), found, strict=True):
            np.testing.assert_array_equal(kept.logprobs, scores.logprobs)
            np.testing.assert_array_equal(kept.is_greedy, scores.is_greedy)
    assert parts.computed_requests == 2 * parts.unique_requests / 3


# ---------------------------------------------------------------- shared prefixes


def plan(requests, max_positions=POSITIONS, batch_tokens=BATCH):
    config = dataclasses.replace(CONFIG, max_positions=max_positions)
    rules = make_sharding_rules("tensor", make_mesh("data=1"), axis_sizes(config))
    return plan_units(rules, config, tokenize_all(requests), batch_tokens)


def in_order(requests):
    """The requests in the order of their ids."""
    return sorted(requests, key=lambda request: tokenize_request(*request).sort_key)


def pack_in_order(requests):
    """One row of all requests."""
    ordered = tokenize_all(requests)
    return pack_trie(ordered, adjacent_lcp(ordered), range(len(ordered)))


def packed_rows(units):
    return [row for unit in units for batch in unit.batches for row in batch.rows]


def paths(row):
    """Return the tokens that each position of a row attends to."""
    index = np.arange(len(row.tokens))
    seen = (index <= index[:, None]) & (index[:, None] < row.subtree_ends)
    np.testing.assert_array_equal(seen.sum(axis=1) - 1, row.positions)
    return [row.tokens[mine].tolist() for mine in seen]


def test_a_context_is_computed_once_and_a_shared_prediction_projected_once():
    context, tails = list(range(40)), [[100, 101, 102], [200, 201], [300], [400]]
    ((batch,),) = (unit.batches for unit in plan([(context, tail) for tail in tails]))
    (row,) = batch.rows
    assert (batch.length, batch.num_queries) == (48, 8)  # the last layer is computed at eight of the positions
    assert row.tokens.tolist() == [*context, 100, 101, 200]
    assert row.positions.tolist() == [*range(40), 40, 41, 40]
    assert row.subtree_ends.tolist() == [43] * 40 + [42, 42, 43]
    assert row.query_positions.tolist() == [39, 40, 41, 42]  # all four first tokens are predicted at the context's last
    assert sorted(row.targets[0].tolist()) == [100, 200, 300, 400]
    five = plan([(context, [token]) for token in range(100, 101 + MAX_TARGETS)])
    assert five[0].batches[0].rows[0].query_positions.tolist() == [39, 39]


def test_the_same_request_is_computed_once(load):
    model, (request, other) = load(), random_requests(2, 512, 64)
    answers = loglikelihoods(model, [request, other, request, request], batch_tokens=BATCH)
    assert answers[0] == answers[2] == answers[3] != answers[1]
    assert [len(deduplicate(model.config, some)[0]) for some in ([request] * 3, [request, other])] == [1, 2]


def test_a_shared_prefix_is_stored_once_in_nested_tries():
    """Choices with shared first words, after questions with shared first words."""
    requests = in_order(
        [
            ([1, 2, 3, 4], [5, 6, 7]),
            ([1, 2, 3, 4], [5, 6, 8]),
            ([1, 2, 3, 4], [5, 9]),
            ([1, 2, 3, 5], [5, 6]),
            ([7, 3], [4]),
        ]
    )
    row = pack_in_order(requests)
    assert row.tokens.tolist() == [1, 2, 3, 4, 5, 6, 5, 5, 7, 3]
    assert row.subtree_ends.tolist() == [8, 8, 8, 6, 6, 6, 8, 8, 10, 10]
    seen = paths(row)
    for member, answer in zip(row.request_ids, row.target_index, strict=True):
        context, continuation = requests[member]
        for n, (at, column) in enumerate(answer):
            assert seen[row.query_positions[at]] == [*context, *continuation][: len(context) + n]
            assert row.targets[at, column] == continuation[n]
    # Three requests share the query after 5, two share the query after 5 and 6.
    assert len(row.query_positions) == 6 < sum(len(continuation) for _, continuation in requests)


def test_a_trie_is_computed_as_its_paths_one_by_one(load):
    """`forward` on random tries equals `forward` on each path."""
    model, rng = load("gpt_neox"), np.random.default_rng(2)
    inputs = [rng.integers(0, 3, int(n)).tolist() for n in rng.integers(2, 9, 40)]  # of three tokens: they fork at once
    row = pack_in_order([(tokens, [9]) for tokens in inputs])
    nodes = {tuple(tokens[:n]) for tokens in inputs for n in range(1, len(tokens) + 1)}
    seen = paths(row)
    assert sorted(map(tuple, seen)) == sorted(nodes)
    arrays = {name: jnp.asarray(getattr(row, name)[None]) for name in ("tokens", "positions", "subtree_ends")}

    @jax.jit
    def logits(params, tokens, positions, subtree_ends=None):
        hidden = forward(
            model.config, model.sharding_rules, params, tokens, positions=positions, subtree_ends=subtree_ends
        )
        return unembed(model.config, model.sharding_rules, params, hidden)

    with mesh_context(model.sharding_rules.mesh):
        together = np.asarray(logits(model.params, **arrays))[0]
        alone = np.zeros((len(seen), 8), np.int32)
        for tokens, path in zip(alone, seen, strict=True):
            tokens[: len(path)] = path
        apart = np.asarray(logits(model.params, alone, jnp.broadcast_to(jnp.arange(8), alone.shape)))
    expected = apart[np.arange(len(seen)), row.positions]
    np.testing.assert_allclose(together, expected, atol=2e-5)  # rounding noise of fp32 logits is about 1e-6


def test_groups_save_a_third_of_the_tokens_and_are_bounded():
    strangers = tokenize_all([([0, token], list(range(10))) for token in range(1, 9)])
    groups = group_by_prefix(strangers, adjacent_lcp(strangers), POSITIONS)
    assert list(map(len, groups)) == [1] * 8  # they share 1 of 11 tokens
    many = [(list(range(60)), [100 + i, *range(20)]) for i in range(100)]
    assert max(len(row.tokens) for row in packed_rows(plan(many))) <= 256
    examples = [(list(range(300)), [400 + i, *range(20)]) for i in range(20)]
    assert max(len(row.tokens) for row in packed_rows(plan(examples))) > 500  # long ones may double
    assert all(len(row.tokens) <= 340 for row in packed_rows(plan(examples, max_positions=340)))
    assert sorted(member for row in packed_rows(plan(many)) for member in row.request_ids) == list(range(100))


def positions(unit):
    return sum(batch.length * len(batch.rows) for batch in unit.batches)


def test_units_bound_the_cost_of_an_interruption_and_the_longest_come_first():
    units = plan(random_requests(600, 512, 300), batch_tokens=640)
    lengths = [batch.length for unit in units for batch in unit.batches]
    assert len(units) > 2
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(unit.batches) <= UNIT_BATCHES or positions(unit) <= UNIT_TOKENS for unit in units)
    room = -(-BUFFER_BATCHES * POSITIONS // PROJECTION_CHUNK) * PROJECTION_CHUNK
    assert all(sum(len(row.query_positions) for row in packed_rows([unit])) <= room for unit in units)
    few = [(request.context, request.continuation[:1]) for request in random_requests(1000, 512, 300)]
    for batch_tokens, own in ((16, 128), (640, 640), (4096, 4096)):  # a row of 128 is longer than 16 positions
        units = plan(few, batch_tokens=batch_tokens)
        assert len(units) > 1
        for unit in units[:-1]:
            assert len(unit.batches) <= SMALL_BATCHES
            assert len(unit.batches) in (UNIT_BATCHES, SMALL_BATCHES) or positions(unit) + own > UNIT_TOKENS
            assert positions(unit) <= max(UNIT_TOKENS, UNIT_BATCHES * own)


def test_a_position_with_many_targets_fills_several_slots(load):
    """Every token of the vocabulary is scored after one context."""
    requests = [([7], [token]) for token in range(512)]
    answers = loglikelihoods(load(), requests, batch_tokens=BATCH)
    assert sum(np.exp(answer.loglikelihood) for answer in answers) == pytest.approx(1.0, abs=1e-5)
    assert sum(answer.is_greedy for answer in answers) == 1


# ---------------------------------------------------------------- rows and their lengths


def test_short_requests_are_packed_if_that_is_cheaper():
    rng = np.random.default_rng(0)
    short = in_order([(rng.integers(0, 512, int(n)).tolist(), [3]) for n in rng.integers(5, 60, 400)])
    batches = [batch for unit in plan(short) for batch in unit.batches]
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(member for row in rows for member in row.request_ids) == list(range(400))
    for row in rows:
        seen = paths(row)
        for member, answer in zip(row.request_ids, row.target_index, strict=True):
            ((place, column),) = answer
            assert row.targets[place, column] == 3
            assert seen[row.query_positions[place]] == short[member][0]
    tokens = sum(len(context) for context, _ in short)
    assert sum(batch.length * len(batch.rows) for batch in batches) < 1.05 * tokens
    # Texts of one length keep a row each, without padding.
    alike = [([*rng.integers(0, 512, 80).tolist()], [3]) for _ in range(64)]
    assert {batch.length for unit in plan(alike) for batch in unit.batches} == {80}


def test_rows_are_full_and_never_overfull():
    rng = np.random.default_rng(0)
    tokens, none = rng.integers(5, 100, 500), np.zeros(500, np.int64)
    rows, filled = bin_pack(tokens, none, none, none, 128)
    assert sorted(item for members in rows for item in members) == list(range(500))
    assert filled.tolist() == [tokens[members].sum() for members in rows]
    assert filled.max() <= 128
    assert len(rows) <= 1.03 * tokens.sum() / 128
    assert len(bin_pack(tokens, none, none, none, 256)[0]) <= 1.02 * tokens.sum() / 256
    # Shared prefixes save room.
    shared = np.minimum(rng.integers(0, 20, 500), tokens - 1)
    closer, filled = bin_pack(tokens, none, shared, shared, 512)
    assert sorted(item for members in closer for item in members) == list(range(500))
    assert len(closer) <= 1.01 * (tokens.sum() - 0.7 * shared.sum()) / 512
    for members, need in zip(closer, filled, strict=True):
        common = [min(shared[a + 1 : b + 1]) for a, b in itertools.pairwise(members)]
        assert tokens[members].sum() - sum(common) <= need <= 512
    # Query positions need room, too.
    assert bin_pack(np.full(4, 10), np.full(4, 60), np.full(4, 9), np.full(4, 9), 128)[0] == [[0, 1], [2, 3]]
    assert bin_pack(np.array([20, 300, 20]), none[:3], none[:3], none[:3], 128)[0] == [[0, 2], [1]]
    assert bin_pack(np.array([20, 300]), none[:2], none[:2], none[:2], 0)[0] == [[0], [1]]


def test_rows_fit_for_any_shared_prefixes():
    """Requests of two tokens share prefixes of all lengths."""
    rng = np.random.default_rng(5)
    skipped = 0
    for _ in range(60):
        n, deep = int(rng.integers(40, 300)), int(rng.integers(10, 60))
        stems = [rng.integers(0, 2, deep).tolist() for _ in range(6)]
        requests = {
            (
                tuple(stems[rng.integers(6)][: int(rng.integers(1, deep))]),
                tuple(rng.integers(0, 2, int(rng.integers(1, 40)))),
            )
            for _ in range(n)
        }
        requests = [(list(context), list(map(int, tail))) for context, tail in requests]
        for unit in plan(requests):
            for batch in unit.batches:
                for row in batch.rows:
                    assert max(len(row.tokens), len(row.query_positions)) <= batch.length
                    assert len(row.query_positions) <= batch.num_queries
        ordered = tokenize_all(requests)
        lcp = adjacent_lcp(ordered)
        groups = group_by_prefix(ordered, lcp, POSITIONS)
        alone = [pack_trie(ordered, lcp, group) for group in groups]
        packing, filled = bin_pack(*measure_groups(lcp, groups, alone), 128)
        skipped += sum(b - a > 1 for row in packing for a, b in itertools.pairwise(row))
        for row, need in zip(packing, filled, strict=True):
            assert pack_trie(ordered, lcp, [i for group in row for i in groups[group]]).size <= need
    assert skipped > 100


def test_lengths_are_the_cheapest_choice():
    """The cost equals that of exhaustive search."""

    def price(lengths):
        return lengths * (1 + lengths / 3072)

    rng = np.random.default_rng(0)
    for compiling in (0.0, 200.0, 2000.0):
        sizes = rng.choice(np.arange(8, 90, 9), 60)
        ends = sorted({round_up_to_bucket(int(size), 2048) for size in sizes})
        best = np.inf
        for k in range(1, MAX_BUCKETS + 1):
            for chosen in itertools.combinations(ends, k):
                if chosen[-1] == ends[-1]:
                    served = np.array(chosen)[np.searchsorted(chosen, sizes)]
                    best = min(best, price(served).sum() + compiling * k)
        found = choose_bucket_lengths(sizes, 2048, price, compiling)
        assert (found >= sizes).all()
        assert len(set(found)) <= MAX_BUCKETS
        assert price(found).sum() + compiling * len(set(found)) == pytest.approx(best)


def test_lengths_are_rounded_to_buckets():
    assert [round_up_to_bucket(n, 2048) for n in (1, 8, 9, 128, 129, 512, 513, 2047)] == [
        8,
        8,
        16,
        128,
        144,
        512,
        576,
        2048,
    ]
    assert [round_up_to_bucket(n, 20) for n in (5, 17, 20)] == [8, 20, 20]


def test_greedy_means_that_every_token_is_the_most_probable(load):
    model = load()
    tokens = [1, 40, 77]
    for _ in range(6):
        tokens.append(int(np.argmax(np.asarray(model.logits(np.array([tokens], np.int32)))[0, -1])))
    wrong = [*tokens[:-1], (tokens[-1] + 1) % 512]
    answers = loglikelihoods(model, [(tokens[:3], tokens[3:]), (tokens[:3], wrong[3:]), (tokens[:2], tokens[2:])])
    assert [answer.is_greedy for answer in answers[:2]] == [True, False]
    # The last token itself does not change what is predicted there.
    each = loglikelihoods(model, [(wrong[:i], tokens[i : i + 1]) for i in range(3, len(tokens))])
    assert all(answer.is_greedy for answer in each)


def test_invalid_requests_are_refused(load):
    model = load()
    for request, message in (
        (([], [3]), "at least one token"),
        (([3], []), "at least one token"),
        (([3], [512]), "token id 512 is not in the model's vocabulary of 512"),
        (([-1], [3]), "token id -1"),
        (([3], [4] * 641), "longer than the model's 640 positions"),
    ):
        with pytest.raises(InputError, match=f"request 1: .*{message}"):
            loglikelihoods(model, [([3], [4]), request])
