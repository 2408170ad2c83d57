"""Paths in object storage (`gs://…`, `s3://…`, whatever fsspec opens): worked on in a local folder that mirrors them.

Results are committed by renaming, claimed by leases, mapped into memory and changed in place; object stores do none of
this, so all work is done in a local folder, as ever. What a command reads is fetched before it begins. What it writes
is fetched, too, so that it goes on where another machine stopped, and is sent while it works, every few seconds and
when it ends, however it ends.

**All or nothing.** An object beside the output (`.NAME.files.json`) lists what belongs to it and is written when all of
that has arrived: a machine that is lost while it sends leaves what the list said before, and no half of a folder.

**One writer.** Another object (`.NAME.writer.json`) says who writes, and is written anew every few seconds. A second
machine is refused while it changes, and takes over when it has not for two minutes; whoever has been taken over from
changes nothing any more.

**Several processes** write into one folder that all of them see: each of their machines mounts a bucket of `gs://`.

**Nothing local is lost.** A mirror has a mark, which the list bears when it was the last to write. Then what is here is
newer than what is there, and stays. Else the store is right, and what is here and was never sent is put aside.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

from jax_selftrain import storage
from jax_selftrain.config import CompareConfig, ExtractConfig, LeakageConfig, PlanConfig, ScoreConfig
from jax_selftrain.errors import InputError, SelftrainError, Stopped, UnavailableError
from jax_selftrain.mirrors import mirrors
from jax_selftrain.processes import listening_to_sigterm

Options = TypeVar("Options")

SEND_SECONDS = 20.0
"""How often what is new is sent."""
BEAT_SECONDS = 10.0
"""How often a writer gives a sign of life."""
SILENT_SECONDS = 120.0
"""After how long without one a writer is taken for lost."""
SETTLE_SECONDS = 1.0
"""How long after its claim a writer looks whether it is still its own."""
OUTPUTS = ("out", "folder")
"""Options that name what a command writes; all others name what it reads."""
WRITES_A_FILE = (CompareConfig, ExtractConfig, LeakageConfig, PlanConfig, ScoreConfig)

_ADDRESS = re.compile(r"\b([a-z][a-z0-9+]*)://[^\s=:]*")
_NOT_OURS = ("http", "https")
_EXTRAS = {"gs": "gcs", "gcs": "gcs"}
_COMPANION = re.compile(r"parts|config\.yaml|timings\.json|[a-z]+\.parquet")
"""What `scoring.files.result_files` puts beside `FILE.json`, after `FILE.`."""
_IDENTITIES = (("etag",), ("ETag",), ("md5Hash",), ("generation",), ("size", "mtime"), ("size", "created"))
"""What stores say of an object that changes when its content does: the first of these that are there."""
_COPIED_BYTES = 16 << 20
"""Files up to this size are copied before they are sent, since logs may grow meanwhile."""
_BATCH = 500
"""Files that are sent, or removed, between two looks whether this process is still the writer."""
_POINTERS = (".json", ".yaml", ".html")
"""Files that speak of others, and are sent after them."""


@contextmanager
def brought_here(options: Options, *, alone: bool = True) -> Iterator[Options]:
    """The options with a local file or folder in place of each address; what they write is sent back.

    Args:
      options: a dataclass of `jax_selftrain.config`; addresses may stand in nested ones, lists and mappings, and within
        a word, as in `piqa:gs://bucket/piqa.jsonl`.
      alone: whether no other process does the same work.

    Raises:
      InputError: an address cannot be opened, holds nothing or is damaged, or several processes would write to one that
        is not mounted.
      UnavailableError: another process writes there, or the store cannot be reached. What was made and could not be
        sent stays in the local folder, and the same command goes on with it.
      Stopped: SIGTERM came, where nothing else listens to it; what there is has been sent.
    """
    given = {name: getattr(options, name, None) for name in OUTPUTS}
    written = {name: text for name, text in given.items() if isinstance(text, str) and _ADDRESS.match(text)}
    for name, address in written.items():
        if isinstance(options, WRITES_A_FILE) and not address.endswith(".json"):
            raise InputError(f"--{name} {address}: give the name of a file that ends in .json")

    def stop() -> None:
        raise Stopped("stopped; what was finished stays, run the same command again to go on")

    here = _with_inputs_here(dataclasses.replace(options, **dict.fromkeys(written, "")))  # type: ignore[type-var]
    with ExitStack() as stack:
        place = sent_back if alone else mounted
        places = {name: str(stack.enter_context(place(address))) for name, address in written.items()}
        stack.enter_context(listening_to_sigterm(stop) if written else nullcontext())
        yield dataclasses.replace(here, **places)


def _with_inputs_here(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        here = {name: _with_inputs_here(part) for name, part in parts.items()}
        return value if here == parts else dataclasses.replace(value, **here)
    if isinstance(value, str):
        return _ADDRESS.sub(lambda found: found[0] if found[1] in _NOT_OURS else str(fetched(found[0])), value)
    if isinstance(value, tuple):
        return tuple(_with_inputs_here(part) for part in value)
    if isinstance(value, Mapping):
        return {key: _with_inputs_here(part) for key, part in value.items()}
    return value


def fetched(address: str) -> Path:
    """The file or folder at an address, fetched as far as it is not here yet; with a result (`score.json`) come the
    files that stand beside it under its name.

    Raises:
      InputError, UnavailableError: see `brought_here`.
    """
    store = _Store(address)
    mirror = _Mirror(store, "in")
    with mirror.locked():
        there = store.listed_objects(within_others=True)
        if not there:
            raise InputError(f"{address}: no such file or folder")
        mirror.take(there)
    return mirror.here


@contextmanager
def sent_back(address: str) -> Iterator[Path]:
    """A local file or folder in place of the address of an output: what is there already is fetched, and what becomes
    of it is sent while the body runs and at its end.

    Raises:
      InputError, UnavailableError: see `brought_here`.
    """
    store = _Store(address)
    if not store.parent.strip("/"):
        raise InputError(f"{address}: is a whole bucket; give a folder in it")
    mirror = _Mirror(store, "out")
    with mirror.locked(), _Writer(store, mirror) as writer:
        yield mirror.here
        writer.ended_well = True


@contextmanager
def mounted(address: str) -> Iterator[Path]:
    """The folder of an address in its bucket, which gcsfuse mounts unless it is mounted already, and stays so.

    Raises:
      InputError: it is no address of Google Cloud Storage, or gcsfuse is not installed.
      UnavailableError: the bucket cannot be mounted.
    """
    scheme, _, rest = address.partition("://")
    bucket, _, inside = rest.strip("/").partition("/")
    if scheme != "gs" or shutil.which("gcsfuse") is None:
        raise InputError(
            f"{address}: several processes write into one folder that all of them see; "
            + ("install gcsfuse, which mounts the bucket" if scheme == "gs" else "mount it, and give that folder")
        )
    if not inside or ".." in inside.split("/"):
        raise InputError(f"{address}: is no address of a folder in a bucket")
    point = mirrors() / "mount" / scheme / bucket
    with _held(mirrors() / "state" / f"mount-{bucket}.lease", f"gs://{bucket}"):
        point.mkdir(parents=True, exist_ok=True)
        if not os.path.ismount(point):
            command = ["gcsfuse", "--implicit-dirs", bucket, str(point)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = " ".join((done.stderr or done.stdout).split())[-300:]
                raise UnavailableError(f"{address}: gcsfuse cannot mount the bucket ({said})")
    yield point / inside


@contextmanager
def _held(path: Path, what: str) -> Iterator[None]:
    """Hold a lease, as soon as no other process of this machine does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = False
    while True:
        with storage.lease(path) as ours:
            if ours:
                yield
                return
        if not waiting:
            print(f"waiting for another process that uses {what}", file=sys.stderr)
        waiting = True
        time.sleep(0.5)


