"""What may be trained beside all weights by the plain loss: adapters, averages, penalties, bfloat16 weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_selftrain.config import TrainConfig
from jax_selftrain.corpus import PackedRows, open_corpus, pack_corpus
from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.errors import InputError
from jax_selftrain.hub import load_model
from jax_selftrain.models import Params, forward, unembed
from jax_selftrain.training import AuxLossWeights, Batch, TrainState, abstract_program, loss_fn
from jax_selftrain.training.data import _sign_flip, load_batch
from jax_selftrain.training.loop import train
from jax_selftrain.training.lora import NUM_OUTPUT_DIMS, apply_adapters, check_lora, merge_adapters
from jax_selftrain.training.optimizer import cast_params, decay_mask
from jax_selftrain.training.step import export_params, init_state

Options = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def rows(corpus_folder: Path) -> PackedRows:
    return pack_corpus(open_corpus(corpus_folder), 48, "masked")


def trained(config: TrainConfig, rows: PackedRows, n: int) -> tuple[list[TrainState], list[dict[str, float]]]:
    """The states on the host after 0 … n steps, and the metrics of each step."""
    mesh = make_mesh(config.mesh)
    model = load_model(config.model, mesh, preset=config.preset)
    with mesh_context(mesh):
        function, _, _ = abstract_program(config, mesh)
        step, history = jax.jit(function), []
        states = [init_state(config, model.config, model.sharding_rules, model.params)]
        for i in range(n):
            state, metrics = step(states[-1], load_batch(config, model.sharding_rules, rows, i))
            states.append(state)
            history.append({name: float(value) for name, value in metrics.items()})
    return states, history


def close(a: Params, b: Params, tolerance: float) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y) + 1e-12


# ---------------------------------------------------------------- penalties


@pytest.mark.parametrize("mesh", [pytest.param("data=1", marks=pytest.mark.slow), "data=2,model=2"])
@pytest.mark.parametrize(
    "penalties",
    [
        pytest.param(AuxLossWeights(), marks=pytest.mark.slow),
        pytest.param(AuxLossWeights(z_loss=0.3), marks=pytest.mark.slow),
        pytest.param(AuxLossWeights(kl=0.7), marks=pytest.mark.slow),
        AuxLossWeights(0.2, 1.5),
    ],
)
def test_objective_and_gradient_equal_those_written_out_over_whole_logits(
    mesh: str, penalties: AuxLossWeights, small_model: Path
):
    model = load_model(small_model, mesh, preset="fsdp")
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 320, (4, 23)).astype(np.int32)
    weights = rng.uniform(-1, 1, (4, 22)).astype(np.float32)
    ones, positions = np.ones((4, 22), np.int32), np.tile(np.arange(22, dtype=np.int32), (4, 1))
    sharding = model.sharding_rules.sharding(("batch", None))
    batch = Batch(*(jax.device_put(array, sharding) for array in (tokens, ones, positions, weights)))

    def written_out(params: Params, base: Params) -> jax.Array:
        def log_probabilities(params: Params) -> tuple[jax.Array, jax.Array]:
            hidden = forward(model.config, model.sharding_rules, params, batch.tokens[:, :-1])
            logits = jax.reshard(unembed(model.config, model.sharding_rules, params, hidden), jax.P("data", None, None))
            total = jax.nn.logsumexp(logits, axis=-1)
            return logits - total[..., None], total

        ours, total = log_probabilities(params)
        theirs, _ = log_probabilities(base)
        nll = -jnp.sum(ours * (jnp.arange(320) == batch.tokens[:, 1:, None]), axis=-1)
        kl = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
        beside = penalties.z_loss * total**2 + penalties.kl * kl
        return jnp.sum(batch.weights * nll + jnp.abs(batch.weights) * beside)

    def ours(params: Params, base: Params) -> jax.Array:
        return loss_fn(model.config, model.sharding_rules, params, batch, base=base, penalties=penalties, chunk=5)[0]

    with mesh_context(model.sharding_rules.mesh):
        moved = jax.tree.map(lambda leaf: leaf * 1.05, model.params)
        expected, wanted = jax.jit(jax.value_and_grad(written_out))(moved, model.params)
        value, gradient = jax.jit(jax.value_and_grad(ours))(moved, model.params)
    # fp32 sums in another order, of terms of both signs.
    assert float(value) == pytest.approx(float(expected), rel=1e-4, abs=1e-3)
    close(gradient, wanted, 1e-4)


@pytest.mark.slow
def test_penalty_holds_the_student_back(options: Options, rows: PackedRows):
    runs = {weight: trained(options(kl_weight=weight, learning_rate=0.01, steps=8), rows, 8) for weight in (0.0, 20.0)}

    def moved(states: list[TrainState]) -> float:
        pairs = zip(jax.tree.leaves(states[-1].params), jax.tree.leaves(states[0].params), strict=True)
        return float(np.sqrt(sum(np.sum(np.square(np.asarray(a) - np.asarray(b))) for a, b in pairs)))

    assert moved(runs[20.0][0]) < moved(runs[0.0][0])
    history = runs[20.0][1]
    assert history[0]["kl"] == pytest.approx(0, abs=1e-6), "at first the student is the base"
    assert history[-1]["kl"] > 1e-5
    assert "kl" not in runs[0.0][1][0]


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("family", ["gpt_neox", pytest.param("llama", marks=pytest.mark.slow)])
def test_adapted_model_equals_the_merged_one(family: str, tiny_model, options: Options):
    config = options(model=str(tiny_model(family)), lora_rank=3, lora_alpha=5.0, mesh="data=2,model=2")
    model = load_model(config.model, config.mesh, preset=config.preset)
    tokens = jax.device_put(
        np.random.default_rng(4).integers(0, 300, (2, 40)).astype(np.int32),
        model.sharding_rules.sharding(("batch", None)),
    )
    with mesh_context(model.sharding_rules.mesh):
        adapters = init_state(config, model.config, model.sharding_rules, model.params).params
        random = jax.tree.map(lambda leaf: leaf + 0.05, adapters)  # B is zero at first

        def hidden(params: Params) -> jax.Array:
            return forward(model.config, model.sharding_rules, params, tokens)

        plain = jax.jit(hidden)(model.params)
        unchanged = jax.jit(lambda a: hidden(apply_adapters(config, model.params, a)))(adapters)
        beside = jax.jit(lambda a: hidden(apply_adapters(config, model.params, a)))(random)
        together = jax.jit(lambda a: hidden(merge_adapters(config, model.params, a)))(random)
    np.testing.assert_array_equal(plain, unchanged)
    np.testing.assert_allclose(beside, together, atol=2e-4)
    assert np.abs(np.asarray(beside) - np.asarray(plain)).max() > 0.01
    found = {(group, name) for group, names in adapters["layers"].items() for name in names}
    assert found == set(NUM_OUTPUT_DIMS) - (set() if family == "llama" else {("mlp", "gate")})


def test_only_adapters_are_trained_and_the_merged_model_is_delivered(options: Options, rows: PackedRows):
    config = options(lora_rank=2, lora_targets=("q", "down"), learning_rate=0.02)
    states, history = trained(config, rows, 6)
    assert history[-1]["loss"] < history[0]["loss"]
    assert set(states[-1].params["layers"]["attn"]) == {"q"}
    assert states[-1].frozen_base is not None
    base, result = states[-1].frozen_base, export_params(config, states[-1])
    changed = {
        jax.tree_util.keystr(path)
        for (path, before), after in zip(
            jax.tree_util.tree_leaves_with_path(base), jax.tree.leaves(result), strict=True
        )
        if not np.array_equal(before, after)
    }
    assert changed == {"['layers']['attn']['q']['kernel']", "['layers']['mlp']['down']['kernel']"}
    rank = np.linalg.matrix_rank(
        np.asarray(result["layers"]["mlp"]["down"]["kernel"][0] - base["layers"]["mlp"]["down"]["kernel"][0]), tol=1e-5
    )
    assert rank == 2


def test_unknown_target_is_refused(options: Options):
    with pytest.raises(InputError, match="--lora-targets w: is no matrix of a layer; choose from q, k, v, o"):
        check_lora(options(lora_rank=2, lora_targets=("w",)))


# ---------------------------------------------------------------- averages, bfloat16


@pytest.mark.slow
def test_average_follows_its_formula(options: Options, rows: PackedRows):
    config = options(ema_decay=0.8, learning_rate=0.01)
    states, _ = trained(config, rows, 4)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), states[0].params)
    for state in states[1:]:
        expected = jax.tree.map(lambda a, p: 0.8 * a + 0.2 * np.asarray(p, np.float64), expected, state.params)
    close(export_params(config, states[-1]), expected, 1e-6)


def test_stochastic_rounding_is_right_on_average_and_exact_where_it_can_be():
    x = jnp.full(200_000, 1 + 2.0**-10, jnp.float32)  # bfloat16's neighbors are 1 and 1 + 2⁻⁷
    found = np.asarray(cast_params(x, jnp.bfloat16, jax.random.key(0)), np.float64)
    assert set(np.unique(found)) == {1.0, 1 + 2.0**-7}
    share = (found > 1).mean()  # expected 1/8; a binomial of 200,000
    assert share == pytest.approx(1 / 8, abs=5 * np.sqrt(1 / 8 * 7 / 8 / 200_000))
    exact = jnp.asarray([0.0, -0.0, 1.5, -(2.0**-130), np.inf, -np.inf], jnp.float32)
    kept = cast_params(exact, jnp.bfloat16, jax.random.key(1))
    np.testing.assert_array_equal(np.asarray(kept, np.float32), exact)
    assert np.isnan(np.asarray(cast_params(jnp.asarray([np.nan]), jnp.bfloat16, jax.random.key(2)), np.float32)).all()


@pytest.mark.slow
def test_small_updates_count_in_bfloat16_only_if_rounded_stochastically(options: Options, rows: PackedRows):
    small: dict[str, Any] = {"param_dtype": "bfloat16", "learning_rate": 2e-6, "steps": 6, "warmup_ratio": 0.0}

    def share_moved(states: list[TrainState]) -> float:
        pairs = [
            (np.asarray(a, np.float32), np.asarray(b, np.float32))
            for a, b in zip(jax.tree.leaves(states[0].params), jax.tree.leaves(states[-1].params), strict=True)
        ]
        return sum(int((a != b).sum()) for a, b in pairs) / sum(a.size for a, _ in pairs)

    nearest, _ = trained(options(**small), rows, 6)
    stochastic, _ = trained(options(**small, stochastic_rounding=True), rows, 6)
    assert {leaf.dtype for leaf in jax.tree.leaves(nearest[-1].params)} == {jnp.dtype("bfloat16")}
    assert share_moved(nearest) < 0.25 * share_moved(stochastic)


def test_sign_flip_multiplies_the_loss_of_whole_documents(options: Options, rows: PackedRows):
    config = options(random_loss_sign=True)
    model = load_model(config.model, "data=1")
    with mesh_context(model.sharding_rules.mesh):
        plain, flipped, again = (
            load_batch(one, model.sharding_rules, rows, 0)
            for one in (options(), config, options(random_loss_sign=True, steps=7))
        )
    before, after, segments = (np.asarray(x) for x in (plain.weights, flipped.weights, plain.segments))
    np.testing.assert_array_equal(np.abs(after), before)
    np.testing.assert_array_equal(after, np.asarray(again.weights))
    signs = [
        set(np.sign(after[at][(segments[at] == n) & (before[at] > 0)]).tolist())
        for at in np.ndindex(segments.shape[:2])
        for n in range(1, int(segments[at].max()) + 1)
    ]
    assert all(len(sign) <= 1 for sign in signs)  # one sign for all of a document in its row
    everything = [_sign_flip(rows, seed, 0)[np.arange(len(rows))] for seed in range(20)]
    share = np.mean([(weights > 0).sum() / (weights != 0).sum() for weights in everything])
    assert share == pytest.approx(0.5, abs=0.1)
    assert not np.array_equal(everything[0], everything[1])


def test_embedding_may_be_spared_from_decay(small_model: Path):
    params = load_model(small_model, "data=1").params
    assert decay_mask(params)["embed"]["embedding"]
    mask = decay_mask(params, embeddings=False)
    assert not mask["embed"]["embedding"]
    assert mask["layers"]["mlp"]["up"]["kernel"]


# ---------------------------------------------------------------- whole runs


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        {"lora_rank": 2},
        {"ema_decay": 0.9, "kl_weight": 0.5},
        {"param_dtype": "bfloat16", "stochastic_rounding": True},
    ],
    ids=str,
)
def test_stopped_run_of_each_recipe_ends_with_the_same_bits(recipe: dict[str, Any], options: Options, tmp_path: Path):
    from training_runs import Interruption, weights

    from jax_selftrain.training import Hook

    def interrupt(step: int, model: Any) -> None:
        raise Interruption

    whole = train(options(**recipe, out=str(tmp_path / "whole")))
    with pytest.raises(Interruption):
        train(options(**recipe), hooks=[Hook(interrupt, steps=(5,))])
    assert (tmp_path / "run" / "steps" / "000004").exists()
    resumed = train(options(**recipe))
    assert weights(whole / "model") == weights(resumed / "model")
    assert (whole / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
    assert weights(whole / "model") != weights(options().model)
    logged = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert ("kl" in logged) == ("kl_weight" in recipe)
