"""SHA-256 of files, and manifests that detect damaged files."""

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jax_selftrain.errors import InputError
from jax_selftrain.io.atomic import PathLike
from jax_selftrain.io.json_files import read_json

_BLOCK_BYTES = 1 << 20


def sha256_file(path: PathLike) -> str:
    """Return the SHA-256 of a file as a hex digest."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def manifest_entry(path: Path) -> dict[str, Any]:
    """Return the checksum and the size in bytes of a file."""
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def verify_beginning(path: Path, entry: Mapping[str, Any], *, fix_hint: str) -> None:
    """Compare the beginning of a file that has grown with its `manifest_entry`.

    Raises:
      InputError: the file is missing, shorter or changed; ends with `fix_hint`.
    """
    if not path.is_file():
        raise InputError(f"{path}: the file is missing; {fix_hint}")
    digest, left = hashlib.sha256(), int(entry["bytes"])
    with open(path, "rb") as stream:
        while left and (block := stream.read(min(left, _BLOCK_BYTES))):
            digest.update(block)
            left -= len(block)
    if left:
        raise InputError(f"{path}: the file is truncated ({left} bytes are missing); {fix_hint}")
    if digest.hexdigest() != entry["sha256"]:
        raise InputError(f"{path}: its first {entry['bytes']} bytes were changed; {fix_hint}")


def folder_manifest(folder: PathLike, *, exclude: str | None = None) -> dict[str, dict[str, Any]]:
    """Return the checksum and size of every file below a folder.

    Keys are relative POSIX paths, sorted; values are {"sha256", "bytes"}. Paths that begin with `exclude` are skipped.
    """
    root = Path(folder)
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return {name: manifest_entry(root / name) for name in names if exclude is None or not name.startswith(exclude)}


def read_manifest(path: Path, format: str, version: int, kinds: Mapping[str, type], *, remedy: str) -> dict[str, Any]:
    """Read a JSON object and check its format, version and keys.

    Raises:
      InputError: the file is unreadable, damaged, of another format or of another version; ends with `remedy`.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != format:
        raise InputError(f"{path}: is not of the format {format!r}; {remedy}")
    if content.get("version") != version:
        raise InputError(f"{path}: has format version {content.get('version')!r}, not {version}; {remedy}")
    for key, kind in kinds.items():
        if key not in content or not isinstance(content[key], kind):
            raise InputError(f"{path}: {key!r} is missing or damaged; {remedy}")
    return content


def verify_checksums(
    folder: PathLike,
    files: Mapping[str, Mapping[str, Any]],
    *,
    fix_hint: str = "recreate it, or restore it from a copy",
) -> None:
    """Compare the files of a folder with its manifest; ignore others.

    Raises:
      InputError: a file is missing, truncated or changed; the sentence names the first and ends with `fix_hint`.
    """
    for name, entry in sorted(files.items()):
        relative, path = PurePosixPath(name), Path(folder, name)
        if relative.is_absolute() or ".." in relative.parts:
            raise InputError(f"{folder}: its manifest lists {name!r}, which is outside the folder; do not use it")
        if not isinstance(entry, Mapping) or not {"sha256", "bytes"} <= set(entry):
            raise InputError(f"{folder}: the manifest entry of {name!r} has no sha256 and bytes; {fix_hint}")
        if not path.is_file():
            raise InputError(f"{path}: the file is missing, but the manifest lists it; {fix_hint}")
        size = path.stat().st_size
        if size != entry["bytes"]:
            what = "truncated" if size < entry["bytes"] else "of the wrong size"
            raise InputError(f"{path}: the file is {what} (expected {entry['bytes']} bytes, found {size}); {fix_hint}")
        found = sha256_file(path)
        if found != entry["sha256"]:
            hashes = f"expected {str(entry['sha256'])[:8]}…, found {found[:8]}…"
            raise InputError(f"{path}: checksum differs from the manifest ({hashes}); {fix_hint}")
