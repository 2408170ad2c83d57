"""Alignment of gradients: against full logits, identical documents, meshes."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_selftrain.config import TrainConfig
from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.hub import LoadedModel, load_model
from jax_selftrain.models import Params, forward, unembed
from jax_selftrain.training import align_gradients

Documents = list[list[int]]
SEQ_LEN = 16


def make_documents(seed: int, low: int, high: int, count: int = 11) -> Documents:
    """Return documents of 2 to 39 tokens; some are cut into three rows."""
    rng = np.random.default_rng(seed)
    return [[1, *rng.integers(low, high, rng.integers(1, 39)).tolist()] for _ in range(count)]


def align(folder: Path, documents: Documents, others: Documents, **changes: Any) -> float | None:
    options: dict[str, Any] = {"model": str(folder), "mesh": "data=1", "seq_len": SEQ_LEN, "batch_size": 4}
    return align_gradients(TrainConfig(**options | changes), documents, others)


def full_gradient(model: LoadedModel, documents: Documents) -> np.ndarray:
    """Differentiate the mean negative log-likelihood of every target, from whole logits."""
    inputs: list[list[int]] = []
    targets: list[list[int]] = []
    for document in documents:
        row: tuple[list[int], list[int]] = ([], [])
        for before, after in itertools.pairwise(document):
            if len(row[0]) == SEQ_LEN:
                inputs, targets, row = [*inputs, row[0]], [*targets, row[1]], ([], [])
            row[0].append(before)
            row[1].append(after)
        inputs, targets = [*inputs, row[0]], [*targets, row[1]]
    padded, wanted = (
        np.array([[*row, *[-1] * (SEQ_LEN - len(row))] for row in side], np.int32) for side in (inputs, targets)
    )

    def loss(params: Params) -> jax.Array:
        hidden = forward(model.config, model.sharding_rules, params, jnp.maximum(padded, 0))
        log_probs = jax.nn.log_softmax(unembed(model.config, model.sharding_rules, params, hidden), axis=-1)
        is_target = jnp.arange(log_probs.shape[-1]) == wanted[..., None]  # nowhere for −1
        return -jnp.sum(jnp.where(is_target, log_probs, 0.0)) / np.sum(wanted >= 0)

    with mesh_context(model.sharding_rules.mesh):
        gradient = jax.jit(jax.grad(loss))(model.params)
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(gradient)])


@pytest.fixture(scope="module")
def sides() -> tuple[Documents, Documents]:
    return make_documents(0, 2, 200), make_documents(1, 100, 300)


@pytest.fixture(scope="module")
def expected(small_model: Path, sides: tuple[Documents, Documents]) -> float:
    one, other = (full_gradient(load_model(small_model, "data=1"), documents) for documents in sides)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.mark.parametrize("mesh", ["data=1", "data=2,model=2"])
def test_alignment_equals_that_from_full_logits(
    small_model: Path, sides: tuple[Documents, Documents], expected: float, mesh: str
) -> None:
    assert 0.05 < expected < 0.95
    assert align(small_model, *sides, mesh=mesh) == pytest.approx(expected, abs=1e-5)  # fp32 sums in another order


def test_a_set_is_aligned_with_itself_and_with_its_copies(
    small_model: Path, sides: tuple[Documents, Documents]
) -> None:
    documents = sides[0]
    assert align(small_model, documents, documents) == pytest.approx(1, abs=1e-6)
    assert align(small_model, documents, documents[::-1] * 3, batch_size=6, grad_accum=2) == pytest.approx(1, abs=1e-5)


def test_without_targets_there_is_no_alignment(small_model: Path, sides: tuple[Documents, Documents]) -> None:
    assert align(small_model, sides[0], []) is None
    assert align(small_model, [[1]], sides[1]) is None
