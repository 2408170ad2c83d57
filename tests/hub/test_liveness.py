"""Every field of DecoderConfig changes parameters or output."""

from dataclasses import fields, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import ShardingRules, make_sharding_rules
from jax_selftrain.models import DecoderConfig, Params, abstract_params, axis_sizes, forward, init_params, unembed
from jax_selftrain.models.config import RopeConfig

BASE = DecoderConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    max_positions=128,
    norm="rmsnorm",
    norm_eps=1e-2,
    activation="gelu",
    gated_mlp=True,
    parallel_residual=False,
    rotary_dim=8,
    rope=RopeConfig(theta=100.0),
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    qk_norm="head",
    tie_word_embeddings=False,
    sliding_window=None,
    initializer_range=0.5,
)
TOKENS = np.arange(64).reshape(1, 64) % 32

FIELDS: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "num_layers": 3,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 16,
    "intermediate_size": 32,
    "norm": "layernorm",
    "norm_eps": 1e-1,
    "activation": "silu",
    "gated_mlp": False,
    "parallel_residual": True,
    "rotary_dim": 4,
    "rope": RopeConfig(theta=1000.0),
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "qk_norm": None,
    "tie_word_embeddings": True,
    "sliding_window": (4, None),
    "layer_ropes": (None, RopeConfig(theta=100.0)),
    "post_norm": True,
    "learned_positions": True,
    "attention_scale": 1.0,
    "initializer_range": 0.25,
}
LLAMA3 = RopeConfig(theta=100.0, kind="llama3", factor=4.0, original_max_position=64)
YARN = RopeConfig(
    theta=100.0, kind="yarn", factor=4.0, original_max_position=48, beta_fast=6.0, beta_slow=1.5, truncate=False
)
ROPE_FIELDS: dict[str, tuple[RopeConfig, dict[str, Any]]] = {
    "theta": (RopeConfig(), {"theta": 50.0}),
    "kind": (RopeConfig(factor=2.0), {"kind": "linear"}),
    "factor": (RopeConfig(kind="linear", factor=2.0), {"factor": 3.0}),
    "original_max_position": (LLAMA3, {"original_max_position": 32}),
    "low_freq_factor": (LLAMA3, {"low_freq_factor": 2.0}),
    "high_freq_factor": (LLAMA3, {"high_freq_factor": 8.0}),
    "beta_fast": (YARN, {"beta_fast": 3.0}),
    "beta_slow": (YARN, {"beta_slow": 0.5}),
    "attention_factor": (YARN, {"attention_factor": 2.0}),
    "truncate": (YARN, {"truncate": True}),
}


@pytest.fixture(scope="module")
def rules() -> ShardingRules:
    return make_sharding_rules("replicated", make_mesh("data=1"), axis_sizes(BASE))


@pytest.fixture(scope="module")
def params(rules: ShardingRules) -> Params:
    return init_params(BASE, 0, rules)


def logits(config: DecoderConfig, rules: ShardingRules, params: Params) -> np.ndarray:
    with mesh_context(rules.mesh):
        hidden = forward(config, rules, params, jnp.asarray(TOKENS, jnp.int32))
        return np.asarray(unembed(config, rules, params, hidden))


def test_all_fields_are_perturbed_here():
    assert FIELDS.keys() | {"max_positions"} == {field.name for field in fields(DecoderConfig)}
    assert ROPE_FIELDS.keys() == {field.name for field in fields(RopeConfig)}


@pytest.mark.parametrize("field", FIELDS)
def test_a_config_field_changes_parameters_or_output(field: str, rules: ShardingRules, params: Params):
    changed = replace(BASE, **{field: FIELDS[field]})
    if field == "initializer_range":
        fresh = init_params(changed, 0, rules)["head"]["kernel"]
        assert np.std(fresh) < 0.75 * np.std(params["head"]["kernel"])
        return
    before, after = abstract_params(BASE), abstract_params(changed)
    if before != after:
        return
    assert np.abs(logits(changed, rules, params) - logits(BASE, rules, params)).max() > 1e-4


@pytest.mark.parametrize("field", ROPE_FIELDS)
def test_a_rotary_field_changes_the_output(field: str, rules: ShardingRules, params: Params):
    rope, change = ROPE_FIELDS[field]
    before = logits(replace(BASE, rope=rope), rules, params)
    after = logits(replace(BASE, rope=replace(rope, **change)), rules, params)
    assert np.abs(after - before).max() > 1e-4


# max_positions bounds what `LoadedModel.logits` accepts: see test_loading.py
