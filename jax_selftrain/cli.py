"""The command line: parse, call one function, print. Nothing here knows what a stage does.

A command is a dataclass of `jax_selftrain.config` and the function it is handed to, which is imported only once the
command is known. tyro turns the dataclass into flags and help; the words of a flag become a value by the rules of
`jax_selftrain.settings`, the same as in a YAML file, so that both complain in the same one sentence.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import logging
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

from jax_selftrain import config
from jax_selftrain.config import yaml_io
from jax_selftrain.distributed import DistributedConfig, current, distributed_context, hard_exit, live_processes
from jax_selftrain.errors import InputError, SelftrainError
from jax_selftrain.io.import_guard import mark_cli_process
from jax_selftrain.io.remote_paths import restore_uris
from jax_selftrain.remote import download, localize_uris
from jax_selftrain.version import __version__


@dataclasses.dataclass(frozen=True)
class Command:
    config_class: type
    """The dataclass that holds its flags."""
    function: str
    """`module:name` of what it calls."""
    required: tuple[str, ...] = ()
    positionals: tuple[tuple[str, str], ...] = ()
    """(name shown, field) of what may be given without a flag, in order."""


COMMANDS: dict[str, Command] = {
    "demo": Command(config.DemoConfig, "jax_selftrain.experiments.microworld:demo", ("out",)),
    "convert": Command(
        config.ConvertConfig, "jax_selftrain.hub:convert", ("source", "out"), (("SRC", "source"), ("DST", "out"))
    ),
    "import": Command(
        config.ImportCorpusConfig, "jax_selftrain.corpus:import_text", ("source", "model", "out"), (("SRC", "source"),)
    ),
    "export": Command(
        config.ExportConfig,
        "jax_selftrain.corpus:export_corpus",
        ("corpus", "out"),
        (("CORPUS", "corpus"), ("DST", "out")),
    ),
    "sample": Command(config.SampleConfig, "jax_selftrain.sampling:sample", ("model", "out")),
    "train": Command(config.TrainConfig, "jax_selftrain.study:train_with_evals", ("model", "corpus", "out")),
    "merge": Command(config.MergeConfig, "jax_selftrain.hub:merge", ("base", "student", "weight", "out")),
    "score": Command(config.ScoreConfig, "jax_selftrain.evals:score", ("model", "out")),
    "compare": Command(
        config.CompareConfig,
        "jax_selftrain.study:compare",
        ("base", "student", "out"),
        (("BASE.json", "base"), ("STUDENT.json", "student")),
    ),
    "extract": Command(config.ExtractConfig, "jax_selftrain.evals:extract", ("model", "sequences", "out")),
    "leakage": Command(config.LeakageConfig, "jax_selftrain.evals:leakage", ("corpus", "texts", "out")),
    "run": Command(config.RunConfig, "jax_selftrain.study:run", ("model", "out")),
    "study": Command(config.StudyConfig, "jax_selftrain.study:run_study", ("out",)),
    "plan": Command(config.PlanConfig, "jax_selftrain.planning:plan_memory", ("model", "topology")),
    "report": Command(config.ReportConfig, "jax_selftrain.report:write_report", ("folder",), (("DIR", "folder"),)),
}

DISTRIBUTED_COMMANDS = ("convert", "sample", "train", "merge", "score", "extract", "run")
"""Commands that several processes can do together: they take the flags of `ProcessesConfig`, too."""

_INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C
_HELP = frozenset({"-h", "--help"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0, 2, 75, 130, 143). A defect of ours keeps its traceback."""
    if argv is None:
        mark_cli_process()
    code = _main(list(sys.argv[1:] if argv is None else argv))
    hard_exit(code)
    if argv is None:
        gc.freeze()  # or the interpreter would search all that was ever imported for garbage before it ends
    return code


