"""Partial results: exactly one process writes, whenever another one ends."""

import shutil

import pytest

from jax_selftrain.likelihood import resumable
from jax_selftrain.likelihood.resumable import PartialResults


@pytest.fixture
def finish(tmp_path, monkeypatch):
    """`finish(looks, has_written)` → times that process 1 of two writes.

    Process 0 ends before look number `looks` of process 1 at the live processes, after it has written or without.
    """

    def run(looks: int, *, has_written: bool) -> int:
        parts, seen, written = PartialResults(tmp_path / "scores.parts"), [], []

        def live_processes() -> tuple[int, ...]:
            seen.append(None)
            if len(seen) <= looks:
                return 0, 1
            if has_written:
                shutil.rmtree(parts.folder, ignore_errors=True)
            return (1,)

        monkeypatch.setattr(resumable.jax, "process_index", lambda: 1)
        monkeypatch.setattr(resumable.jax, "process_count", lambda: 2)
        monkeypatch.setattr(resumable, "live_processes", live_processes)
        monkeypatch.setattr(resumable, "POLL_SECONDS", 0.0)
        parts.finish(lambda: written.append(None))
        assert not parts.folder.exists()
        return len(written)

    return run


@pytest.mark.parametrize("looks", [0, 1, 2, 5])
def test_a_process_does_not_write_the_results_of_a_process_that_has_ended_again(finish, looks):
    assert finish(looks, has_written=True) == 0


@pytest.mark.parametrize("looks", [0, 1, 5])
def test_a_process_writes_the_results_if_the_first_process_was_lost_before(finish, looks):
    assert finish(looks, has_written=False) == 1
