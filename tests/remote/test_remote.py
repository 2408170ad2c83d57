"""URIs of object storage, with fsspec's in-memory and local file systems."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from launcher import CommandProcess, launch_code
from process_group import free_port, start_process, wait_for_all

from jax_selftrain import cli, remote
from jax_selftrain.config import ArmConfig, RunConfig, SampleConfig, ScoreConfig, StudyConfig
from jax_selftrain.errors import InputError, Preempted, UnavailableError
from jax_selftrain.io import atomic
from jax_selftrain.io.process_id import boot_and_pid_namespace
from jax_selftrain.io.remote_paths import restore_uris
from jax_selftrain.remote import upload_session

OUT = "memory://bucket/work/out"


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


def contents(store: MemoryFileSystem) -> dict[str, bytes]:
    """Return the objects of the output, without the list of files."""
    names = [name for name in store.find("/bucket/work") if "/." not in name]
    return {name.removeprefix("/bucket/work/"): store.cat_file(name) for name in names}


def test_inputs_are_fetched_wherever_they_stand(store: MemoryFileSystem):
    store.pipe({"/bucket/model/config.json": b"{}", "/bucket/model/a/weights": b"w", "/bucket/piqa.jsonl": b"q"})
    config = RunConfig(
        model="memory://bucket/model",
        sample=SampleConfig(model="EleutherAI/pythia-70m"),
        score=ScoreConfig(tasks=("quick", "piqa:memory://bucket/piqa.jsonl"), texts=("here.jsonl",)),
    )
    with remote.localize_uris(config) as here:
        assert Path(here.model, "a", "weights").read_bytes() == b"w"
        task, _, file = here.score.tasks[1].partition(":")
        assert (task, Path(file).read_bytes()) == ("piqa", b"q")
        assert here == replace(config, model=here.model, score=replace(config.score, tasks=here.score.tasks))
        assert restore_uris(f"{here.model}: damaged") == "memory://bucket/model: damaged"
    study = StudyConfig(out="x", arms=(ArmConfig(name="real", text="memory://bucket/piqa.jsonl"),))
    with remote.localize_uris(study) as there:
        assert Path(there.arms[0].text).read_bytes() == b"q"


def test_only_what_has_changed_is_fetched_again(store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch):
    store.pipe({"/bucket/texts/one": b"1", "/bucket/texts/two": b"2", "/bucket/texts/three": b"3"})
    folder = remote.download("memory://bucket/texts")
    requests: list[str] = []
    get = MemoryFileSystem.get_file

    def count_calls(self, path, *rest, **more):
        requests.append(path)
        get(self, path, *rest, **more)

    monkeypatch.setattr(MemoryFileSystem, "get_file", count_calls)
    assert remote.download("memory://bucket/texts") == folder
    assert requests == []
    store.pipe("/bucket/texts/two", b"II")
    store.rm_file("/bucket/texts/three")
    (folder / "one").write_bytes(b"changed by hand")
    remote.download("memory://bucket/texts")
    assert sorted(requests) == ["/bucket/texts/one", "/bucket/texts/two"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"one": b"1", "two": b"II"}


def test_companion_files_of_a_result_are_downloaded(store: MemoryFileSystem):
    companion = ("base.json", "base.requests.parquet", "base.parts/0.npy", "base.seed1.json", "base2.json", "base")
    for name in companion:
        store.pipe(f"/bucket/scores/{name}", name.encode())
    file = remote.download("memory://bucket/scores/base.json")
    assert sorted(path.name for path in file.parent.iterdir()) == ["base.json", "base.parts", "base.requests.parquet"]


def test_an_output_is_sent_while_it_is_made_and_another_machine_goes_on_with_it(
    store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with remote.synced_output(OUT) as folder:
        folder.mkdir()
        (folder / "old").write_text("old")
        (folder / "log").write_text("1\n")
        (folder / ".lease").write_text("mine")
        wait_for(lambda: "out/old" in list_names(store))
        (folder / "old").unlink()
        (folder / "steps").mkdir()
        (folder / "steps" / "new").write_text("new")
    assert contents(store) == {"out/log": b"1\n", "out/steps/new": b"new"}
    another_machine(monkeypatch, tmp_path / "second")
    with remote.synced_output(OUT) as folder:
        assert (folder / "steps" / "new").read_text() == "new"
        assert not (folder / "old").exists()
        (folder / "log").write_text("1\n2\n")
    assert contents(store) == {"out/log": b"1\n2\n", "out/steps/new": b"new"}
    another_machine(monkeypatch, tmp_path / "first")
    with remote.synced_output(OUT) as folder:
        assert (folder / "log").read_text() == "1\n2\n"
        assert not (folder / ".lease").exists() or (folder / ".lease").read_text() == "mine"


def test_what_ends_by_an_error_is_sent_too(store: MemoryFileSystem):
    def stop_work() -> None:
        with remote.synced_output(OUT) as folder:
            folder.mkdir()
            (folder / "shard").write_text("whole")
            raise Preempted("on request")

    with pytest.raises(Preempted, match="on request"):
        stop_work()
    assert contents(store) == {"out/shard": b"whole"}


def test_half_a_folder_is_never_taken_up(store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with remote.synced_output(OUT) as folder:
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
        with remote.synced_output(OUT) as folder, atomic.commit_folder(folder / "second") as aside:
            for part in ("part-1", "part-2"):
                (aside / part).write_text(part)

    with monkeypatch.context() as line:
        line.setattr(MemoryFileSystem, "put_file", put_until_lost)
        line.setattr(MemoryFileSystem, "pipe_file", pipe_until_lost)
        with pytest.raises(UnavailableError, match=r"the line is dead.*the output is in .*out"):
            make_two_parts()
    assert len(contents(store)) == 2, "one part has arrived"

    another_machine(monkeypatch, tmp_path / "second")
    with remote.synced_output(OUT) as folder:
        assert [path.name for path in folder.iterdir()] == ["first"]
        (folder / "third").write_text("whole")
    assert contents(store) == {"out/first": b"whole", "out/third": b"whole"}, "what was on its way is cleared away"


def test_what_could_not_be_sent_is_sent_by_the_same_command(store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch):
    put = MemoryFileSystem.put_file

    def dead(self, *arguments, **more):
        raise ConnectionError("the line is dead")

    with remote.synced_output(OUT) as folder:
        folder.mkdir()
        (folder / "before").write_text("before")
    monkeypatch.setattr(MemoryFileSystem, "put_file", dead)

    def work() -> None:
        with remote.synced_output(OUT) as folder:
            (folder / "work").write_text("of hours")

    with pytest.raises(UnavailableError, match="the line is dead"):
        work()
    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    with remote.synced_output(OUT) as folder:
        assert (folder / "work").read_text() == "of hours"
    assert contents(store) == {"out/before": b"before", "out/work": b"of hours"}


def test_a_second_writer_is_refused_while_the_first_one_lives(
    store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    put = MemoryFileSystem.put_file

    def slow(self, *arguments, **more):
        time.sleep(2 * upload_session.WRITER_TIMEOUT)
        put(self, *arguments, **more)

    with remote.synced_output(OUT) as folder:
        folder.mkdir()
        (folder / "shard").write_text("whole")
        another_machine(monkeypatch, tmp_path / "second")
        monkeypatch.setattr(MemoryFileSystem, "put_file", slow)  # while it sends, too
        with (
            pytest.raises(UnavailableError, match=rf"process {os.getpid()} on .* writes there"),
            remote.synced_output(OUT),
        ):
            pytest.fail("two writers")
    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    other_writer(store, "process 1 on a lost machine")
    another_machine(monkeypatch, tmp_path / "third")
    began = time.monotonic()
    with remote.synced_output(OUT) as folder:
        assert time.monotonic() - began > upload_session.WRITER_TIMEOUT
        assert (folder / "shard").read_text() == "whole"


def test_a_long_last_send_gives_signs_of_life(store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    put, sending, refused = MemoryFileSystem.put_file, threading.Event(), []

    def slow(self, *arguments, **more):
        sending.set()
        time.sleep(3 * upload_session.WRITER_TIMEOUT)
        put(self, *arguments, **more)

    def intrude() -> None:
        sending.wait()
        another_machine(monkeypatch, tmp_path / "second")
        try:
            with remote.synced_output(OUT):
                pass
        except UnavailableError as error:
            refused.append(str(error))

    monkeypatch.setattr(upload_session, "UPLOAD_INTERVAL", 60.0)  # nothing is sent before the end
    monkeypatch.setattr(MemoryFileSystem, "put_file", slow)
    intruder = threading.Thread(target=intrude)
    intruder.start()
    with remote.synced_output(OUT) as folder:
        folder.mkdir()
        (folder / "work").write_text("of hours")
    intruder.join()
    assert len(refused) == 1
    assert "writes there" in refused[0]
    assert contents(store) == {"out/work": b"of hours"}


def test_a_copied_home_is_no_second_life(store: MemoryFileSystem):
    """A writer with the same generation on another machine is waited for."""
    with remote.synced_output(OUT):
        pass
    generation = json.loads(store.cat_file("/bucket/work/.out.writer.json"))["generation"]
    for where, waits in ((boot_and_pid_namespace(), False), ("another host", True)):
        other_writer(store, "process 1", generation=generation, scope=where)
        began = time.monotonic()
        with remote.synced_output(OUT):
            assert (time.monotonic() - began > upload_session.WRITER_TIMEOUT) == waits


def test_who_was_taken_over_from_changes_nothing_any_more(
    store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    def work() -> None:
        with remote.synced_output(OUT) as folder:
            folder.mkdir(exist_ok=True)
            (folder / "first").write_text("first")
            wait_for(lambda: "out/first" in list_names(store))
            monkeypatch.setattr(upload_session, "HEARTBEAT_INTERVAL", 60.0)
            other_writer(store, "process 1 on another machine")
            (folder / "late").write_text("late")
            (folder / "first").unlink()

    with pytest.raises(UnavailableError, match="process 1 on another machine has taken over"):
        work()
    assert contents(store) == {"out/first": b"first"}

    store.rm_file("/bucket/work/.out.writer.json")
    another_machine(monkeypatch, tmp_path / "second")
    with remote.synced_output(OUT) as folder:
        (folder / "second").write_text("second")
    another_machine(monkeypatch, tmp_path / "first")
    with remote.synced_output(OUT) as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["first", "second"]
    stderr = capfd.readouterr().err
    assert "1 files of this machine were never uploaded" in stderr
    (late,) = (tmp_path / "first").rglob("late")
    assert late.read_text() == "late"


def test_who_changes_nothing_takes_nothing_over(
    store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with remote.synced_output(OUT) as folder:
        folder.mkdir()
        (folder / "first").write_text("first")

    def dead(self, *arguments, **more):
        raise ConnectionError("the line is dead")

    def work() -> None:
        with remote.synced_output(OUT) as folder:
            (folder / "hours").write_text("never sent")

    with monkeypatch.context() as line:
        line.setattr(MemoryFileSystem, "put_file", dead)
        with pytest.raises(UnavailableError, match="the output is in") as caught:
            work()
    assert caught.value.shows_local_paths
    assert str(tmp_path) in str(caught.value)
    another_machine(monkeypatch, tmp_path / "second")
    with remote.synced_output(OUT) as folder:
        assert (folder / "first").exists()
    another_machine(monkeypatch, tmp_path / "first")
    with remote.synced_output(OUT) as folder:
        assert (folder / "hours").read_text() == "never sent"
    assert contents(store) == {"out/first": b"first", "out/hours": b"never sent"}


def test_what_was_removed_here_stays_removed(store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch):
    with remote.synced_output(OUT) as folder:
        folder.mkdir()
        for step in ("old", "new"):
            (folder / step).write_text(step)
    (folder / "old").unlink()  # as a process does that is killed before it can tell the store
    with remote.synced_output(OUT) as folder:
        assert [path.name for path in folder.iterdir()] == ["new"]
    assert contents(store) == {"out/new": b"new"}


def test_a_part_of_an_output_is_read_by_its_list(store: MemoryFileSystem):
    with remote.synced_output(OUT) as folder:
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "weights").write_text("whole")
    store.pipe("/bucket/work/out/model/half", b"of something else, never listed")
    found = remote.download(f"{OUT}/model")
    assert [path.name for path in found.iterdir()] == ["weights"]
    store.rm_file("/bucket/work/out/model/weights")
    store.pipe(
        "/bucket/work/.out.files.json",
        b'{"files": ["out/model/weights", "out/model/half"], "uploading": [], "generation": ""}',
    )
    with pytest.raises(InputError, match="model/weights is missing"):
        remote.download(f"{OUT}/model")
    store.pipe("/bucket/work/.out.files.json", b"{}")
    with pytest.raises(InputError, match="is not a record of this version"):
        remote.download(f"{OUT}/model")


def test_a_store_that_fails_is_not_an_empty_one(store: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch):
    with remote.synced_output(OUT) as folder:
        folder.mkdir()
        (folder / "work").write_text("of hours")

    def dead(self, *arguments, **more):
        raise ConnectionError("the line is dead")

    with monkeypatch.context() as line:
        line.setattr(MemoryFileSystem, "info", dead)
        line.setattr(MemoryFileSystem, "cat_file", dead)
        with pytest.raises(UnavailableError, match="the line is dead"), remote.synced_output(OUT):
            pytest.fail("began")
    assert (folder / "work").read_text() == "of hours"
    assert contents(store) == {"out/work": b"of hours"}


def test_an_output_that_was_deleted_is_started_over(store: MemoryFileSystem, capfd: pytest.CaptureFixture[str]):
    with remote.synced_output(OUT) as folder:
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "weights").write_text("old")
    store.rm("/bucket/work/out", recursive=True)  # and not the list, which is hidden
    with remote.synced_output(OUT) as folder:
        assert not folder.exists(), "not even an empty folder, which would be taken for a finished one"
    with remote.synced_output(OUT) as folder:
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "weights").write_text("new")
        (folder / "model" / "config").write_text("new")
    store.rm_file("/bucket/work/out/model/config")
    with pytest.raises(InputError, match=r"out/model/config is missing, but \.out\.files\.json lists"):
        remote.download(OUT)


def test_a_mirror_that_is_removed_takes_nothing_with_it(store: MemoryFileSystem, tmp_path: Path):
    with remote.synced_output(OUT) as folder:
        folder.mkdir()
        (folder / "work").write_text("of hours")

    def work(removed: Path) -> None:
        with remote.synced_output(OUT):
            shutil.rmtree(removed)

    for removed in (folder, tmp_path / "first"):
        with pytest.raises(UnavailableError, match="its local folder was removed during the work"):
            work(removed)
        assert contents(store) == {"out/work": b"of hours"}


def test_sending_survives_folders_that_vanish(store: MemoryFileSystem):
    with remote.synced_output(OUT) as folder:
        folder.mkdir()
        for step in range(150):
            with atomic.commit_folder(folder / f"{step:06d}") as aside:
                (aside / "weights").write_text(str(step))
            if step >= 2:
                shutil.rmtree(folder / f"{step - 2:06d}")
    assert contents(store) == {"out/000148/weights": b"148", "out/000149/weights": b"149"}


def test_no_object_lands_outside_its_folder(store: MemoryFileSystem, tmp_path: Path):
    MemoryFileSystem.store["/bucket/texts/../../../evil"] = store.open("/bucket/x", "wb")
    store.pipe("/bucket/texts/good", b"good")
    with pytest.raises(InputError, match="not a path in a folder"):
        remote.download("memory://bucket/texts")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("s3://b/out", "mount the bucket and pass that folder"),
        ("gs://b/out", "install gcsfuse"),
        ("gs://b", "install gcsfuse"),
    ],
)
def test_several_processes_need_a_folder_that_all_see(
    address: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(InputError, match=rf"{address}: several processes .*{says}"),
        remote.localize_uris(SampleConfig(model="x", out=address), exclusive=False),
    ):
        pytest.fail("accepted")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("memory://bucket/nothing", "memory://bucket/nothing: no such file or folder"),
        ("nonsense://bucket/x", "nonsense://bucket/x: cannot be opened"),
        ("memory://bucket/../x", "is not the URI"),
        ("memory://", "is not the URI"),
    ],
)
def test_a_mistake_is_reported_in_one_sentence(address: str, says: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["score", "--model", address, "--tasks", "quick", "--out", "x.json"]) == 2
    assert says in capsys.readouterr().err


def test_results_are_files():
    options = ScoreConfig(model="x", tasks=("quick",), out="memory://bucket/base")
    with pytest.raises(InputError, match=r"ends in \.json"), remote.localize_uris(options):
        pytest.fail("accepted")


def test_other_addresses_are_left_alone():
    config = RunConfig(model="x", title="after https://arxiv.org/abs/2605.31126")
    with remote.localize_uris(config) as here:
        assert here == config


def test_a_whole_bucket_is_no_output():
    with pytest.raises(InputError, match="is a whole bucket"), remote.synced_output("memory://bucket"):
        pytest.fail("accepted")


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_what_is_not_installed_is_named():
    with pytest.raises(InputError, match=r"gs:// is not installed; pip install gcsfs"):
        remote.download("gs://bucket/x")


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
    assert json.loads(there["out/corpus.json"])["source"]["ref"] == "memory://bucket/model"
    again = cli.main(["sample", "--model", "memory://bucket/model", "--out", OUT, *options, "--seed", "9"])
    assert again == 2
    assert f"{OUT}: was created with seed = 0" in capsys.readouterr().err


@pytest.mark.nightly
def test_another_machine_resumes_a_run(
    store: MemoryFileSystem,
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    store.put(str(tiny_model("llama")), "/bucket/model", recursive=True)
    store.pipe("/bucket/held-out.jsonl", b'{"text": "a little text"}\n')
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: memory://bucket/model\n"
        "mesh: data=1\n"
        "sample: {samples: 8, max_tokens: 8, batch_size: 4}\n"
        "train: {batch_size: 2, seq_len: 16, steps: 2}\n"
        "score: {texts: ['memory://bucket/held-out.jsonl']}\n"
    )
    command = ["run", "--config", str(config), "--out", OUT]
    assert cli.main(command) == 0
    there = contents(store)
    assert "out/results.json" in there
    assert str(tmp_path) not in there["out/config.yaml"].decode(), "addresses, not folders of one machine"
    records = [name for name in there if re.fullmatch(r"out/stages/(train|score)-\w+\.json", name)]
    assert len(records) == 3
    for name in ("out/results.json", *records):
        store.rm_file(f"/bucket/work/{name}")
    left = set(list_names(store))
    store.pipe(
        "/bucket/work/.out.files.json",
        json.dumps({"files": sorted(left & contents(store).keys()), "uploading": [], "generation": "lost"}).encode(),
    )
    another_machine(monkeypatch, tmp_path / "second")
    capsys.readouterr()
    assert cli.main(command) == 0
    assert capsys.readouterr().out.strip().endswith(f"report: {OUT}/report.html")
    now = contents(store)
    outputs = [name for name in there if name.endswith("/corpus.json") or name.startswith("out/model/")]
    assert len(outputs) > 1
    for name in (*outputs, "out/results.json", "out/report.html"):
        assert now[name] == there[name], name


QUICK_UPLOADS = """
import sys
from jax_selftrain import cli
from jax_selftrain.remote import upload_session
upload_session.UPLOAD_INTERVAL = upload_session.HEARTBEAT_INTERVAL = 0.1
upload_session.WRITER_TIMEOUT = 1.0
sys.exit(cli.main())
"""


@pytest.mark.nightly
def test_a_machine_that_is_lost_costs_what_it_had_not_sent(tiny_model: Callable[..., Path], tmp_path: Path):
    """Another machine completes a corpus after a kill."""
    model, out = tiny_model("llama"), tmp_path / "store" / "corpus"
    options = ["--samples", "400", "--max-tokens", "64", "--batch-size", "4", "--samples-per-shard", "4"]
    options += ["--mesh", "data=1"]
    command = ["sample", "--model", str(model), *options]
    assert cli.main([*command, "--out", str(tmp_path / "local")]) == 0

    def begin(home: str) -> CommandProcess:
        return launch_code(QUICK_UPLOADS, *command, "--out", f"file://{out}", XDG_CACHE_HOME=str(tmp_path / home))

    lost = begin("lost")
    list_file = out.parent / ".corpus.files.json"

    def has_sent_two_shards() -> bool:
        there = list_file.exists() and json.loads(list_file.read_text())["files"]
        return "corpus/timings/shard-000001.json" in (there or ())

    lost.wait_until(has_sent_two_shards)
    lost.kill()
    lost.wait()
    listed_then = json.loads(list_file.read_text())["files"]
    timings = {name: (out.parent / name).read_bytes() for name in listed_then if "/timings/" in name}
    assert 1 <= len(timings) < 100, "killed in the middle"

    other = begin("other")
    _, stderr = other.communicate(timeout=300)
    assert other.returncode == 0, stderr
    for name, before in timings.items():
        assert (out.parent / name).read_bytes() == before, "not drawn twice"
    shards = sorted(path.name for path in (tmp_path / "local").glob("shard-*"))
    assert len(shards) == 100
    for name in shards:
        assert (out / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


@pytest.mark.nightly
def test_several_processes_mount_the_bucket(tiny_model: Callable[..., Path], tmp_path: Path):
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
    codes, stderr = wait_for_all([start_process([*command, "--mesh", "data=2", "--out", tmp_path / "local"])])
    assert codes == [0], stderr
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


def other_writer(store: MemoryFileSystem, name: str, **more: str) -> None:
    content = {"writer": name, "id": "another", "generation": "another", "scope": "another", "heartbeat": 1.0, **more}
    store.pipe("/bucket/work/.out.writer.json", json.dumps(content).encode())


def list_names(store: MemoryFileSystem) -> list[str]:
    return json.loads(store.cat_file("/bucket/work/.out.files.json"))["files"]


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
