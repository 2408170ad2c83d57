"""Who writes an output: fetches it, sends what becomes of it, and gives signs of life meanwhile."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jax_selftrain.distributed import sigterm_handler
from jax_selftrain.errors import SelftrainError, UnavailableError
from jax_selftrain.io.process_id import boot_and_pid_namespace
from jax_selftrain.remote.local_cache import FileStamp, LocalCache
from jax_selftrain.remote.object_store import Store, first_line

UPLOAD_INTERVAL = 20.0
"""How often what is new is sent."""
HEARTBEAT_INTERVAL = 10.0
"""How often a writer gives a sign of life."""
WRITER_TIMEOUT = 120.0
"""After how long without one a writer is taken for lost."""
CONSISTENCY_DELAY = 1.0
"""How long after its claim a writer looks whether it is still its own."""
_BATCH = 500
"""Files that are sent, or removed, between two looks whether this process is still the writer."""
_INDEX_FILES = (".json", ".yaml", ".html")
"""Files that speak of others, and are sent after them."""


class UploadSession:
    """Fetches an output, then sends what is new until it is left."""

    def __init__(self, store: Store, mirror: LocalCache):
        self.store, self.mirror, self.id = store, mirror, uuid.uuid4().hex
        self.listed: set[str] = set()
        self.sending: set[str] = set()
        """What may be in the store and is in no list."""
        self.marked = False
        """Whether the list says that this mirror was the last to write."""
        self.ended_well = False
        self._beating = PeriodicTask(self._heartbeat_loop, HEARTBEAT_INTERVAL, store.address)
        self._sending = PeriodicTask(self._send, UPLOAD_INTERVAL, store.address)

    def __enter__(self) -> UploadSession:
        self._wait_for_others()
        try:
            self._heartbeat(True)
            time.sleep(CONSISTENCY_DELAY)
            self._require_claim()
            self._beating.start()
            self._fetch()
        except BaseException:
            self._release()
            raise
        self._sending.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with sigterm_handler(lambda: None):  # what ends the work does not end its being sent
            try:
                self._sending.stop()
                self._send()
            except (SelftrainError, OSError) as failure:
                exact = failure if isinstance(failure, SelftrainError) else UnavailableError(first_line(failure))
                kept = type(exact)(f"{exact}; what was made is in {self.mirror.local_path}")
                kept.shows_local_paths = True
                if self.ended_well:
                    raise kept from failure
                print(f"not sent: {kept}", file=sys.stderr)  # beside the error that the body ended by
            finally:
                self._release()

    # Who writes

    def _wait_for_others(self) -> None:
        began, first = time.monotonic(), self.store.read_writer()
        now = first
        while now is not None and now["writer"] and time.monotonic() - began < WRITER_TIMEOUT:
            if (now["mark"], now["scope"]) == (self.mirror.generation, boot_and_pid_namespace()):
                return  # it was of this machine, and held the mirror, which is now ours: it is dead
            if first is not None and (now["id"], now["beat"]) != (first["id"], first["beat"]):
                raise UnavailableError(f"{self.store.address}: {now['writer']} writes there; wait for it")
            time.sleep(min(HEARTBEAT_INTERVAL, WRITER_TIMEOUT) / 4)
            now = self.store.read_writer()

    def _heartbeat(self, alive: bool) -> None:
        content = {
            "writer": f"process {os.getpid()} on {platform.node()}" if alive else "",
            "id": self.id,
            "mark": self.mirror.generation,
            "scope": boot_and_pid_namespace(),
            "beat": time.time(),
        }
        self.store.write(self.store.writer_key, content)

    def _release(self) -> None:
        """Write no more. If that cannot be told, others wait until this process has been silent for long enough."""
        self._beating.stop()
        with suppress(SelftrainError):
            self._require_claim()
            self._heartbeat(False)

    def _require_claim(self) -> None:
        found = self.store.read_writer()
        if found is None:
            raise UnavailableError(f"{self.store.address}: {self.store.writer_key} was removed while work went on")
        if found["id"] != self.id:
            who = found["writer"] or "another process"
            raise UnavailableError(f"{self.store.address}: {who} has taken over from this process")

    def _heartbeat_loop(self) -> None:
        self._require_claim()
        self._heartbeat(True)

    # What is written

    def _fetch(self) -> None:
        listing, there = self.store.read_list(), self.store.listed_objects()
        self.marked = listing is not None and listing["mark"] == self.mirror.generation
        deleted = listing is not None and listing["files"] and not there
        if self.marked and not deleted:
            self.mirror.pull(there, only_missing=True)
        else:
            self.mirror.quarantine_unsynced()
            self.mirror.pull(there)
        self.listed = set(there)
        self.sending = set() if listing is None else set(listing["sending"]) - self.listed
        if listing is None:  # else the mark is left until there is something to send
            self._write_list()

    def _write_list(self) -> None:
        self._require_claim()
        content = {"files": sorted(self.listed), "sending": sorted(self.sending), "mark": self.mirror.generation}
        self.store.write(self.store.list_key, content)
        self.marked = True

    def _send(self) -> None:
        """Bring the store up to what is here at one moment: new files, then the list, then changed ones."""
        while True:
            now, known = self.mirror.files(), self.mirror.synced
            if not self.mirror.state_file.exists() or (self.listed and not now):
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
        pointers = {key for key in changed - new if Path(key).suffix in _INDEX_FILES}
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
            self.mirror.synced = {key: known for key, known in self.mirror.synced.items() if key in now}
            self.mirror.save_state()

    def _sent(self, keys: Iterable[str], now: Mapping[str, FileStamp]) -> bool:
        """Send these files; returns whether all were still there."""
        whole = True
        for batch in _batches(sorted(keys)):
            files, vanished = self.mirror.stage_upload(batch)
            whole = whole and not vanished
            self._require_claim()
            self.store.put(files)
            there = self.store.objects()
            self.mirror.synced |= {key: (there[key], now[key]) for key in files if key in there}
        return whole


def _batches(keys: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), _BATCH):
        yield keys[start : start + _BATCH]


class PeriodicTask:
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
            except (SelftrainError, OSError) as error:  # tried again, and at the end for the last time
                print(f"{self.address}: not sent yet ({first_line(error)})", file=sys.stderr)
