"""Addresses in object storage: fsspec's file system in memory, and one of files where several processes take part."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from process_group import ROOT

from jax_selftrain import cli, remote, storage
from jax_selftrain.config import ArmConfig, RunConfig, SampleConfig, ScoreConfig, StudyConfig
from jax_selftrain.errors import InputError, Stopped, UnavailableError

OUT = "memory://bucket/work/out"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MemoryFileSystem:
    """An empty store, and a machine that has fetched nothing yet."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    another_machine(monkeypatch, tmp_path / "first")
    monkeypatch.setattr(remote, "SEND_SECONDS", 0.05)
    monkeypatch.setattr(remote, "SILENT_SECONDS", 0.4)
    return fsspec.filesystem("memory")


def another_machine(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))


def contents(store: MemoryFileSystem) -> dict[str, bytes]:
    """What is in the store of the output, but for the list of files."""
    names = [name for name in store.find("/bucket/work") if not name.endswith(".files.json")]
    return {name.removeprefix("/bucket/work/"): store.cat_file(name) for name in names}


def test_inputs_are_fetched_wherever_they_stand(store: MemoryFileSystem):
    store.pipe({"/bucket/model/config.json": b"{}", "/bucket/model/a/weights": b"w", "/bucket/piqa.jsonl": b"q"})
    config = RunConfig(
        model="memory://bucket/model",
        sample=SampleConfig(model="EleutherAI/pythia-70m"),
        score=ScoreConfig(tasks=("quick", "piqa:memory://bucket/piqa.jsonl"), texts=("here.jsonl",)),
    )
    with remote.brought_here(config) as here:
        assert Path(here.model, "a", "weights").read_bytes() == b"w"
        task, _, file = here.score.tasks[1].partition(":")
        assert (task, Path(file).read_bytes()) == ("piqa", b"q")
        assert here == replace(config, model=here.model, score=replace(config.score, tasks=here.score.tasks))
        assert remote.named(f"{here.model}: damaged") == "memory://bucket/model: damaged"
    study = StudyConfig(out="x", arms=(ArmConfig(name="real", text="memory://bucket/piqa.jsonl"),))
    with remote.brought_here(study) as there:
        assert Path(there.arms[0].text).read_bytes() == b"q"


def test_only_what_has_changed_is_fetched_again(store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch):
    store.pipe({"/bucket/texts/one": b"1", "/bucket/texts/two": b"2", "/bucket/texts/three": b"3"})
    folder = remote.fetched("memory://bucket/texts")
    asked: list[str] = []
    get = MemoryFileSystem.get_file
    monkeypatch.setattr(
        MemoryFileSystem, "get_file", lambda self, path, *rest, **more: asked.append(path) or get(self, path, *rest)
    )
    assert remote.fetched("memory://bucket/texts") == folder
    assert asked == []
    store.pipe("/bucket/texts/two", b"II")
    store.rm_file("/bucket/texts/three")
    (folder / "one").write_bytes(b"changed by hand")
    remote.fetched("memory://bucket/texts")
    assert sorted(asked) == ["/bucket/texts/one", "/bucket/texts/two"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"one": b"1", "two": b"II"}


def test_files_beside_a_result_come_with_it(store: MemoryFileSystem):
    for name in ("base.json", "base.requests.parquet", "base2.json", "base"):
        store.pipe(f"/bucket/scores/{name}", name.encode())
    file = remote.fetched("memory://bucket/scores/base.json")
    visible = [path.name for path in file.parent.iterdir() if not path.name.startswith(".")]
    assert sorted(visible) == ["base.json", "base.requests.parquet"]


