"""Stream Hugging Face weights to and from a mesh.

For each device of this process, loading copies the part of each layer's tensor that the device holds from the
memory-mapped files. The host holds no more than one device's shard of one array. Writing gathers the tensors of one
output file at a time.

Every tensor of a file must be in the family's table or a legacy buffer, have the right shape, be fp32, bf16 or fp16,
and be finite; fp64 is read as fp32. PyTorch files are read without executing anything (`torch_weights`).
"""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import split_state_dict_into_shards_factory
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.distributed.sharding import ShardingRules
from jax_selftrain.errors import InputError
from jax_selftrain.hub.families import Family, Pattern, pattern_sizes
from jax_selftrain.hub.torch_weights import open_torch_file
from jax_selftrain.hub.weight_mapping import (
    DTYPES,
    ParamSource,
    StoredTensor,
    canonical_tensors,
    map_tensors,
    param_sources,
)
from jax_selftrain.io import json_files
from jax_selftrain.models import DecoderConfig, Params, abstract_params

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
"""Weights above this size are written as several files with an index, as Hugging Face does."""

TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

_MAX_HEADER = 2**24
"""Bytes; 100,000 tensors need less."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def has_weight_files(folder: Path) -> bool:
    """Return True if a Hugging Face folder holds weights."""
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX, TORCH_WEIGHTS, TORCH_INDEX))


def weight_files(folder: Path) -> list[str]:
    """List the safetensors files of a folder, else its PyTorch files.

    Raises:
      InputError: there are none, or an index names a file that is missing.
    """
    for file, index in ((WEIGHTS, INDEX), (TORCH_WEIGHTS, TORCH_INDEX)):
        if (folder / file).is_file():
            return [file]
        if (folder / index).is_file():
            files = indexed_files(folder, index)
            for file in files:
                if not (folder / file).is_file():
                    raise InputError(
                        f"{folder / file}: the index names this file, but it is not there; download it again"
                    )
            return files
    if pickled := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        raise InputError(
            f"{folder / pickled[0]}: is not read; weights are {WEIGHTS} or {TORCH_WEIGHTS}, or several files with "
            f"{INDEX} or {TORCH_INDEX}; write them where you trust the file, with transformers' save_pretrained"
        )
    raise InputError(f"{folder}: holds no weights ({WEIGHTS} or {TORCH_WEIGHTS}); name another folder or revision")


def indexed_files(folder: Path, name: str) -> list[str]:
    """List the files that an index names, present or not."""
    index = json_files.read_json(folder / name)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(f, str) for f in files.values()):
        raise InputError(f"{folder / name}: has no weight_map of tensor names to files; download it again")
    if outside := [file for file in files.values() if Path(file).name != file]:
        raise InputError(f"{folder / name}: the index names {outside[0]}, no file of its folder; download it again")
    return sorted(set(files.values()))


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """Memory-map all weights of a Hugging Face folder and read their headers.

    Raises:
      InputError: a file is missing, truncated or of another format, or two files hold the same tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in (folder / name for name in weight_files(folder)):
        found = open_torch_file(path) if path.suffix == ".bin" else _open_safetensors(path)
        for name in found:
            if name in tensors:
                raise InputError(f"{folder}: {name} is in both {tensors[name].file.name} and {path.name}; keep one")
        tensors |= found
    return tensors


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if _MAX_HEADER < size < path.stat().st_size:
            raise InputError(f"{path}: its header has {size:,} bytes; no supported model has more than {_MAX_HEADER:,}")
        with safe_open(path, framework="numpy"):
            pass  # checks the header and the size of the file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); download or copy it again") from error
    data = np.memmap(path, np.uint8, "r")
    start = 8 + size
    header = json.loads(data[8:start].tobytes(), object_pairs_hook=partial(_unique_keys, path))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), data[start + begin : start + end])
    return tensors


def _unique_keys(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a header that names a tensor twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}: its header names {twice} twice; download or copy it again")
    return content


# ---------------------------------------------------------------- in


def load_params(
    folder: Path, family: Family, config: DecoderConfig, rules: ShardingRules, dtype: np.dtype | None = None
) -> tuple[Params, dict[str, str], list[str]]:
    """Read the weights of a Hugging Face folder onto a mesh.

    `dtype` None keeps each array in the dtype that holds its tensors exactly.

    Returns:
      Parameters; dtype of every tensor that is used: {name: "float32" | "bfloat16" | "float16"}; unused tensors.

    Raises:
      InputError: the checkpoint does not fit the config (see `map_tensors`), or a weight is NaN or infinite.
    """
    tensors = canonical_tensors(open_weights(folder), family, config)
    leaves, dropped = map_tensors(folder, tensors, family, config)
    stored_dtypes = {name: DTYPES[tensors[name].dtype].name for leaf in leaves for name in leaf.names}
    dtypes = {name: "float32" if stored == "float64" else stored for name, stored in stored_dtypes.items()}
    sizes, abstract = pattern_sizes(config), flatten_dict(abstract_params(config, rules=rules), sep="/")
    loaded = {}
    for leaf in leaves:
        stored = {dtypes[name] for name in leaf.names}
        exact = np.dtype(stored.pop() if len(stored) == 1 else np.float32)
        loaded[leaf.path] = _load_leaf(tensors, leaf, sizes, abstract[leaf.path].sharding, dtype or exact)
    return unflatten_dict(loaded, sep="/"), dtypes, dropped


