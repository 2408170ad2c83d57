"""Upload of an output during the work, with a heartbeat."""

import os
import platform
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

from jax_selftrain.distributed import sigterm_handler
from jax_selftrain.errors import SelftrainError, UnavailableError
from jax_selftrain.io.lease import repeat_in_thread
from jax_selftrain.io.process_id import boot_and_pid_namespace
from jax_selftrain.remote.local_cache import FileStamp, LocalCache
from jax_selftrain.remote.object_store import Store, first_line

UPLOAD_INTERVAL = 20.0
"""Seconds between uploads."""
HEARTBEAT_INTERVAL = 10.0
"""Seconds between heartbeats of a writer."""
WRITER_TIMEOUT = 120.0
"""Seconds without a heartbeat after which a writer counts as lost."""
CONSISTENCY_DELAY = 1.0
"""Seconds after which a writer verifies its claim."""
_BATCH = 500
"""Files uploaded or removed between two checks of the claim."""
_INDEX_FILES = (".json", ".yaml", ".html")
"""Suffixes of files that refer to other files and are uploaded after them."""


class UploadSession:
    """Context that downloads an output, then uploads changes until its end."""

    def __init__(self, store: Store, cache: LocalCache):
        self.store, self.cache, self.id = store, cache, uuid.uuid4().hex
        self.listed: set[str] = set()
        self.uploading: set[str] = set()
        """Keys that may be in the store but are not in the list."""
        self.is_last_writer = False
        """The list bears the generation of this local copy."""
        self._heartbeats, self._uploads = ExitStack(), ExitStack()
        """Threads, once they run."""

    def __enter__(self) -> None:
        self._wait_for_others()
        try:
            self._heartbeat(True)
            time.sleep(CONSISTENCY_DELAY)
            self._require_claim()
            self._heartbeats.enter_context(self._repeat(self._renew_claim, HEARTBEAT_INTERVAL))
            self._fetch()
        except BaseException:
            self._release()
            raise
        self._uploads.enter_context(self._repeat(self._sync, UPLOAD_INTERVAL))

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with sigterm_handler(lambda: None):  # SIGTERM does not interrupt the upload
            try:
                self._uploads.close()
                self._sync()
            except (SelftrainError, OSError) as failure:
                exact = failure if isinstance(failure, SelftrainError) else UnavailableError(first_line(failure))
                kept = type(exact)(f"{exact}; the output is in {self.cache.local_path}")
                kept.shows_local_paths = True
                if error is None:
                    raise kept from failure
                print(f"not uploaded: {kept}", file=sys.stderr)  # the error of the body propagates
            finally:
                self._release()

    def _wait_for_others(self) -> None:
        began, first = time.monotonic(), self.store.read_record("writer")
        now = first
        while now is not None and now["writer"] and time.monotonic() - began < WRITER_TIMEOUT:
            if (now["generation"], now["scope"]) == (self.cache.generation, boot_and_pid_namespace()):
                return  # it held the lock of this local copy, which is now ours: it is dead
            if first is not None and (now["id"], now["heartbeat"]) != (first["id"], first["heartbeat"]):
                raise UnavailableError(f"{self.store.uri}: {now['writer']} writes there; wait for it")
            time.sleep(min(HEARTBEAT_INTERVAL, WRITER_TIMEOUT) / 4)
            now = self.store.read_record("writer")

    def _heartbeat(self, alive: bool) -> None:
        content = {
            "writer": f"process {os.getpid()} on {platform.node()}" if alive else "",
            "id": self.id,
            "generation": self.cache.generation,
            "scope": boot_and_pid_namespace(),
            "heartbeat": time.time(),
        }
        self.store.write_record("writer", content)

    def _release(self) -> None:
        """Stop the heartbeat and give up the claim, if the store answers."""
        self._heartbeats.close()
        with suppress(SelftrainError):
            self._require_claim()
            self._heartbeat(False)

    def _require_claim(self) -> None:
        found = self.store.read_record("writer")
        if found is None:
            raise UnavailableError(f"{self.store.uri}: the writer's heartbeat was removed during the work")
        if found["id"] != self.id:
            who = found["writer"] or "another process"
            raise UnavailableError(f"{self.store.uri}: {who} has taken over from this process")

    def _repeat(self, action: Callable[[], None], seconds: float) -> AbstractContextManager[None]:
        def attempt() -> None:
            try:
                action()
            except (SelftrainError, OSError) as error:  # retried, for the last time at the end
                print(f"{self.store.uri}: not uploaded yet ({first_line(error)})", file=sys.stderr)

        return repeat_in_thread(attempt, seconds, self.store.uri)

    def _renew_claim(self) -> None:
        self._require_claim()
        self._heartbeat(True)

    def _fetch(self) -> None:
        listing, there = self.store.read_record("files"), self.store.listed_objects()
        self.is_last_writer = listing is not None and listing["generation"] == self.cache.generation
        deleted = listing is not None and listing["files"] and not there
        if self.is_last_writer and not deleted:
            self.cache.pull(there, only_missing=True)
        else:
            self.cache.quarantine_unsynced()
            self.cache.pull(there)
        self.listed = set(there)
        self.uploading = set() if listing is None else set(listing["uploading"]) - self.listed
        if listing is None:  # else the generation is kept until there is something to upload
            self._write_list()

    def _write_list(self) -> None:
        self._require_claim()
        content = {"files": sorted(self.listed), "uploading": sorted(self.uploading)}
        self.store.write_record("files", content | {"generation": self.cache.generation})
        self.is_last_writer = True

    def _sync(self) -> None:
        """Upload a snapshot: new files, then the list, then changed files."""
        while True:
            now, known = self.cache.files(), self.cache.synced
            if not self.cache.state_file.exists() or (self.listed and not now):
                raise UnavailableError(f"{self.store.uri}: its local folder was removed during the work")
            changed = {key for key, stamp in now.items() if key not in known or known[key][1] != stamp}
            new = now.keys() - self.listed
            if not (self.is_last_writer or new or changed or self.listed - now.keys()):
                return  # keep the generation of the last writer, which may still have files to upload
            if new - self.uploading or (changed and not self.is_last_writer):
                self.uploading |= new
                self._write_list()
            if self._upload(new & changed, now):
                break
        gone = sorted((self.listed | self.uploading) - now.keys())
        if new:
            self.listed |= new
            self.uploading -= self.listed
            self._write_list()
        pointers = {key for key in changed - new if Path(key).suffix in _INDEX_FILES}
        self._upload(changed - new - pointers, now)
        self._upload(pointers, now)
        if gone:
            self.listed, self.uploading = self.listed & now.keys(), set(gone)
            self._write_list()
            for batch in _batches(gone):
                self._require_claim()
                self.store.remove(batch)
            self.uploading = set()
        if new or changed or gone:
            self.cache.synced = {key: known for key, known in self.cache.synced.items() if key in now}
            self.cache.save_state()

    def _upload(self, keys: Iterable[str], now: Mapping[str, FileStamp]) -> bool:
        """Upload files; return True if all still existed."""
        whole = True
        for batch in _batches(sorted(keys)):
            files = self.cache.stage_upload(batch)
            whole = whole and len(files) == len(batch)
            self._require_claim()
            self.store.put(files)
            there = self.store.objects()
            self.cache.synced |= {key: (there[key], now[key]) for key in files if key in there}
        return whole


def _batches(keys: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), _BATCH):
        yield keys[start : start + _BATCH]
