"""Import guard that keeps torch out of command-line processes.

Our commands do not use torch, but transformers and tensorboardX import it if it is installed, which takes most of the
start-up time. Libraries remember that torch is absent, so the guard is off in a user's own program and once
lm-evaluation-harness is loaded, since its tasks may use torch.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_IS_CLI_PROCESS = False


def mark_cli_process() -> None:
    """Declare that this process runs one command and nothing else."""
    global _IS_CLI_PROCESS
    _IS_CLI_PROCESS = True
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # transformers warns that torch is absent


@contextmanager
def block_torch_import() -> Iterator[None]:
    """Block imports of torch if this process does not need it."""
    if not _IS_CLI_PROCESS or {"torch", "lm_eval"} & sys.modules.keys():
        yield
        return
    # None in `sys.modules` makes an import raise ModuleNotFoundError.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
