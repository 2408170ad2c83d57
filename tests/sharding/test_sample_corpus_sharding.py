"""Tests of `sample_corpus` on several devices."""

import shutil
from dataclasses import replace

import jax
import pytest

from jax_selftrain.config import SampleConfig
from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.io import atomic
from jax_selftrain.sampling import abstract_program, sample

SHARDS = 3


@pytest.fixture(scope="module")
def config(tiny_model) -> SampleConfig:
    """40 samples in shards of 16, 16 and 8, with 8 slots."""
    model = tiny_model("llama", vocab_size=512, tokenizer_size=400)
    return SampleConfig(
        model=str(model), samples=40, max_tokens=32, seed=5, batch_size=8, samples_per_shard=16, mesh="data=1,model=1"
    )


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    """The corpus of one uninterrupted process."""
    return sample(replace(config, out=str(tmp_path_factory.mktemp("reference") / "corpus")))


def test_a_moved_model_and_another_mesh_and_batch_size_are_allowed(config, reference, tmp_path):
    moved, folder = tmp_path / "moved", tmp_path / "corpus"
    shutil.copytree(config.model, moved)
    shutil.copytree(reference.folder, folder)
    (folder / "shard-000002.parquet").unlink()
    (folder / "corpus.json").unlink()
    again = sample(replace(config, model=str(moved), out=str(folder), mesh="data=2,model=1", batch_size=4))
    assert again.manifest["source"] == reference.manifest["source"]
    assert [
        atomic.read_json(folder / "records" / f"shard-00000{i}.json")["slots_per_replica"] for i in range(SHARDS)
    ] == [8, 8, 4]


def test_the_program_compiles_from_shapes_alone(config):
    """No weights are loaded; the state is donated to the result."""
    mesh = make_mesh("data=2,model=2")
    function, arguments, donation = abstract_program(config, mesh)
    with mesh_context(mesh):
        compiled = jax.jit(function, donate_argnums=donation).lower(*arguments).compile()
    state, cache = arguments[2], arguments[2].cache.k
    shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (compiled.out_info, state)]
    assert shapes[0] == shapes[1]
    assert cache.shape == (2, 1, 16, 2, 32, 16)
    assert jax.typeof(cache).sharding.spec[:4] == (None, None, "data", "model")
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= 2 * cache.size * 4 // 4, "keys and values are copied"
