"""The notebook runs from its first cell to its last."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"


def run_notebook(model: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """Run the code cells in a folder, with a local model and few steps; return their names."""
    monkeypatch.chdir(folder)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if not number:
            source += f"\nMODEL, SAMPLES, STEPS = {str(model)!r}, 64, 4\n"
        exec(compile(source, f"cell {number} of {NOTEBOOK.name}", "exec"), names)
    return names


def check(names: dict[str, Any], folder: Path) -> None:
    assert len(names["frame"]) == len(names["corpus"]) == 64
    change = names["comparison"]["pairs"][0]["texts"][0]["bits_per_byte"]["change"]
    assert change["low"] < change["value"] < change["high"]
    assert change["value"] != 0
    assert (folder / "student" / "model" / "model.safetensors").is_file()


def test_the_notebook_runs(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(run_notebook(tiny_model("gpt_neox"), monkeypatch, tmp_path), tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("after: ") == 3
    assert "nats per token" in printed


@pytest.mark.nightly
def test_the_notebook_runs_with_a_trained_model(
    stories260k: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check(run_notebook(stories260k, monkeypatch, tmp_path), tmp_path)