def _load_leaf(
    tensors: Mapping[str, StoredTensor],
    leaf: ParamSource,
    sizes: Mapping[str, int],
    sharding: jax.sharding.Sharding,
    dtype: np.dtype,
) -> jax.Array:
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(part.indices(n)[:2] for part, n in zip(index or (), leaf.shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in holders.items():
        box = tuple(slice(*b) for b in bounds)
        host = _empty_aligned([b.stop - b.start for b in box], dtype)
        with np.errstate(over="ignore"):  # `convert` refuses weights that overflow in a narrower type
            if leaf.is_stacked:
                for row, name in zip(host, leaf.names[box[0]], strict=True):
                    row[...] = read_box(name, tensors[name], leaf.pattern, box[1:], sizes)
            else:
                host[...] = read_box(leaf.names[0], tensors[leaf.names[0]], leaf.pattern, box, sizes)
        # To a CPU device this is zero-copy (hence a new buffer each time); waiting bounds the number of buffers.
        arrays += jax.block_until_ready([jax.device_put(host, device) for device in devices])
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _empty_aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Allocate with 64-byte alignment: `device_put` to a CPU is zero-copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def read_box(
    name: str, tensor: StoredTensor, pattern: Pattern, box: tuple[slice, ...], sizes: Mapping[str, int]
) -> np.ndarray:
    """Copy the part of a tensor that fills a box; refuse NaN."""
    data = np.array(pattern.view(tensor.array, sizes)[box])
    if data.dtype == np.float64:
        with np.errstate(over="ignore"):
            data = data.astype(np.float32)
    if not np.isfinite(data).all():
        raise InputError(f"{tensor.file}: tensor {name} holds NaN or infinity; use another checkpoint")
    return data


# ---------------------------------------------------------------- out


def save_weights(
    folder: Path, family: Family, config: DecoderConfig, params: Params, tensors: Mapping[str, str]
) -> None:
    """Write parameters as Hugging Face safetensors into `folder` (which the caller commits).

    Process 0 writes. Arrays shared by processes are gathered layer by layer; all processes call this together.
    `tensors` holds the dtype of every tensor by name: {"lm_head.weight": "bfloat16", …}.
    """
    sizes, arrays = pattern_sizes(config), flatten_dict(params, sep="/")
    sources: dict[str, list[tuple[ParamSource, int]]] = {}
    for leaf in param_sources(family, config, tensors):
        for layer, name in enumerate(leaf.names):
            sources.setdefault(name, []).append((leaf, layer))
    if sources.keys() != tensors.keys():
        wrong = sorted(sources.keys() ^ tensors.keys())[0]
        raise ValueError(f"tensor {wrong} is either not in the model or has no dtype given")

    shapes = {name: parts[0][0].pattern.file_shape(sizes) for name, parts in sources.items()}

    def assemble(name: str) -> np.ndarray:
        tensor = np.empty(shapes[name], np.dtype(tensors[name]))
        for leaf, layer in sources[name]:
            part = _to_host(arrays[leaf.path], layer if leaf.is_stacked else None)
            if part is not None:
                leaf.pattern.view(tensor, sizes)[...] = part
        return tensor

    split = split_state_dict_into_shards_factory(
        {name: math.prod(shapes[name]) * np.dtype(tensors[name]).itemsize for name in _sort_by_layer(sources)},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        if jax.process_index():
            for name in names:
                assemble(name)  # takes part in the gathers
        else:
            save_file({name: assemble(name) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded and not jax.process_index():
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _to_host(array: jax.Array | np.ndarray, layer: int | None) -> np.ndarray | None:
    """Copy an array or layer to the host (shared: process 0)."""
    if isinstance(array, np.ndarray):
        return array if layer is None else array[layer]
    if not array.is_fully_addressable:
        mesh = cast(NamedSharding, array.sharding).mesh
        with mesh_context(mesh):
            gathered = _all_gather_layer(array, layer, NamedSharding(mesh, PartitionSpec()))
        gathered.block_until_ready()  # collectives of a process that runs ahead deadlock on CPUs (JAX 0.10.2)
        return None if jax.process_index() else np.asarray(gathered.addressable_data(0))
    host = np.empty(array.shape if layer is None else array.shape[1:], array.dtype)
    with jax.set_mesh(Mesh(np.empty((), object), ())):  # a caller's mesh does not hold for the shards of one device
        for shard in array.addressable_shards:
            if not shard.replica_id:
                index = shard.index if layer is None else shard.index[1:]  # layers are never sharded
                host[index] = np.asarray(shard.data if layer is None else shard.data[layer])
    return host


@partial(jax.jit, static_argnums=2)
def _all_gather_layer(array: jax.Array, layer: jax.Array | None, sharding: NamedSharding) -> jax.Array:
    return jax.reshard(array if layer is None else array[layer], sharding)


def _sort_by_layer(sources: Mapping[str, list[tuple[ParamSource, int]]]) -> list[str]:
    """Sort tensors: the embedding, each layer, the rest."""

    def position(name: str) -> tuple[int, int]:
        leaf, layer = sources[name][0]
        return (1, layer) if leaf.is_stacked else (0 if leaf.path.startswith("embed") else 2, 0)

    return sorted(sources, key=position)