# ---------------------------------------------------------------- there


class _Store:
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
            how = f"pip install 'jax-selftrain[{extra}]'" if extra else _one_line(error)
            raise InputError(f"{address}: what opens {self.scheme}:// is not installed; {how}") from error
        except ValueError as error:
            raise InputError(f"{address}: cannot be opened ({_one_line(error)})") from error
        self.parent, _, self.name = str(path).rpartition("/")

    def belongs(self, name: str) -> bool:
        """Whether a file or folder beside the address belongs to it."""
        stem = self.name.removesuffix(".json")
        companion = stem != self.name and name.startswith(f"{stem}.")
        return name == self.name or (companion and _COMPANION.fullmatch(name[len(stem) + 1 :]) is not None)

    def at(self, key: str) -> str:
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
        with self.reached():
            self.files.invalidate_cache()
            for root in self._roots():
                inside = self.files.find(root["name"], detail=True) if root["type"] == "directory" else {}
                found |= inside or {root["name"]: root}
        start = len(self.parent) + 1
        objects = {path: info for path, info in found.items() if info["type"] == "file" and not path.endswith("/")}
        if outside := [path for path in objects if ".." in path.split("/")]:
            raise InputError(f"{self.address}: holds {outside[0]!r}, which is no place in a folder; do not use it")
        return {path[start:]: _said_of(info) for path, info in sorted(objects.items())}

    def _roots(self) -> list[dict[str, Any]]:
        try:
            if not self.name.endswith(".json"):
                return [self.files.info(self.at(self.name))]
            beside = self.files.ls(self.parent, detail=True)
        except FileNotFoundError:
            return []
        names = [entry["name"].rstrip("/").rpartition("/") for entry in beside]
        return [
            entry
            for entry, (folder, _, name) in zip(beside, names, strict=True)
            if folder == self.parent and self.belongs(name)
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
                return {key for key in keys if self.belongs(key.partition("/")[0])}
            parent, _, name = parent.rpartition("/") if within_others else ("", "", "")
        return None

    def read_list(self, path: str = "") -> dict[str, Any] | None:
        """The list of files, this address's own unless another one is named."""
        content = self._read(path or self.at(self.list_key))
        if content is not None and not {"files", "sending", "mark"} <= content.keys():
            raise InputError(f"{path or self.list_key}: is no list of files; delete it and the output to start over")
        return content

    def read_writer(self) -> dict[str, Any] | None:
        """Who writes."""
        content = self._read(self.at(self.writer_key))
        if content is not None and not {"writer", "id", "mark", "scope", "beat"} <= content.keys():
            raise InputError(f"{self.address}: {self.writer_key} does not say who writes; delete it")
        return content

    def get(self, keys: list[str], folder: Path) -> None:
        with self.reached():
            for key in keys:
                (folder / key).parent.mkdir(parents=True, exist_ok=True)
            self.files.get([self.at(key) for key in keys], [str(folder / key) for key in keys])

    def put(self, files: Mapping[str, Path]) -> None:
        if files:
            with self.reached():
                self.files.put([str(path) for path in files.values()], [self.at(key) for key in files])

    def remove(self, keys: Iterable[str]) -> None:
        with self.reached():
            for key in keys:
                try:
                    self.files.rm_file(self.at(key))
                except FileNotFoundError:
                    continue  # it never arrived

    def _read(self, path: str) -> dict[str, Any] | None:
        with self.reached():
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
        path, data = self.at(key), json.dumps(content, indent=1, sort_keys=True).encode()
        with self.reached():
            if self.scheme != "file":
                self.files.pipe_file(path, data)
            else:  # where half a file can be seen, other than in object stores
                self.files.pipe_file(f"{path}.new", data)
                self.files.mv(f"{path}.new", path)

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Tell in one sentence what goes wrong on the way."""
        try:
            yield
        except (FileNotFoundError, PermissionError) as error:
            raise InputError(f"{self.address}: {_one_line(error)}") from error
        except Exception as error:  # every store has errors of its own
            said = f"{type(error).__name__}: {_one_line(error)}"
            raise UnavailableError(f"{self.address}: cannot be reached ({said}); run the same command again") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _said_of(info: Mapping[str, Any]) -> str:
    names = next((names for names in _IDENTITIES if all(name in info for name in names)), ("size", "LastModified"))
    return storage.fingerprint([str(info.get(name)).strip('"') for name in names])


# ---------------------------------------------------------------- here

Identity = tuple[int, int]
"""Of a local file: size, and time of change in nanoseconds."""


class _Mirror:
    """The local place that stands for an address."""

    def __init__(self, store: _Store, purpose: str):
        self.store = store
        self.here = mirrors().joinpath(purpose, store.scheme, *store.parts)
        self.state = mirrors() / "state" / storage.fingerprint([purpose, store.address])[:16]
        self.known: dict[str, tuple[str, Identity]] = {}
        """Files that are the same on both sides: what the store and what the local file system says of each."""
        self.mark = uuid.uuid4().hex

    def at(self, key: str) -> Path:
        return self.here.parent / key

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes that share this place out of it meanwhile."""
        with _held(self.state / "mirror.lease", self.store.address):
            self._recall()
            self.here.parent.mkdir(parents=True, exist_ok=True)
            yield

    @property
    def note(self) -> Path:
        return self.state / "known.json"

    def _recall(self) -> None:
        if self.note.exists():
            note = storage.read_json(self.note)
            self.mark = note["mark"]
            self.known = {key: (there, (size, changed)) for key, (there, size, changed) in note["files"].items()}
        else:
            self.remember()

    def remember(self) -> None:
        """Keep what is the same on both sides."""
        files = {key: [there, *here] for key, (there, here) in self.known.items()}
        storage.write_json(self.note, {"address": self.store.address, "mark": self.mark, "files": files})

    def files(self) -> dict[str, Identity]:
        """The local files, but for locks and what is only being written.

        Looked through until two looks agree: what was there before something that is seen is then seen, too.
        """
        before, now = None, self._look()
        while before is None or before.keys() != now.keys():
            before, now = now, self._look()
        return now

    def _look(self) -> dict[str, Identity]:
        found: dict[str, Identity] = {}

        def see(path: Path) -> None:
            if (identity := _identity_of(path)) is not None:
                found[path.relative_to(self.here.parent).as_posix()] = identity

        for root in self.here.parent.iterdir() if self.here.parent.is_dir() else ():
            if self.store.belongs(root.name) and not root.is_dir():
                see(root)
            elif self.store.belongs(root.name):
                for folder, folders, names in os.walk(root):  # which passes over what vanishes meanwhile
                    folders[:] = [name for name in folders if not storage.is_passing(name)]
                    for name in names:
                        if not storage.is_passing(name):
                            see(Path(folder, name))
        return found

    def take(self, there: Mapping[str, str], *, only_missing: bool = False) -> None:
        """Make this side equal to the store.

        Args:
          there: what belongs to it, and what the store says of each.
          only_missing: leave alone what is here, and what was removed here.
        """
        incoming = self.state / "incoming"
        shutil.rmtree(incoming, ignore_errors=True)  # of one that was interrupted
        here, before = self.files(), self.known
        self.known = {key: known for key, known in before.items() if there.get(key) == known[0]}
        if only_missing:  # what was here and is no more has been removed here, unless all is gone
            wanted = [key for key in there if key not in here and not (here and key in before)]
        else:
            wanted = [key for key in there if key not in here or not self._is_known(key, here[key])]
        if wanted:
            self.store.get(wanted, incoming)
        if not only_missing:
            for key in here.keys() - there.keys():
                self.at(key).unlink(missing_ok=True)
            self._prune()
        for key in wanted:
            self.at(key).parent.mkdir(parents=True, exist_ok=True)
            os.replace(incoming / key, self.at(key))
            identity = _identity_of(self.at(key))
            if identity is not None:
                self.known[key] = there[key], identity
        shutil.rmtree(incoming, ignore_errors=True)
        self.remember()

    def _is_known(self, key: str, identity: Identity) -> bool:
        return key in self.known and self.known[key][1] == identity

    def _prune(self) -> None:
        """Remove folders that have become empty: a folder that is there is taken for finished."""
        for root in [path for path in self.here.parent.iterdir() if self.store.belongs(path.name)]:
            for folder, _, _ in os.walk(root, topdown=False):
                if not any(Path(folder).iterdir()):
                    Path(folder).rmdir()

    def put_unsent_aside(self) -> None:
        """Keep what is here and was never sent where nothing overwrites it, and say so."""
        unsent = [key for key, identity in self.files().items() if not self._is_known(key, identity)]
        if unsent:
            aside = self.state / f"unsent-{time.strftime('%Y%m%d-%H%M%S')}"
            for key in unsent:
                (aside / key).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.at(key), aside / key)
            print(
                f"{self.store.address}: another machine went on with it; {len(unsent)} files of this one, never sent, "
                f"are in {aside}",
                file=sys.stderr,
            )

    def outgoing(self, keys: Iterable[str]) -> tuple[dict[str, Path], list[str]]:
        """(files to send for these keys, keys that have vanished): small ones are copied, as they may be growing."""
        folder, found, vanished = self.state / "outgoing", {}, []
        shutil.rmtree(folder, ignore_errors=True)
        for key in keys:
            path = self.at(key)
            try:
                if path.stat().st_size <= _COPIED_BYTES:
                    (folder / key).parent.mkdir(parents=True, exist_ok=True)
                    path = Path(shutil.copyfile(path, folder / key))
                found[key] = path
            except FileNotFoundError:
                vanished.append(key)
            except OSError:  # no room for a copy
                found[key] = path
        return found, vanished


