"""The loss: gradients against torch, segment masks, memory."""

import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from corpus_factory import pack_corpus

from jax_selftrain.corpus import open_corpus
from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import make_sharding_rules
from jax_selftrain.hub import LoadedModel, load_model
from jax_selftrain.models import DecoderConfig, Params, abstract_params, axis_sizes, forward, unembed
from jax_selftrain.models.config import RopeConfig
from jax_selftrain.training.loss import LOGITS_BYTES, Batch, LossStats, choose_chunk_size, loss_fn


def rows_on_device(model: LoadedModel, tokens: np.ndarray, weights: np.ndarray, **arrays: np.ndarray) -> Batch:
    """Make a batch of rows of one document each, by default."""
    rows, length = weights.shape
    segments = arrays.get("segments", np.ones((rows, length), np.int32))
    positions = arrays.get("positions", np.tile(np.arange(length, dtype=np.int32), (rows, 1)))
    sharding = model.sharding_rules.sharding(("batch", None))
    return Batch(*(jax.device_put(array, sharding) for array in (tokens, segments, positions, weights)))


def compute_stats(model: LoadedModel, batch: Batch, **options: Any) -> LossStats:
    with mesh_context(model.sharding_rules.mesh):
        return jax.jit(partial(loss_fn, model.config, model.sharding_rules, **options))(model.params, batch)[1]


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen2", "qwen3"])
def test_gradient_equals_torchs(family: str, tiny_model, tmp_path: Path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = tiny_model(family)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 512, (3, 33)).astype(np.int32)
    weights = rng.uniform(-1, 1, (3, 32)).astype(np.float32)  # sign-flipped targets, too

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    log_probabilities = reference(torch.tensor(tokens[:, :-1]).long()).logits.log_softmax(-1)
    nll = -log_probabilities.gather(-1, torch.tensor(tokens[:, 1:, None]).long())[..., 0]
    (torch.tensor(weights) * nll).sum().backward()

    model = load_model(folder, "data=1")
    batch = rows_on_device(model, tokens, weights)
    with mesh_context(model.sharding_rules.mesh):
        gradient = jax.jit(
            jax.grad(lambda params: loss_fn(model.config, model.sharding_rules, params, batch, chunk_size=10)[0])
        )(model.params)
    # A gradient has the shapes of the parameters, so the hub's export can bring it into torch's layout.
    dataclasses.replace(model, params=gradient).save_pretrained(tmp_path / "gradient")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "gradient", dtype=torch.float32)
    ours = {name: parameter.detach().numpy() for name, parameter in exported.named_parameters()}
    theirs = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = np.linalg.norm(ours[name] - expected) / np.linalg.norm(expected)
        # Two fp32 programs that sum in different orders: a few rounding errors of 6e-8 per layer and reduction.
        assert error <= 1e-4, name


def test_loss_of_a_masked_row_is_the_sum_of_its_documents_losses(small_model: Path, corpus_folder: Path):
    model = load_model(small_model, "data=1")
    corpus = open_corpus(corpus_folder)
    rows = pack_corpus(corpus, 120, "masked")
    assert rows.segments.max() >= 3, "several documents share a row"
    packed = rows_on_device(model, rows.tokens, rows.weights, segments=rows.segments, positions=rows.positions)
    together = float(compute_stats(model, packed).loss)

    documents = [np.append(corpus.start_id, sample.tokens).astype(np.int32) for sample in corpus.iter_samples()]
    longest = max(len(document) for document in documents)
    tokens, weights = np.zeros((len(documents), longest), np.int32), np.zeros((len(documents), longest - 1), np.float32)
    for row, document in enumerate(documents):
        tokens[row, : len(document)] = document
        weights[row, : len(document) - 1] = 1  # causal: the padding behind a document cannot be seen from it
    apart = float(compute_stats(model, rows_on_device(model, tokens, weights)).loss)
    # Sums of about 2,000 fp32 terms in another order.
    assert together == pytest.approx(apart, rel=1e-5)


