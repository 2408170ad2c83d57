"""Files at a URI of object storage, read and written with fsspec."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jax_selftrain.errors import InputError, UnavailableError
from jax_selftrain.io.json_files import hash_json

_METADATA_SUFFIX = re.compile(r"parts|config\.yaml|timings\.json|[a-z]+\.parquet")
"""Suffixes of the companions of a result `FILE.json` (`evals.result_files`)."""
_RECORD_KEYS = {
    "files": {"files", "uploading", "generation"},
    "writer": {"writer", "id", "generation", "scope", "heartbeat"},
}
"""Keys of the list of files and of the writer's heartbeat, the objects `.NAME.files.json` and `.NAME.writer.json`."""
_IDENTITIES = (("etag",), ("ETag",), ("md5Hash",), ("generation",), ("size", "mtime"), ("size", "created"))
"""Metadata that changes with the content of an object; the first that is present is used."""


class Store:
    """The files at a URI; keys are relative to its parent."""

    def __init__(self, uri: str):
        from fsspec.core import url_to_fs

        self.uri, self.scheme = uri.rstrip("/"), uri.partition("://")[0]
        self.parts = [part for part in uri.partition("://")[2].split("/") if part]
        if not self.parts or ".." in self.parts:
            raise InputError(f"{uri}: is not the URI of a file or folder")
        try:
            self.files, path = url_to_fs(self.uri, **({"auto_mkdir": True} if self.scheme == "file" else {}))
        except ImportError as error:
            how = "pip install gcsfs" if self.scheme in ("gs", "gcs") else first_line(error)
            raise InputError(f"{uri}: the package for {self.scheme}:// is not installed; {how}") from error
        except ValueError as error:
            raise InputError(f"{uri}: cannot be opened ({first_line(error)})") from error
        self.parent, _, self.name = str(path).rpartition("/")

    def owns_key(self, name: str) -> bool:
        """Return True if a name in the parent belongs to this URI."""
        stem = self.name.removesuffix(".json")
        companion = stem != self.name and name.startswith(f"{stem}.")
        return name == self.name or (companion and _METADATA_SUFFIX.fullmatch(name[len(stem) + 1 :]) is not None)

    def uri_for(self, key: str) -> str:
        """Return the path of a key in the store."""
        return f"{self.parent}/{key}"

    def objects(self) -> dict[str, str]:
        """Return {key: stamp} of all objects."""
        found: dict[str, Any] = {}
        with self.translate_errors():
            self.files.invalidate_cache()
            for root in self._roots():
                inside = self.files.find(root["name"], detail=True) if root["type"] == "directory" else {}
                found |= inside or {root["name"]: root}
        start = len(self.parent) + 1
        objects = {path: info for path, info in found.items() if info["type"] == "file" and not path.endswith("/")}
        if outside := [path for path in objects if ".." in path.split("/")]:
            raise InputError(f"{self.uri}: holds {outside[0]!r}, which is not a path in a folder; do not use it")
        return {path[start:]: _remote_stamp(info) for path, info in sorted(objects.items())}

    def _roots(self) -> list[dict[str, Any]]:
        try:
            if not self.name.endswith(".json"):
                return [self.files.info(self.uri_for(self.name))]
            siblings = self.files.ls(self.parent, detail=True)
        except FileNotFoundError:
            return []

        def is_own(entry: dict[str, Any]) -> bool:
            folder, _, name = entry["name"].rstrip("/").rpartition("/")
            return folder == self.parent and self.owns_key(name)

        return list(filter(is_own, siblings))

    def listed_objects(self, *, within_others: bool = False) -> dict[str, str]:
        """Return the listed objects; all objects if there is no list.

        With `within_others`, also use the list of an output that contains this URI.
        """
        listed, there = self._read_listed_keys(within_others), self.objects()
        if listed is None:
            return there
        if there.keys().isdisjoint(listed):
            return {}  # deleted, to be created again
        if missing := sorted(listed - there.keys()):
            list_name = f".{self.name}.files.json"
            raise InputError(f"{self.uri}: {missing[0]} is missing, but {list_name} lists it; restore or recreate it")
        return {key: there[key] for key in there if key in listed}

    def _read_listed_keys(self, within_others: bool) -> set[str] | None:
        parent, name = self.parent, self.name
        while name:
            content = self.read_record("files", f"{parent}/.{name}")
            if content is not None:
                start = f"{self.parent}/"
                paths = [f"{parent}/{key}" for key in content["files"]]
                keys = [path[len(start) :] for path in paths if path.startswith(start)]
                return {key for key in keys if self.owns_key(key.partition("/")[0])}
            parent, _, name = parent.rpartition("/") if within_others else ("", "", "")
        return None

    def get(self, keys: list[str], folder: Path) -> None:
        """Download objects into a folder."""
        with self.translate_errors():
            for key in keys:
                (folder / key).parent.mkdir(parents=True, exist_ok=True)
            self.files.get([self.uri_for(key) for key in keys], [str(folder / key) for key in keys])

    def put(self, files: Mapping[str, Path]) -> None:
        """Upload files."""
        if files:
            with self.translate_errors():
                self.files.put([str(path) for path in files.values()], [self.uri_for(key) for key in files])

    def remove(self, keys: Iterable[str]) -> None:
        """Remove objects that exist."""
        with self.translate_errors():
            for key in keys:
                try:
                    self.files.rm_file(self.uri_for(key))
                except FileNotFoundError:
                    continue  # it was never uploaded

    def read_record(self, kind: str, output: str = "") -> dict[str, Any] | None:
        """Read the record `files` or `writer` of an output; None: absent."""
        path = f"{output or self.uri_for(f'.{self.name}')}.{kind}.json"
        with self.translate_errors():
            self.files.invalidate_cache()
            try:
                data = self.files.cat_file(path)
            except FileNotFoundError:
                return None
        try:
            content = json.loads(data)
        except ValueError as error:
            raise InputError(f"{self.uri}: {path} is damaged ({error}); delete it") from error
        if not isinstance(content, dict) or not _RECORD_KEYS[kind] <= content.keys():
            rest = " and the output" if kind == "files" else ""
            raise InputError(f"{self.uri}: {path} is not a record of this version; delete it{rest}")
        return content

    def write_record(self, kind: str, content: Mapping[str, Any]) -> None:
        """Replace the record `files` or `writer` atomically."""
        path, data = self.uri_for(f".{self.name}.{kind}.json"), json.dumps(content, indent=1, sort_keys=True).encode()
        with self.translate_errors():
            if self.scheme != "file":
                self.files.pipe_file(path, data)
            else:  # unlike object stores, a file system shows half-written files
                self.files.pipe_file(f"{path}.new", data)
                self.files.mv(f"{path}.new", path)

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Turn errors of the store into InputError or UnavailableError."""
        try:
            yield
        except (FileNotFoundError, PermissionError) as error:
            raise InputError(f"{self.uri}: {first_line(error)}") from error
        except Exception as error:  # each store has its own error types
            message = f"{type(error).__name__}: {first_line(error)}"
            raise UnavailableError(f"{self.uri}: cannot be reached ({message}); run the same command again") from error


def first_line(error: Exception) -> str:
    """Return the text of an error in one line."""
    return " ".join(str(error).split())[:300]


def _remote_stamp(info: Mapping[str, Any]) -> str:
    names = next((names for names in _IDENTITIES if all(name in info for name in names)), ("size", "LastModified"))
    return hash_json([str(info.get(name)).strip('"') for name in names])
