"""Exceptions with an exit code.

An error that the user can correct is an `InputError`; its message is one sentence: what is wrong, where, and what to
do. Any other exception is a bug and keeps its traceback (exit code 1).
"""

from collections.abc import Iterator
from contextlib import contextmanager


class SelftrainError(Exception):
    """Base of the exceptions that the command line reports in one line."""

    exit_code = 1
    shows_local_paths = False
    """If True, local copies of objects in object storage are not replaced by their URIs in the message."""


class InputError(SelftrainError):
    """Invalid flag, missing or damaged file, or impossible combination; exit code 2."""

    exit_code = 2


class UnavailableError(SelftrainError):
    """Peer lost or resource temporarily unavailable; repeat the command. Exit code 75."""

    exit_code = 75


class Preempted(SelftrainError):
    """Clean stop on SIGTERM, with all work saved; exit code 143."""

    exit_code = 143


@contextmanager
def library_errors_as_input_errors(problem: str, remedy: str = "") -> Iterator[None]:
    """Turn what a library raises about a foreign file into an InputError.

    Libraries raise nearly anything for a damaged file. Only calls that read such a file belong inside.
    """
    try:
        with library_panics_as_input_errors(problem):
            yield
    except SelftrainError:
        raise
    except Exception as error:
        raise InputError(f"{problem} ({summarize_error(error)})" + (remedy and f"; {remedy}")) from error


@contextmanager
def library_panics_as_input_errors(problem: str) -> Iterator[None]:
    """Turn a panic of Rust code (no `Exception`) into an InputError.

    The tokenizers library panics on some texts, for instance when a regular expression backtracks without end.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{problem} ({summarize_error(error)})") from error


def summarize_error(error: BaseException) -> str:
    """Return type and message of an exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:300]
