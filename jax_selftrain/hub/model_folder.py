"""What a MODEL is on disk, and how a reference becomes one.

A model folder of ours holds `config.json`, tokenizer files and `generation_config.json` as Hugging Face has them,
`params/` (a checked tree, see `checkpoint`), and `model.json`:

| key | meaning |
|---|---|
| `format`, `version` | "jax_selftrain.model", 2 |
| `source` | reference and fingerprint of the model that this one was made from |
| `tensors` | type in which each tensor is exported, by its Hugging Face name |
| `dropped` | tensors of the source that were left out: legacy buffers, copies of tied embeddings |
| `dtypes` | type in which each array is stored in `params/` |
| `weights` | fingerprint of the weights by content, see `digest` |
| `metadata` | what the writer wants to record |
| `versions` | of the libraries that wrote it |
| `files` | SHA-256 and size of every file here, `params/manifest.json` among them, which lists those of `params/` |
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_selftrain.errors import InputError
from jax_selftrain.hub import orbax_io
from jax_selftrain.hub.distributed_commit import commit_from_all_processes
from jax_selftrain.hub.families import FAMILIES
from jax_selftrain.hub.hf_config import parse_config
from jax_selftrain.hub.safetensors_io import INDEX, WEIGHTS, open_weights, weight_files
from jax_selftrain.hub.tokenizer import (
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    SpecialTokens,
    has_tokenizer,
    read_tokenizer,
    resolve_special_tokens,
    tokenizer_hash,
)
from jax_selftrain.hub.trees import flatten
from jax_selftrain.hub.weight_mapping import param_sources
from jax_selftrain.hub.weights_hash import hash_weights
from jax_selftrain.io import atomic
from jax_selftrain.io.manifest import folder_manifest, hash_json, sha256_file, verify_checksums
from jax_selftrain.models import DecoderConfig, Params, abstract_params
from jax_selftrain.version import versions

CONFIG, MODEL_JSON, PARAMS = "config.json", "model.json", "params"
_FORMAT, _VERSION = "jax_selftrain.model", 2  # 1 had the inputs of kernels before their outputs
_REMEDY = "restore the model folder from a copy, or make it again"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w.-]+)?")

Ref = str | Path
"""A Hugging Face folder, a hub id (`org/name` or `org/name@revision`), a model folder of ours, or a RUN folder."""


# ---------------------------------------------------------------- references


def resolve(ref: Ref) -> Path:
    """Find the folder that a reference means: one with a config.json, ours or Hugging Face's.

    A RUN folder means its final `model`. What is not a local path and looks like a hub id is fetched from the Hugging
    Face hub, or taken from its local cache.

    Raises:
      InputError: there is no such folder, it holds no model, or the hub id cannot be fetched.
    """
    path = Path(ref)
    if not path.exists():
        if _HUB_ID.fullmatch(str(ref)) and not str(ref).startswith("."):
            return _fetch(str(ref))
        raise InputError(f"{ref}: no such model folder; give a folder, or a Hugging Face id such as org/name")
    if not path.is_dir():
        raise InputError(f"{ref}: is a file; give the folder that holds the model's config.json")
    if (path / MODEL_JSON).is_file() or (path / CONFIG).is_file():
        return path
    if (path / "model" / MODEL_JSON).is_file():
        return path / "model"
    if (path / "run.json").is_file():
        raise InputError(
            f"{ref}: this run has no final model yet; run the same train command again to finish it, or name one of "
            "its checkpoints (steps/NUMBER/model)"
        )
    raise InputError(f"{ref}: holds no model ({CONFIG} is missing); name another folder")


def _fetch(ref: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = ref.partition("@")
    patterns = [CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES, WEIGHTS, INDEX, "model-*.safetensors"]
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{ref}: no such folder here, and it could not be fetched from the Hugging Face hub ({reason}); check the "
            "name and the network, or give a local folder"
        ) from error
    if not (Path(folder) / CONFIG).is_file():
        raise InputError(f"{ref}: the Hugging Face hub has no {CONFIG} for it; check the name")
    return Path(folder)


def is_native(path: Path) -> bool:
    """Whether a resolved folder is a model folder of ours rather than Hugging Face's."""
    return (path / MODEL_JSON).is_file()


# ---------------------------------------------------------------- reading


def read_config(ref: Ref) -> tuple[DecoderConfig, dict[str, Any]]:
    """The architecture of a model, and its raw config.json, without reading weights.

    Raises:
      InputError: see `resolve` and `hf_config.parse_config`.
    """
    path = resolve(ref)
    if is_native(path):
        read_model_json(path)
    raw = atomic.read_json(path / CONFIG)
    return parse_config(raw, str(path / CONFIG)), raw


def read_model_json(path: Path) -> dict[str, Any]:
    """`model.json` of a model folder of ours, after checking every file it vouches for outside `params/`.

    Raises:
      InputError: it is of another format or version, or a file is missing, truncated or changed.
    """
    where = path / MODEL_JSON
    record = atomic.read_json(where)
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise InputError(f"{where}: is not the record of a model folder; {_REMEDY}")
    if record.get("version") != _VERSION:
        remedy = (
            "convert the model again from its Hugging Face folder"
            if record.get("version") == 1
            else "use a newer release"
        )
        raise InputError(f"{where}: format version {record.get('version')!r} is not {_VERSION}; {remedy}")
    parts = {"source": dict, "tensors": dict, "dropped": list, "dtypes": dict, "weights": str, "files": dict}
    wrong = [key for key, kind in parts.items() if not isinstance(record.get(key), kind)]
    if wrong:
        raise InputError(f"{where}: {wrong[0]} is missing or damaged; {_REMEDY}")
    verify_checksums(path, record["files"], fix_hint=_REMEDY)
    return record


def load_tokenizer(ref: Ref) -> Any:
    """The tokenizer of a model (a transformers tokenizer); also opens a folder that holds nothing but a tokenizer.

    Raises:
      InputError: there is none, or it cannot be opened.
    """
    return read_tokenizer(_tokenizer_folder(ref))


def tokenizer_fingerprint(ref: Ref) -> str:
    """SHA-256 (hex) of what turns text into ids; see `tokens.fingerprint_of`."""
    return tokenizer_hash(_tokenizer_folder(ref))


def _tokenizer_folder(ref: Ref) -> Path:
    path = Path(ref)
    return path if path.is_dir() and has_tokenizer(path) else resolve(ref)


def special_tokens(ref: Ref) -> SpecialTokens:
    """Start and stop ids of a model, or of a folder that holds nothing but a tokenizer.

    Raises:
      InputError: the model or its tokenizer cannot be read, or they do not belong together.
    """
    path = _tokenizer_folder(ref)
    tokenizer = read_tokenizer(path) if has_tokenizer(path) else None
    if tokenizer is not None and not (path / CONFIG).is_file():
        return read_special_tokens(path, {}, tokenizer, len(tokenizer))
    config, raw = read_config(path)
    return read_special_tokens(path, raw, tokenizer, config.vocab_size)


def read_special_tokens(path: Path, raw: Mapping[str, Any], tokenizer: Any, vocab_size: int) -> SpecialTokens:
    """`special_tokens` of a resolved folder whose parts have been read already."""
    where = path / GENERATION_CONFIG
    generation = atomic.read_json(where) if where.is_file() else {}
    if not isinstance(generation, dict):
        raise InputError(f"{where}: is not a JSON object; download it again")
    return resolve_special_tokens(raw, generation, tokenizer, vocab_size=vocab_size, where=str(path))


def model_fingerprint(ref: Ref) -> str:
    """SHA-256 (hex) of a model's config and weights.

    For a folder of ours the weights count by content, so that equal training gives an equal fingerprint; a Hugging
    Face folder counts by the bytes of its weight files.

    Raises:
      InputError: see `resolve`; or there are no weights.
    """
    path = resolve(ref)
    if is_native(path):
        record = read_model_json(path)
        return hash_json({"config": atomic.read_json(path / CONFIG), "weights": record["weights"]})
    stats = {name: (path / name).stat() for name in (CONFIG, *weight_files(path))}
    return _fingerprint_of_files(path.resolve(), tuple((n, s.st_size, s.st_mtime_ns) for n, s in stats.items()))