def test_an_output_is_sent_while_it_is_made_and_another_machine_goes_on_with_it(
    store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with remote.sent_back(OUT) as folder:
        folder.mkdir()
        (folder / "old").write_text("old")
        (folder / "log").write_text("1\n")
        (folder / ".lease").write_text("mine")
        wait_for(lambda: "out/old" in listed(store))
        (folder / "old").unlink()
        (folder / "steps").mkdir()
        (folder / "steps" / "new").write_text("new")
    assert contents(store) == {"out/log": b"1\n", "out/steps/new": b"new"}
    another_machine(monkeypatch, tmp_path / "second")
    with remote.sent_back(OUT) as folder:
        assert (folder / "steps" / "new").read_text() == "new"
        assert not (folder / "old").exists()
        (folder / "log").write_text("1\n2\n")
    assert contents(store) == {"out/log": b"1\n2\n", "out/steps/new": b"new"}
    another_machine(monkeypatch, tmp_path / "first")
    with remote.sent_back(OUT) as folder:
        assert (folder / "log").read_text() == "1\n2\n"
        assert not (folder / ".lease").exists() or (folder / ".lease").read_text() == "mine"


def test_what_ends_by_an_error_is_sent_too(store: MemoryFileSystem):
    def stopped() -> None:
        with remote.sent_back(OUT) as folder:
            folder.mkdir()
            (folder / "shard").write_text("whole")
            raise Stopped("on request")

    with pytest.raises(Stopped, match="on request"):
        stopped()
    assert contents(store) == {"out/shard": b"whole"}


def test_half_a_folder_is_never_taken_up(store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with remote.sent_back(OUT) as folder:
        folder.mkdir()
        (folder / "first").write_text("whole")
    put, pipe, lost = MemoryFileSystem.put_file, MemoryFileSystem.pipe_file, threading.Event()

    def put_until_lost(self, local, path, *rest, **more):
        if lost.is_set() or any("second" in name for name in contents(store)):
            lost.set()
            raise ConnectionError("the line is dead")
        put(self, local, path, *rest, **more)

    def pipe_until_lost(self, path, value, **more):
        if lost.is_set():
            raise ConnectionError("the line is dead")
        pipe(self, path, value, **more)

    def make_two_parts() -> None:
        with remote.sent_back(OUT) as folder, storage.commit_folder(folder / "second") as aside:
            for part in ("part-1", "part-2"):
                (aside / part).write_text(part)

    with monkeypatch.context() as line:
        line.setattr(MemoryFileSystem, "put_file", put_until_lost)
        line.setattr(MemoryFileSystem, "pipe_file", pipe_until_lost)
        with pytest.raises(UnavailableError, match=r"the line is dead.*what was made is in .*out"):
            make_two_parts()
    assert len(contents(store)) == 2, "one part has arrived"

    another_machine(monkeypatch, tmp_path / "second")
    with remote.sent_back(OUT) as folder:
        assert [path.name for path in folder.iterdir()] == ["first"]
    assert contents(store) == {"out/first": b"whole"}, "what was on its way is cleared away"


def test_what_could_not_be_sent_is_sent_by_the_same_command(store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch):
    put = MemoryFileSystem.put_file

    def dead(self, *arguments, **more):
        raise ConnectionError("the line is dead")

    with remote.sent_back(OUT) as folder:
        folder.mkdir()
        (folder / "before").write_text("before")
    monkeypatch.setattr(MemoryFileSystem, "put_file", dead)

    def work() -> None:
        with remote.sent_back(OUT) as folder:
            (folder / "work").write_text("of hours")

    with pytest.raises(UnavailableError, match="the line is dead"):
        work()
    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    with remote.sent_back(OUT) as folder:
        assert (folder / "work").read_text() == "of hours"
    assert contents(store) == {"out/before": b"before", "out/work": b"of hours"}


def test_a_second_writer_is_refused_while_the_first_one_lives(
    store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with remote.sent_back(OUT) as folder:
        folder.mkdir()
        (folder / "shard").write_text("whole")
        another_machine(monkeypatch, tmp_path / "second")
        with (
            pytest.raises(UnavailableError, match=rf"process {os.getpid()} on .* writes there"),
            remote.sent_back(OUT),
        ):
            pytest.fail("two writers")
    left = json.loads(store.cat_file("/bucket/work/.out.files.json")) | {"writer": "process 1 on a lost machine"}
    store.pipe("/bucket/work/.out.files.json", json.dumps(left).encode())
    another_machine(monkeypatch, tmp_path / "third")
    began = time.monotonic()
    with remote.sent_back(OUT) as folder:
        assert time.monotonic() - began > remote.SILENT_SECONDS
        assert (folder / "shard").read_text() == "whole"


def test_several_processes_are_sent_to_a_mounted_bucket():
    with (
        pytest.raises(InputError, match=r"--out gs://b/out: several processes .* mount the bucket"),
        remote.brought_here(SampleConfig(model="x", out="gs://b/out"), alone=False),
    ):
        pytest.fail("accepted")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("memory://bucket/nothing", "memory://bucket/nothing: no such file or folder"),
        ("nonsense://bucket/x", "nonsense://bucket/x: cannot be opened"),
        ("memory://bucket/../x", "is no address"),
        ("memory://", "is no address"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(address: str, says: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["score", "--model", address, "--tasks", "quick", "--out", "x.json"]) == 2
    assert says in capsys.readouterr().err


def test_a_whole_bucket_is_no_output():
    with pytest.raises(InputError, match="is a whole bucket"), remote.sent_back("memory://bucket"):
        pytest.fail("accepted")


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_what_is_not_installed_is_named():
    with pytest.raises(InputError, match=r"gs:// is not installed; pip install 'jax-selftrain\[gcs\]'"):
        remote.fetched("gs://bucket/x")


def test_the_command_line_reads_and_writes_addresses(
    store: MemoryFileSystem, tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = tiny_model("llama")
    store.put(str(model), "/bucket/model", recursive=True)
    options = ["--samples", "6", "--max-tokens", "8", "--batch-size", "2", "--samples-per-shard", "2"]
    assert cli.main(["sample", "--model", str(model), "--out", str(tmp_path / "local"), *options]) == 0
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").glob("shard-*")}
    capsys.readouterr()
    assert cli.main(["sample", "--model", "memory://bucket/model", "--out", OUT, *options]) == 0
    assert capsys.readouterr().out.startswith(f"{OUT}: 6 documents")
    there = contents(store)
    assert {name.rpartition("/")[2]: data for name, data in there.items() if name.startswith("out/shard-")} == local
    assert "out/corpus.json" in there
    again = cli.main(["sample", "--model", "memory://bucket/model", "--out", OUT, *options, "--seed", "9"])
    assert again == 2
    assert f"{OUT}: was begun with seed = 0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_machine_that_is_lost_costs_what_it_had_not_sent(tiny_model: Callable[..., Path], tmp_path: Path):
    """Killed while it samples; another machine, which has nothing but the store, completes the corpus."""
    model, out = tiny_model("llama"), tmp_path / "store" / "corpus"
    options = ["--samples", "400", "--max-tokens", "64", "--batch-size", "4", "--samples-per-shard", "4"]
    command = ["sample", "--model", str(model), *options]
    assert cli.main([*command, "--out", str(tmp_path / "local")]) == 0

    def begin(home: str) -> subprocess.Popen[str]:
        code = (
            "import sys; from jax_selftrain import cli, remote; remote.SEND_SECONDS = 0.1; remote.SILENT_SECONDS = 1.0;"
            "sys.exit(cli.main(sys.argv[1:]))"
        )
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / home), "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-c", code, *command, "--out", f"file://{out}"],
            env=environment,
            text=True,
            stderr=subprocess.PIPE,
        )

    lost = begin("lost")
    list_file = out.parent / ".corpus.files.json"
    wait_for(lambda: list_file.exists() and "corpus/timings/shard-000001.json" in list_file.read_text(), seconds=120)
    lost.send_signal(signal.SIGKILL)
    lost.communicate()
    listed_then = json.loads(list_file.read_text())["files"]
    timings = {name: (out.parent / name).read_bytes() for name in listed_then if "/timings/" in name}
    assert 1 <= len(timings) < 100, "killed in the middle"

    other = begin("other")
    _, said = other.communicate(timeout=300)
    assert other.returncode == 0, said
    for name, before in timings.items():
        assert (out.parent / name).read_bytes() == before, "not drawn twice"
    shards = sorted(path.name for path in (tmp_path / "local").glob("shard-*"))
    assert len(shards) == 100
    for name in shards:
        assert (out / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def listed(store: MemoryFileSystem) -> list[str]:
    return json.loads(store.cat_file("/bucket/work/.out.files.json"))["files"]


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
