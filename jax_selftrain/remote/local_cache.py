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

from jax_selftrain.io import atomic, lease
from jax_selftrain.io.manifest import hash_json
from jax_selftrain.io.remote_paths import remote_cache_dir
from jax_selftrain.remote.object_store import Store

_COPIED_BYTES = 16 << 20
"""Files up to this size are copied before they are sent, since logs may grow meanwhile."""

FileStamp = tuple[int, int]
"""Of a local file: size, and time of change in nanoseconds."""


class LocalCache:
    """The local place that stands for an address."""

    def __init__(self, store: Store, purpose: str):
        self.store = store
        self.local_path = remote_cache_dir().joinpath(purpose, store.scheme, *store.parts)
        self.state = remote_cache_dir() / "state" / hash_json([purpose, store.address])[:16]
        self.synced: dict[str, tuple[str, FileStamp]] = {}
        """Files that are the same on both sides: what the store and what the local file system says of each."""
        self.generation = uuid.uuid4().hex

    def local_path_for(self, key: str) -> Path:
        return self.local_path.parent / key

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes that share this place out of it meanwhile."""
        with wait_for_lease(self.state / "mirror.lease", self.store.address):
            self._load_state()
            self.local_path.parent.mkdir(parents=True, exist_ok=True)
            yield

    @property
    def state_file(self) -> Path:
        return self.state / "known.json"

    def _load_state(self) -> None:
        if self.state_file.exists():
            note = atomic.read_json(self.state_file)
            self.generation = note["mark"]
            self.synced = {key: (there, (size, changed)) for key, (there, size, changed) in note["files"].items()}
        else:
            self.save_state()

    def save_state(self) -> None:
        """Keep what is the same on both sides."""
        files = {key: [there, *here] for key, (there, here) in self.synced.items()}
        atomic.write_json(self.state_file, {"address": self.store.address, "mark": self.generation, "files": files})

    def files(self) -> dict[str, FileStamp]:
        """The local files, but for locks and what is only being written.

        Looked through until two looks agree: what was there before something that is seen is then seen, too.
        """
        before, now = None, self._look()
        while before is None or before.keys() != now.keys():
            before, now = now, self._look()
        return now

    def _look(self) -> dict[str, FileStamp]:
        found: dict[str, FileStamp] = {}

        def see(path: Path) -> None:
            if (identity := _identity_of(path)) is not None:
                found[path.relative_to(self.local_path.parent).as_posix()] = identity

        for root in self.local_path.parent.iterdir() if self.local_path.parent.is_dir() else ():
            if self.store.owns_key(root.name) and not root.is_dir():
                see(root)
            elif self.store.owns_key(root.name):
                for folder, folders, names in os.walk(root):  # which passes over what vanishes meanwhile
                    folders[:] = [name for name in folders if not atomic.is_temporary(name)]
                    for name in names:
                        if not atomic.is_temporary(name):
                            see(Path(folder, name))
        return found

    def pull(self, there: Mapping[str, str], *, only_missing: bool = False) -> None:
        """Make this side equal to the store.

        Args:
          there: what belongs to it, and what the store says of each.
          only_missing: leave alone what is here, and what was removed here.
        """
        incoming = self.state / "incoming"
        shutil.rmtree(incoming, ignore_errors=True)  # of one that was interrupted
        here, before = self.files(), self.synced
        self.synced = {key: known for key, known in before.items() if there.get(key) == known[0]}
        if only_missing:  # what was here and is no more has been removed here, unless all is gone
            wanted = [key for key in there if key not in here and not (here and key in before)]
        else:
            wanted = [key for key in there if key not in here or not self._is_known(key, here[key])]
        if wanted:
            self.store.get(wanted, incoming)
        if not only_missing:
            for key in here.keys() - there.keys():
                self.local_path_for(key).unlink(missing_ok=True)
            self._prune()
        for key in wanted:
            self.local_path_for(key).parent.mkdir(parents=True, exist_ok=True)
            os.replace(incoming / key, self.local_path_for(key))
            identity = _identity_of(self.local_path_for(key))
            if identity is not None:
                self.synced[key] = there[key], identity
        shutil.rmtree(incoming, ignore_errors=True)
        self.save_state()

    def _is_known(self, key: str, identity: FileStamp) -> bool:
        return key in self.synced and self.synced[key][1] == identity

    def _prune(self) -> None:
        """Remove folders that have become empty: a folder that is there is taken for finished."""
        for root in [path for path in self.local_path.parent.iterdir() if self.store.owns_key(path.name)]:
            for folder, _, _ in os.walk(root, topdown=False):
                if not any(Path(folder).iterdir()):
                    Path(folder).rmdir()

    def quarantine_unsynced(self) -> None:
        """Keep what is here and was never sent where nothing overwrites it, and say so."""
        unsent = [key for key, identity in self.files().items() if not self._is_known(key, identity)]
        if unsent:
            aside = self.state / f"unsent-{time.strftime('%Y%m%d-%H%M%S')}"
            for key in unsent:
                (aside / key).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.local_path_for(key), aside / key)
            print(
                f"{self.store.address}: {len(unsent)} files of this machine were never sent and do not belong to what "
                f"is there now; they are in {aside}",
                file=sys.stderr,
            )

    def stage_upload(self, keys: Iterable[str]) -> tuple[dict[str, Path], list[str]]:
        """(files to send for these keys, keys that have vanished): small ones are copied, as they may be growing."""
        folder, found, vanished = self.state / "outgoing", {}, []
        shutil.rmtree(folder, ignore_errors=True)
        for key in keys:
            path = self.local_path_for(key)
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


def _identity_of(path: Path) -> FileStamp | None:
    """None: no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


@contextmanager
def wait_for_lease(path: Path, what: str) -> Iterator[None]:
    """Hold a lease, as soon as no other process of this machine does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = False
    while True:
        with lease.lease(path) as ours:
            if ours:
                yield
                return
        if not waiting:
            print(f"waiting for another process that uses {what}", file=sys.stderr)
        waiting = True
        time.sleep(0.5)