@lru_cache(maxsize=64)
def _fingerprint_of_files(path: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    # Sizes and times are in the key, so that a long process notices when a file changes, and else hashes it once.
    weights = {name: sha256_file(path / name) for name, _, _ in files[1:]}
    return hash_json({"config": atomic.read_json(path / CONFIG), "weights": weights})


# ---------------------------------------------------------------- writing


def save_model(
    folder: Ref,
    config_raw: Mapping[str, Any],
    params: Params,
    *,
    source_ref: Ref,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, str] | None = None,
    dropped: tuple[str, ...] = (),
) -> None:
    """Write a model folder of ours; it appears under its name only when it is whole.

    In a program of several processes, all of them call this together.

    Args:
      folder: must not exist, or be empty.
      config_raw: content of config.json.
      params: device or host arrays.
      source_ref: the model whose tokenizer and generation config belong to this one.
      metadata: plain data to record in model.json.
      tensors: type in which each tensor is to be exported, by Hugging Face name; for weights that are as they came.
        Unset: the types of `params`, and config.json is made to state them (transformers reads weights in the type
        that config.json states, and a base in fp16 would have its fp32 students rounded).

    Raises:
      InputError: the folder exists, the source is gone, or the disk is full.
    """
    source = resolve(source_ref)
    config = parse_config(config_raw, "config.json")
    arrays, shapes = flatten(params), {path: leaf.shape for path, leaf in flatten(abstract_params(config)).items()}
    if {path: array.shape for path, array in arrays.items()} != shapes:
        raise ValueError("parameters do not have the shapes that the config gives them")
    dtypes = {path: np.dtype(array.dtype).name for path, array in arrays.items()}
    if tensors is None:
        known = source_tensor_names(source)
        leaves = param_sources(FAMILIES[config_raw["model_type"]], config, known)
        tensors = {name: dtypes[leaf.path] for leaf in leaves for name in leaf.names}
        config_raw = set_torch_dtype(config_raw, set(tensors.values()))
    identity = hash_weights(params)
    with commit_from_all_processes(folder) as aside:
        orbax_io.save_tree(aside / PARAMS, params)
        if jax.process_index():
            return
        copy_config_and_tokenizer(aside, config_raw, source)
        # The manifest of params/ vouches for what is in there; hashing that again would read all weights twice.
        manifest = f"{PARAMS}/{orbax_io.MANIFEST}"
        entry = {"sha256": sha256_file(aside / manifest), "bytes": (aside / manifest).stat().st_size}
        atomic.write_json(
            aside / MODEL_JSON,
            {
                "format": _FORMAT,
                "version": _VERSION,
                "source": {"ref": str(source_ref), "fingerprint": _source_fingerprint(source)},
                "tensors": dict(tensors),
                "dropped": sorted(dropped),
                "dtypes": dtypes,
                "weights": identity,
                "metadata": dict(metadata),
                "versions": versions(),
                "files": folder_manifest(aside, exclude=[f"{PARAMS}/*"]) | {manifest: entry},
            },
        )


def copy_config_and_tokenizer(folder: Path, config_raw: Mapping[str, Any], source: Path) -> None:
    """Write config.json, and copy tokenizer and generation config from the source; verbatim where nothing changed."""
    if (source / CONFIG).is_file() and atomic.read_json(source / CONFIG) == config_raw:
        shutil.copyfile(source / CONFIG, folder / CONFIG)
    else:
        text = json.dumps(config_raw, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def set_torch_dtype(config_raw: Mapping[str, Any], types: set[str]) -> dict[str, Any]:
    """The config, stating the type of the weights where it states any."""
    stated = next(iter(types)) if len(types) == 1 else "float32"
    return {key: stated if key in ("dtype", "torch_dtype") else value for key, value in config_raw.items()}


def source_tensor_names(source: Path) -> Mapping[str, Any]:
    """Tensor names of the source, so that a family's alternatives (embed_out, lm_head) stay as they were."""
    if is_native(source):
        return read_model_json(source)["tensors"]
    if not _has_weights(source):
        return {}
    with open_weights(source) as reader:
        return dict(reader.tensors)


def _has_weights(path: Path) -> bool:
    return any((path / name).is_file() for name in (WEIGHTS, INDEX))


def _source_fingerprint(source: Path) -> str:
    if is_native(source) or _has_weights(source):
        return model_fingerprint(source)
    return hash_json({"config": atomic.read_json(source / CONFIG)})  # an architecture to train from scratch
