"""Write model folders in Hugging Face's format.

A folder holds config.json, safetensors, tokenizer, generation config, a model card, and a manifest, `selftrain.json`:

| key | content |
|---|---|
| `format`, `version` | "jax_selftrain.model", 3 |
| `weights` | "safetensors", or "orbax" (`params/`, an Orbax tree: checkpoints of training, `convert --format flax`) |
| `source` | reference and fingerprint of the model that config and tokenizer come from |
| `tensors` | dtype of each tensor in Hugging Face's format, by name |
| `dropped` | tensors of the source that are not stored: legacy buffers, copies of tied embeddings |
| `metadata`, `versions` | how the model was made; versions of libraries |
| `files` | SHA-256 and size of every file; those of `params/` are in `params/manifest.json` |
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jax_selftrain.distributed import barrier, broadcast_one_to_all
from jax_selftrain.errors import InputError
from jax_selftrain.hub import orbax_io
from jax_selftrain.hub.families import FAMILIES
from jax_selftrain.hub.hf_config import parse_config
from jax_selftrain.hub.model_ref import (
    CONFIG,
    FORMAT,
    MANIFEST,
    MODEL_CARD,
    PARAMS,
    VERSION,
    ModelRef,
    Ref,
    open_model,
)
from jax_selftrain.hub.safetensors_io import save_weights
from jax_selftrain.hub.tokenizer import GENERATION_CONFIG, TOKENIZER_FILES
from jax_selftrain.hub.weight_mapping import param_sources
from jax_selftrain.io import atomic, json_files
from jax_selftrain.io.manifest import folder_manifest, manifest_entry
from jax_selftrain.io.remote_paths import restore_uris
from jax_selftrain.models import Params
from jax_selftrain.version import versions

Format = Literal["hf", "flax"]
"""Safetensors, or an Orbax tree."""


@dataclass(frozen=True)
class ExportSpec:
    """The dtypes and names of tensors in Hugging Face's format."""

    raw_config: Mapping[str, Any]
    """Content of config.json."""
    tensors: Mapping[str, str]
    """Dtype of every tensor by name: "float32", "bfloat16" or "float16"."""
    dropped: Sequence[str] = ()
    """Tensors that are not stored: legacy buffers, copies of tied embeddings."""

    def cast(self, tensors: Mapping[str, str]) -> "ExportSpec":
        """Change dtypes, also in config.json, which transformers obeys."""
        types = set(tensors.values())
        dtype = types.pop() if len(types) == 1 else "float32"
        raw = {key: dtype if key in ("dtype", "torch_dtype") else value for key, value in self.raw_config.items()}
        return ExportSpec(raw, tensors, self.dropped)


def save_model(
    folder: Ref,
    params: Params,
    *,
    source: Ref | ModelRef,
    metadata: Mapping[str, Any],
    export: ExportSpec | None = None,
    format: Format = "hf",
) -> Path:
    """Write a model folder and commit it; all processes call this together.

    Args:
      folder: must not exist, or be empty.
      params: device or host arrays.
      source: the model whose config, tokenizer and generation config belong to this one.
      metadata: plain data for the manifest and the model card; `made_by` is the command.
      export: names and dtypes of tensors; unset: those of `source` and of `params`.
      format: `hf` for safetensors, `flax` for an Orbax tree.

    Raises:
      InputError: the folder exists, the source cannot be read, or the disk is full.
    """
    source = open_model(source)
    if export is None:
        leaves = param_sources(FAMILIES[source.raw_config["model_type"]], source.config, source.tensor_names)
        dtypes = {path: np.dtype(array.dtype).name for path, array in flatten_dict(params, sep="/").items()}
        tensors = {name: dtypes[leaf.path] for leaf in leaves for name in leaf.names}
        export = ExportSpec(source.raw_config, {}).cast(tensors)
    with commit_from_all_processes(folder) as temporary:
        if not jax.process_index():
            _write_config_and_tokenizer(temporary, export.raw_config, source)
        if format == "flax":
            orbax_io.save_tree(temporary / PARAMS, params)
        else:
            family, config = FAMILIES[export.raw_config["model_type"]], parse_config(export.raw_config, CONFIG)
            save_weights(temporary, family, config, params, export.tensors)
        if not jax.process_index():
            files = folder_manifest(temporary, exclude=f"{PARAMS}/")
            if format == "flax":
                name = f"{PARAMS}/{orbax_io.MANIFEST}"
                files[name] = manifest_entry(temporary / name)
            content = {
                "format": FORMAT,
                "version": VERSION,
                "weights": "orbax" if format == "flax" else "safetensors",
                "source": source.provenance,
                "tensors": dict(export.tensors),
                "dropped": sorted(export.dropped),
                "metadata": dict(metadata),
                "versions": versions(),
                "files": files,
            }
            json_files.write_json(temporary / MANIFEST, content)
            atomic.write_text(temporary / MODEL_CARD, model_card(content))
    return Path(folder)


