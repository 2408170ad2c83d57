"""The Cloud TPU scripts call a simulated `gcloud` and survive preemptions."""

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
GCLOUD_SCRIPTS = ("create", "setup", "run", "status", "logs", "resume", "fetch", "delete")
SCRIPT_NAMES = (*GCLOUD_SCRIPTS, "gke")
FAKE = Path(__file__).with_name("fake_gcloud.py")
ROOT = SCRIPTS.parent


@dataclass
class Cloud:
    """The folder, configuration and environment of a simulated gcloud."""

    folder: Path
    config: Path
    environment: dict[str, str]

    def script(self, name: str, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [str(SCRIPTS / name), "--config", str(self.config), *args]
        return subprocess.run(command, env=self.environment, text=True, capture_output=True, input=stdin, timeout=300)

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def preempt(self) -> None:
        subprocess.run(["gcloud", "preempt"], env=self.environment, check=True)


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    folder, programs = tmp_path / "cloud", tmp_path / "bin"
    bucket = folder / "bucket"
    bucket.mkdir(parents=True)
    programs.mkdir()
    scripts = {
        "gcloud": f'exec {sys.executable} {FAKE} "$@"',
        # `gcsfuse --implicit-dirs --only-dir FOLDER BUCKET MOUNT`; a mount is a symbolic link here
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
        "FAKE_GCLOUD": str(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    return Cloud(folder, config, environment)


def test_a_slice_is_created_used_and_deleted(cloud: Cloud, tmp_path: Path) -> None:
    created = cloud.script("create")
    assert created.returncode == 0, created.stderr
    assert created.stdout.split("\n")[:3] == [
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
    refused = cloud.script("delete", stdin="pod-2\n")
    assert (refused.returncode, "nothing was deleted" in refused.stderr) == (2, True)
    assert cloud.script("status").stdout.startswith("pod-1: ACTIVE")
    assert cloud.script("delete", stdin="pod-1\n").returncode == 0
    assert cloud.script("status").stdout == "pod-1: ABSENT\n"


@pytest.mark.nightly
def test_a_preempted_run_resumes_with_the_same_results(
    cloud: Cloud, finished_run: Path, options: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Preempt the slice once during sampling and once during training."""
    bucket = cloud.folder / "bucket"
    yaml_io.save(bucket / "run.yaml", options(Path("out/run")))
    for script in ("create", "setup"):
        assert cloud.script(script).returncode == 0
    assert cloud.script("run", "--", "jax-selftrain", "run", "--config", "out/run.yaml").returncode == 0
    command = [str(SCRIPTS / "resume"), "--config", str(cloud.config)]
    watcher = subprocess.Popen(command, env=cloud.environment, text=True, stdout=subprocess.PIPE)
    for pattern in ("sample-*/shard-000000.parquet", "train-*/checkpoints"):
        deadline = time.monotonic() + 240
        while not any((bucket / "run" / "stages").glob(pattern)):
            assert watcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        cloud.preempt()
    output, _ = watcher.communicate(timeout=300)
    assert watcher.returncode == 0
    assert output.count("preempted; requesting the slice again") == 2
    for name in ("results.json", "report.html"):
        assert (bucket / "run" / name).read_bytes() == (finished_run / name).read_bytes()
    records = sorted((bucket / "run" / "stages").glob("sample-*/records/shard-*.json"))
    assert len(records) == 3  # 40 samples in shards of 16


@pytest.mark.parametrize(
    ("code", "is_retried"),
    [(75, True), (143, True), (2, False), (1, False)],
    ids=["lost peer", "stopped", "invalid input", "internal error"],
)
def test_only_lost_and_stopped_commands_are_restarted(cloud: Cloud, code: int, is_retried: bool) -> None:
    for script in ("create", "setup"):
        assert cloud.script(script).returncode == 0
    fails_once = f"[ -e out/failed ] && exit 0; touch out/failed; exit {code}"
    assert cloud.script("run", "--", "bash", "-c", fails_once).returncode == 0
    resumed = cloud.script("resume")
    assert resumed.returncode == (0 if is_retried else code)
    assert ("restarting the command" in resumed.stdout) == is_retried


def test_failed_gcloud_calls_are_not_taken_for_a_preemption(cloud: Cloud) -> None:
    """After three network errors, the command completes without a new request."""
    for script in ("create", "setup"):
        assert cloud.script(script).returncode == 0
    assert cloud.script("run", "--", "sleep", "1").returncode == 0
    cloud.environment["FAKE_FAULTS"] = "3"
    resumed = cloud.script("resume")
    assert (resumed.returncode, resumed.stdout) == (0, "pod-1: done\n")
    assert resumed.stderr.count("no network") == 3
    assert sum("create" in call for call in cloud.calls()) == 1
    cloud.environment["FAKE_FAULTS"] = "99"
    (cloud.folder / "faults").unlink()
    stuck = cloud.script("create")
    assert (stuck.returncode, "gcloud failed ten times" in stuck.stderr) == (2, True)


def test_setup_is_tried_five_times(cloud: Cloud) -> None:
    for script in ("create", "setup"):
        assert cloud.script(script).returncode == 0
    assert cloud.script("run", "--", "bash", "-c", "exit 75").returncode == 0
    with cloud.config.open("a") as file:
        file.write("INSTALL=false\n")
    resumed = cloud.script("resume")
    assert resumed.returncode == 2
    assert resumed.stdout.count("setup failed; trying again") == 4
    assert "failed five times in a row" in resumed.stderr


def test_a_restart_waits_until_all_workers_have_ended(cloud: Cloud) -> None:
    """One worker exits with 75 two seconds before the other."""
    cloud.environment["FAKE_WORKERS"] = "2"
    for script in ("create", "setup"):
        assert cloud.script(script).returncode == 0
    job = 'f=failed-${HOME##*/}; [ -e $f ] && exit 0; touch $f; [ $f = failed-worker0 ] || sleep 2; echo "$f"; exit 75'
    assert cloud.script("run", "--", "bash", "-c", job).returncode == 0
    resumed = cloud.script("resume")
    assert resumed.returncode == 0
    assert resumed.stdout.splitlines() == ["pod-1: restarting the command", "pod-1: done"]
    assert cloud.script("status").stdout == "pod-1: ACTIVE\n0\n0\n"
    assert cloud.script("logs", "all").stdout.split() == ["failed-worker0", "failed-worker1"]


def test_a_dry_run_prints_the_calls_without_making_them(cloud: Cloud, tmp_path: Path) -> None:
    args = {"run": ("--", "true"), "fetch": (str(tmp_path / "back"),)}
    (cloud.config.parent / ".pod-1.job").write_text("true ")
    for name in GCLOUD_SCRIPTS:
        printed = cloud.script(name, "--dry-run", *args.get(name, ()))
        assert printed.returncode == 0, printed.stderr
        assert printed.stdout.startswith("gcloud "), name
    assert not cloud.calls()
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ZONE", "expected a line of the form KEY=value"),
        ("ZOME=z", "unknown key ZOME"),
        ("NAME=Pod 1", "only lowercase letters, digits and dashes"),
        ("TYPE=gpu-8", "unknown TYPE gpu-8"),
        ("TIER=cheap", "it must be spot, reserved or on-demand"),
        ("BUCKET=my-bucket", "it must be gs://BUCKET"),
        ("BUCKET=gs://bucket/a; rm -rf x", "of letters, digits, dots and dashes"),
        ("BUCKET=gs://bucket/$(id)", "of letters, digits, dots and dashes"),
        ("POLL_SECONDS=1; id", "it must be a number"),
        ("PROJECT=", "PROJECT is missing"),
    ],
)
def test_invalid_configs_are_refused(cloud: Cloud, line: str, message: str) -> None:
    with cloud.config.open("a") as file:
        file.write(line + "\n")
    refused = cloud.script("create")
    assert refused.returncode == 2
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not cloud.calls()


def test_missing_arguments_are_reported_and_configs_are_not_executed(cloud: Cloud, tmp_path: Path) -> None:
    cloud.config.write_text(cloud.config.read_text() + f"RUNTIME=$(touch {tmp_path / 'executed'})\n")
    assert cloud.script("create", "--dry-run").returncode == 0
    assert not (tmp_path / "executed").exists()
    assert "the command is missing" in cloud.script("run").stderr
    assert "no command was started on pod-1" in cloud.script("resume").stderr
    assert "expected one argument: the folder to copy to" in cloud.script("fetch").stderr
    cloud.config.unlink()
    assert "no such file; copy" in cloud.script("create").stderr


def test_the_environment_does_not_configure_a_script(cloud: Cloud) -> None:
    """A NAME in the shell must not decide which slice is deleted."""
    cloud.environment |= {"NAME": "other", "BUCKET": "gs://other/x"}
    called = cloud.script("delete", "--dry-run").stdout
    assert "pod-1" in called
    assert "other" not in called
    cloud.config.write_text(cloud.config.read_text().replace("NAME=pod-1\n", ""))
    refused = cloud.script("delete", "--dry-run")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "NAME is missing" in refused.stderr


@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_every_script_has_help_and_passes_shellcheck(name: str) -> None:
    text = subprocess.run([str(SCRIPTS / name), "--help"], text=True, capture_output=True, check=True).stdout
    assert text.startswith(f"{name} ")
    assert "--config" in text
    assert len(text.splitlines()) >= 2
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert checker, "shellcheck is missing; pip install -e '.[test]' installs it"
    subprocess.run([checker, "-x", "-P", "SCRIPTDIR", name, "common.sh"], cwd=SCRIPTS, check=True)


def test_gke_calls_xpk(cloud: Cloud, tmp_path: Path) -> None:
    """The flags are those of docs/usage in AI-Hypercomputer/xpk."""
    xpk = tmp_path / "bin" / "xpk"
    xpk.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    xpk.chmod(0o755)
    assert "CLUSTER is missing" in cloud.script("gke", "status").stderr
    cluster_settings = "CLUSTER=c\nIMAGE=image:1\nSTORAGE=results\n"
    cloud.config.write_text(cloud.config.read_text().replace("gs://bucket/a/b", "gs://bucket") + cluster_settings)
    location = {"--cluster=c", "--project=p", "--zone=z"}

    def call_xpk(*args: str, stdin: str = "") -> list[str]:
        completed = cloud.script("gke", *args, stdin=stdin)
        assert completed.returncode == 0, completed.stderr
        xpk_args = json.loads(completed.stdout)
        assert location <= set(xpk_args)
        return xpk_args

    attached = call_xpk("attach")
    assert attached[:3] == ["storage", "attach", "results"]
    assert {"--type=gcsfuse", "--bucket=bucket", "--mount-point=/out"} <= set(attached)
    submitted = call_xpk("run", "--", "jax-selftrain", "run", "--title", "two words")
    assert submitted[:2] == ["workload", "create"]
    assert {"--workload=pod-1", "--tpu-type=v5litepod-4", "--docker-image=image:1", "--storage=results"} <= set(
        submitted
    )
    assert "--max-restarts=50" in submitted
    (command,) = (arg.removeprefix("--command=") for arg in submitted if arg.startswith("--command="))
    assert shlex.split(command) == ["jax-selftrain", "run", "--title", "two words"]
    assert "--wait-for-job-completion=pod-1" in call_xpk("wait")
    assert "--filter-by-job=pod-1" in call_xpk("status")
    refused = cloud.script("gke", "delete", stdin="pod-2\n")
    assert (refused.returncode, "nothing was deleted" in refused.stderr) == (2, True)
    assert call_xpk("delete", stdin="pod-1\n")[:3] == ["workload", "delete", "--workload=pod-1"]
    assert cloud.script("gke", "run", "--dry-run", "--", "true").stdout.startswith("xpk workload create ")
    for invalid in (("wait", "more"), ("fly",), ("run",), ()):
        assert cloud.script("gke", *invalid).returncode == 2
