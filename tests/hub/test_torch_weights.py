"""PyTorch checkpoints equal their safetensors twins, and nothing of them is executed."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from launcher import run_code

from jax_selftrain import hub
from jax_selftrain.errors import InputError
from jax_selftrain.hub.safetensors_io import open_weights
from jax_selftrain.hub.torch_weights import open_torch_file

torch: Any = pytest.importorskip("torch", reason="PyTorch writes the files")
load_torch: Any = pytest.importorskip("safetensors.torch").load_file

Twin = Callable[..., Path]


@pytest.fixture
def twin(tiny_model: Callable[..., Path], tmp_path: Path) -> Twin:
    """`twin(family, dtype, shards)`: a tiny model with its weights as PyTorch files instead of safetensors."""

    def make(family: str = "llama", dtype: str = "float32", shards: int = 1, **overrides: Any) -> Path:
        source, folder = tiny_model(family, **overrides), tmp_path / "twin"
        folder.mkdir()
        for path in source.iterdir():
            if path.suffix != ".safetensors":
                (folder / path.name).write_bytes(path.read_bytes())
        state = {
            name: tensor.to(getattr(torch, dtype)) for name, tensor in load_torch(source / "model.safetensors").items()
        }
        if shards == 1:
            torch.save(OrderedDict(state), folder / "pytorch_model.bin")
            return folder
        names = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(state)}
        for file in sorted(set(names.values())):
            torch.save({name: tensor for name, tensor in state.items() if names[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        return folder

    return make


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("family", "dtype", "shards", "overrides"),
    [
        ("llama", "float32", 1, {}),
        ("llama", "bfloat16", 3, {"tie_word_embeddings": True}),
        ("gpt_neox", "float16", 2, {}),
    ],
)
def test_a_model_equals_its_safetensors_twin(
    twin: Twin, tiny_model: Callable[..., Path], family, dtype, shards, overrides
):
    folder = twin(family, dtype, shards, **overrides)
    stored = open_weights(folder)
    expected = load_torch(tiny_model(family, **overrides) / "model.safetensors")
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        cast = tensor.to(getattr(torch, dtype))
        assert stored[name].shape == tuple(cast.shape)
        assert stored[name].data.tobytes() == cast.contiguous().view(torch.uint8).numpy().tobytes()
    loaded, twin_params = (
        hub.load_model(one, dtype="float32").params for one in (folder, tiny_model(family, **overrides))
    )
    rounded = jax.tree.map(
        lambda x: np.asarray(torch.tensor(np.asarray(x)).to(getattr(torch, dtype)).float()), twin_params
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)
    assert len(hub.open_model(folder).fingerprint) == 64


def test_views_parameters_and_buffers(tmp_path: Path):
    """Tensors that share a storage, with offsets, strides and every type of element."""
    base = torch.arange(24, dtype=torch.float32)
    content = {
        "whole": base,
        "row": base.reshape(4, 6)[2],
        "column": base.reshape(4, 6)[:, 1],
        "transposed": base.reshape(2, 3, 4).permute(2, 0, 1),
        "parameter": torch.nn.Parameter(base[3:9].clone()),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        **{str(dtype): torch.tensor([1, 0, 3]).to(dtype) for dtype in (
            torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
            torch.uint8, torch.bool,
        )},
    }  # fmt: skip
    found = open_torch_file(save(content, tmp_path / "pytorch_model.bin"))
    assert found.keys() == content.keys()
    for name, tensor in content.items():
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert (found[name].data.tobytes(), found[name].shape) == (raw, tuple(tensor.shape)), name
    assert found["row"].data.base is not None, "a contiguous tensor is not copied"


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def replace_pickle(path: Path, data: bytes, target: Path) -> Path:
    """Copy a container with another `data.pkl`."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, data if entry.filename.endswith("/data.pkl") else old.read(entry))
    return target


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_calls_something_is_named_and_refused(tmp_path: Path, protocol: int):
    good = save({"a": torch.ones(2)}, tmp_path / "good.bin")
    marker = tmp_path / "executed"
    for function, named in ((Path.touch, "touch"), (eval, "eval")):
        argument = marker if function is Path.touch else f"open({str(marker)!r}, 'w')"
        data = pickle.dumps({"a": Call(function, argument)}, protocol)
        with pytest.raises(InputError, match="which no state dict needs") as caught:
            open_torch_file(replace_pickle(good, data, tmp_path / "bad.bin"))
        assert any(word in str(caught.value) for word in (named, "getattr", "instruction"))
        assert not marker.exists()


