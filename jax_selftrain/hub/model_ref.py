"""Model references: resolved once, read and verified on first use.

A folder that this package wrote has a manifest, `selftrain.json`. Small files are verified when the folder is opened,
weights when they are loaded.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any

from jax_selftrain.errors import InputError
from jax_selftrain.hub import orbax_io
from jax_selftrain.hub.hf_config import parse_config
from jax_selftrain.hub.safetensors_io import (
    INDEX,
    TORCH_INDEX,
    TORCH_WEIGHTS,
    WEIGHTS,
    has_weight_files,
    indexed_files,
    open_weights,
    weight_files,
)
from jax_selftrain.hub.tokenizer import (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    SpecialTokens,
    has_tokenizer,
    read_tokenizer,
    resolve_special_tokens,
    tokenizer_hash,
    vocabulary_range,
)
from jax_selftrain.io import json_files
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.io.manifest import read_manifest, sha256_file, verify_checksums
from jax_selftrain.models import DecoderConfig

MANIFEST, PARAMS, MODEL_CARD = "selftrain.json", "params", "README.md"
FORMAT, VERSION = "jax_selftrain.model", 3
ADAPTER = "adapter_config.json"
"""Config of a PEFT adapter, which transformers applies to the model of the folder."""
OLD_MANIFEST = "model.json"
"""Manifest of versions 1 and 2, whose weights were an Orbax tree."""
_FIX_HINT = f"restore the folder from a copy or make it again (if you changed it on purpose, delete its {MANIFEST})"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")

Ref = str | Path
"""A model folder, a hub id (`org/name` or `org/name@revision`), or a RUN folder."""


@dataclass(frozen=True, eq=False)
class ModelRef:
    """A resolved model folder.

    Properties raise InputError where a file is missing, damaged or not supported.
    """

    ref: str
    """The reference as given."""
    folder: Path
    """The folder with config.json, or with nothing but a tokenizer."""
    hub_id: str = ""
    """Repository of a snapshot of the hub, whose weights are downloaded on first use; empty for other folders."""

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """Content of `selftrain.json`, small files verified; empty without one."""
        path = self.folder / MANIFEST
        if not path.is_file():
            return {}
        kinds = {"weights": str, "source": dict, "tensors": dict, "dropped": list, "metadata": dict, "files": dict}
        content = read_manifest(path, FORMAT, VERSION, kinds, remedy=_FIX_HINT)
        small = {name: entry for name, entry in content["files"].items() if not name.endswith(".safetensors")}
        verify_checksums(self.folder, small, fix_hint=_FIX_HINT)
        return content

    @cached_property
    def raw_config(self) -> Mapping[str, Any]:
        """Content of config.json."""
        if not (self.folder / CONFIG).is_file():
            raise InputError(f"{self.ref}: holds no model ({CONFIG} is missing); name another folder")
        _ = self.manifest  # verifies config.json
        return json_files.read_json(self.folder / CONFIG)

    @cached_property
    def config(self) -> DecoderConfig:
        """The architecture."""
        return parse_config(self.raw_config, str(self.folder / CONFIG))

    @property
    def has_tokenizer(self) -> bool:
        """Return True if the folder holds a tokenizer."""
        return has_tokenizer(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, shared by all users of the model."""
        _ = self.manifest  # verifies the tokenizer's files
        return read_tokenizer(self.folder)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 (hex) of what turns text into ids, see `tokenizer_hash`."""
        return tokenizer_hash(self.folder, self.tokenizer)

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """Start and stop ids."""
        path = self.folder / GENERATION_CONFIG
        generation = json_files.read_json(path) if path.is_file() else {}
        if not isinstance(generation, dict):
            raise InputError(f"{path}: is not a JSON object; download it again")
        tokenizer = self.tokenizer if self.has_tokenizer else None
        raw: Mapping[str, Any] = {}
        size = 0 if tokenizer is None else vocabulary_range(tokenizer)[0]
        if tokenizer is None or (self.folder / CONFIG).is_file():
            raw, size = self.raw_config, self.config.vocab_size
        return resolve_special_tokens(raw, generation, tokenizer, vocab_size=size, where=str(self.folder))

    @property
    def weights_folder(self) -> Path:
        """The folder, with the weights."""
        if self.hub_id:
            _download_weights(self.ref, self.hub_id, self.folder)
        return self.folder

    @property
    def is_orbax(self) -> bool:
        """Return True if the weights are an Orbax tree rather than safetensors."""
        return self.manifest.get("weights") == "orbax"

    @property
    def has_weights(self) -> bool:
        """Return True if the folder holds weights, not only an architecture."""
        return self.is_orbax or has_weight_files(self.weights_folder)

    @property
    def has_local_weights(self) -> bool:
        """Return True if the folder holds weights, without a download."""
        return self.is_orbax or has_weight_files(self.folder)

    @cached_property
    def tensor_names(self) -> frozenset[str]:
        """Hugging Face names of the tensors (embed_out or lm_head)."""
        if self.manifest:
            return frozenset(self.manifest["tensors"])
        return frozenset(open_weights(self.weights_folder) if self.has_weights else ())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of config and weight files, from the manifest if any."""
        names = [f"{PARAMS}/{orbax_io.MANIFEST}"] if self.is_orbax else weight_files(self.weights_folder)
        listed = self.manifest.get("files", {})
        weights = {n: listed[n]["sha256"] if n in listed else sha256_file(self.folder / n) for n in names}
        return hash_json({"config": self.raw_config, "weights": weights})

    @property
    def commit(self) -> str | None:
        """The commit of a model of the hub; None for other folders."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    @property
    def provenance(self) -> dict[str, str | None]:
        """Reference, fingerprint, commit and license, for records."""
        weights = self.fingerprint if self.has_weights else hash_json({"config": self.raw_config})
        return {"ref": self.ref, "fingerprint": weights, "commit": self.commit, "license": self.license}

    @cached_property
    def license(self) -> str | None:
        """The license that the model card states; None without one."""
        from huggingface_hub.repocard import metadata_load
        from yaml import YAMLError

        try:
            card = metadata_load(self.folder / MODEL_CARD) if (self.folder / MODEL_CARD).is_file() else None
        except (ValueError, YAMLError):  # free text that begins like a card
            return None
        stated = (card or {}).get("license")
        return stated if isinstance(stated, str) else None

    def without_keys(self, keys: Collection[str]) -> "ModelRef":
        """Return the model without some keys of config.json, which must be there."""
        if missing := [key for key in keys if key not in self.raw_config]:
            raise InputError(f"--ignore-config-keys {missing[0]}: is not in {self.folder / CONFIG}")
        model = replace(self)
        model.__dict__["raw_config"] = {key: value for key, value in self.raw_config.items() if key not in keys}
        return model

    def verify_weights(self, fix_hint: str = _FIX_HINT) -> None:
        """Refuse safetensors files that differ from the manifest, if any; once."""
        if not self.manifest or "_is_verified" in self.__dict__:
            return
        listed = {name: entry for name, entry in self.manifest["files"].items() if name.endswith(".safetensors")}
        verify_checksums(self.weights_folder, listed, fix_hint=fix_hint)
        if unknown := [name for name in weight_files(self.folder) if name not in listed]:
            raise InputError(f"{self.folder / unknown[0]}: is not in {MANIFEST}; {fix_hint}")
        self.__dict__["_is_verified"] = True


def open_model(ref: Ref | ModelRef) -> ModelRef:
    """Resolve a model reference; the same object until a file changes.

    A RUN folder means its final `model`. A hub id is downloaded, or taken from the local cache: config and tokenizer
    at once, weights on first use. A folder may also hold nothing but a tokenizer.

    Raises:
      InputError: there is no such folder, it holds no model, or the hub id cannot be downloaded.
    """
    if isinstance(ref, ModelRef):
        return ref
    folder, hub_id = _resolve(ref)
    stats = {
        path.name: path.stat() for path in (*folder.iterdir(), folder / PARAMS / orbax_io.MANIFEST) if path.is_file()
    }
    files = tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()))
    return _open(str(ref), folder, hub_id, folder.absolute(), files)


@lru_cache(maxsize=32)
def _open(ref: str, folder: Path, hub_id: str, _absolute: Path, _files: tuple[tuple[str, int, int], ...]) -> ModelRef:
    return ModelRef(ref, folder, hub_id)


def _resolve(ref: Ref) -> tuple[Path, str]:
    """Return the folder, and the hub id of a snapshot."""
    path = Path(ref)
    if not path.exists():
        if _HUB_ID.fullmatch(str(ref)) and not str(ref).startswith("."):
            return _download(str(ref)), str(ref).partition("@")[0]
        raise InputError(f"{ref}: no such model folder; give a folder, or a Hugging Face id such as org/name")
    if not path.is_dir():
        raise InputError(f"{ref}: is a file; give the folder that holds the model's {CONFIG}")
    for folder in (path, path / "model"):
        old = folder / OLD_MANIFEST
        if old.is_file() and not (folder / MANIFEST).is_file() and FORMAT.encode() in old.read_bytes():
            raise InputError(
                f"{folder}: has the model format of an earlier version; make it again, or convert it with the release "
                f"that wrote it: jax-selftrain convert {folder} OUT --format hf"
            )
    _refuse_adapter(path)
    if (path / CONFIG).is_file():
        return path, ""
    if (path / "model" / CONFIG).is_file():
        return path / "model", ""
    if (path / "run.json").is_file():
        raise InputError(f"{ref}: has no final model yet; run the same train command again, or name a checkpoint")
    if has_tokenizer(path):
        return path, ""
    raise InputError(f"{ref}: holds no model ({CONFIG} is missing); name another folder")


def _refuse_adapter(folder: Path) -> None:
    if (folder / ADAPTER).is_file():
        raise InputError(
            f"{folder / ADAPTER}: adapters are not applied here; merge it into its base with peft's merge_and_unload "
            "and save_pretrained, or move it to another folder to use the model without it"
        )


@lru_cache(maxsize=32)
def _download(ref: str) -> Path:
    """Return the snapshot of a hub id, with config, tokenizer and card."""
    name, _, revision = ref.partition("@")
    small = [CONFIG, MANIFEST, MODEL_CARD, GENERATION_CONFIG, ADAPTER, *TOKENIZER_FILES]
    folder = download_snapshot(ref, name, revision or None, small)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{ref}: the Hugging Face hub has no {CONFIG} for it; check the name")
    _refuse_adapter(folder)
    return folder


@lru_cache(maxsize=32)
def _download_weights(ref: str, name: str, folder: Path) -> None:
    """Download the weights of a snapshot, if the hub has any.

    An index names them, so that they can have any names. They are those of the snapshot's commit.
    """
    for file, index in ((WEIGHTS, INDEX), (TORCH_WEIGHTS, TORCH_INDEX)):
        download_snapshot(ref, name, folder.name, [file, index])
        if (folder / index).is_file():
            download_snapshot(ref, name, folder.name, indexed_files(folder, index))
        if has_weight_files(folder):
            return


def download_snapshot(
    ref: str,
    name: str,
    revision: str | None,
    files: Sequence[str],
    *,
    repo_type: str = "model",
    cached_only: bool = False,
) -> Path:
    """Download files of the hub, or find them in the cache.

    Args:
      ref: the reference as given, for errors.
      name: `org/name`.
      revision: branch, tag or commit; None: the main branch.
      files: names or patterns.
      repo_type: `model` or `dataset`.
      cached_only: download nothing.

    Returns the folder of the commit. Raises InputError if the download fails.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    try:
        patterns: dict[str, Any] = {"allow_patterns": list(files), "local_files_only": cached_only}
        return Path(snapshot_download(name, repo_type=repo_type, revision=revision, **patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = shorten(str(error), 200, placeholder=" …")
        if isinstance(error, LocalEntryNotFoundError):
            reason = "it cannot be reached, and its cache has no copy"
        kind = "" if repo_type == "model" else f" --repo-type {repo_type}"
        cached = Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=repo_type))
        raise InputError(
            f"{ref}: no such local folder, and the download from the Hugging Face hub failed ({reason}); check the "
            f"name and the network; without a network, run `hf download {name}{kind}` on another machine and copy its "
            f"cache to {cached}"
        ) from error
