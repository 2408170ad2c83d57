"""What a process that runs one command and nothing else may leave out.

No command of ours has a use for torch, but transformers and tensorboardX take it along where it is installed, which is
most of what starting a command costs. What found no torch will not find it later: in a user's own program it is let in,
and where lm-evaluation-harness has been loaded, whose tasks run code that is not ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_IS_CLI_PROCESS = False


def mark_cli_process() -> None:
    """Say that nothing but a command will ever run in this process."""
    global _IS_CLI_PROCESS
    _IS_CLI_PROCESS = True
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that it found no torch


@contextmanager
def block_torch_import() -> Iterator[None]:
    """Inside, torch cannot be imported, unless it has a use in this process or has been imported already."""
    if not _IS_CLI_PROCESS or {"torch", "lm_eval"} & sys.modules.keys():
        yield
        return
    # The import system's own way to say that there is no such module: whoever asks or imports takes it for an answer.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
