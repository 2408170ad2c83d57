"""Tests of `lora` on several devices."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

from jax_selftrain.config import TrainConfig
from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.hub import load_model
from jax_selftrain.models import Params, forward
from jax_selftrain.training.lora import NUM_OUTPUT_DIMS, apply_adapters, merge_adapters
from jax_selftrain.training.step import init_state

Options = Callable[..., TrainConfig]


@pytest.mark.parametrize("family", ["gpt_neox", pytest.param("llama", marks=pytest.mark.nightly)])
def test_adapted_model_equals_the_merged_one(family: str, tiny_model, options: Options):
    config = options(model=str(tiny_model(family)), lora_rank=3, lora_alpha=5.0, mesh="data=2,model=2")
    model = load_model(config.model, config.mesh, preset=config.preset)
    rules = model.sharding_rules
    token_ids = np.random.default_rng(4).integers(0, 300, (2, 40)).astype(np.int32)
    tokens = jax.device_put(token_ids, rules.sharding(("batch", None)))
    with mesh_context(rules.mesh):
        adapters = init_state(config, model.config, rules, model.params).params
        random = jax.tree.map(lambda leaf: leaf + 0.05, adapters)  # B is initialized with zeros

        def hidden(params: Params) -> jax.Array:
            return forward(model.config, rules, params, tokens)

        plain = jax.jit(hidden)(model.params)
        unchanged = jax.jit(lambda a: hidden(apply_adapters(config, model.params, a)))(adapters)
        adapted = jax.jit(lambda a: hidden(apply_adapters(config, model.params, a)))(random)
        merged = jax.jit(lambda a: hidden(merge_adapters(config, model.params, a)))(random)
    np.testing.assert_array_equal(plain, unchanged)
    np.testing.assert_allclose(adapted, merged, atol=2e-4)
    assert np.abs(np.asarray(adapted) - np.asarray(plain)).max() > 0.01
    paths = {(group, name) for group, names in adapters["layers"].items() for name in names}
    assert paths == set(NUM_OUTPUT_DIMS) - (set() if family == "llama" else {("mlp", "gate")})
