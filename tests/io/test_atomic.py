"""Commits are atomic, damage is named, a lease has one holder."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic, json_files, lease
from jax_selftrain.io.json_files import hash_json
from jax_selftrain.io.manifest import folder_manifest, sha256_file, verify_checksums


def start(code: str, *args: object, **popen) -> subprocess.Popen[str]:
    """A real process of this package, speaking over stdin and stdout."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(atomic.__file__).parents[1])},
        **popen,
    )


def wait_for_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return line.strip()


def tell(process: subprocess.Popen[str], line: object) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


# ---------------------------------------------------------------- commits


def test_a_committed_file_is_whole_and_nothing_else_is_left(tmp_path):
    with atomic.commit_file(tmp_path / "new" / "a.bin") as temp:
        temp.write_bytes(b"half")
        assert not (tmp_path / "new" / "a.bin").exists()
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"half"
    assert os.listdir(tmp_path / "new") == ["a.bin"]


def test_a_failed_commit_leaves_what_was_there_before(tmp_path):
    def fail_in_file() -> None:
        with atomic.commit_file(tmp_path / "a.txt") as temp:
            temp.write_text("new")
            raise ZeroDivisionError

    def fail_in_folder() -> None:
        with atomic.commit_folder(tmp_path / "f") as temp:
            (temp / "x").write_text("x")
            raise KeyboardInterrupt

    atomic.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError):
        fail_in_file()
    assert (tmp_path / "a.txt").read_text() == "old"
    with pytest.raises(KeyboardInterrupt):
        fail_in_folder()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_committed_folder_appears_at_once_and_is_never_written_over_unasked(tmp_path):
    def fill(value: str, **options: bool) -> None:
        with atomic.commit_folder(tmp_path / "f", **options) as temp:
            (temp / "deep").mkdir()
            (temp / "deep" / "x").write_text(value)

    fill("1")
    with pytest.raises(InputError, match=r"f: already exists"):
        fill("2")
    assert (tmp_path / "f/deep/x").read_text() == "1"
    fill("2", overwrite=True)
    assert (tmp_path / "f/deep/x").read_text() == "2"
    assert os.listdir(tmp_path) == ["f"]