def _main(argv: list[str]) -> int:
    program = "jax-selftrain"
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the traceback of an error that it also raises
    try:
        if not argv or argv[0] in _HELP:
            print(_overview(), file=sys.stdout if argv else sys.stderr)
            return 0 if argv else InputError.exit_code
        if argv[0] == "--version":
            print(f"jax-selftrain {__version__}")
            return 0
        if argv[0] not in COMMANDS:
            hint = yaml_io.did_you_mean(argv[0], COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
            raise InputError(f"unknown command `{argv[0]}`{hint}")
        name = argv[0]
        program = f"jax-selftrain {name}"
        options, processes = parse_all(name, argv[1:])
        _enable_compilation_cache()
        module, function = COMMANDS[name].function.split(":")
        with ExitStack() as stack:
            if name in DISTRIBUTED_COMMANDS:
                stack.enter_context(distributed_context(processes, program=program))
            options = stack.enter_context(localize_uris(options, exclusive=current() is None))
            result = getattr(import_module(module), function)(options.folder if name == "report" else options)
            said = restore_uris(summary(name, options, result)) if _is_first_process() else ""
        if said:
            print(said)
        return 0
    except SelftrainError as error:
        said = " ".join(str(error).split())
        print(f"{program}: error: {said if error.shows_local_paths else restore_uris(said)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _enable_compilation_cache() -> None:
    """Keep what XLA compiles in the user's cache folder, unless JAX's own variables say otherwise.

    Programs are compiled for the processor at hand, and a home may be shared by several kinds: each has a folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "jax_selftrain" / f"compiled-{_cpu_model()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a home that cannot be written to: compile each time
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2 << 30))


def _cpu_model() -> str:
    """A name for the processor's kind and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kind = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join([platform.machine(), *kind]).encode()).hexdigest()[:8]


def parse(name: str, words: Sequence[str]) -> Any:
    """The options of command `name`; see `parse_all`."""
    return parse_all(name, words)[0]


def parse_all(name: str, words: Sequence[str]) -> tuple[Any, DistributedConfig]:
    """The options of command `name` – the defaults, under the file that `--config` names, under the flags – and the
    flags about several processes, which are of this start alone and so stand in no file.

    Prints the help and raises SystemExit(0) for `--help`. Raises InputError for whatever cannot be understood and
    for required options that are missing.
    """
    import tyro

    command = COMMANDS[name]
    file, words = _pop_config_flag(words)
    shared = (
        {leaf.flag: leaf for leaf in yaml_io.iter_fields(DistributedConfig)} if name in DISTRIBUTED_COMMANDS else {}
    )
    if _HELP.isdisjoint(words):
        _check_flags(words, {leaf.flag: leaf for leaf in yaml_io.iter_fields(command.config_class)} | shared)
    processes, words = _pop_distributed_flags(words, shared)
    base = (
        yaml_io.load(command.config_class, download(file) if "://" in file else file)
        if file
        else command.config_class()
    )
    view = _help_rows(command.config_class, command.required, shared=name in DISTRIBUTED_COMMANDS)
    usage = " ".join(["jax-selftrain", name, *(f"[{shown}]" for shown, _ in command.positionals)])
    given, bare = tyro.cli(view, prog=usage, args=words, default=_cast_strings(base, view), return_unknown_args=True)
    options = _cast_strings(given, command.config_class)
    options = dataclasses.replace(options, **_positionals(command, bare, words))
    yaml_io.require(options, *command.required)
    return options, processes


def summary(name: str, options: Any, result: Any) -> str:
    """What a person wants to know when a command is done, in a few lines."""
    if name in ("sample", "import"):
        return f"{options.out}: {len(result):,} documents, {result.manifest['tokens']:,} tokens"
    if name == "train":
        return f"model: {Path(result) / 'model'}"
    if name == "score":
        measured = {**result.get("tasks", {}), **result.get("groups", {}), **result.get("texts", {})}
        return "\n".join(
            [*(_measure(label, numbers) for label, numbers in measured.items()), f"written: {options.out}"]
        )
    if name == "compare":
        from jax_selftrain.report import comparison_table

        return "\n".join([comparison_table(result), f"written: {options.out}"])
    if name == "extract":
        shown = ("n", "exact_match", "exact_match_stderr", "token_accuracy", "token_accuracy_stderr")
        groups = ("held_out", "partial", "seen", "controls", "baseline")
        parts = {"all": result, **{part: result[part] for part in groups if part in result}}
        lines = [_measure(part, {key: numbers.get(key) for key in shown}) for part, numbers in parts.items()]
        return "\n".join([*lines, f"written: {options.out}"])
    if name == "leakage":
        shown = ("samples", "leaking", "leaking_stderr", "longest", "covered")
        return "\n".join([_measure("all", {key: result[key] for key in shown}), f"written: {options.out}"])
    if name == "plan":
        from jax_selftrain.planning import table

        return "\n".join([table(result), *([f"written: {options.out}"] if options.out else [])])
    if name == "study" and options.dry_run:
        return f"nothing was done; without --dry-run true, the study goes to {options.out}"
    if name in ("demo", "run", "study", "report"):
        return f"report: {Path(options.folder if name == 'report' else options.out) / 'report.html'}"
    return f"written: {result}"


def _measure(label: str, numbers: Mapping[str, Any]) -> str:
    shown = []
    for key, value in numbers.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and not key.endswith("_stderr"):
            error = numbers.get(f"{key}_stderr")
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
            shown.append(f"{key} {text}" + (f" ± {error:.2g}" if isinstance(error, float) else ""))
    return f"{label:<24} {'   '.join(shown)}"


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [
        f"  {name:<{width}}{(command.config_class.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: jax-selftrain COMMAND [options]",
            "",
            "Can a language model get better by training on text it sampled from itself, and whose text?",
            "",
            "commands:",
            *lines,
            "",
            "`jax-selftrain COMMAND --help` lists the options; each may also stand in a YAML file given by --config.",
        ]
    )


def _is_first_process() -> bool:
    jax = sys.modules.get("jax")
    # Asking for the process index would start the devices, which a command without a model has no need of.
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == live_processes()[0]


# ---------------------------------------------------------------- words


def _pop_config_flag(words: Sequence[str]) -> tuple[str, list[str]]:
    """(the file named by `--config` or "", the other words)."""
    file, rest, pending = "", [], False
    for word in words:
        if pending or word.startswith("--config="):
            file, pending = word.removeprefix("--config="), False
            if not file or (word.startswith("-") and not word.startswith("--config=")):
                raise InputError("--config needs a value: the YAML file to read")
        elif word == "--config":
            if file:
                raise InputError("--config is given twice; one file holds all options")
            pending = True
        else:
            rest.append(word)
    if pending:
        raise InputError("--config needs a value: the YAML file to read")
    return file, rest


def _pop_distributed_flags(
    words: Sequence[str], config_fields: Mapping[str, yaml_io.Field]
) -> tuple[DistributedConfig, list[str]]:
    """(the flags about several processes, the other words)."""
    found: dict[str, Any] = {}
    rest: list[str] = []
    values = iter(words)
    for word in values:
        flag, equals, value = word.partition("=")
        leaf = config_fields.get(flag.replace("_", "-"))
        if leaf is None:
            rest.append(word)
        else:
            found[leaf.path[0]] = _parse(leaf, [value if equals else next(values, "")])
    return DistributedConfig(**found), rest


def _check_flags(words: Sequence[str], leaves: Mapping[str, yaml_io.Field]) -> None:
    """Refuse unknown flags, flags given twice and flags without their value, in one sentence each."""
    seen: set[str] = set()
    waiting = ""
    for word in [*words, "--"]:
        if word.startswith("-") and word != "-" and not re.match(r"-\.?\d", word):
            if waiting:
                raise InputError(f"{waiting} needs a value: {yaml_io.type_name(leaves[waiting].type)}")
            if word == "--":
                return
            flag, equals, _ = word.partition("=")
            flag = flag.replace("_", "-")
            if flag not in leaves:
                raise InputError(
                    f"unknown option `{flag}`{yaml_io.did_you_mean(flag, leaves) or '; --help lists them all'}"
                )
            if flag in seen:
                several = "; give it all its values at once" if leaves[flag].is_sequence else ""
                raise InputError(f"{flag} is given twice{several}")
            seen.add(flag)
            waiting = "" if equals or leaves[flag].is_sequence else flag
        else:
            waiting = ""


def _positionals(command: Command, bare: Sequence[str], words: Sequence[str]) -> dict[str, Any]:
    if len(bare) > len(command.positionals):
        raise InputError(f"unexpected argument `{bare[len(command.positionals)]}`; options start with `--`")
    named = {word.partition("=")[0].replace("_", "-") for word in words}
    values = {}
    for (shown, field), word in zip(command.positionals, bare, strict=False):
        if yaml_io.flag(field) in named:
            raise InputError(f"{shown} is given twice, as `{word}` and with {yaml_io.flag(field)}")
        values[field] = yaml_io.parse(get_type_hints(command.config_class)[field], [word], where=shown)
    return values


# ---------------------------------------------------------------- what tyro is shown


def _help_rows(options: type, required: Sequence[str], prefix: tuple[str, ...] = (), *, shared: bool = False) -> type:
    """The dataclass as tyro is to see it: a subclass, for its docstrings, whose every leaf is parsed by `settings`;
    with the flags about several processes where they are `shared`."""
    from tyro.conf import FlagConversionOff, arg
    from tyro.constructors import PrimitiveConstructorSpec

    bases = (options, DistributedConfig) if shared else (options,)
    hints = {name: tp for base in bases for name, tp in get_type_hints(base).items()}
    fields: list[tuple[str, Any, Any]] = []
    for field in (field for base in bases for field in dataclasses.fields(base)):
        path, tp = (*prefix, field.name), hints[field.name]
        if dataclasses.is_dataclass(tp):
            section = _help_rows(cast(type, tp), (), path)
            fields.append((field.name, section, dataclasses.field(default_factory=section)))
            continue
        leaf = yaml_io.Field(path, tp, field.default)
        spec: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
            nargs="*" if leaf.is_sequence else 1,
            metavar=_metavar(tp),
            instance_from_str=partial(_parse, leaf),
            is_instance=lambda value: True,
            str_from_instance=_format_default,
        )
        note = arg(help_behavior_hint=partial(_hint, required=field.name in required))
        fields.append((field.name, Annotated[tp, spec, FlagConversionOff, note], field))
    if not prefix:
        note = arg(metavar="FILE.yaml", help="Read options from this file; flags win over it.", help_behavior_hint="")
        fields.append(("config", Annotated[str, note], ""))
    return dataclasses.make_dataclass(
        options.__name__, fields, bases=bases, frozen=True, namespace={"__doc__": options.__doc__}
    )


