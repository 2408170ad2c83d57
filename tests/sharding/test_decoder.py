"""The decoder: forward pass and decode steps, on any mesh."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import ShardingRules, make_sharding_rules, shard_host_array
from jax_selftrain.models import DecoderConfig, abstract_params, axis_sizes, forward, init_params, unembed
from jax_selftrain.models.config import RopeConfig
from jax_selftrain.models.kv_cache import TAIL_LEN, decode_step, flush_tail, init_cache, num_used_blocks
from jax_selftrain.models.token_precompute import abstract_precomputed, precompute
from jax_selftrain.planning.jaxpr_flops import flops_by_dtype

LLAMA = DecoderConfig(
    vocab_size=512, hidden_size=64, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, intermediate_size=172,
    max_positions=512, norm="rmsnorm", norm_eps=1e-5, activation="silu", gated_mlp=True, parallel_residual=False,
    rotary_dim=8, rope=RopeConfig(), qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm="head",
    tie_word_embeddings=True, initializer_range=0.1,
)  # fmt: skip
NEOX = dataclasses.replace(
    LLAMA, num_kv_heads=8, norm="layernorm", activation="gelu", gated_mlp=False, parallel_residual=True, rotary_dim=2,
    qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=None, tie_word_embeddings=False, sliding_window=(40, None),
)  # fmt: skip
MQA = dataclasses.replace(LLAMA, num_kv_heads=1)
GPT2 = dataclasses.replace(NEOX, parallel_residual=False, rotary_dim=0, learned_positions=True, attention_scale=1.0)
OLMO3 = dataclasses.replace(
    LLAMA, qk_norm="width", post_norm=True, layer_ropes=(RopeConfig(), None), sliding_window=(40, None)
)
nightly = pytest.mark.nightly
compat = pytest.mark.compat
FAMILIES = [pytest.param(LLAMA, id="gqa"), pytest.param(NEOX, id="neox"), pytest.param(MQA, id="mqa", marks=nightly)]
GQA_EVERY_DAY = [FAMILIES[0], pytest.param(NEOX, id="neox", marks=nightly), FAMILIES[2]]
MESHES = [pytest.param("data=1", marks=nightly), "data=2,model=2"]

ROUNDING = 2e-5
"""Logits are of order 1–10; another order of fp32 sums of a few hundred terms changes them by about 1e-6."""


def sharding_rules_for(config: DecoderConfig, spec: str = "data=1", preset: str = "tensor") -> ShardingRules:
    return make_sharding_rules(preset, make_mesh(spec), axis_sizes(config))


def random_tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 512, (rows, length)).astype(np.int32)


def compute_logits(config: DecoderConfig, rules: ShardingRules, tokens: np.ndarray, **given) -> np.ndarray:
    params = init_params(config, 0, rules)
    given = {name: shard_host_array(rules, value, ("batch", None)) for name, value in given.items()}
    with mesh_context(rules.mesh):
        run = jax.jit(lambda p, t, kw: unembed(config, rules, p, forward(config, rules, p, t, **kw)))
        return np.asarray(run(params, shard_host_array(rules, tokens, ("batch", None)), given))


@pytest.mark.parametrize("config", GQA_EVERY_DAY)
@pytest.mark.parametrize("spec", MESHES)
def test_query_positions_select_positions_of_the_full_result(config: DecoderConfig, spec: str):
    rules, tokens = sharding_rules_for(config, spec), random_tokens(4, 70)
    at = np.random.default_rng(1).integers(0, 70, (4, 9)).astype(np.int32)
    segments = np.repeat(np.arange(7, dtype=np.int32), 10)[None].repeat(4, axis=0)
    found = compute_logits(config, rules, tokens, query_positions=at, segments=segments)
    whole = compute_logits(config, rules, tokens, segments=segments)
    np.testing.assert_allclose(found, np.take_along_axis(whole, at[..., None], axis=1), atol=ROUNDING)


@pytest.mark.parametrize("config", GQA_EVERY_DAY)
@pytest.mark.parametrize(
    ("layers", "preset"),
    [pytest.param(1, "tensor", marks=nightly), (2, "fsdp"), pytest.param(3, "tensor", marks=nightly)],
)
def test_precomputed_activations_give_the_same_logits(config: DecoderConfig, layers: int, preset: str):
    """Each device has its own table, which overwrites an older one."""
    windows = config.sliding_window and (40, *[None] * (layers - 1))
    config = dataclasses.replace(config, num_layers=layers, sliding_window=windows)
    rules, tokens = sharding_rules_for(config, "data=2,model=2", preset), random_tokens(4, 70)
    random = np.random.default_rng(1)
    at = random.integers(0, 70, (4, 9)).astype(np.int32)
    vocabularies = [random.permutation(np.unique(own)).astype(np.int32) for own in tokens.reshape(2, -1)]
    table, indices = np.zeros((2, 160), np.int32), np.zeros_like(tokens)
    for device, own in enumerate(vocabularies):
        table[device, : len(own)] = own
        mine = slice(2 * device, 2 * device + 2)
        indices[mine] = np.argsort(own)[np.searchsorted(np.sort(own), tokens[mine])]
    with mesh_context(rules.mesh):
        params = init_params(config, 0, rules)
        shapes = abstract_precomputed(config, rules, params, 160, jnp.float32)
        before = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, out_sharding=leaf.sharding), shapes)
        learn = jax.jit(partial(precompute, config, rules), static_argnums=4)
        chunks = shard_host_array(rules, np.asarray(-(-max(map(len, vocabularies)) // 16), np.int32), ())
        known = learn(params, before, shard_host_array(rules, table, ("batch", None)), chunks, 16)
        run = jax.jit(
            lambda p, t, at, known: unembed(
                config, rules, p, forward(config, rules, p, t, query_positions=at, precomputed=known)
            )
        )
        found = run(params, *(shard_host_array(rules, array, ("batch", None)) for array in (indices, at)), known)
    np.testing.assert_allclose(found, compute_logits(config, rules, tokens, query_positions=at), atol=ROUNDING)


@pytest.mark.parametrize(("config", "saved"), [(NEOX, "qkv and MLP"), (LLAMA, "qkv")])
def test_precomputed_activations_save_the_products_of_the_first_layer(config: DecoderConfig, saved: str):
    rules = sharding_rules_for(config)
    params = init_params(config, 0, rules)
    with mesh_context(rules.mesh):
        tokens, at = (
            shard_host_array(rules, array, ("batch", None))
            for array in (random_tokens(4, 70), np.zeros((4, 9), np.int32))
        )
        known = abstract_precomputed(config, rules, params, 160, jnp.float32)

        def operations(known) -> float:
            compute = partial(forward, config, rules)
            program = jax.make_jaxpr(compute)(params, tokens, query_positions=at, precomputed=known)
            return sum(flops_by_dtype(program).values())

        difference = operations(None) - operations(known)
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    if saved == "qkv and MLP":
        width += 2 * config.intermediate_size
    assert difference == 2 * 4 * 70 * config.hidden_size * width


@compat
@pytest.mark.parametrize("config", FAMILIES)
@pytest.mark.parametrize(
    ("spec", "preset"),
    [
        pytest.param("data=4", "fsdp", marks=nightly),
        ("data=2,model=2", "fsdp"),
        pytest.param("model=4", "tensor", marks=nightly),
        ("data=8", "replicated"),
    ],
)
def test_logits_and_parameters_are_the_same_on_any_mesh(config, spec, preset):
    tokens = random_tokens(8, 48)
    one, many = sharding_rules_for(config), sharding_rules_for(config, spec, preset)
    jax.tree.map(np.testing.assert_array_equal, init_params(config, 0, one), init_params(config, 0, many))
    np.testing.assert_allclose(compute_logits(config, many, tokens), compute_logits(config, one, tokens), atol=ROUNDING)


class StepwiseDecoder:
    """Decodes one token per row and step."""

    def __init__(self, config: DecoderConfig, rules: ShardingRules, rows: int, capacity: int, **options):
        self.config, self.sharding_rules, self.params = config, rules, init_params(config, 0, rules)
        with mesh_context(rules.mesh):
            self.cache = jax.jit(lambda: init_cache(config, rules, rows, capacity, **options))()
        self.committed_len = np.zeros(rows, np.int32)

        @jax.jit
        def step(params, cache, token, committed_len, offset):
            hidden, cache = decode_step(
                config,
                rules,
                params,
                cache,
                token,
                committed_len + offset,
                committed_len,
                num_used_blocks(cache, committed_len),
                offset,
            )
            return unembed(config, rules, params, hidden), cache

        self._step, self._flush = step, jax.jit(partial(flush_tail, rules))

    def decode_chunk(self, tokens: np.ndarray) -> np.ndarray:
        """Decode tokens [B, T ≤ TAIL_LEN] to logits; flush a full tail."""
        logits = []
        with mesh_context(self.sharding_rules.mesh):
            committed_len = shard_host_array(self.sharding_rules, self.committed_len, ("batch",))
            for t in range(tokens.shape[1]):
                token = shard_host_array(self.sharding_rules, tokens[:, t], ("batch",))
                out, self.cache = self._step(self.params, self.cache, token, committed_len, jnp.int32(t))
                logits.append(np.asarray(out))
            if tokens.shape[1] == TAIL_LEN:
                self.cache = self._flush(self.cache, committed_len)
        self.committed_len = self.committed_len + TAIL_LEN
        return np.stack(logits, axis=1)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [self.decode_chunk(tokens[:, t : t + TAIL_LEN]) for t in range(0, tokens.shape[1], TAIL_LEN)], axis=1
        )


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LLAMA, id="gqa", marks=compat),
        *GQA_EVERY_DAY[1:],
        pytest.param(GPT2, id="gpt2"),
        pytest.param(OLMO3, id="olmo3"),
    ],
)
@pytest.mark.parametrize("spec", MESHES)
@pytest.mark.parametrize("block_size", [TAIL_LEN, pytest.param(2 * TAIL_LEN, marks=nightly)])
def test_decode_steps_equal_the_forward_pass(config, spec, block_size):
    rules, tokens = sharding_rules_for(config, spec), random_tokens(4, 3 * TAIL_LEN + 9)
    decoded = StepwiseDecoder(config, rules, 4, 3 * TAIL_LEN, block_size=block_size).decode(tokens)
    np.testing.assert_allclose(decoded, compute_logits(config, rules, tokens), atol=ROUNDING)


@pytest.mark.parametrize("spec", ["data=1", pytest.param("data=2", marks=nightly)])
def test_a_row_has_the_same_bits_for_any_neighbors_and_capacity(spec):
    """Row 0 restarts while row 1 continues, as in continuous batching."""
    config, rules, tokens = LLAMA, sharding_rules_for(LLAMA, spec), random_tokens(4, 4 * TAIL_LEN)
    fresh, long = tokens[:2], tokens[2:]
    alone, decoding = [
        StepwiseDecoder(config, rules, 2, capacity, block_size=block_size)
        for capacity, block_size in ((4 * TAIL_LEN, TAIL_LEN), (8 * TAIL_LEN, TAIL_LEN))
    ]
    expected = (
        alone.decode(long),
        StepwiseDecoder(config, rules, 2, TAIL_LEN, block_size=TAIL_LEN).decode_chunk(fresh[:, :TAIL_LEN]),
    )
    mixed = np.stack([fresh[0], long[1]])
    found = [decoding.decode_chunk(long[:, t : t + TAIL_LEN]) for t in range(0, 3 * TAIL_LEN, TAIL_LEN)]
    decoding.committed_len = np.array([0, 3 * TAIL_LEN], np.int32)
    mixed = np.stack([fresh[0, :TAIL_LEN], long[1, 3 * TAIL_LEN :]])
    found.append(decoding.decode_chunk(mixed))
    np.testing.assert_array_equal(np.concatenate(found, axis=1)[1], expected[0][1])
    np.testing.assert_array_equal(found[-1][0], expected[1][0])


def test_committed_blocks_in_eight_bits_are_close():
    """int8 errors are at most 1/254 of a maximum, bfloat16 errors 2^-9."""
    config, rules, tokens = LLAMA, sharding_rules_for(LLAMA), random_tokens(4, 3 * TAIL_LEN)
    expected = compute_logits(config, rules, tokens)
    spread = expected.std()
    for dtype, bound in ((jnp.int8, 0.05), (jnp.bfloat16, 0.03)):
        decoded = StepwiseDecoder(config, rules, 4, 2 * TAIL_LEN, committed_dtype=dtype).decode(tokens)
        np.testing.assert_allclose(decoded[:, :TAIL_LEN], expected[:, :TAIL_LEN], atol=ROUNDING)
        error = np.abs(decoded[:, TAIL_LEN:] - expected[:, TAIL_LEN:])
        assert ROUNDING < error.max() < 10 * bound * spread
        assert error.mean() < bound * spread


def test_segments_mask_other_documents_and_positions_restart():
    first, second = random_tokens(1, 20, seed=1), random_tokens(1, 30, seed=2)
    packed = np.concatenate([first, second], axis=1)
    segments = np.repeat([1, 2], [20, 30])[None].astype(np.int32)
    positions = np.concatenate([np.arange(20), np.arange(30)])[None].astype(np.int32)
    rules = sharding_rules_for(NEOX)
    together = compute_logits(NEOX, rules, packed, segments=segments, positions=positions)
    np.testing.assert_allclose(together[:, :20], compute_logits(NEOX, rules, first), atol=ROUNDING)
    np.testing.assert_allclose(together[:, 20:], compute_logits(NEOX, rules, second), atol=ROUNDING)


def test_a_sliding_window_contains_exactly_the_latest_positions():
    """Logits at t depend on tokens t−w+1 … t only."""
    config = dataclasses.replace(LLAMA, num_layers=1, sliding_window=(8,))
    tokens = random_tokens(1, 32)
    base = compute_logits(config, sharding_rules_for(config), tokens)
    for changed_position, is_visible in [(31 - 8, False), (31 - 7, True), (31, True)]:
        other = tokens.copy()
        other[0, changed_position] = (other[0, changed_position] + 1) % 512
        changed = (
            np.abs(compute_logits(config, sharding_rules_for(config), other)[0, 31] - base[0, 31]).max() > ROUNDING
        )
        assert changed == is_visible


@pytest.mark.parametrize("remat", ["dots", pytest.param("full", marks=nightly)])
@pytest.mark.parametrize("spec", ["data=1", pytest.param("data=2,model=2", marks=nightly)])
def test_rematerialization_changes_memory_only(spec: str, remat: str):
    rules, tokens = sharding_rules_for(LLAMA, spec, "fsdp"), random_tokens(4, 24)
    params = init_params(LLAMA, 0, rules)

    def loss(params, tokens, remat):
        hidden = forward(LLAMA, rules, params, tokens, remat=remat)
        return jnp.square(unembed(LLAMA, rules, params, hidden)).mean()

    with mesh_context(rules.mesh):
        placed = shard_host_array(rules, tokens, ("batch", None))
        gradient = jax.jit(jax.grad(loss), static_argnums=2)
        plain, other = (gradient(params, placed, policy) for policy in ("none", remat))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(np.asarray(b)).max())


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_residual_has_the_size_of_the_scores(remat: str):
    rules = sharding_rules_for(LLAMA)
    params = init_params(LLAMA, 0, rules)
    with mesh_context(rules.mesh):
        tokens = shard_host_array(rules, random_tokens(1, 96), ("batch", None))
        _, backward = jax.vjp(lambda p: forward(LLAMA, rules, p, tokens, remat=remat), params)
    kept = [leaf.size for leaf in jax.tree.leaves(backward) if 96 in leaf.shape]
    assert kept, "activations are kept"
    assert not [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.ndim > 3 and leaf.shape[-2:] == (96, 96)]


@compat
def test_gradients_have_the_shardings_of_their_parameters():
    rules = sharding_rules_for(NEOX, "data=2,model=2", "fsdp")
    params = init_params(NEOX, 0, rules)
    with mesh_context(rules.mesh):
        tokens = shard_host_array(rules, random_tokens(4, 8), ("batch", None))
        gradients = jax.jit(jax.grad(lambda p: forward(NEOX, rules, p, tokens).sum()))(params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(NEOX, rules=rules))
    jax.tree.map(
        lambda g, s: g.sharding.is_equivalent_to(s, g.ndim) or pytest.fail(f"{g.sharding} != {s}"), gradients, shardings
    )


def test_program_size_does_not_grow_with_depth():
    def program(layers: int) -> str:
        config = dataclasses.replace(LLAMA, num_layers=layers)
        rules = sharding_rules_for(config)
        params = init_params(config, 0, rules)
        with mesh_context(rules.mesh):
            return jax.jit(lambda p, t: forward(config, rules, p, t)).lower(params, random_tokens(1, 8)).as_text()

    assert program(2).count("stablehlo.dot_general") == program(12).count("stablehlo.dot_general")


@compat
def test_bfloat16_operands_keep_the_residual_stream_in_fp32():
    rules, tokens = sharding_rules_for(LLAMA), random_tokens(2, 16)
    params = init_params(LLAMA, 0, rules)
    with mesh_context(rules.mesh):
        low = forward(LLAMA, rules, params, jnp.asarray(tokens), compute_dtype=jnp.bfloat16)
        full = forward(LLAMA, rules, params, jnp.asarray(tokens))
    assert low.dtype == jnp.float32
    # bf16 operands carry 8 bits: relative error 2^-8 an operand, averaged over sums
    np.testing.assert_allclose(low, full, atol=0.1)
    assert np.abs(np.asarray(low) - np.asarray(full)).max() > 1e-4
