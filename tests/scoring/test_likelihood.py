"""The likelihood engine against transformers, and against itself in other shapes."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_selftrain import hub
from jax_selftrain.config import ScoreConfig
from jax_selftrain.errors import InputError
from jax_selftrain.mesh import make_layout, make_mesh
from jax_selftrain.models import axis_sizes
from jax_selftrain.scoring import Request, loglikelihoods, program, token_scores
from jax_selftrain.scoring.likelihood import batch_program, logprobs_and_argmax
from jax_selftrain.scoring.trees import bucket_lengths

FAMILIES = ("gpt_neox", "llama")
POSITIONS = 640
BATCH = 1280


def random_requests(n: int, vocab: int, longest: int, seed: int = 0) -> list[Request]:
    """Requests of all lengths up to a little beyond what the model can take."""
    rng = np.random.default_rng(seed)
    requests = []
    for _ in range(n):
        total = int(rng.integers(2, longest + 1))
        continuation = int(rng.integers(1, min(total, longest // 2)))
        tokens = rng.integers(0, vocab, total).tolist()
        requests.append(Request(tokens[:-continuation], tokens[-continuation:]))
    return requests


def edge_requests(tokens: np.ndarray, positions: int) -> list[Request]:
    """One token, powers of two and their neighbours, odd lengths, and contexts that must be cut from the left."""
    shapes = [(1, 1), (1, 31), (1, 32), (1, 33), (31, 33), (64, 1), (97, 31), (positions - 1, 1), (positions, 1)]
    shapes += [(positions - 3, 4), (positions + 5, 3), (2 * positions, 129), (1, positions), (positions, positions)]
    ids = tokens.tolist()
    return [Request(ids[:context], ids[context : context + continuation]) for context, continuation in shapes]


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
    """`load(family, mesh, preset)` → a tiny model of 640 positions, a size that is no power of two."""

    def loaded(family: str = "llama", mesh: str = "data=1", preset: str = "tensor") -> hub.LoadedModel:
        return hub.load_model(tiny_model(family, max_position_embeddings=POSITIONS), mesh, preset=preset)

    return loaded


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


@pytest.mark.parametrize(
    ("mesh", "preset"),
    [("data=4", "tensor"), ("data=2,model=2", "tensor"), ("model=2", "replicated"), ("data=2,model=2", "fsdp")],
)
def test_any_mesh_gives_the_same_likelihoods(load, mesh, preset):
    requests = random_requests(40, 512, 64)
    one = token_scores(load(), requests, batch_tokens=BATCH)
    many = token_scores(load("llama", mesh, preset), requests, batch_tokens=BATCH)
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)  # rounding noise of fp32 logits is about 1e-6
        np.testing.assert_array_equal(a.greedy, b.greedy)


def test_batch_size_does_not_matter(load):
    requests = random_requests(40, 512, 64)
    large = np.array([answer.loglikelihood for answer in loglikelihoods(load(), requests, batch_tokens=4096)])
    small = np.array([answer.loglikelihood for answer in loglikelihoods(load(), requests, batch_tokens=64)])
    np.testing.assert_allclose(large, small, atol=1e-4)  # sums over up to 32 tokens, each off by rounding of about 1e-6


def test_a_request_is_scored_alike_in_any_company(load):
    requests = random_requests(30, 512, 64)
    everyone = loglikelihoods(load(), requests, batch_tokens=BATCH)
    assert loglikelihoods(load(), requests[::-1], batch_tokens=BATCH) == everyone[::-1]
    assert loglikelihoods(load(), requests[7:8], batch_tokens=BATCH) == everyone[7:8]
    assert loglikelihoods(load(), [], batch_tokens=BATCH) == []


def test_few_shapes_serve_all_lengths():
    assert bucket_lengths(2048) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert bucket_lengths(POSITIONS) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 640]
    assert bucket_lengths(32) == [32]
    assert bucket_lengths(20) == [20]


def test_greedy_means_that_every_token_is_the_most_probable(load):
    model = load()
    tokens = [1, 40, 77]
    for _ in range(6):
        tokens.append(int(np.argmax(np.asarray(model.logits(np.array([tokens], np.int32)))[0, -1])))
    wrong = [*tokens[:-1], (tokens[-1] + 1) % 512]
    answers = loglikelihoods(model, [(tokens[:3], tokens[3:]), (tokens[:3], wrong[3:]), (tokens[:2], tokens[2:])])
    assert [answer.is_greedy for answer in answers[:2]] == [True, False]
    (scores,) = token_scores(model, [(wrong[:3], wrong[3:])])
    assert scores.greedy.tolist() == tokens[3:]  # the last token itself does not change what is predicted there


def test_equal_logits_are_won_by_the_lowest_id_and_great_ones_stay_finite():
    logits = jnp.array([[[0.0, 5.0, 5.0, -jnp.inf], [3e4, -3e4, 0.0, 3e4]]])
    logprobs, best = logprobs_and_argmax(logits, jnp.array([[2, 1]]))
    assert best.tolist() == [[1, 0]]
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits)[0, [0, 1], [2, 1]][None], rtol=1e-6)


def test_requests_that_no_model_can_answer_are_refused(load):
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


def test_the_program_compiles_without_weights_and_never_holds_all_logits(tiny_model):
    vocab = 8192  # large enough that logits would dwarf everything else
    folder = tiny_model("llama", vocab_size=vocab, max_position_embeddings=128, tokenizer=False)
    config = ScoreConfig(model=str(folder), batch_tokens=8192)
    mesh = make_mesh("data=2,model=2")
    function, arguments, donated = program(config, mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
    all_logits = 4 * config.batch_tokens * vocab // 4  # bytes on each of the four devices
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < all_logits / 2


def test_the_engine_runs_the_program_that_it_plans(load):
    model = load("llama", "data=2")
    function, arguments, _ = batch_program(model.config, model.layout, model.compute_dtype, BATCH, 64)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), arguments[0])
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.params)
    assert make_layout("tensor", model.layout.mesh, axis_sizes(model.config)) == model.layout
    with jax.set_mesh(model.layout.mesh):
        logprobs, greedy = jax.eval_shape(function, *arguments)
    assert logprobs.shape == greedy.shape == arguments[2].shape
