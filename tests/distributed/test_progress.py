"""Without a terminal, progress is lines of a log."""

from __future__ import annotations

import logging
import re

from launcher import run_command

from jax_selftrain.distributed import progress


def test_a_line_is_logged_at_most_once_an_interval(caplog, monkeypatch):
    clock = iter([0.0, 10.0, 31.0, 40.0, 65.0, 100.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, "jax_selftrain"), progress.progress_bar("training", 110, 10) as show:
        for completed in (10, 41, 50, 75, 110):
            show(completed, f"loss {completed} ")
    assert caplog.messages == [
        "training: 41 of 110, loss 41, 0:01:09 left",  # 31 in 31 seconds, 69 to go
        "training: 75 of 110, loss 75, 0:00:35 left",
        "training: 110 of 110, loss 110, 0:00:00 left",
    ]


def test_a_command_logs_what_it_does_and_a_program_of_the_user_is_silent(tiny_model, tmp_path, capsys):
    model = tiny_model("llama")
    words = ["--model", model, "--samples", 4, "--max-tokens", 8]
    done = run_command("sample", *words, "--out", tmp_path / "corpus")
    line = (
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d sampling from .*llama.* parameters\), 4 samples of at most 8 tokens, on 1 × "
    )
    assert re.search(line, done.stderr)
    assert done.stderr.count("sampling from") == 1
    assert done.returncode == 0