def _write_config_and_tokenizer(folder: Path, raw_config: Mapping[str, Any], source: ModelRef) -> None:
    """Copy files; config.json stays the same bytes unless its content changes."""
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG, CONFIG):
        if (source.folder / name).is_file():
            _refuse_link(source.folder, name)
            shutil.copyfile(source.folder / name, folder / name)
    if not (folder / CONFIG).is_file() or json_files.read_json(folder / CONFIG) != raw_config:
        json_files.write_json(folder / CONFIG, raw_config, checksum=False)
    if not (folder / GENERATION_CONFIG).is_file():
        special = source.special_tokens
        ids = {"bos_token_id": special.bos_token_id, "eos_token_id": list(special.eos_token_ids) or None}
        stated = {name: value for name, value in ids.items() if value is not None}
        json_files.write_json(folder / GENERATION_CONFIG, stated, checksum=False)


def _refuse_link(folder: Path, name: str) -> None:
    """Refuse a link out of the folder, except to the hub's `blobs`."""
    target, root = (folder / name).resolve(), folder.resolve()
    if target.parent not in (root, root.parent.parent / "blobs") and (folder / name).is_symlink():
        raise InputError(f"{folder / name}: is a link to {target}, outside the folder; replace it with a copy")


def model_card(manifest: Mapping[str, Any], changes: str = "") -> str:
    """Write README.md as Markdown: base, corpus, recipe, fingerprints.

    Args:
      manifest: content of `selftrain.json`.
      changes: a section with measured changes.
    """
    from huggingface_hub import ModelCardData

    base, metadata = dict(manifest["source"]), dict(manifest["metadata"])
    ref, base_license = base.pop("ref"), base.pop("license", None)
    made_by = f"jax-selftrain {metadata.pop('made_by', '')}".strip()
    data = ModelCardData(
        base_model=ref.partition("@")[0] if base.get("commit") else None,
        library_name="transformers",
        license=base_license,
        tags=["jax_selftrain"],
    )
    lines = ["---", data.to_yaml(), "---", "", f"Written by `{made_by}`."]
    lines += ["", f"- base: `{ref}`", f"- license of the base: {base_license or 'not stated'}"]
    lines += [f"- {name} of the base: `{value}`" for name, value in base.items() if value]
    tables = {name: metadata.pop(name) for name in ("corpora", "recipe", "fingerprints") if name in metadata}
    lines += [f"- {name}: `{json.dumps(value, sort_keys=True)}`" for name, value in sorted(metadata.items())]
    for title, rows in tables.items():
        lines += ["", f"## {title.capitalize()}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | `{json.dumps(value, sort_keys=True)}` |" for name, value in sorted(rows.items())]
    lines += [
        *(["", changes] if changes else []),
        "",
        f"`{MANIFEST}` lists the SHA-256 of every file and the versions of libraries.",
    ]
    return restore_uris("\n".join([*lines, ""]))


@contextmanager
def commit_from_all_processes(path: str | Path) -> Iterator[Path]:
    """Yield one temporary folder to all processes; process 0 commits it.

    All processes pass the same path on a shared file system, and get the InputError of process 0.
    """
    with ExitStack() as stack:
        yield Path(broadcast_one_to_all(lambda: str(stack.enter_context(atomic.commit_folder(path)).absolute())))
        barrier(f"written {path}")
    barrier(f"committed {path}")
