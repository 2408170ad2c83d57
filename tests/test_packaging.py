"""The wheel, and what it gives to those who install it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

import jax_selftrain
from jax_selftrain import cli
from jax_selftrain.config import RunConfig, StudyConfig, yaml_io
from jax_selftrain.config.ready_configs import ready_configs

ROOT = Path(jax_selftrain.__file__).parents[1]


def jax_selftrain_in(package: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jax_selftrain", *words]
    env = {**os.environ, "PYTHONPATH": str(package)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    code = f"import hatchling.build; hatchling.build.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (file,) = out.glob("*.whl")
    with ZipFile(file) as archive:
        modes = {entry.filename: entry.external_attr >> 16 for entry in archive.infolist()}
        archive.extractall(out / "unpacked")
    for name, mode in modes.items():  # as pip does
        (out / "unpacked" / name).chmod(0o755 if mode & 0o111 else 0o644)
    (out / "unpacked" / "modes.json").write_text(json.dumps(modes))
    return out / "unpacked"


def test_the_wheel_holds_configs_scripts_and_types(wheel: Path):
    for folder in ("configs", "tpu_scripts"):
        source = {path.name: path.read_bytes() for path in (ROOT / folder).iterdir() if path.is_file()}
        assert {path.name: path.read_bytes() for path in (wheel / "jax_selftrain" / folder).iterdir()} == source
    modes = json.loads((wheel / "modes.json").read_text())
    assert modes["jax_selftrain/tpu_scripts/create"] & 0o111
    assert "jax_selftrain/py.typed" in modes


def test_an_installed_package_lists_and_copies_its_configs(wheel: Path, tmp_path: Path):
    listed = jax_selftrain_in(wheel, "configs", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout == jax_selftrain_in(ROOT, "configs", cwd=tmp_path).stdout
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert names == [*sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")), "tpu_scripts"]
    assert "Pythia 14m (L 6, D 128), trained for one epoch" in listed.stdout
    for name in ("pythia-14m", "tpu_scripts"):
        copied = jax_selftrain_in(wheel, "configs", "copy", name, cwd=tmp_path)
        assert copied.returncode == 0, copied.stderr
    assert (tmp_path / "pythia-14m.yaml").read_bytes() == (ROOT / "configs" / "pythia-14m.yaml").read_bytes()
    assert os.access(tmp_path / "tpu_scripts" / "create", os.X_OK)


def test_a_copy_refuses_to_overwrite_and_unknown_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["configs", "copy", "pythia-14m.yaml", str(tmp_path / "new" / "mine.yaml")]) == 0
    (tmp_path / "new" / "mine.yaml").write_text("edited")
    capsys.readouterr()
    for words, message in {
        ("copy", "pythia-14m", str(tmp_path / "new" / "mine.yaml")): "mine.yaml: exists already; remove it, or name",
        ("copy", "pythia14m"): "there is no configuration 'pythia14m'; did you mean `pythia-14m`?",
        ("copy", ""): "there is no configuration ''; jax-selftrain configs lists them",
        ("list", "pythia-14m"): "takes no name; write `configs copy pythia-14m`",
        ("copy", "pythia-14m", "/proc/none/x.yaml"): "/proc/none/x.yaml: cannot be written",
    }.items():
        assert cli.main(["configs", *words]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "new" / "mine.yaml").read_text() == "edited"


def test_every_ready_config_loads(monkeypatch: pytest.MonkeyPatch):
    for name in ("JAX_SELFTRAIN_DATA", "CANARIES"):
        monkeypatch.setenv(name, "/data")
    for name, path in ready_configs().items():
        if path.is_file():
            yaml_io.load(StudyConfig if name.startswith(("study", "paper")) else RunConfig, path)


def test_mypy_sees_the_types_of_the_wheel(wheel: Path, tmp_path: Path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(
        "from jax_selftrain.config import SampleConfig\n"
        "reveal_type(SampleConfig().samples)\n"
        "SampleConfig(modle='org/name')\n"
    )
    env = {**os.environ, "MYPYPATH": str(wheel)}
    words = ["--follow-imports=silent", "--ignore-missing-imports", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    found = subprocess.run(
        [sys.executable, "-m", "mypy", *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    ).stdout
    assert re.search(r'Revealed type is "(builtins\.)?int"', found)
    assert 'Unexpected keyword argument "modle"' in found


def test_files_of_the_repository_agree_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == jax_selftrain.__version__
    assert {citation["license"]} == {project["license"]}
    assert project["urls"]["Paper"] in [one["value"] for one in citation["identifiers"]]
    sky, image = (ROOT / "sky.yaml").read_text(), (ROOT / "Dockerfile").read_text()
    named = re.findall(
        r"(?:EXTRAS?[=:] ?|\[tpu,|\$EXTRA,)([a-z,]+)", sky + image + (ROOT / "tpu_scripts/common.sh").read_text()
    )
    extras = {extra for names in named for extra in names.split(",")}
    assert {"tpu", "cuda", "harness", "gcs"} <= extras <= set(project["optional-dependencies"])
    (copied,) = re.findall(r"COPY ([^.].*) \./", image)
    assert all((ROOT / file).is_file() for file in copied.split())
    configs = re.findall(r"CONFIG[=:] ?([\w.-]+)", sky)
    assert configs
    assert set(configs) <= set(ready_configs())
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["run"]
    (command,) = (step["run"] for step in job["steps"] if "run" in step)
    assert set(re.findall(r"'(nightly|run)'", command)) == {path.name for path in (ROOT / ".ci").iterdir()} - {
        "common.sh"
    }


def test_nothing_says_that_the_package_is_on_pypi():
    texts = [*(ROOT / "jax_selftrain").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    texts += (ROOT / "tpu_scripts").iterdir()
    claim = re.compile(r"pip install (-\S+ )*['\"]?jax-selftrain|jax-selftrain\[")
    assert not [path.name for path in texts if claim.search(path.read_text())]