def test_chunks_sum_to_the_whole(small_model: Path):
    model = load_model(small_model, "data=1")
    rng = np.random.default_rng(1)
    batch = rows_on_device(
        model, rng.integers(0, 320, (4, 23)).astype(np.int32), rng.uniform(0, 1, (4, 22)).astype(np.float32)
    )
    whole, sliced = (compute_stats(model, batch, chunk_size=size) for size in (22, 5))
    logits = np.asarray(model.logits(np.asarray(batch.tokens[:, :-1])))
    assert float(sliced.loss) == pytest.approx(float(whole.loss), rel=1e-6)  # the same terms in another order
    assert (float(sliced.weight), int(sliced.tokens)) == (float(whole.weight), int(whole.tokens))
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
    expected = np.sum(np.asarray(nll) * np.asarray(batch.weights))
    assert float(whole.loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("mesh", [pytest.param("data=1", marks=pytest.mark.nightly), "data=2,model=2"])
def test_loss_and_gradient_equal_those_of_full_logits(mesh: str, small_model: Path):
    model = load_model(small_model, mesh, preset="fsdp")
    config, rules = model.config, model.sharding_rules
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 320, (4, 23)).astype(np.int32)
    batch = rows_on_device(model, tokens, rng.uniform(-1, 1, (4, 22)).astype(np.float32))

    def full_loss(params: Params) -> jax.Array:
        hidden = forward(config, rules, params, batch.tokens[:, :-1])
        logits = jax.reshard(unembed(config, rules, params, hidden), jax.P("data", None, None))
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        nll = -jnp.sum(log_probs * (jnp.arange(320) == batch.tokens[:, 1:, None]), axis=-1)
        return jnp.sum(batch.weights * nll)

    def chunked_loss(params: Params) -> jax.Array:
        return loss_fn(config, rules, params, batch, chunk_size=5)[0]

    with mesh_context(rules.mesh):
        expected, expected_grad = jax.jit(jax.value_and_grad(full_loss))(model.params)
        value, grad = jax.jit(jax.value_and_grad(chunked_loss))(model.params)
    # fp32 sums in another order, of terms of both signs.
    assert float(value) == pytest.approx(float(expected), rel=1e-4, abs=1e-3)
    for found, wanted in zip(jax.tree.leaves(grad), jax.tree.leaves(expected_grad), strict=True):
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        assert np.linalg.norm(found - wanted) <= 1e-4 * np.linalg.norm(wanted) + 1e-12


def test_logits_of_a_whole_batch_never_exist(small_model: Path):
    model = load_model(small_model, "data=1")
    batch = rows_on_device(model, np.zeros((4, 65), np.int32), np.ones((4, 64), np.float32))

    def loss(params: dict, batch: Batch) -> jax.Array:
        return loss_fn(model.config, model.sharding_rules, params, batch, chunk_size=8)[0]

    with mesh_context(model.sharding_rules.mesh):
        jaxpr = jax.make_jaxpr(jax.grad(loss))(model.params, batch)
    shapes = set(shapes_in(jaxpr.jaxpr))
    assert (4, 8, 320) in shapes, "a slice of logits"
    assert max(np.prod(shape) for shape in shapes if shape[-1:] == (320,)) == 4 * 8 * 320


def shapes_in(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def _pythia(vocabulary: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocabulary, hidden_size=64, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=16,
        intermediate_size=64, max_positions=2048, norm="layernorm", norm_eps=1e-5, activation="gelu", gated_mlp=False,
        parallel_residual=True, rotary_dim=4, rope=RopeConfig(), qkv_bias=True, out_bias=True, mlp_bias=True,
        qk_norm=None, tie_word_embeddings=False,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 32, 1024])
