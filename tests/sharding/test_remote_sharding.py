"""Tests of `remote` on several devices."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from process_group import free_port, start_process, wait_for_all

from jax_selftrain import cli
from jax_selftrain.remote import upload_session


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MemoryFileSystem:
    """An empty store, and a machine that has fetched nothing yet."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    another_machine(monkeypatch, tmp_path / "first")
    for name, seconds in {
        "UPLOAD_INTERVAL": 0.05,
        "HEARTBEAT_INTERVAL": 0.05,
        "WRITER_TIMEOUT": 0.5,
        "CONSISTENCY_DELAY": 0.02,
    }.items():
        monkeypatch.setattr(upload_session, name, seconds)
    return fsspec.filesystem("memory")


def another_machine(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))


@pytest.mark.nightly
def test_several_processes_mount_the_bucket(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Two machines mount one bucket; gcsfuse is replaced by a bind mount."""
    model, bucket = tiny_model("llama"), tmp_path / "buckets" / "b"
    homes = [tmp_path / f"home{index}" for index in range(2)]
    points = [home / "jax_selftrain/mirror/mount/gs/b" for home in homes]
    for folder in (bucket, tmp_path / "bin"):
        folder.mkdir(parents=True)
    disk = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", bucket]  # a file system of its own, as gcsfuse's is
    if subprocess.run(disk, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    gcsfuse = tmp_path / "bin" / "gcsfuse"
    gcsfuse.write_text(f'#!/bin/sh\nmount --bind "{tmp_path}/buckets/$2" "$3"\n')
    gcsfuse.chmod(0o755)
    command = ["sample", "--model", model, "--samples", "12", "--max-tokens", "8", "--batch-size", "2"]
    command += ["--samples-per-shard", "2"]
    assert cli.main([*map(str, command), "--mesh", "data=2", "--out", str(tmp_path / "local")]) == 0
    meeting = ("--coordinator", f"localhost:{free_port()}", "--num-processes", 2)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    try:
        processes = [
            start_process(
                [*command, "--out", "gs://b/work/out"],
                *meeting,
                "--process-id",
                index,
                PATH=path,
                XDG_CACHE_HOME=str(home),
            )
            for index, home in enumerate(homes)
        ]
        codes, stderr = wait_for_all(processes)
        assert codes == [0, 0], stderr
        assert all(map(os.path.ismount, points))
        local = {path.name: path.read_bytes() for path in (tmp_path / "local").glob("shard-*")}
        assert len(local) == 6
        assert {path.name: path.read_bytes() for path in (bucket / "work/out").glob("shard-*")} == local
        assert "corpus.json" in os.listdir(bucket / "work/out")
    finally:
        for point in (*points, bucket):
            subprocess.run(["umount", point], capture_output=True, check=False)
