"""The local place that stands for an address, and what is known to be the same on both sides."""

from __future__ import annotations

import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jax_selftrain import storage
from jax_selftrain.mirrors import mirrors
from jax_selftrain.remote.store import Store

_COPIED_BYTES = 16 << 20
"""Files up to this size are copied before they are sent, since logs may grow meanwhile."""

Identity = tuple[int, int]
"""Of a local file: size, and time of change in nanoseconds."""


class Mirror:
    """The local place that stands for an address."""

    def __init__(self, store: Store, purpose: str):
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
        with held(self.state / "mirror.lease", self.store.address):
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
                f"{self.store.address}: {len(unsent)} files of this machine were never sent and do not belong to what "
                f"is there now; they are in {aside}",
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


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
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
