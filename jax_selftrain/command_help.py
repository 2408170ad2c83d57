"""The help of the commands and shell completion, which tyro writes."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal, Union, get_type_hints

from jax_selftrain import config
from jax_selftrain.command_table import COMMANDS, CONFIG_FILE, DISTRIBUTED_COMMANDS, LOG_LEVEL
from jax_selftrain.config.metadata import Role, fields_with_role, roles
from jax_selftrain.distributed.cluster import DistributedConfig
from jax_selftrain.errors import InputError

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
COMPLETION = "--tyro-print-completion"
"""tyro's flag that prints a completion script, with the name of a shell."""
_SHELLS = ("bash", "zsh", "fish", "tcsh")


def overview() -> str:
    summaries = {name: (command.config_class.__doc__ or "").splitlines()[0] for name, command in COMMANDS.items()}
    lines = "\n".join(f"  {name:<{max(map(len, COMMANDS)) + 2}}{text}" for name, text in summaries.items())
    return (
        "usage: jax-selftrain COMMAND [options]\n\n"
        "Can a language model improve from text that it samples from itself, or from text of another model?\n\n"
        f"commands:\n{lines}\n\n"
        "`jax-selftrain COMMAND --help` lists the options; a YAML file given by --config can set each of them.\n"
        f"`jax-selftrain {COMPLETION} bash` prints a completion script; so for zsh, fish and tcsh."
    )


_HELP_GROUPS = {
    Role.EVALUATION: "Evaluation during training.",
    Role.EXECUTION: "Speed, memory and bookkeeping; the result is the same, except for rounding.",
}


def print_help(name: str, options: Any) -> None:
    """Print the options, an example and the page of the documentation; exit."""
    import tyro

    command = COMMANDS[name]
    usage = " ".join(["jax-selftrain", name, *(f"[{shown}]" for shown in command.positionals)])
    try:
        tyro.cli(_make_view(name, options), prog=usage, args=["--help"])
    finally:  # tyro exits
        print(f"\nexample: jax-selftrain {name} {command.example}\ndocumentation: {command.page}")


def print_completion(words: Sequence[str]) -> None:
    """Print the completion script of a shell, and exit."""
    import tyro

    conf: Any = tyro.conf
    if len(words) != 2 or words[1] not in _SHELLS:
        raise InputError(f"{COMPLETION} needs the name of a shell: {', '.join(_SHELLS)}")
    views = [
        Annotated[_make_view(name, command.config_class()), conf.subcommand(name, prefix_name=False)]
        for name, command in COMMANDS.items()
    ]
    union: Any = Union  # of a tuple that is made here
    tyro.cli(union[tuple(views)], prog="jax-selftrain", args=words)


def _make_view(name: str, options: Any) -> Any:
    """Return a class for tyro with the options, grouped by role."""
    import tyro

    conf: Any = tyro.conf
    cls: Any = type(options)
    main, views = set(roles(cls)), {}
    if not any(map(dataclasses.is_dataclass, get_type_hints(cls).values())):
        for role, doc in _HELP_GROUPS.items():
            if members := set(fields_with_role(cls, role)):
                main -= members
                views[str(role.name).lower()] = _select_fields(options, members, doc)
    if name in DISTRIBUTED_COMMANDS:
        views["distributed"] = _select_fields(DistributedConfig(), set(roles(DistributedConfig)), "Several processes.")
    note = conf.arg(metavar="FILE.yaml", help="Read options from this file; flags override it.", help_behavior_hint="")
    level = conf.arg(help="Messages to write to standard error, of this level and above.")
    extra: list[tuple[str, Any, Any]] = [
        (CONFIG_FILE, Annotated[str, note], ""),
        (LOG_LEVEL, Annotated[LogLevel, level], "INFO"),
    ]
    for title, view in views.items():
        extra.append((title, conf.OmitArgPrefixes[view], dataclasses.field(default_factory=view)))
    return _select_fields(options, main, cls.__doc__ or "", extra)


def _select_fields(options: Any, names: set[str], doc: str, extra: Sequence[tuple[str, Any, Any]] = ()) -> Any:
    """Return a subclass for tyro, with defaults from `options`.

    Its help shows only the named fields.
    """
    import tyro

    conf: Any = tyro.conf
    cls: Any = type(options)
    fields = []
    for name, hint in get_type_hints(cls).items():
        default = partial(getattr, options, name)
        if name not in names:
            shown = conf.Suppress[conf.Fixed[hint]]
        elif dataclasses.is_dataclass(hint):
            section: Any = hint
            hidden = set(fields_with_role(section, Role.SET_BY_STUDY))
            if not issubclass(cls, config.StudyConfig):  # a run has the seeds and special tokens of its stages
                hidden &= set(fields_with_role(section, Role.INPUT | Role.OUTPUT))
            shown = default = _select_fields(default(), set(roles(section)) - hidden, name)
        else:
            is_required = Role.REQUIRED in roles(cls)[name]
            shown = Annotated[hint, conf.arg(help_behavior_hint=partial(_default_hint, required=is_required))]
        fields.append((name, shown, dataclasses.field(default_factory=default)))
    namespace = {"__doc__": doc}
    return dataclasses.make_dataclass(cls.__name__, [*fields, *extra], bases=(cls,), frozen=True, namespace=namespace)


def _default_hint(default: str, *, required: bool) -> str:
    if default in ("''", "", "None", "()"):
        return "(required)" if required else "(default: unset)"
    return f"(default: {default})"