def _cast_strings(value: Any, cls: Any) -> Any:
    """The same settings as an instance of `cls`, from a dataclass to its view or back."""
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if hasattr(value, field.name)]
    parts = {name: getattr(value, name) for name in names}
    return cls(
        **{
            name: _cast_strings(part, hints[name]) if dataclasses.is_dataclass(part) else part
            for name, part in parts.items()
        }
    )


def _parse(leaf: yaml_io.Field, words: list[str]) -> Any:
    return yaml_io.parse(leaf.type, words, where=leaf.flag)


def _format_default(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, tuple) else [str(value)]


def _hint(default: str, *, required: bool) -> str:
    if default in ("''", "", "None", "()"):
        return "(required)" if required else "(default: unset)"
    return f"(default: {default})"


def _metavar(tp: Any) -> str:
    """What stands for a value in the help: `INT`, `{flax,hf}`, `[TEXT ...]`."""
    inner = next((arg for arg in get_args(tp) if arg is not type(None)), tp) if type(None) in get_args(tp) else tp
    if get_origin(inner) is Literal:
        return "{" + ",".join(map(str, get_args(inner))) + "}"
    if get_origin(inner) is tuple:
        return f"[{_metavar(get_args(inner)[0])} ...]"
    return {int: "INT", float: "FLOAT", bool: "{true,false}"}.get(inner, "TEXT")
