"""JSON files: committed whole, with a checksum of their content.

The key `checksum` of a file is the SHA-256 of all other keys (`hash_json`). It is verified and dropped when the file is
read, so that a damaged file is refused instead of believed. JSON files of other programs have none.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_selftrain.errors import InputError
from jax_selftrain.io.atomic import PathLike, write_text
from jax_selftrain.io.remote_paths import restore_uris

CHECKSUM = "checksum"


def hash_json(obj: Any) -> str:
    """Return the SHA-256 (hex) of plain data; key order is ignored."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: PathLike, obj: Mapping[str, Any], *, checksum: bool = True) -> None:
    """Commit plain data as indented JSON with sorted keys.

    Equal data gives equal bytes. Local copies of objects are recorded by their URI. NaN is a ValueError.

    Args:
      path: the file.
      obj: plain data.
      checksum: False for formats of other programs, such as config.json.
    """
    try:
        text = restore_uris(json.dumps(obj, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if checksum:
        content = json.loads(text)
        text = json.dumps(content | {CHECKSUM: hash_json(content)}, indent=2, sort_keys=True, ensure_ascii=False)
    write_text(path, text + "\n")


def read_json(path: PathLike) -> Any:
    """Read a JSON file, and verify its checksum if it has one.

    Raises:
      InputError: the file is missing, unreadable, damaged or not strict JSON.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"{path}: not valid JSON ({error}); the file is damaged or of another kind") from error
    if isinstance(content, dict) and (stored := content.pop(CHECKSUM, None)) not in (None, hash_json(content)):
        raise InputError(f"{path}: the file is damaged: it does not match its {CHECKSUM} {str(stored)[:8]}…")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
