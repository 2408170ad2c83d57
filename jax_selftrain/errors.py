"""The few ways a command can end early, each with its exit code (DESIGN: exit codes).

Everything a user can mend is an `InputError` whose message is one sentence: what is wrong, where, and what to
do. Anything else that escapes is a defect of ours and keeps its traceback (exit code 1).
"""


class SelftrainError(Exception):
    """Base of the errors that the command line turns into one line and an exit code."""

    exit_code = 1
    shows_local_paths = False
    """Whether its sentence is about folders of this machine, where otherwise addresses in object storage stand."""


class InputError(SelftrainError):
    """The user's input cannot be used: bad flag, missing or damaged file, impossible combination. Exit code 2."""

    exit_code = 2


class UnavailableError(SelftrainError):
    """A peer was lost or a resource is temporarily gone; the same command may be run again. Exit code 75."""

    exit_code = 75


class Preempted(SelftrainError):
    """A clean stop on SIGTERM, after saving what there was to save. Exit code 143."""

    exit_code = 143
