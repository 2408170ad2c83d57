"""The command line: parse options, call one function, print a summary.

A command is a dataclass of `jax_selftrain.config` and a function, which is imported when its command is called.
Values of flags are converted as in a YAML file (`config.yaml_io`), with the same error sentences. tyro writes the help.
"""

import dataclasses
import gc
import logging
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from jax_selftrain.command_help import COMPLETION, LogLevel, overview, print_completion, print_help
from jax_selftrain.command_table import COMMANDS as COMMANDS
from jax_selftrain.command_table import CONFIG_FILE as CONFIG_FILE
from jax_selftrain.command_table import DISTRIBUTED_COMMANDS as DISTRIBUTED_COMMANDS
from jax_selftrain.command_table import LOG_LEVEL
from jax_selftrain.config import yaml_io
from jax_selftrain.console import configure_log, escape_controls, is_stdout_closed
from jax_selftrain.distributed import peers, sync
from jax_selftrain.distributed.cluster import DistributedConfig
from jax_selftrain.errors import InputError, SelftrainError, library_panics_as_input_errors
from jax_selftrain.io.compilation_cache import enable_compilation_cache
from jax_selftrain.io.import_guard import mark_cli_process
from jax_selftrain.io.lease import wait_for_lease
from jax_selftrain.io.remote_paths import restore_uris
from jax_selftrain.remote import download, localize_uris
from jax_selftrain.version import __version__

_INTERRUPTED = 130  # the exit code of a shell for a program ended by Ctrl-C
_HELP = frozenset({"-h", "--help"})
_ALIASES = {
    **dict.fromkeys(("m", "model-name-or-path"), "model"),
    **dict.fromkeys(("o", "output", "output-dir"), "out"),
    **dict.fromkeys(("c", "cfg"), "config"),
    **dict.fromkeys(("lr", "learningrate"), "learning-rate"),
    **dict.fromkeys(("bs", "b", "batch", "batchsize"), "batch-size"),
    **dict.fromkeys(("epoch", "num-epochs", "num-train-epochs"), "epochs"),
    **dict.fromkeys(("max-steps", "num-steps"), "steps"),
    **dict.fromkeys(("n", "num-samples"), "samples"),
    **dict.fromkeys(("t", "temp"), "temperature"),
    **dict.fromkeys(("max-new-tokens", "max-length"), "max-tokens"),
    **dict.fromkeys(("max-seq-length", "block-size"), "seq-len"),
    "wd": "weight-decay",
}
"""Names of options in other programs, for hints."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    An unexpected exception keeps its traceback.
    """
    if argv is None:
        mark_cli_process()
        configure_log()
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        if not is_stdout_closed():
            raise
        code = 128 + signal.SIGPIPE  # as a shell says of a program whose reader has ended
    sync.hard_exit(code)
    if argv is None:
        gc.freeze()  # the final garbage collection over all imported modules takes long
    return code


