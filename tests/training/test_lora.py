"""LoRA: adapters, merging, exact resumption."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from corpus_factory import whole_mixture
from model_params import param_bytes
from training_runs import Interruption, interrupt

from jax_selftrain.config import TrainConfig
from jax_selftrain.corpus import PackedRows
from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.errors import InputError
from jax_selftrain.hub import load_model
from jax_selftrain.training import Hook, abstract_train_step, train
from jax_selftrain.training.data import load_batch
from jax_selftrain.training.lora import check_lora
from jax_selftrain.training.optimizer import learning_rates
from jax_selftrain.training.step import TrainState, export_params, init_state

Options = Callable[..., TrainConfig]


def run_steps(config: TrainConfig, rows: PackedRows, n: int) -> tuple[TrainState, list[float]]:
    """Return the state after `n` steps and the loss of each step."""
    mesh = make_mesh(config.mesh)
    model = load_model(config.model, mesh, preset=config.preset)
    with mesh_context(mesh):
        function, _, _ = abstract_train_step(config, mesh)
        step, losses = jax.jit(function), []
        state = init_state(config, model.config, model.sharding_rules, model.params)
        rates = learning_rates(config, n)
        for i in range(n):
            state, metrics = step(state, load_batch(config, model.sharding_rules, whole_mixture(rows), i), rates[i])
            losses.append(float(metrics["loss"]))
    return state, losses


def test_training_changes_only_the_adapters_and_exports_the_merged_model(options: Options, rows: PackedRows):
    config = options(lora_rank=2, lora_targets=("q", "down"), learning_rate=0.02)
    state, losses = run_steps(config, rows, 6)
    assert losses[-1] < losses[0]
    assert set(state.params["layers"]["attn"]) == {"q"}
    base, merged = state.frozen_base, export_params(config, state)
    assert base is not None
    pairs = zip(jax.tree_util.tree_leaves_with_path(base), jax.tree.leaves(merged), strict=True)
    changed = {jax.tree_util.keystr(path) for (path, old), new in pairs if not np.array_equal(old, new)}
    assert changed == {"['layers']['attn']['q']['kernel']", "['layers']['mlp']['down']['kernel']"}
    delta = merged["layers"]["mlp"]["down"]["kernel"][0] - base["layers"]["mlp"]["down"]["kernel"][0]
    assert np.linalg.matrix_rank(np.asarray(delta), tol=1e-5) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_targets": ("w",)}, "--lora-targets w: is no matrix of a layer; choose from q, k, v, o"),
        ({"lora_targets": ()}, "--lora-targets: is empty"),
        ({"init": "scratch"}, "--lora-rank 2: needs a trained model, not --init scratch"),
    ],
)
def test_invalid_lora_options_are_refused(change: dict, message: str, options: Options):
    with pytest.raises(InputError, match=message):
        check_lora(options(lora_rank=2, **change))


def test_targets_that_the_model_has_not_are_refused(tiny_model: Callable[..., Path], options: Options):
    model = str(tiny_model("gpt_neox"))  # its MLP has no gate
    with pytest.raises(InputError, match=r"--lora-targets gate: .* has no such matrix; choose from q, k, v, o, up"):
        train(options(model=model, lora_rank=2, lora_targets=("gate",)))


def test_interrupted_lora_run_ends_with_the_same_bits(options: Options, tmp_path: Path):
    whole = train(options(lora_rank=2, out=str(tmp_path / "whole")))
    with pytest.raises(Interruption):
        train(options(lora_rank=2), hooks=[Hook(interrupt, steps=(5,))])
    assert (tmp_path / "run" / "checkpoints" / "000004").exists()
    resumed = train(options(lora_rank=2))
    assert param_bytes(whole / "model") == param_bytes(resumed / "model")
    assert (whole / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
    assert param_bytes(whole / "model") != param_bytes(options().model)
