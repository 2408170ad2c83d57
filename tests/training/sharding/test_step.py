"""The step: AdamW against references, meshes, gradient accumulation, sharding."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpus_factory import whole_mixture

from jax_selftrain.config import TrainConfig
from jax_selftrain.corpus import PackedRows
from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.errors import InputError
from jax_selftrain.hub import load_model
from jax_selftrain.training import abstract_train_step
from jax_selftrain.training.data import load_batch
from jax_selftrain.training.loss import loss_fn
from jax_selftrain.training.optimizer import decay_mask, learning_rates
from jax_selftrain.training.step import TrainState, abstract_batch, abstract_state, init_state, jit_key, make_step


def run_steps(config: TrainConfig, rows: PackedRows, n: int) -> tuple[TrainState, list[dict[str, float]]]:
    """Run `n` steps as the training loop does."""
    mesh = make_mesh(config.mesh)
    model = load_model(config.model, mesh, preset=config.preset)
    with mesh_context(mesh):
        function, _, donation = abstract_train_step(config, mesh)
        step = jax.jit(function, donate_argnums=donation)
        state = init_state(config, model.config, model.sharding_rules, model.params)
        rates = learning_rates(config, config.steps or 1)
        history = []
        for i in range(n):
            state, metrics = step(state, load_batch(config, model.sharding_rules, whole_mixture(rows), i), rates[i])
            history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def test_ten_steps_equal_adamw_written_out_in_numpy(options: Callable[..., TrainConfig], rows: PackedRows):
    """In fp64, with the formulas of Loshchilov & Hutter (algorithm 2)."""
    changes: dict[str, Any] = {"dtype": "float64"}  # not offered to users: `highest` fp32 is what devices have
    config = dataclasses.replace(
        options(mesh="data=1", steps=10, learning_rate=0.01, schedule="cosine", final_learning_rate=0.001),
        weight_decay=0.1, clip_norm=0.5, grad_accum=2, warmup_ratio=0.2, **changes,
    )  # fmt: skip
    base = load_model(config.model, "data=1")
    with jax.enable_x64(True), mesh_context(base.sharding_rules.mesh):
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), base.params)
        state = init_state(config, base.config, base.sharding_rules, params)
        step = jax.jit(make_step(config, base.config, base.sharding_rules))
        rates = learning_rates(config, 10)

        def mean_loss(params: dict, batch) -> jax.Array:
            only = jax.tree.map(lambda leaf: leaf[0], batch)  # of one micro-batch
            loss, sums = loss_fn(base.config, base.sharding_rules, params, only, compute_dtype=jnp.float64)
            return loss / sums.weight

        gradient_of = jax.jit(jax.grad(mean_loss))
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        expected = [np.array(leaf) for leaf in jax.tree.leaves(params)]
        start = [leaf.copy() for leaf in expected]
        first, second = [np.zeros_like(p) for p in expected], [np.zeros_like(p) for p in expected]
        clipped = 0
        for n in range(10):
            state, metrics = step(state, load_batch(config, base.sharding_rules, whole_mixture(rows), n), rates[n])

            whole = load_batch(dataclasses.replace(config, grad_accum=1), base.sharding_rules, whole_mixture(rows), n)
            gradient = gradient_of(jax.tree.unflatten(jax.tree.structure(params), expected), whole)
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]
            norm = np.sqrt(sum(np.sum(leaf**2) for leaf in leaves))
            assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-9)
            clipped += norm > 0.5
            progress = (n + 1 - 2) / 8
            rate = 0.01 * (n + 1) / 2 if n < 2 else 0.001 + 0.009 * (1 + np.cos(np.pi * progress)) / 2
            assert float(metrics["learning_rate"]) == pytest.approx(rate, rel=1e-6)  # schedules are fp32
            rate = float(metrics["learning_rate"])
            for i, leaf in enumerate(leaves):
                leaf = leaf * min(1, 0.5 / norm)
                first[i] = 0.9 * first[i] + 0.1 * leaf
                second[i] = 0.95 * second[i] + 0.05 * leaf**2
                update = first[i] / (1 - 0.9 ** (n + 1)) / (np.sqrt(second[i] / (1 - 0.95 ** (n + 1))) + 1e-8)
                decay = 0.1 if paths[i][-1].key in ("kernel", "embedding") else 0.0
                expected[i] = expected[i] - rate * (update + decay * expected[i])
        assert clipped, "clipping was exercised"
        for path, found, wanted, before in zip(paths, jax.tree.leaves(state.params), expected, start, strict=True):
            # Relative to how far the weights moved. optax keeps 1 − βⁿ in fp32 (6e-8), the rest is fp64.
            error = np.linalg.norm(np.asarray(found) - wanted) / np.linalg.norm(wanted - before)
            assert error < 1e-6, jax.tree_util.keystr(path)


def test_ten_steps_equal_torchs_adamw(options: Callable[..., TrainConfig], rows: PackedRows):
    """Both use the same fp64 gradients: norms in transformers are fp32."""
    torch = pytest.importorskip("torch")
    changes: dict[str, Any] = {"dtype": "float64"}
    config = dataclasses.replace(
        options(mesh="data=1", steps=10, learning_rate=0.01),
        weight_decay=0.1, clip_norm=0.5, grad_accum=2, warmup_ratio=0.0, **changes,
    )  # fmt: skip
    base = load_model(config.model, "data=1")
    with jax.enable_x64(True), mesh_context(base.sharding_rules.mesh):
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), base.params)
        leaves, structure = jax.tree.flatten(params)
        theirs = [torch.tensor(np.array(leaf), requires_grad=True) for leaf in leaves]
        decayed = jax.tree.leaves(decay_mask(params))
        groups = [
            {"params": [p for p, yes in zip(theirs, decayed, strict=True) if yes], "weight_decay": 0.1},
            {"params": [p for p, yes in zip(theirs, decayed, strict=True) if not yes], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)

        def mean_loss(params: dict, batch) -> jax.Array:
            only = jax.tree.map(lambda leaf: leaf[0], batch)
            loss, sums = loss_fn(base.config, base.sharding_rules, params, only, compute_dtype=jnp.float64)
            return loss / sums.weight

        gradient_of = jax.jit(jax.grad(mean_loss))
        state = init_state(config, base.config, base.sharding_rules, params)
        step = jax.jit(make_step(config, base.config, base.sharding_rules))
        rates = learning_rates(config, 10)
        for n in range(10):
            state, _ = step(state, load_batch(config, base.sharding_rules, whole_mixture(rows), n), rates[n])
            batch = load_batch(dataclasses.replace(config, grad_accum=1), base.sharding_rules, whole_mixture(rows), n)
            at = jax.tree.unflatten(structure, [jnp.asarray(p.detach().numpy()) for p in theirs])
            for p, gradient in zip(theirs, jax.tree.leaves(gradient_of(at, batch)), strict=True):
                p.grad = torch.tensor(np.array(gradient))
            norm = torch.sqrt(sum((p.grad**2).sum() for p in theirs))
            for p in theirs:
                p.grad *= min(1.0, 0.5 / norm.item())  # torch's own clipping divides by norm + 1e-6
            optimizer.step()
        for ours, wanted in zip(jax.tree.leaves(state.params), theirs, strict=True):
            expected = wanted.detach().numpy()
            assert np.linalg.norm(np.asarray(ours) - expected) <= 1e-9 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("mesh", "preset"),
    [
        ("data=2,model=2", "fsdp"),
        pytest.param("data=4", "fsdp", marks=pytest.mark.nightly),
        pytest.param("model=4", "tensor", marks=pytest.mark.nightly),
    ],
)
def test_loss_curve_is_the_same_on_every_mesh(
    options: Callable[..., TrainConfig], rows: PackedRows, mesh: str, preset: str
):
    _, one = run_steps(options(mesh="data=1", preset="fsdp"), rows, 5)
    _, many = run_steps(options(mesh=mesh, preset=preset), rows, 5)
    one_curve, many_curve = ([entry["loss"] for entry in history] for history in (one, many))
    # fp32 sums in another order (1e-7), amplified a little by five Adam steps.
    np.testing.assert_allclose(many_curve, one_curve, rtol=1e-5)
    assert one_curve[-1] != one_curve[0]


@pytest.mark.parametrize("mesh", ["data=1", pytest.param("data=2", marks=pytest.mark.nightly)])
def test_accumulated_micro_batches_equal_one_batch(options: Callable[..., TrainConfig], rows: PackedRows, mesh: str):
    uneven = rows.weights.copy()
    uneven[::3, 5:] = 0  # micro-batches with different numbers of targets: a mean of means would differ
    rows = dataclasses.replace(rows, weights=uneven)
    (one, one_history), (four, four_history) = (
        run_steps(options(mesh=mesh, grad_accum=grad_accum), rows, 4) for grad_accum in (1, 4)
    )
    assert [h["tokens"] for h in one_history] == [h["tokens"] for h in four_history]
    np.testing.assert_allclose([h["loss"] for h in one_history], [h["loss"] for h in four_history], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one.opt_state), jax.tree.leaves(four.opt_state), strict=True):
        # Moments are linear and quadratic in the gradient: fp32 rounding of sums in another order.
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= 1e-4 * np.linalg.norm(np.asarray(a)) + 1e-12


def test_parameters_and_both_moments_are_sharded_alike(options: Callable[..., TrainConfig], rows: PackedRows):
    state, _ = run_steps(options(mesh="data=2,model=2", preset="fsdp"), rows, 1)
    adam = next(
        part
        for part in jax.tree.leaves(state.opt_state, is_leaf=lambda leaf: hasattr(leaf, "mu"))
        if hasattr(part, "mu")
    )
    for moments in (adam.mu, adam.nu):
        jax.tree.map(lambda p, m: np.testing.assert_equal(m.sharding, p.sharding), state.params, moments)
    kernel = adam.mu["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4, "each device holds a quarter, not a copy"
    assert adam.nu["embed"]["embedding"].addressable_shards[0].data.size == adam.nu["embed"]["embedding"].size // 4


def test_program_compiles_from_shapes_alone_and_donates_the_state(options: Callable[..., TrainConfig]):
    mesh = make_mesh("data=2,model=2")
    function, arguments, donation = abstract_train_step(options(), mesh)
    with mesh_context(mesh):
        compiled = jax.jit(function, donate_argnums=donation).lower(*arguments).compile()
    state_bytes = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in jax.tree.leaves(arguments[0]))
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= state_bytes
    assert jax.tree.map(lambda leaf: leaf.sharding, arguments[0]) == compiled.input_shardings[0][0]


def test_master_weights_stay_float32_under_bfloat16_compute(options: Callable[..., TrainConfig], rows: PackedRows):
    state, history = run_steps(options(mesh="data=1", dtype="bfloat16", remat="full"), rows, 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert all(np.isfinite(entry["loss"]) for entry in history)


def test_batch_that_does_not_divide_is_refused_with_the_sizes_that_do(options: Callable[..., TrainConfig]):
    with pytest.raises(InputError, match=r"must be a multiple of 6, for instance 6, 12, 18"):
        abstract_train_step(options(batch_size=8, grad_accum=3), make_mesh("data=2"))


def test_runs_share_compiled_programs_unless_an_option_changes_them(options: Callable[..., TrainConfig]):
    config = options(mesh="data=1")
    model = load_model(config.model, "data=1")
    rules = model.sharding_rules

    def other(value: Any) -> Any:
        if isinstance(value, bool):
            return not value
        if isinstance(value, int | float):
            return value + 1
        return {"pretrained": "scratch", "masked": "single", None: 3}.get(value, "other") if value != () else ("other",)

    changed = {field.name: other(getattr(config, field.name)) for field in dataclasses.fields(config)}
    sharing = {name for name in changed if jit_key(config) == jit_key(options(**{name: changed[name]}))}
    assert {"out", "corpus", "seed", "random_loss_sign", "learning_rate", "schedule", "steps"} <= sharing
    assert not sharing & {"beta1", "lora_rank", "dtype", "remat"}

    with mesh_context(rules.mesh):
        arguments = abstract_state(config, model.config, rules), abstract_batch(config, rules), np.float32(0.1)
        first, second = (
            str(jax.make_jaxpr(make_step(one, model.config, rules))(*arguments))
            for one in (config, dataclasses.replace(config, **{name: changed[name] for name in sharing}))
        )
    assert first == second