def test_a_folder_filled_by_somebody_else_meanwhile_is_kept(tmp_path):
    def lose_the_race() -> None:
        with atomic.commit_folder(tmp_path / "f") as temp:
            (temp / "x").write_text("ours")
            (tmp_path / "f").mkdir()
            (tmp_path / "f" / "x").write_text("theirs")

    with pytest.raises(InputError, match="already exists"):
        lose_the_race()
    assert (tmp_path / "f/x").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("again", [False, True], ids=["cleaned", "committed again"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_kill_in_the_middle_of_a_commit_leaves_nothing_that_reads_as_whole(tmp_path, kind, again):
    process = start(
        """
        import sys, time
        from jax_selftrain.io import atomic
        path, kind = sys.argv[1:]
        with (atomic.commit_file if kind == "file" else atomic.commit_folder)(path) as temp:
            (temp if kind == "file" else temp / "x").write_text("half of it")
            print("writing", flush=True)
            time.sleep(60)
        """,
        tmp_path / "result",
        kind,
    )
    wait_for_line(process)
    atomic.remove_stale_temp_files(tmp_path)
    assert len(os.listdir(tmp_path)) == 1, "the work of a living process is not a leftover"
    kill(process)
    assert not (tmp_path / "result").exists()
    if again:
        with (atomic.commit_file if kind == "file" else atomic.commit_folder)(tmp_path / "result") as temp:
            (temp if kind == "file" else temp / "x").write_text("all of it")
    else:
        atomic.remove_stale_temp_files(tmp_path)
    assert os.listdir(tmp_path) == ["result"] * again


def test_a_reader_never_sees_a_mixture_while_a_file_is_rewritten_and_its_writer_killed(tmp_path):
    size = 200_000
    path = tmp_path / "data"
    atomic.write_text(path, "a" * size)
    for pause in (0.0, 0.013, 0.037):
        process = start(
            """
            import itertools, sys
            from jax_selftrain.io import atomic
            print("start_time", flush=True)
            for letter in itertools.cycle("abcdefgh"):
                atomic.write_text(sys.argv[1], letter * int(sys.argv[2]))
            """,
            path,
            size,
        )
        wait_for_line(process)
        end = time.monotonic() + pause
        while True:
            content = path.read_bytes()
            assert len(content) == size
            assert len(set(content)) == 1
            if time.monotonic() > end:
                break
        kill(process)
        content = path.read_bytes()
        assert len(content) == size
        assert len(set(content)) == 1
    atomic.remove_stale_temp_files(tmp_path)
    assert os.listdir(tmp_path) == ["data"]


def test_kill_in_the_instant_of_replacing_a_folder_is_undone(tmp_path):
    with atomic.commit_folder(tmp_path / "f") as temp:
        (temp / "x").write_text("old")
    process = start(
        """
        import os, signal, sys
        from jax_selftrain.io import atomic
        rename = os.rename
        def rename_once(source, target):
            rename(source, target)
            os.kill(os.getpid(), signal.SIGKILL)
        with atomic.commit_folder(sys.argv[1], overwrite=True) as temp:
            (temp / "x").write_text("new")
            os.rename = rename_once
        """,
        tmp_path / "f",
    )
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "f").exists()
    atomic.remove_stale_temp_files(tmp_path)
    assert (tmp_path / "f/x").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


WRITERS = {
    "text": "atomic.write_text(path, 'a' * 1_000_000)",
    "numpy": "import numpy as np\n"
    "with atomic.commit_file(path) as temp, temp.open('wb') as stream: np.save(stream, np.zeros(125_000))",
    "parquet": "import pyarrow as pa, pyarrow.parquet as pq, os\n"
    "with atomic.commit_file(path) as temp: pq.write_table(pa.table({'a': [os.urandom(1_000_000)]}), temp)",
    "safetensors": "import numpy as np\nfrom safetensors.numpy import save_file\n"
    "with atomic.commit_folder(path) as temp: save_file({'a': np.zeros(125_000)}, temp / 'model.safetensors')",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_sentence_naming_the_file_and_leaves_nothing(tmp_path, writer):
    # A limit on the size of a file (EFBIG) makes the same write fail as a full disk does, on any machine.
    # Python itself must write none of its modules there, cut off, where all other tests would read them.
    code = "import sys\nsys.dont_write_bytecode = True\n"
    code += "from jax_selftrain.io import atomic\npath = sys.argv[1]\n" + WRITERS[writer]
    limit = (100_000, resource.RLIM_INFINITY)
    process = start(code, tmp_path / "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, error = process.communicate(timeout=60)
    last = error.strip().splitlines()[-1]
    assert last.startswith(f"jax_selftrain.errors.InputError: {tmp_path / 'out'}: cannot be written")
    assert "run the same command again" in last
    assert os.listdir(tmp_path) == []


def test_a_really_full_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", tmp_path / "disk"], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        with pytest.raises(InputError, match=r"disk/x: cannot be written \(No space left on device\); free some space"):
            atomic.write_text(tmp_path / "disk/x", "a" * 1_000_000)
        with (
            pytest.raises(InputError, match=r"disk/f: cannot be written"),
            atomic.commit_folder(tmp_path / "disk/f") as temp,
        ):
            np.save(temp / "x.npy", np.zeros(125_000))
        assert os.listdir(tmp_path / "disk") == []
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "plain").write_text("a file, not a folder")
    with pytest.raises(InputError, match=r"plain/x\.json: cannot be written"):
        json_files.write_json(tmp_path / "plain" / "x.json", {})
    with pytest.raises(InputError, match=r"gs://bucket/x: is a URI"):
        atomic.write_text("gs://bucket/x", "")


def test_an_error_of_reading_some_other_file_is_not_blamed_on_the_target(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic.commit_file(tmp_path / "out"):
        (tmp_path / "elsewhere").read_bytes()
    assert caught.value.errno == errno.ENOENT


# ---------------------------------------------------------------- hashes and JSON


def test_fingerprint_depends_on_the_data_alone():
    assert hash_json({"a": 1, "b": [1.5, "é"]}) == hash_json({"b": [1.5, "é"], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 1.0})
    assert hash_json([]) == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
    with pytest.raises(ValueError, match="Out of range"):
        hash_json(float("nan"))


def test_json_is_the_same_bytes_for_the_same_data(tmp_path):
    json_files.write_json(tmp_path / "a", {"x": 1, "a": {"c": [1, 2.5], "b": "é"}})
    json_files.write_json(tmp_path / "b", {"a": {"b": "é", "c": [1, 2.5]}, "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json_files.read_json(tmp_path / "a") == {"x": 1, "a": {"c": [1, 2.5], "b": "é"}}
    with pytest.raises(ValueError, match="nan"):
        json_files.write_json(tmp_path / "nan.json", {"loss": float("nan")})
    assert not (tmp_path / "nan.json").exists()


@pytest.mark.parametrize("content", [b'{"a": 1', b"", b"\xff\xfe", b'{"a": NaN}', b"PK\x03\x04"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json: not valid JSON"):
        json_files.read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match=r"y\.json: no such file"):
        json_files.read_json(tmp_path / "y.json")


@pytest.fixture
def folder(tmp_path):
    for name, content in {"b.bin": b"0123456789" * 100, "params/a": b"weights", "params/.meta": b""}.items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_bytes(content)
    return tmp_path / "m"


def test_a_manifest_lists_every_file_in_order(folder):
    files = folder_manifest(folder)
    assert list(files) == ["b.bin", "params/.meta", "params/a"]
    assert files["params/a"] == {"sha256": sha256_file(folder / "params/a"), "bytes": 7}
    assert list(folder_manifest(folder, exclude="params/")) == ["b.bin"]
    verify_checksums(folder, files)


def test_damage_is_named(folder):
    files = folder_manifest(folder)

    def message_after(content: bytes | None) -> str:
        whole = (folder / "b.bin").read_bytes()
        if content is None:
            (folder / "b.bin").unlink()
        else:
            (folder / "b.bin").write_bytes(content)
        with pytest.raises(InputError) as caught:
            verify_checksums(folder, files, fix_hint="convert it again")
        (folder / "b.bin").write_bytes(whole)
        message = str(caught.value)
        assert message.startswith(f"{folder / 'b.bin'}: ")
        assert message.endswith("; convert it again")
        return message

    flipped = bytearray(b"0123456789" * 100)
    flipped[500] ^= 1
    assert f"checksum differs from the manifest (expected {files['b.bin']['sha256'][:8]}…" in message_after(
        bytes(flipped)
    )
    assert "truncated (expected 1000 bytes, found 10)" in message_after(b"0123456789")
    assert "of the wrong size" in message_after(bytes(1001))
    assert "missing" in message_after(None)
    verify_checksums(folder, files)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "params/../../outside"])
def test_a_manifest_cannot_reach_outside_its_folder(folder, name):
    with pytest.raises(InputError, match="outside the folder"):
        verify_checksums(folder, {name: {"sha256": "", "bytes": 0}})


# ---------------------------------------------------------------- leases

HOLDER = """
    import sys
    from jax_selftrain.io import lease
    for line in sys.stdin:  # each line names a lease; hold it until the next line comes
        path, stale_after = line.split()
        with lease.lease(path, stale_after=float(stale_after)) as held:
            print(int(held), flush=True)
            if sys.stdin.readline().strip() == "hang":
                import time; time.sleep(60)
        print("given back", flush=True)
"""


def test_a_lease_has_one_holder_and_is_given_back(tmp_path):
    path = tmp_path / "shard.lease"
    with lease.lease(path) as first:
        assert first
        with lease.lease(path) as second:
            assert not second
        assert path.exists(), "one who was refused does not take the lease away"
    assert os.listdir(tmp_path) == []
    with pytest.raises(ZeroDivisionError), lease.lease(path):
        _ = 1 / 0
    assert os.listdir(tmp_path) == []


def test_the_lease_of_a_killed_process_is_taken_over_at_once(tmp_path):
    path = tmp_path / "shard.lease"
    process = start(HOLDER)
    tell(process, f"{path} 600")
    assert wait_for_line(process) == "1"
    with lease.lease(path) as held:
        assert not held
    process.kill()
    # Not reaped yet: a zombie, which still has its PID, is dead, too.
    while Path(f"/proc/{process.pid}/stat").exists() and ") Z " not in Path(f"/proc/{process.pid}/stat").read_text():
        time.sleep(0.01)
    with lease.lease(path) as held:
        assert held
    process.communicate()
    assert os.listdir(tmp_path) == []


def test_a_reused_pid_is_not_taken_for_the_holder(tmp_path):
    path = tmp_path / "shard.lease"
    with lease.lease(path):
        content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "start_time": content["start_time"] - 1}))
    with lease.lease(path) as held:
        assert held


def test_processes_fighting_for_leases_win_each_once(tmp_path):
    fighters = [start(HOLDER) for _ in range(4)]
    dead = start(
        "import json, dataclasses; from jax_selftrain.io.process_id import this_process\n"
        "print(json.dumps(dataclasses.asdict(this_process())))"
    )
    corpse, _ = dead.communicate()
    for round_ in range(25):
        path = tmp_path / f"{round_}.lease"
        if round_ % 2:  # every other lease is left by a dead process, and the fight is for taking it over
            path.write_text(corpse)
        for fighter in fighters:
            tell(fighter, f"{path} 600")
        assert sorted(wait_for_line(fighter) for fighter in fighters) == ["0", "0", "0", "1"], round_
        for fighter in fighters:
            tell(fighter, "next")
            assert wait_for_line(fighter) == "given back"
    for fighter in fighters:
        _, error = fighter.communicate()
        assert fighter.returncode == 0, error
    assert os.listdir(tmp_path) == []


def test_the_lease_of_another_machine_counts_until_its_heartbeat_is_old(tmp_path):
    path = tmp_path / "shard.lease"
    path.write_text(json.dumps({"host": "elsewhere", "scope": "0" * 12, "pid": 1, "start_time": 1, "token": "t"}))
    with lease.lease(path, stale_after=600) as held:
        assert not held
    old = time.time() - 601
    os.utime(path, (old, old))
    with lease.lease(path, stale_after=600) as held:
        assert held


def test_a_process_that_dies_while_it_writes_a_lease_leaves_none(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from jax_selftrain.io import lease\n"
        "create = lease._create\n"
        "def die(path, content):\n"
        "    create(path, content[:5])\n"
        "    os._exit(9)\n"
        "lease._create = die\n"
        f"with lease.lease(Path({str(tmp_path / 'shard.lease')!r})): pass\n"
    )
    process = start(code)
    process.communicate()
    assert process.returncode == 9
    assert not (tmp_path / "shard.lease").exists()
    with lease.lease(tmp_path / "shard.lease") as held:
        assert held


@pytest.mark.parametrize("error", [PermissionError, OSError])
def test_leases_work_without_hard_links(tmp_path, monkeypatch, error):
    def refuse(*_: object) -> None:
        raise error("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    test_a_lease_has_one_holder_and_is_given_back(tmp_path)


def test_a_lease_cut_short_by_a_crash_is_taken_over_when_old(tmp_path):
    path = tmp_path / "shard.lease"
    path.write_bytes(b"")
    with lease.lease(path, stale_after=600) as held:
        assert not held
    os.utime(path, (0, 0))
    with lease.lease(path, stale_after=600) as held:
        assert held


def test_a_holder_at_work_keeps_its_heartbeat_fresh(tmp_path):
    path = tmp_path / "shard.lease"
    with lease.lease(path, stale_after=0.5) as held:
        assert held
        before = path.stat().st_mtime_ns
        deadline = time.monotonic() + 30
        while path.stat().st_mtime_ns == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime_ns > before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lease")]


def test_a_holder_that_was_taken_over_does_not_remove_the_new_lease(tmp_path):
    path = tmp_path / "shard.lease"
    with lease.lease(path) as first:
        assert first
        os.utime(path, (0, 0))  # as if this process had been suspended for long
        process = start(HOLDER)
        tell(process, f"{path} 600")
        assert wait_for_line(process) == "1"
    assert path.exists()
    tell(process, "next")
    assert wait_for_line(process) == "given back"
    process.communicate()
    assert os.listdir(tmp_path) == []


def test_versions_are_found_without_importing_the_libraries():
    process = start(
        """
        import sys
        from jax_selftrain.version import versions
        found = versions()
        assert {"jax_selftrain", "python", "jax", "jaxlib", "numpy"} <= set(found), found
        print(sorted({"jax", "numpy", "transformers", "flax"} & set(sys.modules)))
        """
    )
    output, error = process.communicate()
    assert output.strip() == "[]", error
