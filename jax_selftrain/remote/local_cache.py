"""Local copy of a URI, and a record of synced files."""

import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jax_selftrain.io import atomic, json_files
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.io.lease import wait_for_lease
from jax_selftrain.io.remote_paths import remote_cache_dir
from jax_selftrain.remote.object_store import Store

_COPIED_BYTES = 16 << 20
"""Files up to this size are copied before the upload, because logs may grow during it."""

FileStamp = tuple[int, int]
"""(size, modification time in nanoseconds) of a local file."""


class LocalCache:
    """The local copy of a URI."""

    def __init__(self, store: Store, purpose: str):
        self.store = store
        self.local_path = remote_cache_dir().joinpath(purpose, store.scheme, *store.parts)
        self.state = remote_cache_dir() / "state" / hash_json([purpose, store.uri])[:16]
        self.synced: dict[str, tuple[str, FileStamp]] = {}
        """Files that are equal on both sides: {key: (stamp of the store, local stamp)}."""
        self.generation = uuid.uuid4().hex

    def local_path_for(self, key: str) -> Path:
        """Return the local path of a key."""
        return self.local_path.parent / key

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock of this local copy."""
        with wait_for_lease(self.state / "cache.lease", resource=self.store.uri):
            self._load_state()
            self.local_path.parent.mkdir(parents=True, exist_ok=True)
            yield

    @property
    def state_file(self) -> Path:
        """File with the generation and the synced files."""
        return self.state / "synced.json"

    def _load_state(self) -> None:
        if self.state_file.exists():
            note = json_files.read_json(self.state_file)
            self.generation = note["generation"]
            self.synced = {key: (there, (size, changed)) for key, (there, size, changed) in note["files"].items()}
        else:
            self.save_state()

    def save_state(self) -> None:
        """Write the state file."""
        files = {key: [there, *here] for key, (there, here) in self.synced.items()}
        json_files.write_json(self.state_file, {"uri": self.store.uri, "generation": self.generation, "files": files})

    def files(self) -> dict[str, FileStamp]:
        """Return the stamps of local files, without leases and temporary files.

        The listing repeats until two agree, so that it holds every file that is older than any file in it.
        """
        before, now = None, self._look()
        while before is None or before.keys() != now.keys():
            before, now = now, self._look()
        return now

    def _look(self) -> dict[str, FileStamp]:
        found: dict[str, FileStamp] = {}
        for root in self._roots():
            tree = os.walk(root) if root.is_dir() else [(root.parent, list[str](), [root.name])]
            for folder, folders, names in tree:  # ignores files that vanish
                folders[:] = [name for name in folders if not atomic.is_temporary(name)]
                paths = [Path(folder, name) for name in names if not atomic.is_temporary(name)]
                stamps = {path.relative_to(self.local_path.parent).as_posix(): _file_stamp(path) for path in paths}
                found |= {key: stamp for key, stamp in stamps.items() if stamp is not None}
        return found

    def _roots(self) -> list[Path]:
        parent = self.local_path.parent
        return [path for path in parent.iterdir() if self.store.owns_key(path.name)] if parent.is_dir() else []

    def pull(self, there: Mapping[str, str], *, only_missing: bool = False) -> None:
        """Make the local copy equal to the store.

        Args:
          there: {key: stamp} of the files of the store.
          only_missing: keep local files, and do not restore files that were removed locally.
        """
        incoming = self.state / "incoming"
        shutil.rmtree(incoming, ignore_errors=True)  # left by an interrupted pull
        here, before = self.files(), self.synced
        self.synced = {key: known for key, known in before.items() if there.get(key) == known[0]}
        if only_missing:  # a synced file that is absent was removed here, unless everything is absent
            wanted = [key for key in there if key not in here and not (here and key in before)]
        else:
            wanted = [key for key in there if key not in here or not self._is_synced(key, here[key])]
        if wanted:
            self.store.get(wanted, incoming)
        if not only_missing:
            for key in here.keys() - there.keys():
                self.local_path_for(key).unlink(missing_ok=True)
            self._prune()
        for key in wanted:
            self.local_path_for(key).parent.mkdir(parents=True, exist_ok=True)
            os.replace(incoming / key, self.local_path_for(key))
            stamp = _file_stamp(self.local_path_for(key))
            if stamp is not None:
                self.synced[key] = there[key], stamp
        shutil.rmtree(incoming, ignore_errors=True)
        self.save_state()

    def _is_synced(self, key: str, stamp: FileStamp) -> bool:
        return key in self.synced and self.synced[key][1] == stamp

    def _prune(self) -> None:
        """Remove empty folders: an existing folder may count as complete."""
        for root in self._roots():
            for folder, _, _ in os.walk(root, topdown=False):
                if not any(Path(folder).iterdir()):
                    Path(folder).rmdir()

    def quarantine_unsynced(self) -> None:
        """Move files that were never uploaded to a separate folder."""
        unsent = [key for key, stamp in self.files().items() if not self._is_synced(key, stamp)]
        if unsent:
            folder = self.state / f"unsent-{time.strftime('%Y%m%d-%H%M%S')}"
            for key in unsent:
                (folder / key).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.local_path_for(key), folder / key)
            print(
                f"{self.store.uri}: {len(unsent)} files of this machine were never uploaded and do not belong to "
                f"the current content; they were moved to {folder}",
                file=sys.stderr,
            )

    def stage_upload(self, keys: Iterable[str]) -> dict[str, Path]:
        """Return the files that still exist, to upload; copy small ones."""
        folder, found = self.state / "outgoing", {}
        shutil.rmtree(folder, ignore_errors=True)
        for key in keys:
            path = self.local_path_for(key)
            try:
                if path.stat().st_size <= _COPIED_BYTES:
                    (folder / key).parent.mkdir(parents=True, exist_ok=True)
                    path = Path(shutil.copyfile(path, folder / key))
                found[key] = path
            except FileNotFoundError:
                continue
            except OSError:  # no space for a copy
                found[key] = path
        return found


def _file_stamp(path: Path) -> FileStamp | None:
    """Return the stamp of a file; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns
