"""The decoder: one function on any mesh, token by token or all at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_selftrain.mesh import Layout, make_layout, make_mesh, place
from jax_selftrain.models import (
    PAGE,
    DecoderConfig,
    RopeConfig,
    axis_sizes,
    decode_step,
    flush_page,
    forward,
    grow_cache,
    init_cache,
    init_params,
    param_shardings,
    project,
)

LLAMA = DecoderConfig(
    vocab_size=512, hidden_size=64, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, intermediate_size=172,
    max_positions=512, norm="rmsnorm", norm_eps=1e-5, activation="silu", gated_mlp=True, parallel_residual=False,
    rotary_dim=8, rope=RopeConfig(), qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=True, tied=True,
    initializer_range=0.1,
)  # fmt: skip
NEOX = dataclasses.replace(
    LLAMA, num_kv_heads=8, norm="layernorm", activation="gelu", gated_mlp=False, parallel_residual=True, rotary_dim=2,
    qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=False, tied=False, sliding_window=(40, None),
)  # fmt: skip
MQA = dataclasses.replace(LLAMA, num_kv_heads=1)

ROUNDING = 2e-5
"""Logits here are of order 1–10; fp32 sums of a few hundred terms in another order move them by some 1e-6."""


def layout_of(config: DecoderConfig, spec: str = "data=1", preset: str = "tensor") -> Layout:
    return make_layout(preset, make_mesh(spec), axis_sizes(config))


def tokens_of(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 512, (rows, length)).astype(np.int32)


def logits_of(config: DecoderConfig, layout: Layout, tokens: np.ndarray, **given) -> np.ndarray:
    params = init_params(config, 0, layout)
    given = {name: place(layout, value, ("batch", None)) for name, value in given.items()}
    with jax.set_mesh(layout.mesh):
        run = jax.jit(lambda p, t, kw: project(config, layout, p, forward(config, layout, p, t, **kw)))
        return np.asarray(run(params, place(layout, tokens, ("batch", None)), given))


@pytest.mark.parametrize("config", [LLAMA, NEOX, MQA], ids=["gqa", "neox", "mqa"])
@pytest.mark.parametrize(
    ("spec", "preset"),
    [("data=4", "fsdp"), ("data=2,model=2", "fsdp"), ("model=4", "tensor"), ("data=8", "replicated")],
)
def test_logits_and_parameters_are_the_same_on_any_mesh(config, spec, preset):
    tokens = tokens_of(8, 48)
    one, many = layout_of(config), layout_of(config, spec, preset)
    jax.tree.map(np.testing.assert_array_equal, init_params(config, 0, one), init_params(config, 0, many))
    np.testing.assert_allclose(logits_of(config, many, tokens), logits_of(config, one, tokens), atol=ROUNDING)


@pytest.mark.parametrize("config", [LLAMA, NEOX, MQA], ids=["gqa", "neox", "mqa"])
@pytest.mark.parametrize(("spec", "ragged"), [("data=1", False), ("data=2,model=2", True)], ids=["lockstep", "per-row"])
def test_token_by_token_equals_all_at_once(config, spec, ragged):
    rows, length = 4, 2 * PAGE + 9
    layout, tokens = layout_of(config, spec), tokens_of(4, 2 * PAGE + 9)
    params = init_params(config, 0, layout)

    @jax.jit
    def step(params, cache, token, position, settled, offset):
        hidden, cache = decode_step(config, layout, params, cache, token, position, settled, offset)
        return project(config, layout, params, hidden), cache

    with jax.set_mesh(layout.mesh):
        cache = jax.jit(lambda: init_cache(config, layout, rows, PAGE))()
        settled = place(layout, np.zeros(rows, np.int32), ("batch",)) if ragged else jnp.int32(0)
        logits = []
        for t in range(length):
            position = place(layout, np.full(rows, t, np.int32), ("batch",))
            token = place(layout, tokens[:, t], ("batch",))
            out, cache = step(params, cache, token, position, settled, jnp.int32(t % PAGE))
            logits.append(np.asarray(out))
            if t % PAGE == PAGE - 1:
                cache = jax.jit(lambda cache, settled: flush_page(layout, cache, settled))(cache, settled)
                cache = jax.jit(lambda cache: grow_cache(layout, cache, cache.capacity + PAGE))(cache)
                settled = settled + PAGE
    np.testing.assert_allclose(np.stack(logits, 1), logits_of(config, layout, tokens), atol=ROUNDING)


def test_rows_with_settled_parts_of_different_lengths_decode_as_if_alone():
    """Row 0 starts afresh while row 1 has a page behind it: what refilling finished rows needs."""
    config, layout = LLAMA, layout_of(LLAMA)
    tokens = tokens_of(2, 2 * PAGE)
    params = init_params(config, 0, layout)
    step = jax.jit(lambda *inputs: decode_step(config, layout, *inputs))
    with jax.set_mesh(layout.mesh):
        cache = init_cache(config, layout, 2, 2 * PAGE)
        settled = jnp.zeros(2, jnp.int32)
        history = [tokens[:, :PAGE], np.stack([tokens[0, :PAGE], tokens[1, PAGE:]])]
        starts = [np.zeros(2, np.int32), np.array([0, PAGE], np.int32)]
        for fed, start in zip(history, starts, strict=True):
            for t in range(PAGE):
                hidden, cache = step(params, cache, fed[:, t], start + np.int32(t), settled, jnp.int32(t))
            cache = flush_page(layout, cache, settled)
            settled = jnp.array([0, PAGE], jnp.int32)
        last = np.asarray(project(config, layout, params, hidden))
    np.testing.assert_allclose(last[0], logits_of(config, layout, tokens[:1, :PAGE])[0, -1], atol=ROUNDING)
    np.testing.assert_allclose(last[1], logits_of(config, layout, tokens[1:])[0, -1], atol=ROUNDING)


def test_segments_hide_other_documents_and_positions_restart():
    first, second = tokens_of(1, 20, seed=1), tokens_of(1, 30, seed=2)
    packed = np.concatenate([first, second], axis=1)
    segments = np.repeat([1, 2], [20, 30])[None].astype(np.int32)
    positions = np.concatenate([np.arange(20), np.arange(30)])[None].astype(np.int32)
    layout = layout_of(NEOX)
    together = logits_of(NEOX, layout, packed, segments=segments, positions=positions)
    np.testing.assert_allclose(together[:, :20], logits_of(NEOX, layout, first), atol=ROUNDING)
    np.testing.assert_allclose(together[:, 20:], logits_of(NEOX, layout, second), atol=ROUNDING)


def test_sliding_window_sees_exactly_its_latest_positions():
    """With one layer of window w, logits at t depend on tokens t−w+1 … t and on no other."""
    config = dataclasses.replace(LLAMA, num_layers=1, sliding_window=(8,))
    tokens = tokens_of(1, 32)
    base = logits_of(config, layout_of(config), tokens)
    for moved, seen in [(31 - 8, False), (31 - 7, True), (31, True)]:
        other = tokens.copy()
        other[0, moved] = (other[0, moved] + 1) % 512
        changed = np.abs(logits_of(config, layout_of(config), other)[0, 31] - base[0, 31]).max() > ROUNDING
        assert changed == seen


def test_rematerialisation_changes_nothing_but_memory():
    layout, tokens = layout_of(LLAMA, "data=2,model=2", "fsdp"), tokens_of(4, 24)
    params = init_params(LLAMA, 0, layout)

    def loss(params, tokens, remat):
        hidden = forward(LLAMA, layout, params, tokens, remat=remat)
        return jnp.square(project(LLAMA, layout, params, hidden)).mean()

    with jax.set_mesh(layout.mesh):
        placed = place(layout, tokens, ("batch", None))
        plain, saved = (jax.jit(jax.grad(loss), static_argnums=2)(params, placed, remat) for remat in (False, True))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(saved), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(np.asarray(b)).max())


def test_gradients_lie_where_their_parameters_lie():
    layout = layout_of(NEOX, "data=2,model=2", "fsdp")
    params = init_params(NEOX, 0, layout)
    with jax.set_mesh(layout.mesh):
        tokens = place(layout, tokens_of(4, 8), ("batch", None))
        gradients = jax.jit(jax.grad(lambda p: forward(NEOX, layout, p, tokens).sum()))(params)
    shardings = param_shardings(NEOX, layout)
    jax.tree.map(
        lambda g, s: g.sharding.is_equivalent_to(s, g.ndim) or pytest.fail(f"{g.sharding} != {s}"), gradients, shardings
    )


def test_program_size_does_not_grow_with_depth():
    def program(layers: int) -> str:
        config = dataclasses.replace(LLAMA, num_layers=layers)
        layout = layout_of(config)
        params = init_params(config, 0, layout)
        with jax.set_mesh(layout.mesh):
            return jax.jit(lambda p, t: forward(config, layout, p, t)).lower(params, tokens_of(1, 8)).as_text()

    assert program(2).count("stablehlo.dot_general") == program(12).count("stablehlo.dot_general")


def test_bfloat16_operands_keep_the_residual_stream_in_fp32():
    layout, tokens = layout_of(LLAMA), tokens_of(2, 16)
    params = init_params(LLAMA, 0, layout)
    with jax.set_mesh(layout.mesh):
        low = forward(LLAMA, layout, params, jnp.asarray(tokens), compute_dtype=jnp.bfloat16)
        full = forward(LLAMA, layout, params, jnp.asarray(tokens))
    assert low.dtype == jnp.float32
    # bf16 operands carry 8 bits: relative error 2^-8 an operand, averaged over sums
    np.testing.assert_allclose(low, full, atol=0.1)
    assert np.abs(np.asarray(low) - np.asarray(full)).max() > 1e-4
