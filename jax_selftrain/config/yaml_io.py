"""Strict conversion between YAML files and frozen dataclasses.

The annotations of a dataclass are the schema. Unknown keys, duplicate keys and values of a wrong type are errors with
their position and the nearest valid key. YAML 1.1 reads `1e-4` as text (here: a number, if the field is a number) and
`no` as a boolean (here: an error, if the field is text). `${NAME}` in a value is replaced by an environment variable;
`$${` is a literal `${`. A comment `# NAME: …` says in the error what an unset variable is for.
"""

import dataclasses
import math
import os
import re
import string
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

import yaml

from jax_selftrain.config.metadata import Role, fields_with_role, ranges, scalar_lists, shorthands
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.io.remote_paths import restore_uris

Config = TypeVar("Config")


# ---------------------------------------------------------------- files


def load(cls: type[Config], path: atomic.PathLike) -> Config:
    """Read a YAML file into a dataclass; missing keys keep their defaults.

    Raises:
      InputError: the file cannot be read, a key is unknown or duplicate, a value has a wrong type, or an environment
        variable is not set.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise InputError(f"{path}: {reason}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (RecursionError, ValueError) as error:  # deep nesting; dates and numbers that Python cannot hold
        raise InputError(f"{path}: {' '.join(str(error).split())}; correct the value") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise InputError(f"{path}{line}: {problem}") from error
    return from_dict(cls, {} if data is None else data, where=str(path))


def from_dict(cls: type[Config], data: Any, *, where: str) -> Config:
    """Convert plain data to a dataclass; `where` begins each error message.

    Raises:
      InputError: as `load`.
    """
    return _build(cls, data, cls(), where=where, section="", root=cls)


def to_dict(obj: Any, role: Role | None = None) -> dict[str, Any]:
    """Convert a dataclass to plain data; the inverse of `from_dict`.

    A local copy of an object in object storage is written as its URI. With `role`, only fields with that role, without
    the defaults of those with `Role.OMIT_DEFAULT`.
    """
    names = [field.name for field in dataclasses.fields(obj)]
    if role is not None:
        default, omitted = type(obj)(), fields_with_role(type(obj), Role.OMIT_DEFAULT)
        names = [
            name for name in fields_with_role(type(obj), role) if name not in omitted or _is_set(name, obj, default)
        ]
    return {name: _field_to_yaml(obj, name) for name in names}


def _field_to_yaml(obj: Any, name: str) -> Any:
    cls: type = type(obj)
    value = _to_yaml(getattr(obj, name))
    return value[0] if name in scalar_lists(cls) and len(value) == 1 else value


def _is_set(name: str, obj: Any, default: Any) -> bool:
    return bool(getattr(obj, name) != getattr(default, name))


def save(path: atomic.PathLike, obj: Any) -> None:
    """Write all fields of a dataclass as YAML."""
    text = yaml.dump(to_dict(obj), Dumper=_EscapingDumper, sort_keys=False, allow_unicode=True, width=120)
    atomic.write_text(path, text)


def require(config: Any, *names: str) -> None:
    """Refuse unset fields and values of wrong type or range."""
    types = option_types(type(config))
    for name in names or fields_with_role(type(config), Role.REQUIRED):
        if getattr(config, name) in (None, "", ()):
            option = "" if has_sections(types[name]) else f"pass {flag(name)}, or "
            raise InputError(f"`{name}` is required: {option}set `{name}` in the configuration file")
    check_ranges(config)


def check_ranges(config: Any, prefix: str = "--") -> None:
    """Refuse values of wrong type or range, also in sections."""
    cls: type = type(config)
    hints = typing.get_type_hints(cls)
    for name, value in vars(config).items():
        option, valid = prefix + name.replace("_", "-"), ranges(cls).get(name)
        inner = _strip_none(hints[name])
        if isinstance(value, str) and inner is float:  # in YAML, 1e-4 is text
            raise InputError(f"{option}: expected {type_name(inner)}, found {_format_value(value)}")
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{option}.")
        elif not has_sections(hints[name]):
            _convert(hints[name], os.fspath(value) if isinstance(value, os.PathLike) else value, where=option)
        for number in value if isinstance(value, tuple) else (value,):
            if valid is not None and number is not None and not valid.is_valid(number):
                raise InputError(f"{option} {number}: must be {valid.text}")
        for entry in value if isinstance(value, tuple) else ():
            if dataclasses.is_dataclass(entry):  # its first option names it
                check_ranges(entry, f"{option.removeprefix('--')}: {next(iter(vars(entry).values()))}: ")


# ---------------------------------------------------------------- options and flags


def option_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Return the types of options by name, with those of sections (`train.learning_rate`)."""
    found: dict[str, Any] = {}
    for name, tp in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(tp):
            found |= option_types(cast(type, tp), f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = tp
    return found


def is_sequence(tp: Any) -> bool:
    """Return True if an option takes any number of values."""
    return get_origin(_strip_none(tp)) is tuple


def has_sections(tp: Any) -> bool:
    """Return True if the values of an option are sections."""
    return any(map(dataclasses.is_dataclass, get_args(_strip_none(tp))))


def flag(name: str) -> str:
    """Return the flag of an option: `--train.learning-rate`."""
    return "--" + name.replace("_", "-")


def negated_flag(name: str) -> str:
    """Return the flag that sets a boolean to false: `--train.no-decay-embeddings`."""
    section, dot, last = name.rpartition(".")
    return flag(f"{section}{dot}no-{last}")


def parse_value(tp: Any, words: Sequence[str], *, where: str) -> Any:
    """Convert the words after a flag; `none` unsets an optional value.

    Raises:
      InputError: the words do not fit the type; the message begins with `where`.
    """
    inner = _strip_none(tp)
    if inner != tp and [word.lower() for word in words] in (["none"], ["null"]):
        return None
    if get_origin(inner) is tuple:
        return tuple(parse_value(get_args(inner)[0], [word], where=where) for word in words)
    (word,) = words
    value = {str(choice): choice for choice in get_args(inner)}.get(word, word)
    if inner is int and re.fullmatch(r"[+-]?\d[\d_]*", word):
        value = int(word)
    return _convert(tp, value, where=where)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean …?` with the closest name, or nothing."""
    known = list(known)
    last = {candidate.rsplit(".", 1)[-1].lstrip("-"): candidate for candidate in reversed(known)}
    match = get_close_matches(name, known, 1, 0.6)
    # Users often omit the section of a field, so its own name is compared as well.
    match = match or [last[near] for near in get_close_matches(name.rsplit(".", 1)[-1].lstrip("-"), last, 1, 0.75)]
    return f"; did you mean `{match[0]}`?" if match else ""


def type_name(tp: Any) -> str:
    """Return a type in words: `a whole number`."""
    inner = _strip_none(tp)
    suffix = " or null" if inner != tp else ""
    if get_origin(inner) is Literal:
        return "one of " + ", ".join(map(str, get_args(inner))) + suffix
    if get_origin(inner) is tuple:
        return f"a list, each entry {type_name(get_args(inner)[0])}" + suffix
    if dataclasses.is_dataclass(inner):
        return "a section of keys and values" + suffix
    return {int: "a whole number", float: "a finite number", bool: "true or false"}.get(inner, "text") + suffix


# ---------------------------------------------------------------- plain data -> dataclass


def _build(cls: type[Config], data: Any, base: Any, *, where: str, section: str, root: type) -> Config:
    """Replace fields of `base`; `section` is its path within `root`."""
    if not isinstance(data, Mapping):
        position = f"`{section}`" if section else "the top level"
        raise InputError(f"{where}: expected a section of keys and values at {position}, found {_format_value(data)}")
    schema: type = cls
    hints = typing.get_type_hints(cls)
    prefix = f"{section}." if section else ""
    values: dict[str, Any] = {}
    for key, value in data.items():
        name, full = str(key).replace("-", "_"), f"{prefix}{key}"
        if name not in hints:
            raise InputError(f"{where}: unknown key `{full}`{_suggestion(name, hints, prefix, root)}")
        if name in values:
            raise InputError(f"{where}: `{prefix}{name}` is set twice (as `-` and as `_`)")
        if dataclasses.is_dataclass(hints[name]):
            inner = getattr(base, name)
            values[name] = _build(hints[name], value, inner, where=where, section=f"{prefix}{name}", root=root)
        else:
            if (short := shorthands(schema).get(name)) and isinstance(value, list):
                value = [_shorten(short.template, entry, where=f"{where}: `{full}`") for entry in value]
            if name in scalar_lists(schema) and not isinstance(value, list | tuple):
                value = [value]
            values[name] = _convert(hints[name], value, where=f"{where}: `{full}`")
    return dataclasses.replace(base, **values)


def _shorten(template: str, entry: Any, *, where: str) -> Any:
    """Replace a section by the equal text."""
    if not isinstance(entry, Mapping):
        return entry
    keys = [key for _, key, _, _ in string.Formatter().parse(template) if key]
    if sorted(map(str, entry)) != sorted(keys):
        needed = " and ".join(f"`{key}`" for key in keys)
        raise InputError(f"{where}: an entry is text, or a section with {needed}; found {_format_value(dict(entry))}")
    return template.format(**entry)


def _convert(tp: Any, value: Any, *, where: str) -> Any:
    inner = _strip_none(tp)
    if value is None and inner != tp:
        return None
    origin, args = get_origin(inner), get_args(inner)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(args[0], item, where=f"{where}[{index}]") for index, item in enumerate(value))
    if dataclasses.is_dataclass(inner):
        return from_dict(cast(type, inner), value, where=where)
    if origin is Literal and any(type(choice) is type(value) and choice == value for choice in args):
        return value
    if inner in (int, str, bool) and type(value) is inner:  # `isinstance` would accept a bool as an int
        return value
    if inner is float and (number := _parse_float(value)) is not None:
        return number
    quotes = "; put it in quotes" if inner is str and value is not None and not isinstance(value, list | dict) else ""
    raise InputError(f"{where}: expected {type_name(tp)}, found {_format_value(value)}{quotes}")


def _parse_float(value: Any) -> float | None:
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _suggestion(name: str, known: Mapping[str, Any], prefix: str, root: type) -> str:
    if near := get_close_matches(name, known, 1, 0.6):
        return f"; did you mean `{prefix}{near[0]}`?"
    return did_you_mean(name, option_types(root)) or f"; known here: {', '.join(known)}"


def _strip_none(tp: Any) -> Any:
    """Return `X` for `X | None`, and any other type itself."""
    if get_origin(tp) not in (Union, types.UnionType):
        return tp
    (inner,) = (arg for arg in get_args(tp) if arg is not type(None))
    return inner


def _format_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "the truth value true", False: "the truth value false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _to_yaml(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, list | tuple):
        return [_to_yaml(item) for item in value]
    return restore_uris(value) if isinstance(value, str) else value


# ---------------------------------------------------------------- YAML


class _StrictLoader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys and expands environment variables.

    Single scalars are expanded after parsing, so the value of a variable cannot add structure. The type of a plain
    scalar is resolved after the expansion, so that `steps: ${STEPS}` is a number.
    """

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        expanded = re.sub(r"(\$?)\$\{([^}]*)\}", lambda match: _expand(match, node), node.value)
        if expanded == node.value:
            return node
        tag = self.resolve(yaml.ScalarNode, expanded, (True, False)) if node.style is None else node.tag
        return yaml.ScalarNode(tag, expanded, node.start_mark, node.end_mark, style=node.style)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"the key {_format_value(key)} is not text; put it in quotes"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            if key in seen:
                problem = f"the key `{key}` is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _EscapingDumper(yaml.SafeDumper):
    """YAML dumper that escapes `${NAME}` as `$${NAME}`."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return super().represent_str(re.sub(r"\$\{[^}]*\}", r"$\g<0>", data))


_EscapingDumper.add_representer(str, _EscapingDumper.represent_str)


def _expand(match: re.Match[str], node: yaml.ScalarNode) -> str:
    escaped, name = match.groups()
    if escaped:
        return f"${{{name}}}"
    if name not in os.environ:
        head = re.search(rf"^# {re.escape(name)}: (.+(?:\n#  .+)*)", node.start_mark.buffer or "", re.MULTILINE)
        meaning = " (" + re.sub(r"\n# *", " ", head[1]).rstrip(".") + ")" if head else ""
        problem = f"the environment variable {name} is not set; export it first{meaning}"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return os.environ[name]
