"""An address in object storage: what is there, and how it is read and written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jax_selftrain.errors import InputError, UnavailableError
from jax_selftrain.io.manifest import hash_json

_EXTRAS = {"gs": "gcs", "gcs": "gcs"}
_METADATA_SUFFIX = re.compile(r"parts|config\.yaml|timings\.json|[a-z]+\.parquet")
"""What `scoring.files.result_files` puts beside `FILE.json`, after `FILE.`."""
_IDENTITIES = (("etag",), ("ETag",), ("md5Hash",), ("generation",), ("size", "mtime"), ("size", "created"))
"""What stores say of an object that changes when its content does: the first of these that are there."""


class Store:
    """An address in object storage. Keys name files on both sides, from the folder on that the address stands in."""

    def __init__(self, address: str):
        from fsspec.core import url_to_fs

        self.address, self.scheme = address.rstrip("/"), address.partition("://")[0]
        self.parts = [part for part in address.partition("://")[2].split("/") if part]
        if not self.parts or ".." in self.parts:
            raise InputError(f"{address}: is no address of a file or folder")
        try:
            self.files, path = url_to_fs(self.address, **({"auto_mkdir": True} if self.scheme == "file" else {}))
        except ImportError as error:
            extra = _EXTRAS.get(self.scheme)
            how = f"pip install 'jax-selftrain[{extra}]'" if extra else first_line(error)
            raise InputError(f"{address}: what opens {self.scheme}:// is not installed; {how}") from error
        except ValueError as error:
            raise InputError(f"{address}: cannot be opened ({first_line(error)})") from error
        self.parent, _, self.name = str(path).rpartition("/")

    def owns_key(self, name: str) -> bool:
        """Whether a file or folder beside the address belongs to it."""
        stem = self.name.removesuffix(".json")
        companion = stem != self.name and name.startswith(f"{stem}.")
        return name == self.name or (companion and _METADATA_SUFFIX.fullmatch(name[len(stem) + 1 :]) is not None)

    def uri_for(self, key: str) -> str:
        return f"{self.parent}/{key}"

    @property
    def list_key(self) -> str:
        return f".{self.name}.files.json"

    @property
    def writer_key(self) -> str:
        return f".{self.name}.writer.json"

    def objects(self) -> dict[str, str]:
        """{key: what the store says of the object}."""
        found: dict[str, Any] = {}
        with self.translate_errors():
            self.files.invalidate_cache()
            for root in self._roots():
                inside = self.files.find(root["name"], detail=True) if root["type"] == "directory" else {}
                found |= inside or {root["name"]: root}
        start = len(self.parent) + 1
        objects = {path: info for path, info in found.items() if info["type"] == "file" and not path.endswith("/")}
        if outside := [path for path in objects if ".." in path.split("/")]:
            raise InputError(f"{self.address}: holds {outside[0]!r}, which is no place in a folder; do not use it")
        return {path[start:]: _remote_stamp(info) for path, info in sorted(objects.items())}

    def _roots(self) -> list[dict[str, Any]]:
        try:
            if not self.name.endswith(".json"):
                return [self.files.info(self.uri_for(self.name))]
            beside = self.files.ls(self.parent, detail=True)
        except FileNotFoundError:
            return []
        names = [entry["name"].rstrip("/").rpartition("/") for entry in beside]
        return [
            entry
            for entry, (folder, _, name) in zip(beside, names, strict=True)
            if folder == self.parent and self.owns_key(name)
        ]

    def listed_objects(self, *, within_others: bool = False) -> dict[str, str]:
        """Of `objects`, those that the list of files names; all of them where there is no list.

        Args:
          within_others: also go by the list of an output that the address lies in.

        Raises:
          InputError: one of them is missing.
        """
        listed, there = self._listed(within_others), self.objects()
        if listed is None:
            return there
        if there.keys().isdisjoint(listed):
            return {}  # deleted, to be made anew
        if missing := sorted(listed - there.keys()):
            raise InputError(
                f"{self.address}: {missing[0]} is missing, which {self.list_key} names; put it back, or delete the "
                "output and start over"
            )
        return {key: there[key] for key in there if key in listed}

    def _listed(self, within_others: bool) -> set[str] | None:
        parent, name = self.parent, self.name
        while name:
            content = self.read_list(f"{parent}/.{name}.files.json")
            if content is not None:
                start = f"{self.parent}/"
                paths = [f"{parent}/{key}" for key in content["files"]]
                keys = [path[len(start) :] for path in paths if path.startswith(start)]
                return {key for key in keys if self.owns_key(key.partition("/")[0])}
            parent, _, name = parent.rpartition("/") if within_others else ("", "", "")
        return None

    def read_list(self, path: str = "") -> dict[str, Any] | None:
        """The list of files, this address's own unless another one is named."""
        content = self._read(path or self.uri_for(self.list_key))
        if content is not None and not {"files", "sending", "mark"} <= content.keys():
            raise InputError(f"{path or self.list_key}: is no list of files; delete it and the output to start over")
        return content

    def read_writer(self) -> dict[str, Any] | None:
        """Who writes."""
        content = self._read(self.uri_for(self.writer_key))
        if content is not None and not {"writer", "id", "mark", "scope", "beat"} <= content.keys():
            raise InputError(f"{self.address}: {self.writer_key} does not say who writes; delete it")
        return content

    def get(self, keys: list[str], folder: Path) -> None:
        with self.translate_errors():
            for key in keys:
                (folder / key).parent.mkdir(parents=True, exist_ok=True)
            self.files.get([self.uri_for(key) for key in keys], [str(folder / key) for key in keys])

    def put(self, files: Mapping[str, Path]) -> None:
        if files:
            with self.translate_errors():
                self.files.put([str(path) for path in files.values()], [self.uri_for(key) for key in files])

    def remove(self, keys: Iterable[str]) -> None:
        with self.translate_errors():
            for key in keys:
                try:
                    self.files.rm_file(self.uri_for(key))
                except FileNotFoundError:
                    continue  # it never arrived

    def _read(self, path: str) -> dict[str, Any] | None:
        with self.translate_errors():
            self.files.invalidate_cache()
            try:
                data = self.files.cat_file(path)
            except FileNotFoundError:
                return None
        try:
            content = json.loads(data)
        except ValueError as error:
            raise InputError(f"{self.address}: {path} is damaged ({error}); delete it") from error
        return content if isinstance(content, dict) else {}

    def write(self, key: str, content: Mapping[str, Any]) -> None:
        """Replace an object as a whole."""
        path, data = self.uri_for(key), json.dumps(content, indent=1, sort_keys=True).encode()
        with self.translate_errors():
            if self.scheme != "file":
                self.files.pipe_file(path, data)
            else:  # where half a file can be seen, other than in object stores
                self.files.pipe_file(f"{path}.new", data)
                self.files.mv(f"{path}.new", path)

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Tell in one sentence what goes wrong on the way."""
        try:
            yield
        except (FileNotFoundError, PermissionError) as error:
            raise InputError(f"{self.address}: {first_line(error)}") from error
        except Exception as error:  # every store has errors of its own
            said = f"{type(error).__name__}: {first_line(error)}"
            raise UnavailableError(f"{self.address}: cannot be reached ({said}); run the same command again") from error


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _remote_stamp(info: Mapping[str, Any]) -> str:
    names = next((names for names in _IDENTITIES if all(name in info for name in names)), ("size", "LastModified"))
    return hash_json([str(info.get(name)).strip('"') for name in names])