def test_what_is_not_a_state_dict_is_refused_in_one_sentence(tmp_path: Path):
    good = save({"a": torch.ones(2)}, tmp_path / "good.bin")
    content = good.read_bytes()
    compressed = tmp_path / "compressed.bin"
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    cases = {
        "is not a zip container of PyTorch 1.6": pickle.dumps({"weights": [1, 2, 3]}),
        "is not a zip container": content[: len(content) // 2],
        "is compressed": compressed.read_bytes(),
        "step is not a tensor": save({"model": torch.ones(1), "step": 4}, tmp_path / "x.bin").read_bytes(),
        "does not have one data.pkl": empty.getvalue(),
        "holds no dict": save(torch.ones(3), tmp_path / "x.bin").read_bytes(),
    }
    for message, data in cases.items():
        (tmp_path / "bad.bin").write_bytes(data)
        with pytest.raises(InputError, match=message):
            open_torch_file(tmp_path / "bad.bin")


FUZZ = """
import encodings.cp437, random, sys, time, zipfile
from pathlib import Path
from jax_selftrain.errors import InputError
from jax_selftrain.hub.torch_weights import open_torch_file

source, target, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
content, rng = source.read_bytes(), random.Random(0)
with zipfile.ZipFile(source) as container:
    members = {name: container.read(name) for name in container.namelist()}
(pickled,) = (name for name in members if name.endswith("/data.pkl"))

def damage(data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        kind, at = rng.randrange(4), rng.randrange(len(data) + 1)
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 2:
            del data[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            other = rng.randrange(len(data) + 1)
            data[at:at] = data[other : other + rng.randrange(1, 60)]
    return bytes(data)

def open_it():
    try:
        open_torch_file(target)
        return True
    except InputError as error:
        assert str(error).startswith(str(target)) and "\\n" not in str(error), error
        return False

open_torch_file(source)
target.write_bytes(b"")
open_it()  # everything is imported now
allowed = {"builtins.id", "open", "mmap.__new__", "os.listdir", "object.__getattr__", "sys._getframe", "marshal.loads"}

def watch(event, arguments):
    if is_watched and (event not in allowed or (event == "open" and "w" in str(arguments[1]))):
        print(event, arguments, flush=True)
        import os
        os._exit(3)

is_watched = False
sys.addaudithook(watch)
opened, slowest = 0, 0.0
for n in range(count):
    if n % 2:
        with zipfile.ZipFile(target, "w") as container:
            for name, data in members.items():
                container.writestr(name, damage(data) if name == pickled else data)
    else:
        target.write_bytes(damage(content))
    begin, is_watched = time.monotonic(), True
    try:
        opened += open_it()
    finally:
        is_watched = False
    slowest = max(slowest, time.monotonic() - begin)
print(count, opened, slowest)
assert slowest < 5
"""
"""Opens damaged files under an audit hook that ends the process if anything but a file to read is touched."""


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_damaged_files_are_refused_without_execution(tmp_path: Path, count: int):
    content = {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.ones(2, 3).T}
    source = save(OrderedDict(content), tmp_path / "source.bin")
    process = run_code(FUZZ, source, tmp_path / "damaged.bin", count)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.startswith(f"{count} ")
