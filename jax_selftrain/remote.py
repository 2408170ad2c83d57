"""Paths in object storage (`gs://…`, `s3://…`, whatever fsspec opens): worked on in a local folder that mirrors them.

Results are committed by renaming, claimed by leases, mapped into memory and changed in place; object stores do none of
this, so all work is done in a local folder, as ever. What a command reads is fetched before it begins. What it writes
is fetched, too, so that it goes on where another machine stopped, and is sent while it works, every few seconds and
when it ends, however it ends.

**All or nothing.** An object beside the output (`.NAME.files.json`) lists what belongs to it and is written when all of
that has arrived. Whoever fetches an output to go on with it goes by the list: a machine that is lost while it sends
leaves what the list said before, and no half of a folder. The list also says who is writing: a second writer is
refused while the first one shows signs of life.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from jax_selftrain import storage
from jax_selftrain.errors import InputError, SelftrainError, UnavailableError

Options = TypeVar("Options")

SEND_SECONDS = 20.0
"""How often what is new is sent."""
SILENT_SECONDS = 120.0
"""After how long without a sign of life another writer is taken for lost."""
OUTPUTS = ("out", "folder")
"""Options that name what a command writes; all others name what it reads."""

_ADDRESS = re.compile(r"\b([a-z][a-z0-9+]*)://[^\s=]*")
_EXTRAS = {"gs": "gcs", "gcs": "gcs"}
_IDENTITY = ("size", "etag", "ETag", "generation", "md5Hash", "mtime", "updated", "LastModified", "created")
"""What file systems say of an object that changes when its content does."""


@contextmanager
def brought_here(options: Options, *, alone: bool = True) -> Iterator[Options]:
    """The options with a local file or folder in place of each address; what they write is sent back.

    Args:
      options: a dataclass of `jax_selftrain.config`; addresses may stand in nested ones, lists and mappings, and within
        a word, as in `piqa:gs://bucket/piqa.jsonl`.
      alone: whether no other process does the same work.

    Raises:
      InputError: an address cannot be opened, holds nothing, or would be written by several processes.
      UnavailableError: another process writes there, or the store cannot be reached. What was made and could not be
        sent stays in the local folder, and the same command goes on with it.
    """
    given = {name: getattr(options, name, None) for name in OUTPUTS}
    written = {name: text for name, text in given.items() if isinstance(text, str) and _ADDRESS.match(text)}
    if written and not alone:
        name, address = next(iter(written.items()))
        raise InputError(
            f"--{name} {address}: several processes write into one folder that all of them see; mount the bucket as "
            "docs/tpu.md says, and give that folder"
        )
    with ExitStack() as stack:
        places = {name: str(stack.enter_context(sent_back(address))) for name, address in written.items()}
        yield _with_inputs_here(dataclasses.replace(options, **places))  # type: ignore[type-var]


def _with_inputs_here(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        here = {name: _with_inputs_here(part) for name, part in parts.items()}
        return value if here == parts else dataclasses.replace(value, **here)
    if isinstance(value, str):
        return _ADDRESS.sub(lambda found: str(fetched(found[0])), value)
    if isinstance(value, tuple):
        return tuple(_with_inputs_here(part) for part in value)
    if isinstance(value, Mapping):
        return {key: _with_inputs_here(part) for key, part in value.items()}
    return value


def named(text: str) -> str:
    """The text with addresses in place of the local folders that stand for them."""
    local = re.escape(str(_mirrors()))
    return re.sub(rf"{local}/(?:in|out)/(\w+)/", lambda found: f"{found[1]}://{'/' * (found[1] == 'file')}", text)


def fetched(address: str) -> Path:
    """The file or folder at an address, fetched as far as it is not here yet; with a result (`score.json`) come the
    files that stand beside it under its name.

    Raises:
      InputError, UnavailableError: see `brought_here`.
    """
    remote = _Remote.at(address, "in")
    with _locked(remote.here):
        remote.recall()
        if remote.fetch() == 0:
            raise InputError(f"{address}: no such file or folder")
        remote.remember("")
    return remote.here


@contextmanager
def sent_back(address: str) -> Iterator[Path]:
    """A local file or folder in place of the address of an output: what is there already is fetched, and what becomes
    of it is sent while the body runs and at its end.

    Raises:
      InputError, UnavailableError: see `brought_here`.
    """
    remote = _Remote.at(address, "out")
    if not remote.parent.strip("/"):
        raise InputError(f"{address}: is a whole bucket; give a folder in it")
    with _locked(remote.here), _Writer(remote) as writer:
        yield remote.here
        writer.ended_well = True


# ---------------------------------------------------------------- both sides


def _mirrors() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jax_selftrain", "mirror")


Identity = tuple[int, int]
"""Of a local file: size, and time of change in nanoseconds."""


class _Remote:
    """An address and the local place that stands for it. Keys name files on both sides, from the folder on that the
    address stands in."""

    def __init__(self, address: str, files: Any, path: str, here: Path):
        self.address, self.files, self.here = address, files, here
        self.parent, _, self.name = path.rpartition("/")
        self.known: dict[str, tuple[str, Identity]] = {}
        """Files that are the same on both sides: what the store and what the local file system says of each."""

    @classmethod
    def at(cls, address: str, purpose: str) -> _Remote:
        from fsspec.core import url_to_fs

        scheme, _, rest = address.partition("://")
        parts = [part for part in rest.split("/") if part]
        if not parts or ".." in parts:
            raise InputError(f"{address}: is no address of a file or folder")
        try:
            files, path = url_to_fs(address.rstrip("/"), **({"auto_mkdir": True} if scheme == "file" else {}))
        except ImportError as error:
            how = f"pip install 'jax-selftrain[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else _one_line(error)
            raise InputError(f"{address}: what opens {scheme}:// is not installed; {how}") from error
        except ValueError as error:
            raise InputError(f"{address}: cannot be opened ({_one_line(error)})") from error
        return cls(address, files, str(path), _mirrors().joinpath(purpose, scheme, *parts))

    def _belongs(self, name: str) -> bool:
        """Whether a file or folder beside the address belongs to it."""
        stem = self.name.removesuffix(".json")
        return name == self.name or (stem != self.name and name.startswith(f"{stem}."))

    # The local side

    def local(self, key: str) -> Path:
        return self.here.parent / key

    def here_now(self) -> dict[str, Identity]:
        """The local files, but for locks and what is only being written.

        Looked through until two looks agree: what was there before something that is seen is then seen, too.
        """
        before, now = None, self._look()
        while before is None or before.keys() != now.keys():
            before, now = now, self._look()
        return now

    def _look(self) -> dict[str, Identity]:
        found: dict[str, Identity] = {}
        for root in self.here.parent.iterdir():
            for path in [root, *root.rglob("*")] if self._belongs(root.name) else ():
                inside = path.relative_to(self.here.parent)
                identity = _identity_of(path)
                if identity is not None and not any(map(storage.is_passing, inside.parts)):
                    found[inside.as_posix()] = identity
        return found

    @property
    def _note(self) -> Path:
        return self.here.with_name(f".{self.here.name}.known.json")

    def recall(self) -> str:
        """Read what was kept by `remember`; returns the mark given then, or nothing."""
        if not self._note.exists():
            return ""
        note = storage.read_json(self._note)
        self.known = {key: (there, (size, changed)) for key, (there, size, changed) in note["files"].items()}
        return note["mark"]

    def remember(self, mark: str) -> None:
        """Keep beside the local place what is the same on both sides."""
        files = {key: [there, *here] for key, (there, here) in self.known.items()}
        storage.write_json(self._note, {"mark": mark, "files": files})

    # The store

    def _remote(self, key: str) -> str:
        return f"{self.parent}/{key}"

    @property
    def _list(self) -> str:
        return self._remote(f".{self.name}.files.json")

    def there_now(self) -> dict[str, str]:
        """{key: what the store says of the object}."""
        found: dict[str, Any] = {}
        with self._reached():
            self.files.invalidate_cache()
            beside = self.files.ls(self.parent, detail=True) if self.files.exists(self.parent) else []
            for entry in beside:
                if self._belongs(entry["name"].rstrip("/").rpartition("/")[2]):
                    inside = self.files.find(entry["name"], detail=True) if entry["type"] == "directory" else {}
                    found |= inside or {entry["name"]: entry}
        objects = {path: info for path, info in found.items() if info["type"] == "file" and not path.endswith("/")}
        return {path[len(self.parent) + 1 :]: _said_of(info) for path, info in sorted(objects.items())}

    def fetch(self, listed: set[str] | None = None, *, only_missing: bool = False) -> int:
        """Make the local side equal to the store; returns the number of files.

        Args:
          listed: what belongs to it; None: all that is there.
          only_missing: leave alone what is here.
        """
        there = {key: said for key, said in self.there_now().items() if listed is None or key in listed}
        for key, said in there.items():
            place, known = self.local(key), self.known.get(key)
            if (only_missing and place.exists()) or (known is not None and known == (said, _identity_of(place))):
                continue
            with storage.commit_file(place) as aside, self._reached():
                self.files.get_file(self._remote(key), str(aside))
            identity = _identity_of(place)
            if identity is not None:
                self.known[key] = said, identity
        if not only_missing:
            for key in self.here_now().keys() - there.keys():
                self.local(key).unlink(missing_ok=True)
            self.known = {key: self.known[key] for key in there}
        return len(there)

    def send(self, key: str, identity: Identity) -> bool:
        """Whether the file was still there to be sent."""
        with self._reached():
            try:
                self.files.put_file(str(self.local(key)), self._remote(key))
            except FileNotFoundError:
                if self.local(key).exists():
                    raise
                return False
            self.files.invalidate_cache()
            self.known[key] = _said_of(self.files.info(self._remote(key))), identity
        return True

    def remove(self, keys: list[str]) -> None:
        with self._reached():
            self.files.invalidate_cache()
            for key in keys:
                if self.files.exists(self._remote(key)):
                    self.files.rm_file(self._remote(key))

    def read_list(self) -> dict[str, Any] | None:
        with self._reached():
            self.files.invalidate_cache()
            return json.loads(self.files.cat_file(self._list)) if self.files.exists(self._list) else None

    def write_list(self, content: Mapping[str, Any]) -> None:
        with self._reached():
            self.files.pipe_file(self._list, json.dumps(content, indent=1, sort_keys=True).encode())

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Tell in one sentence what goes wrong on the way."""
        try:
            yield
        except (FileNotFoundError, PermissionError) as error:
            raise InputError(f"{self.address}: {_one_line(error)}") from error
        except Exception as error:  # every file system has errors of its own
            said = f"{type(error).__name__}: {_one_line(error)}"
            raise UnavailableError(f"{self.address}: cannot be reached ({said}); run the same command again") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _said_of(info: Mapping[str, Any]) -> str:
    return storage.fingerprint({name: str(info[name]) for name in _IDENTITY if name in info})