def _identity_of(path: Path) -> Identity | None:
    """None: no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


# ---------------------------------------------------------------- an output


class _Writer:
    """Fetches an output, then sends what is new until it is left."""

    def __init__(self, store: _Store, mirror: _Mirror):
        self.store, self.mirror, self.id = store, mirror, uuid.uuid4().hex
        self.listed: set[str] = set()
        self.sending: set[str] = set()
        """What may be in the store and is in no list."""
        self.marked = False
        """Whether the list says that this mirror was the last to write."""
        self.ended_well = False
        self._beating = _Repeated(self._beat, BEAT_SECONDS, store.address)
        self._sending = _Repeated(self._send, SEND_SECONDS, store.address)

    def __enter__(self) -> _Writer:
        self._wait_for_others()
        try:
            self._say(True)
            time.sleep(SETTLE_SECONDS)
            self._require_claim()
            self._beating.start()
            self._fetch()
        except BaseException:
            self._release()
            raise
        self._sending.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with listening_to_sigterm(lambda: None):  # what ends the work does not end its being sent
            try:
                self._sending.stop()
                self._send()
            except Exception as failure:
                exact = failure if isinstance(failure, SelftrainError) else UnavailableError(_one_line(failure))
                kept = type(exact)(f"{exact}; what was made is in {self.mirror.here}")
                kept.names_folders = True
                if self.ended_well:
                    raise kept from failure
                print(f"not sent: {kept}", file=sys.stderr)  # beside the error that the body ended by
            finally:
                self._release()

    # Who writes

    def _wait_for_others(self) -> None:
        began, first = time.monotonic(), self.store.read_writer()
        now = first
        while now is not None and now["writer"] and time.monotonic() - began < SILENT_SECONDS:
            if (now["mark"], now["scope"]) == (self.mirror.mark, storage.scope()):
                return  # it was of this machine, and held the mirror, which is now ours: it is dead
            if first is not None and (now["id"], now["beat"]) != (first["id"], first["beat"]):
                raise UnavailableError(f"{self.store.address}: {now['writer']} writes there; wait for it")
            time.sleep(min(BEAT_SECONDS, SILENT_SECONDS) / 4)
            now = self.store.read_writer()

    def _say(self, alive: bool) -> None:
        content = {
            "writer": f"process {os.getpid()} on {platform.node()}" if alive else "",
            "id": self.id,
            "mark": self.mirror.mark,
            "scope": storage.scope(),
            "beat": time.time(),
        }
        self.store.write(self.store.writer_key, content)

    def _release(self) -> None:
        """Write no more. If that cannot be told, others wait until this process has been silent for long enough."""
        self._beating.stop()
        with suppress(SelftrainError):
            self._require_claim()
            self._say(False)

    def _require_claim(self) -> None:
        found = self.store.read_writer()
        if found is None:
            raise UnavailableError(f"{self.store.address}: {self.store.writer_key} was removed while work went on")
        if found["id"] != self.id:
            who = found["writer"] or "another process"
            raise UnavailableError(f"{self.store.address}: {who} has taken over from this process")

    def _beat(self) -> None:
        self._require_claim()
        self._say(True)

    # What is written

    def _fetch(self) -> None:
        listing, there = self.store.read_list(), self.store.listed_objects()
        self.marked = listing is not None and listing["mark"] == self.mirror.mark
        deleted = listing is not None and listing["files"] and not there
        if self.marked and not deleted:
            self.mirror.take(there, only_missing=True)
        else:
            self.mirror.put_unsent_aside()
            self.mirror.take(there)
        self.listed = set(there)
        self.sending = set() if listing is None else set(listing["sending"]) - self.listed
        if listing is None:  # else the mark is left until there is something to send
            self._write_list()

    def _write_list(self) -> None:
        self._require_claim()
        content = {"files": sorted(self.listed), "sending": sorted(self.sending), "mark": self.mirror.mark}
        self.store.write(self.store.list_key, content)
        self.marked = True

    def _send(self) -> None:
        """Bring the store up to what is here at one moment: new files, then the list, then changed ones."""
        while True:
            now, known = self.mirror.files(), self.mirror.known
            if not self.mirror.note.exists() or (self.listed and not now):
                raise UnavailableError(f"{self.store.address}: its local folder was removed while work went on in it")
            changed = {key for key, identity in now.items() if key not in known or known[key][1] != identity}
            new = now.keys() - self.listed
            if not (self.marked or new or changed or self.listed - now.keys()):
                return  # nothing to send, so that the mirror that wrote last may go on with what it could not send
            if new - self.sending or (changed and not self.marked):
                self.sending |= new
                self._write_list()
            if self._sent(new & changed, now):
                break
        gone = sorted((self.listed | self.sending) - now.keys())
        if new:
            self.listed |= new
            self.sending -= self.listed
            self._write_list()
        pointers = {key for key in changed - new if Path(key).suffix in _POINTERS}
        self._sent(changed - new - pointers, now)
        self._sent(pointers, now)
        if gone:
            self.listed, self.sending = self.listed & now.keys(), set(gone)
            self._write_list()
            for batch in _batches(gone):
                self._require_claim()
                self.store.remove(batch)
            self.sending = set()
        if new or changed or gone:
            self.mirror.known = {key: known for key, known in self.mirror.known.items() if key in now}
            self.mirror.remember()

    def _sent(self, keys: Iterable[str], now: Mapping[str, Identity]) -> bool:
        """Send these files; returns whether all were still there."""
        whole = True
        for batch in _batches(sorted(keys)):
            files, vanished = self.mirror.outgoing(batch)
            whole = whole and not vanished
            self._require_claim()
            self.store.put(files)
            there = self.store.objects()
            self.mirror.known |= {key: (there[key], now[key]) for key in files if key in there}
        return whole


def _batches(keys: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), _BATCH):
        yield keys[start : start + _BATCH]


class _Repeated:
    """A thread that does something every few seconds until it is stopped."""

    def __init__(self, action: Callable[[], None], seconds: float, address: str):
        self.action, self.seconds, self.address = action, seconds, address
        self._done, self._thread = threading.Event(), threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when what is under way is done; does nothing the second time, or before the start."""
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self.seconds):
            try:
                self.action()
            except Exception as error:  # it is tried again, at the end for the last time, and raised then
                print(f"{self.address}: not sent yet ({_one_line(error)})", file=sys.stderr)