def _main(argv: list[str]) -> int:
    program, options = "jax-selftrain", None
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the traceback of an error that it also raises
    try:
        if argv[:1] == ["help"]:
            argv = [*argv[1:], "--help"]
        if not argv or argv[0] in _HELP:
            print(overview(), file=sys.stdout if argv else sys.stderr)
            return 0 if argv else InputError.exit_code
        if argv[0] == "--version":
            print(f"jax-selftrain {__version__}")
            return 0
        if argv[0] == COMPLETION:
            print_completion(argv)
        if argv[0] not in COMMANDS:
            hint = yaml_io.did_you_mean(argv[0], COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
            raise InputError(f"unknown command `{argv[0]}`{hint}")
        name = argv[0]
        program = f"jax-selftrain {name}"
        options, processes = parse_command_line(name, argv[1:])
        logging.getLogger("jax_selftrain").debug("%s", options)
        enable_compilation_cache()
        module, function = COMMANDS[name].function.split(":")
        with ExitStack() as stack:
            if name in DISTRIBUTED_COMMANDS:
                stack.enter_context(sync.distributed_context(processes, program=program))
            options = stack.enter_context(localize_uris(options, exclusive=peers.current() is None))
            with library_panics_as_input_errors("the tokenizer cannot read a text"):
                result = getattr(import_module(module), function)(options.folder if name == "report" else options)
            if name in ("run", "study") and not getattr(options, "dry_run", False) and _is_first_process():
                with wait_for_lease(Path(options.out) / ".report.lease"):  # processes that share the folder
                    import_module("jax_selftrain.report").write_report(options.out)
            text = restore_uris(summary(name, options, result)) if _is_first_process() else ""
        if text:
            print(escape_controls(text))
        return 0
    except SelftrainError as error:
        text = " ".join(str(error).split())
        text = escape_controls(text if error.shows_local_paths else restore_uris(text))
        print(f"{program}: error: {text}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if not _is_about(error, getattr(options, "out", "")):
            raise
        name = escape_controls(str(error.filename))
        print(f"{program}: error: {name}: cannot be written ({error.strerror})", file=sys.stderr)
        return InputError.exit_code
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _is_about(error: OSError, out: str) -> bool:
    """Return True if an error names the output or its parents."""
    path = Path(str(error.filename or ""))
    return bool(out and error.filename) and (path.is_relative_to(out) or Path(out).is_relative_to(path))


def _is_first_process() -> bool:
    jax = sys.modules.get("jax")
    # `process_index` starts the devices, so a command without a model does not call it.
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == sync.live_processes()[0]


# ---------------------------------------------------------------- options


def parse_command_line(name: str, words: Sequence[str]) -> tuple[Any, DistributedConfig]:
    """Parse the words after a command's name.

    Flags override the file that `--config` names, which overrides the defaults. The options of several processes are
    not part of a file.

    Returns:
      (an instance of the command's configuration class, the options of several processes).

    Raises:
      InputError: a word cannot be parsed, or a required option is missing.
      SystemExit: `--help` was given; the help is printed.
    """
    command = COMMANDS[name]
    shared = yaml_io.option_types(DistributedConfig) if name in DISTRIBUTED_COMMANDS else {}
    own = {key: tp for key, tp in yaml_io.option_types(command.config_class).items() if not yaml_io.has_sections(tp)}
    types = {**own, **shared, CONFIG_FILE: str, LOG_LEVEL: LogLevel}
    needs_help = not _HELP.isdisjoint(words)
    values = _parse_words([word for word in words if word not in _HELP], types, command.positionals)
    options, processes = command.config_class(), DistributedConfig()
    if level := values.pop(LOG_LEVEL, ""):
        logging.getLogger("jax_selftrain").setLevel(level)
    if file := values.pop(CONFIG_FILE, ""):
        options = yaml_io.load(command.config_class, download(file) if "://" in file else file)
    for key, value in values.items():
        if key in shared:
            processes = _replace(processes, key.split("."), value)
        else:
            options = _replace(options, key.split("."), value)
    if needs_help:
        print_help(name, options)
    yaml_io.require(options)
    return options, processes


def _parse_words(words: Sequence[str], types: Mapping[str, Any], positionals: Mapping[str, str]) -> dict[str, Any]:
    """Convert the words after a command to values of options.

    tyro does not parse them: it silently keeps the last of two equal flags, and its errors are not sentences.
    """
    flags = {yaml_io.flag(name): (name, True) for name in types}
    flags |= {yaml_io.negated_flag(name): (name, False) for name, tp in types.items() if tp is bool}
    given: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    bare: list[str] = []
    name = ""
    for word in words:
        if word.startswith("-") and word != "-" and not re.match(r"-\.?\d", word):
            flag, equals, value = word.partition("=")
            flag = flag.replace("_", "-")
            if flag not in flags:
                alias = _ALIASES.get(flag.lstrip("-"), "")
                meant = next((known for known in flags if alias and known.endswith(("-" + alias, "." + alias))), "")
                hint = f"; did you mean `{meant}`?" if meant else yaml_io.did_you_mean(flag, flags)
                hint = hint or "; --help lists all options"
                raise InputError(f"unknown option `{flag}`{hint}")
            name, is_true = flags[flag]
            if name in given:
                hint = "; give it all its values at once" if yaml_io.is_sequence(types[name]) else ""
                raise InputError(f"{yaml_io.flag(name)} is given twice{hint}")
            given[name], values[name] = [value] if equals else [], is_true
        elif name and _takes_word(types[name], given[name], word):
            given[name].append(word)
        else:
            name = ""
            bare.append(word)
    for word, (shown, name) in zip(bare, positionals.items(), strict=False):
        if name in given:
            raise InputError(f"{shown} is given twice, as `{word}` and with {yaml_io.flag(name)}")
        given[name] = [word]
    if len(bare) > len(positionals):
        raise InputError(f"unexpected argument `{bare[len(positionals)]}`; options start with `--`")
    for name, strings in given.items():
        flag = yaml_io.flag(name)
        if types[name] is not bool:
            if not strings:
                raise InputError(f"{flag} needs a value: {yaml_io.type_name(types[name])}")
            values[name] = yaml_io.parse_value(types[name], strings, where=flag)
        elif strings:
            negation = yaml_io.negated_flag(name)
            raise InputError(f"{flag} takes no value, found `{strings[0]}`; write {flag} or {negation}")
    return values


def _takes_word(tp: Any, given: Sequence[str], word: str) -> bool:
    if tp is bool:
        return word.lower() in ("true", "false")  # an error
    return yaml_io.is_sequence(tp) or not given


def _replace(options: Any, path: Sequence[str], value: Any) -> Any:
    name, *rest = path
    return dataclasses.replace(options, **{name: _replace(getattr(options, name), rest, value) if rest else value})


# ---------------------------------------------------------------- summaries


def summary(name: str, options: Any, result: Any) -> str:
    """Summarize the result of a command in a few lines."""
    if name in ("sample", "import", "subset"):
        return f"{options.out}: {len(result):,} documents, {result.manifest['tokens']:,} tokens"
    if name == "configs":
        return str(result)
    if name == "train":
        return f"model: {Path(result) / 'model'}"
    if name == "study" and options.dry_run:
        return f"nothing was run; without --dry-run, the study is written to {options.out}"
    if name in ("demo", "run", "study", "report"):
        folder = Path(options.folder if name == "report" else options.out)
        results = import_module("jax_selftrain.study.results").load_results(folder / "results.json")
        effects = import_module("jax_selftrain.report").format_effects(results)
        return f"{effects}\nreport: {folder / 'report.html'}"
    if name in ("compare", "plan"):
        package, function = {"compare": ("report", "format_comparison"), "plan": ("planning", "table")}[name]
        lines = [getattr(import_module(f"jax_selftrain.{package}"), function)(result)]
    elif name == "score":
        sections = [result.get(part, {}) for part in ("tasks", "groups", "texts")]
        lines = [_format_metrics(label, numbers) for section in sections for label, numbers in section.items()]
    elif name == "extract":
        shown = ("n", "exact_match", "exact_match_stderr", "token_accuracy", "token_accuracy_stderr")
        groups = ("held_out", "partial", "seen", "controls", "baseline")
        parts = {"all": result, **{part: result[part] for part in groups if part in result}}
        lines = [_format_metrics(part, {key: numbers.get(key) for key in shown}) for part, numbers in parts.items()]
    elif name == "extract-windows":
        parts = {"all": result, **result["texts"], **({"base": result["base"]} if "base" in result else {})}
        means = ("n", "pz", "pz_stderr", "logprob", "logprob_stderr", "exact_match", "exact_match_stderr")
        lines = [_format_metrics(part, {key: numbers.get(key) for key in means}) for part, numbers in parts.items()]
    elif name == "decontaminate":
        lines = [import_module("jax_selftrain.evals.decontamination").describe_report(result)]
    elif name == "leakage":
        shown = ("samples", "leak_rate", "leak_rate_stderr", "longest", "coverage")
        lines = [_format_metrics("all", {key: result[key] for key in shown})]
    elif name == "membership":
        lines = [_format_metrics(label, numbers) for label, numbers in result["scores"].items()]
    elif name == "token-gap":
        classes = {f"{part} {label}": row for part, rows in result["sets"].items() for label, row in rows.items()}
        lines = [_format_metrics(label, numbers) for label, numbers in classes.items()]
    else:
        return f"written: {result}"
    return "\n".join([*lines, *([f"written: {options.out}"] if options.out else [])])


def _format_metrics(label: str, numbers: Mapping[str, Any]) -> str:
    shown = []
    for key, value in numbers.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and not key.endswith("_stderr"):
            error = numbers.get(f"{key}_stderr")
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
            shown.append(f"{key} {text}" + (f" ± {error:.2g}" if isinstance(error, float) else ""))
    return f"{label:<24} {'   '.join(shown)}"