def test_chunk_fits_the_budget_for_pythias_vocabulary(rows: int):
    config = _pythia(50304)
    rules = make_sharding_rules("tensor", make_mesh("data=1,model=2"), axis_sizes(config))
    chunk = choose_chunk_size(config, rules, rows, 2048)
    assert rows * chunk * config.vocab_size // 2 * 4 <= LOGITS_BYTES or chunk == 1
    assert 2048 <= chunk * -(-2048 // chunk) < 2048 + chunk


def test_bfloat16_operands_change_the_loss_by_their_rounding_only(small_model: Path):
    model = load_model(small_model, "data=1")
    tokens = np.random.default_rng(2).integers(0, 320, (4, 33)).astype(np.int32)
    batch = rows_on_device(model, tokens, np.ones((4, 32), np.float32))
    exact = float(compute_stats(model, batch).loss)
    rounded = float(compute_stats(model, batch, compute_dtype=jnp.bfloat16).loss)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=1e-2)  # bfloat16 keeps 8 bits: 4e-3 per operand


@pytest.mark.parametrize(
    ("mesh", "preset", "remat"),
    [
        ("data=1", "tensor", "none"),
        pytest.param("data=2,model=2", "tensor", "none", marks=pytest.mark.nightly),
        pytest.param("data=4", "fsdp", "dots", marks=pytest.mark.nightly),
    ],
)
def test_gradients_with_bfloat16_operands_differ_by_rounding_only(
    small_model: Path, mesh: str, preset: Any, remat: Any
):
    model = load_model(small_model, mesh, preset=preset)
    tokens = np.random.default_rng(2).integers(0, 320, (4, 33)).astype(np.int32)
    batch = rows_on_device(model, tokens, np.ones((4, 32), np.float32))

    def gradient(dtype: Any) -> Any:
        loss = partial(loss_fn, model.config, model.sharding_rules, compute_dtype=dtype, remat=remat)
        with mesh_context(model.sharding_rules.mesh):
            return jax.jit(jax.grad(loss, has_aux=True))(model.params, batch)[0]

    exact, rounded = gradient(jnp.float32), gradient(jnp.bfloat16)
    for path, leaf in jax.tree.leaves_with_path(exact):
        other = dict(jax.tree.leaves_with_path(rounded))[path]
        assert other.sharding == leaf.sharding
        error = np.linalg.norm(np.asarray(other, np.float64) - np.asarray(leaf, np.float64))
        assert 0 < error < 0.02 * np.linalg.norm(np.asarray(leaf, np.float64)), path


def test_replicas_reduce_the_output_matrix_once_and_not_for_every_chunk(small_model: Path):
    model = load_model(small_model, "data=4", preset="replicated")
    batch = rows_on_device(model, np.zeros((4, 65), np.int32), np.ones((4, 64), np.float32))
    with mesh_context(model.sharding_rules.mesh):
        gradient = jax.jit(jax.grad(partial(loss_fn, model.config, model.sharding_rules, chunk_size=8), has_aux=True))
        text = gradient.lower(model.params, batch).compile().as_text()
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    found, inside = [], ""
    for line in text.splitlines():
        if heading := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            inside = heading[1]
        elif (reduced := re.search(r"= (.*) all-reduce(?:-start)?\(", line)) and "320" in reduced[1]:
            found.append(inside)
    assert found, "the output matrix is added up somewhere"
    assert not bodies & set(found)


def test_a_large_vocabulary_costs_far_less_memory_than_its_logits():
    """Temporary memory of the gradient grows little with the vocabulary."""

    def temporary(vocabulary: int) -> int:
        config = dataclasses.replace(_pythia(vocabulary), hidden_size=64)
        rules = make_sharding_rules("tensor", make_mesh("data=1"), axis_sizes(config))
        rows, length = 8, 512
        sharding = rules.sharding(("batch", None))
        shapes = [((rows, length + 1), "int32"), *[((rows, length), "int32")] * 2, ((rows, length), "float32")]
        batch = Batch(*(jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes))
        params = abstract_params(config, rules=rules)
        with mesh_context(rules.mesh):
            gradient = jax.jit(jax.grad(partial(loss_fn, config, rules), has_aux=True))
            memory = gradient.lower(params, batch).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    added = temporary(50304) - temporary(512)  # the gradients themselves are results, not temporary
    assert 0 < added < 0.15 * (4 * 8 * 512 * 50304)
