"""Match the tensors of a checkpoint with a family's table.

A checkpoint fits its config tensor by tensor, or the first tensor that does not is named.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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
}
"""Supported dtypes by their code in safetensors."""


@dataclass(frozen=True)
class TensorInfo:
    """Header of a tensor in a safetensors file."""

    file: str
    dtype: str
    """Code of safetensors: F32, BF16, F16 …"""
    shape: tuple[int, ...]


class TensorReader(Protocol):
    """A source of weights: headers of all tensors, and slices of one."""

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint, for messages."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Headers of all tensors by name."""

    def read(self, name: str, bounds: tuple[slice, ...]) -> np.ndarray:
        """Read slices of a tensor, in the file's dtype."""


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
            layers = range(config.num_layers) if row.is_stacked else range(1)
            names = tuple(_choose(row, layer, known) for layer in layers)
            leaves.append(ParamSource(row.path, row.pattern, shapes[row.path], names, row.is_stacked))
    if {leaf.path for leaf in leaves} != shapes.keys():
        raise ValueError(f"the table of {family.model_type} does not fill {shapes.keys() - {x.path for x in leaves}}")
    return leaves


def _choose(rule: TensorRule, layer: int, known: Collection[str]) -> str:
    names = [name.format(layer) for name in rule.names]
    # Embedding models hold the body alone, without the body's prefix.
    names += [name.removeprefix("model.").removeprefix("gpt_neox.") for name in names]
    return next((name for name in names if name in known), names[0])


@dataclass(frozen=True)
class WeightMapping:
    """The tensors of a checkpoint that fits a config."""

    leaves: tuple[ParamSource, ...]
    tensors: dict[str, str]
    """Dtype of every tensor that is used: {name: "float32" | "bfloat16" | "float16"}."""
    dropped: tuple[str, ...]
    """Tensors that are not used: legacy buffers and copies of tied embeddings."""

    def stored_dtype(self, leaf: ParamSource) -> np.dtype:
        """Return the common dtype of a parameter's tensors, else fp32."""
        types = {self.tensors[name] for name in leaf.names}
        return np.dtype(types.pop()) if len(types) == 1 else np.dtype(np.float32)


def map_tensors(reader: TensorReader, family: Family, config: DecoderConfig) -> WeightMapping:
    """Match every tensor of a checkpoint with the family's table.

    Raises:
      InputError: a tensor is unknown, missing, of another shape or dtype, or the config ties embeddings that differ.
    """
    folder, found = reader.folder, dict(reader.tensors)
    dropped = [name for name in found if any(re.fullmatch(pattern, name) for pattern in family.ignored_buffers)]
    leaves = param_sources(family, config, found)
    sizes = pattern_sizes(config)
    expected = {name: leaf.pattern.file_shape(sizes) for leaf in leaves for name in leaf.names}
    missing = [name for name in expected if name not in found]
    if missing:
        raise InputError(
            f"{folder}: tensor {missing[0]} is missing{_more(missing)}; config.json requires it, so the weights are "
            "incomplete or of another model"
        )
    if config.tie_word_embeddings:
        embedding = next(leaf.names[0] for leaf in leaves if leaf.path == "embed/embedding")
        for copy in (name for name in family.tied_head if name in found):
            if found[copy].shape != found[embedding].shape or not _equal(reader, copy, embedding):
                raise InputError(
                    f"{folder}: {copy} differs from {embedding} though config.json says tie_word_embeddings: true; "
                    "set it to false if the two are meant to differ"
                )
            dropped.append(copy)
    unknown = [name for name in found if name not in expected and name not in dropped]
    if unknown:
        raise InputError(
            f"{folder}: tensor {unknown[0]} is not known{_more(unknown)}: neither part of a {family.model_type} model "
            "with this config.json nor a legacy buffer; ignoring it could change the model"
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise InputError(f"{folder}: tensor {name} has shape {found[name].shape}, but config.json makes it {shape}")
        if found[name].dtype not in DTYPES:
            raise InputError(
                f"{folder}: tensor {name} is of type {found[name].dtype}; only {', '.join(DTYPES)} are supported, so "
                "dequantize or convert the model with the tool that made it"
            )
    tensors = {name: DTYPES[found[name].dtype].name for name in expected}
    return WeightMapping(tuple(leaves), tensors, tuple(sorted(dropped)))


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _equal(reader: TensorReader, one: str, other: str, rows: int = 4096) -> bool:
    height, width = reader.tensors[one].shape
    blocks = (slice(start, min(start + rows, height)) for start in range(0, height, rows))
    whole = slice(0, width)
    return all(np.array_equal(reader.read(one, (b, whole)), reader.read(other, (b, whole))) for b in blocks)
