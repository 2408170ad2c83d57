"""Files, models, arms and groups with hostile names, from the command line to a page in a browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import load_pages
from corpus_factory import write_jsonl
from run_factory import make_run_config, write_inputs

from jax_selftrain import cli
from jax_selftrain.config import ArmConfig, ModelConfig, StudyConfig, yaml_io

NAMES = {
    "markup": "<img src=x onerror=window.executed=1>",
    "a script in the title": "'><svg onload=window.executed=1>&lt;b&gt;",
    "TeX": r"$\frac$ a_b^{c US$",
    "control characters": "red\x1b[31m\x07\ttab",
    "a colon, quotes and a direction": '10:30 "שלום" \u202eabc',
    "a long word": "y" * 90,
}


def run_cli(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_pass_through_every_command_as_text(
    name: str, tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    model = shutil.copytree(tiny_model(), folder / "model")
    inputs = {key: str(Path(path).rename(folder / f"{name} {key}.jsonl")) for key, path in write_inputs(folder).items()}
    rows = [json.loads(line) | {"group": name} for line in Path(inputs["sequences"]).read_text().splitlines()]
    write_jsonl(Path(inputs["sequences"]), rows)
    config = make_run_config(model, inputs, folder / "run")

    scores = folder / "scores"
    for who in ("base", "student"):
        files = ("--tasks", inputs["choices"], "--texts", inputs["texts"])
        run_cli("score", "--model", model, *files, "--out", scores / f"{who}.json", "--mesh", "data=1")
    run_cli("compare", "--base", scores / "base.json", "--student", scores / "student.json", "--out", folder / "c.json")
    window = ("--prefix", 12, "--suffix", 8, "--mesh", "data=1")
    run_cli("extract", "--model", model, "--sequences", inputs["sequences"], "--out", folder / "e.json", *window)
    yaml_io.save(folder / "run.yaml", config)
    run_cli("run", "--config", folder / "run.yaml")
    sections = {key: getattr(config, key) for key in ("sample", "train", "score", "extract", "mesh")}
    study = StudyConfig(
        out=str(folder / "study"),
        title=name,
        models=(ModelConfig(f"{name} model", str(model)),),
        seeds=(100,),
        arms=(ArmConfig(f"{name} arm", learning_rate=0.0),),
        **sections,
    )
    study = replace(study, train=replace(study.train, seed=0, steps=4), sample=replace(study.sample, seed=0))
    yaml_io.save(folder / "study.yaml", study)
    run_cli("study", "--config", folder / "study.yaml")
    run_cli("report", folder / "study")

    printed = capsys.readouterr().out
    assert not {character for character in printed if ord(character) < 32} - {"\n"}
    assert "\u202e" not in printed
    for figure in folder.glob("*/figures/*.svg"):
        ElementTree.parse(figure)  # raises if it is not well-formed
    pages = [shutil.copy(folder / kind / "report.html", tmp_path / f"{kind}.html") for kind in ("run", "study")]
    for width in (1400, 400):
        for path, page in zip(pages, load_pages(pages, width), strict=True):
            assert page["requests"] == [path.as_uri()]
            assert (page["messages"], page["executed"], page["overflow"]) == ([], False, 0)
            assert (page["scripts"], page["handlers"], page["brokenLinks"]) == (1, 0, 0)
            assert name[:4] in page["text"]
