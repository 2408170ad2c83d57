"""Standard output and error of a command: log and escapes."""

import logging
import os
import re
import sys


def configure_log() -> None:
    """Write the package's log to standard error, with times."""
    handler, log = logging.StreamHandler(), logging.getLogger("jax_selftrain")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    handler.addFilter(_escape_record)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # other packages add handlers to the root


def escape_controls(text: str) -> str:
    """Escape characters of names and files that a terminal obeys."""
    return re.sub(
        r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
        lambda match: match[0].encode("unicode_escape").decode(),
        text,
    )


def is_stdout_closed() -> bool:
    """Return True, and discard what follows, if standard output has no reader."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _escape_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = escape_controls(record.getMessage()), ()
    return True