def _identity_of(path: Path) -> Identity | None:
    """None: no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return (found.st_size, found.st_mtime_ns) if path.is_file() else None


@contextmanager
def _locked(here: Path) -> Iterator[None]:
    """Keep other processes of this machine from the same place meanwhile."""
    here.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with storage.lease(here.with_name(f".{here.name}.mirror.lease")) as ours:
            if ours:
                yield
                return
        time.sleep(0.5)


# ---------------------------------------------------------------- an output


class _Writer:
    """Fetches an output, then sends what is new until it is left."""

    def __init__(self, remote: _Remote):
        self.remote, self.mark = remote, uuid.uuid4().hex
        self.listed: set[str] = set()
        self.sending: set[str] = set()
        """What may be in the store and is in no list."""
        self.ended_well = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_sending, name=f"send to {remote.address}", daemon=True)

    def __enter__(self) -> _Writer:
        mark, before = self.remote.recall(), self.remote.read_list()
        ours = before is not None and before["mark"] == mark
        if not ours:  # else this machine was the last to write, and perhaps could not send all that it had
            before = self._without_others(before)
        self.remote.fetch(None if before is None else set(before["files"]), only_missing=ours)
        self.listed = set(self.remote.known) if before is None else set(before["files"])
        self.sending = set() if before is None else set(before["sending"])
        self.remote.remember(self.mark)
        self._write_list(alive=True)
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._done.set()
        self._thread.join()
        try:
            self._send()
            self._write_list(alive=False)
        except SelftrainError as failure:
            kept = f"{failure}; what was made is in {self.remote.here}"
            if self.ended_well:
                raise type(failure)(kept) from failure
            print(f"not sent: {kept}", file=sys.stderr)  # beside the error that the body ended by

    def _without_others(self, found: dict[str, Any] | None) -> dict[str, Any] | None:
        """The list of files, once nobody else writes."""
        began, now = time.monotonic(), found
        while now is not None and now["writer"] and time.monotonic() - began < SILENT_SECONDS:
            if found is not None and now["beat"] != found["beat"]:
                raise UnavailableError(f"{self.remote.address}: {now['writer']} writes there; wait for it")
            time.sleep(min(SEND_SECONDS, SILENT_SECONDS) / 4)
            now = self.remote.read_list()
        return now

    def _keep_sending(self) -> None:
        while not self._done.wait(SEND_SECONDS):
            try:
                self._send()
                self._write_list(alive=True)
            except SelftrainError as error:  # the network may come back, and the last attempt is made at the end
                print(f"not sent yet: {error}", file=sys.stderr)

    def _send(self) -> None:
        """Bring the store up to what is here; the list is written when all of one moment has arrived."""
        whole = False
        while not whole:
            now, known = self.remote.here_now(), self.remote.known
            new = {key: identity for key, identity in now.items() if key not in known or known[key][1] != identity}
            if unlisted := new.keys() - self.listed - self.sending:
                self.sending |= unlisted
                self._write_list(alive=True)
            vanished = [key for key, identity in new.items() if not self.remote.send(key, identity)]
            whole = not vanished
        gone = (self.listed | self.sending) - now.keys()
        if new or gone:
            self.listed, self.sending = set(now), gone
            self._write_list(alive=True)
            self.remote.remove(sorted(gone))
            self.sending = set()
            self.remote.known = {key: known[key] for key in now}
            self.remote.remember(self.mark)

    def _write_list(self, *, alive: bool) -> None:
        self.remote.write_list(
            {
                "files": sorted(self.listed),
                "sending": sorted(self.sending),
                "writer": f"process {os.getpid()} on {platform.node()}" if alive else "",
                "mark": self.mark,
                "beat": time.time(),
            }
        )
