"""Saved trees load on any mesh; damage is named."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_selftrain.distributed.mesh import make_mesh
from jax_selftrain.errors import InputError
from jax_selftrain.hub import orbax_io


def abstract_like(tree, mesh):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())), tree
    )


@pytest.fixture
def tree() -> dict:
    mesh = make_mesh("data=2,model=4")
    rows = NamedSharding(mesh, PartitionSpec("data", "model"))
    return {
        "matrix": jax.device_put(jnp.arange(64.0).reshape(8, 8), rows),
        "half": {"x": jax.device_put(jnp.arange(8).astype(jnp.bfloat16), NamedSharding(mesh, PartitionSpec()))},
        "host": np.arange(6, dtype=np.int32),
        "scalar": np.float32(2.5) * np.ones((), np.float32),  # numpy makes this a numpy scalar
    }


def test_a_tree_comes_back_on_another_mesh(tree: dict, tmp_path: Path):
    orbax_io.save_tree(tmp_path / "t", tree)
    for mesh in (make_mesh("data=1"), make_mesh("data=4,model=2"), make_mesh("data=8")):
        abstract = abstract_like(tree, mesh)
        abstract["matrix"] = jax.ShapeDtypeStruct(
            (8, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
        )
        loaded = orbax_io.load_tree(tmp_path / "t", abstract)
        assert loaded["matrix"].sharding == abstract["matrix"].sharding
        for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(loaded), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_optimizer_state_keeps_its_structure(tmp_path: Path):
    state = optax.adamw(1e-3).init({"w": jnp.ones((4, 4))})
    orbax_io.save_tree(tmp_path / "t", state)
    loaded = orbax_io.load_tree(tmp_path / "t", abstract_like(state, make_mesh("data=1")))
    assert str(jax.tree.structure(loaded)) == str(jax.tree.structure(state))


def test_every_flipped_byte_is_named(tree: dict, tmp_path: Path):
    orbax_io.save_tree(tmp_path / "t", tree)
    abstract = abstract_like(tree, make_mesh("data=1"))
    files = [p for p in sorted((tmp_path / "t").rglob("*")) if p.is_file() and p.name != orbax_io.MANIFEST]
    assert any("ocdbt" in str(p) for p in files)
    for path in (p for p in files if p.stat().st_size):
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(InputError, match=path.name) as caught:
            orbax_io.load_tree(tmp_path / "t", abstract, remedy="delete it and run again")
        assert "checksum differs" in str(caught.value)
        assert "delete it and run again" in str(caught.value)
        path.write_bytes(content)
    orbax_io.load_tree(tmp_path / "t", abstract)


def test_truncated_missing_and_unfinished_trees_are_refused(tree: dict, tmp_path: Path):
    folder = tmp_path / "t"
    orbax_io.save_tree(folder, tree)
    abstract = abstract_like(tree, make_mesh("data=1"))
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != orbax_io.MANIFEST]
    victim = max(files, key=lambda p: p.stat().st_size)
    content = victim.read_bytes()
    victim.write_bytes(content[:-1])
    with pytest.raises(InputError, match=f"{victim.name}.*truncated"):
        orbax_io.load_tree(folder, abstract)
    victim.unlink()
    with pytest.raises(InputError, match=f"{victim.name}.*missing"):
        orbax_io.load_tree(folder, abstract)
    victim.write_bytes(content)
    manifest = folder / orbax_io.MANIFEST
    manifest.rename(tmp_path / "kept")
    with pytest.raises(InputError, match="never finished"):
        orbax_io.load_tree(folder, abstract)
    for text in ("{", '{"format": "other"}', '{"format": "jax_selftrain.tree", "version": 99, "files": {"a": {}}}'):
        manifest.write_text(text)
        with pytest.raises(InputError, match=r"manifest\.json"):
            orbax_io.load_tree(folder, abstract)


def test_a_tree_of_another_shape_is_refused(tree: dict, tmp_path: Path):
    orbax_io.save_tree(tmp_path / "t", tree)
    mesh = make_mesh("data=1")
    whole = abstract_like(tree, mesh)
    fewer = {k: v for k, v in whole.items() if k != "host"}
    wider = whole | {"matrix": jax.ShapeDtypeStruct((8, 9), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))}
    for other, named in ((fewer, "host"), (whole | {"more": whole["host"]}, "more"), (wider, r"matrix.*\(8, 9\)")):
        with pytest.raises(InputError, match=f"/t: {named}"):
            orbax_io.load_tree(tmp_path / "t", other)
    with pytest.raises(InputError, match="already exists"):
        orbax_io.save_tree(tmp_path / "t", tree)
