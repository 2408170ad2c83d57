"""Match the tensors of a checkpoint with a family's table.

A checkpoint fits its config tensor by tensor, or the first tensor that does not is named.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from jax_selftrain.errors import InputError
from jax_selftrain.hub.families import Family, Pattern, TensorRule, pattern_sizes
from jax_selftrain.models import DecoderConfig, abstract_params

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
}
"""Supported dtypes by their code in safetensors. Double precision is read as single."""
_WRAPPERS = ("_orig_mod.", "module.")
"""Prefixes that wrappers of torch add to the names of all tensors."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a memory-mapped safetensors file."""

    file: Path
    dtype: str
    """Code of safetensors: F32, BF16, F16 …"""
    shape: tuple[int, ...]
    data: np.ndarray
    """uint8, memory-mapped."""

    @property
    def array(self) -> np.ndarray:
        """The memory-mapped values; the dtype must be supported."""
        return self.data.view(DTYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class ParamSource:
    """One parameter and the tensors that make it up."""

    path: str
    pattern: Pattern
    shape: tuple[int, ...]
    names: tuple[str, ...]
    """One per layer; a single one where `is_stacked` is False."""
    is_stacked: bool


def param_sources(family: Family, config: DecoderConfig, known: Collection[str] = ()) -> list[ParamSource]:
    """List all parameters with the tensor names of a family.

    Of a tensor's alternative names, the one in `known` is used, else the first.
    """
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract_params(config), sep="/").items()}
    leaves = []
    for row in family.rows:
        if row.path in shapes:
            is_stacked = row.path.startswith("layers/")
            layers = range(config.num_layers if is_stacked else 1)
            names = tuple(_choose(row, family.prefix, layer, known) for layer in layers)
            leaves.append(ParamSource(row.path, row.pattern, shapes[row.path], names, is_stacked))
    if unfilled := shapes.keys() - {leaf.path for leaf in leaves}:
        raise ValueError(f"the table of {family.model_type} does not fill {unfilled}")
    return leaves


def _choose(rule: TensorRule, prefix: str, layer: int, known: Collection[str]) -> str:
    names = [name.format(layer) for name in rule.names]
    # Embedding models hold the body alone, without the body's prefix, and so do GPT-2's files.
    names += [name.removeprefix(prefix) for name in names]
    return next((name for name in names if name in known), names[0])


def canonical_tensors(
    found: Mapping[str, StoredTensor], family: Family, config: DecoderConfig
) -> dict[str, StoredTensor]:
    """Give tensors the names that `save_pretrained` gives them.

    Wrappers of torch add a prefix to all names (`torch.compile`, data parallelism). Files of tied models may hold the
    head alone (`safetensors.torch.save_model`), which then is the embedding.
    """
    tensors = dict(found)
    for prefix in _WRAPPERS * 2:  # one around the other
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        row = next(row for row in family.rows if row.path == "embed/embedding")
        names = {*row.names, *(name.removeprefix(family.prefix) for name in row.names)}
        head = next((name for name in family.tied_head if name in tensors), None)
        if head is not None and not names & tensors.keys():
            tensors[row.names[0]] = tensors.pop(head)
    return tensors


def map_tensors(
    folder: Path, found: Mapping[str, StoredTensor], family: Family, config: DecoderConfig
) -> tuple[list[ParamSource], list[str]]:
    """Match every tensor of a checkpoint with the family's table.

    Returns:
      All parameters; and the tensors that are not used: legacy buffers and copies of tied embeddings.

    Raises:
      InputError: a tensor is unknown, missing, of another shape or dtype, or the config ties embeddings that differ.
    """
    dropped = [name for name in found if any(re.fullmatch(pattern, name) for pattern in family.ignored_buffers)]
    leaves = param_sources(family, config, found)
    sizes = pattern_sizes(config)
    expected = {name: leaf.pattern.file_shape(sizes) for leaf in leaves for name in leaf.names}
    if missing := [name for name in expected if name not in found]:
        raise InputError(f"{folder}: tensor {missing[0]} is missing{_more(missing)}, but config.json requires it")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise InputError(f"{folder}: tensor {name} has shape {found[name].shape}, but config.json makes it {shape}")
        if found[name].dtype not in DTYPES:
            raise InputError(
                f"{folder}: tensor {name} is of type {found[name].dtype}, not {'/'.join(DTYPES)}; convert it"
            )
    if config.tie_word_embeddings:
        embedding = next(leaf.names[0] for leaf in leaves if leaf.path == "embed/embedding")
        for copy in (name for name in family.tied_head if name in found):
            if not _equal(found[copy], found[embedding]):
                raise InputError(f"{folder}: {copy} differs from {embedding}, but config.json sets tie_word_embeddings")
            dropped.append(copy)
    if unknown := [name for name in found if name not in expected and name not in dropped]:
        raise InputError(f"{folder}: tensor {unknown[0]} is not known{_more(unknown)}; without it the model may differ")
    return leaves, sorted(dropped)


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape or one.dtype not in DTYPES:
        return False
    return all(map(np.array_equal, one.array, other.array))  # row by row, without large temporary arrays
