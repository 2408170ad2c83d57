"""Strict YAML <-> frozen dataclasses: a typo in a configuration must fail at once, not train for a day.

The annotations of a dataclass are its schema. Unknown keys, keys given twice and values of the wrong type are
errors that say where and suggest the nearest key. Two traps of YAML 1.1 are dealt with: `1e-4` is text to it (here
a number, where a number is expected) and `no` is a truth value (here an error, where text is expected).
`${NAME}` in a value stands for an environment variable, `$${` for a literal `${`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

import yaml

from jax_selftrain.config.metadata import Role, fields_with_role
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
from jax_selftrain.io.remote_paths import restore_uris

Config = TypeVar("Config")


# ---------------------------------------------------------------- files


def load(cls: type[Config], path: atomic.PathLike, *, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML file into a `cls`; fields it does not name keep their defaults.

    `overrides` wins over the file; its keys are fields, dotted for fields of nested dataclasses, or nested
    mappings. Raises InputError in one sentence for a missing or malformed file, an unknown or doubled key, a value
    of the wrong type, an unset environment variable.
    """
    data = _read_mapping(Path(path))
    for key, value in (overrides or {}).items():
        _override(data, key, value, where=str(path))
    return from_dict(cls, data, where=str(path))


def from_dict(cls: type[Config], data: Mapping[str, Any], *, where: str) -> Config:
    """Build a `cls` from plain data as strictly as `load` does; `where` opens the error messages (a file name, say)."""
    return _build(cls, data, None, where=where, section="", root=cls)


def to_dict(obj: Any, role: Role | None = None) -> dict[str, Any]:
    """Convert a dataclass to nested dicts, lists and scalars; the inverse of `from_dict`.

    A local copy of an object in object storage is written as its URI. With `role`, only fields with that role.
    """
    names = [field.name for field in dataclasses.fields(obj)] if role is None else fields_with_role(type(obj), role)
    return {name: _to_yaml(getattr(obj, name)) for name in names}


def save(path: atomic.PathLike, obj: Any) -> None:
    """Commit a dataclass as YAML, every field spelled out, so that `load` gives back an equal one."""
    data = _map_strings(to_dict(obj), lambda text: re.sub(r"\$\{[^}]*\}", r"$\g<0>", text))
    atomic.write_text(path, yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120))


def require(config: Any, *names: str) -> None:
    """Raise InputError for the first of the named fields that is still unset: None, empty text or an empty tuple."""
    for name in names:
        if getattr(config, name) in (None, "", ()):
            raise InputError(f"`{name}` is required: pass {flag(name)}, or set `{name}` in the configuration file")


# ---------------------------------------------------------------- the schema, for the command line too


@dataclasses.dataclass(frozen=True)
class Field:
    """One leaf of a configuration: `path` is ("train", "learning_rate") for `--train.learning-rate`."""

    path: tuple[str, ...]
    type: Any
    default: Any

    @property
    def flag(self) -> str:
        return flag(*self.path)

    @property
    def is_sequence(self) -> bool:
        """Whether it takes any number of values."""
        return get_origin(_strip_none(self.type)) is tuple


def flag(*path: str) -> str:
    """The command-line spelling of a field: `--train.learning-rate`."""
    return "--" + ".".join(path).replace("_", "-")


def iter_fields(cls: type, _prefix: tuple[str, ...] = ()) -> Iterator[Field]:
    """All fields of a configuration class that hold values, those of nested dataclasses included."""
    hints = typing.get_type_hints(cls)
    for field in _init_fields(cls):
        path, tp = (*_prefix, field.name), hints[field.name]
        if dataclasses.is_dataclass(tp):
            yield from iter_fields(cast(type, tp), path)
        else:
            yield Field(path, tp, _default(field))


def parse(tp: Any, args: Sequence[str], *, where: str) -> Any:
    """The value of type `tp` that command-line words spell, by the same rules as in a file; `none` unsets an option.

    Raises InputError opening with `where`.
    """
    optional, inner = tp != _strip_none(tp), _strip_none(tp)
    if optional and [word.lower() for word in args] in (["none"], ["null"]):
        return None
    if get_origin(inner) is tuple:
        item = get_args(inner)[0]
        return tuple(parse(item, [word], where=where) for word in args)
    if len(args) != 1:
        raise InputError(f"{where}: expected {type_name(tp)}, found {len(args)} values")
    return _convert(tp, _scalar(inner, args[0]), where=where, section="", root=None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` with the closest of the known names, or an empty string when none is close."""
    known = list(known)
    last = {candidate.rsplit(".", 1)[-1].lstrip("-"): candidate for candidate in reversed(known)}
    match = get_close_matches(name, known, 1, 0.6)
    # A field of a section is often written without the section; its own name is then what is close.
    match = match or [last[near] for near in get_close_matches(name.rsplit(".", 1)[-1].lstrip("-"), last, 1, 0.75)]
    return f"; did you mean `{match[0]}`?" if match else ""


def type_name(tp: Any) -> str:
    """What a type asks of a user, in words: `a whole number`."""
    inner = _strip_none(tp)
    suffix = " or null" if inner != tp else ""
    if get_origin(inner) is Literal:
        return "one of " + ", ".join(map(str, get_args(inner))) + suffix
    if get_origin(inner) is tuple:
        return f"a list, each entry {type_name(get_args(inner)[0])}" + suffix
    if get_origin(inner) in (dict, Mapping) or dataclasses.is_dataclass(inner):
        return "a section of keys and values" + suffix
    return {int: "a whole number", float: "a finite number", bool: "true or false"}.get(inner, "text") + suffix


# ---------------------------------------------------------------- plain data -> dataclass


def _build(cls: type[Config], data: Any, base: Any, *, where: str, section: str, root: type | None) -> Config:
    """`base` supplies what `data` leaves out; `section` is the dotted path to here, `root` the outermost class."""
    if not isinstance(data, Mapping):
        place = f"`{section}`" if section else "the top level"
        raise InputError(f"{where}: expected a section of keys and values at {place}, found {_format_value(data)}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in _init_fields(cls)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        full = f"{section}.{key}" if section else str(key)
        if name not in fields:
            raise InputError(f"{where}: unknown key `{full}`{_suggestion(name, fields, section, root or cls)}")
        if name in values:
            raise InputError(f"{where}: `{section + '.' if section else ''}{name}` is set twice (as `-` and as `_`)")
        if dataclasses.is_dataclass(hints[name]):
            inner = getattr(base, name) if base is not None else _default(fields[name])
            dotted = f"{section}.{name}" if section else name
            values[name] = _build(hints[name], value, inner, where=where, section=dotted, root=root)
        else:
            values[name] = _convert(hints[name], value, where=f"{where}: `{full}`", section=full, root=root)
    missing = [name for name, field in fields.items() if name not in values and _default(field) is dataclasses.MISSING]
    if base is None and missing:
        raise InputError(f"{where}: the key `{section + '.' if section else ''}{missing[0]}` is missing")
    try:
        return cls(**values) if base is None else dataclasses.replace(base, **values)
    except ValueError as error:  # a check of the dataclass's own
        raise InputError(f"{where}: {error}") from error


def _convert(tp: Any, value: Any, *, where: str, section: str, root: type | None) -> Any:
    inner = _strip_none(tp)
    if value is None and inner != tp:
        return None
    origin, args = get_origin(inner), get_args(inner)
    if origin is tuple and isinstance(value, list | tuple):
        many = len(args) == 2 and args[1] is Ellipsis
        if not many and len(args) != len(value):
            raise InputError(f"{where}: expected {len(args)} values, found {len(value)}")
        types_ = [args[0]] * len(value) if many else args
        return tuple(
            _convert(item_type, item, where=f"{where}[{index}]", section=section, root=root)
            for index, (item_type, item) in enumerate(zip(types_, value, strict=True))
        )
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {
            str(key): _convert(args[1], item, where=f"{where}.{key}", section=section, root=root)
            for key, item in value.items()
        }
    if dataclasses.is_dataclass(inner):
        return _build(cast(type, inner), value, None, where=where, section="", root=None)
    if origin is Literal:
        for choice in args:
            if type(choice) is type(value) and choice == value:
                return choice
    elif inner is float:
        number = _as_float(value)
        if number is not None:
            return number
    elif inner is Path:
        if isinstance(value, str):
            return Path(value)
    elif inner in (int, str, bool):
        if type(value) is inner:  # not isinstance: a bool is an int to Python
            return value
    elif origin not in (tuple, dict, Mapping):
        raise TypeError(f"{where}: settings cannot hold a field of type {tp}")
    quotes = "; put it in quotes" if inner is str and value is not None and not isinstance(value, list | dict) else ""
    raise InputError(f"{where}: expected {type_name(tp)}, found {_format_value(value)}{quotes}")


def _as_float(value: Any) -> float | None:
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _scalar(tp: Any, word: str) -> Any:
    """The scalar that a command-line word stands for, left as text where it does not fit (`_convert` then objects)."""
    if get_origin(tp) is Literal:
        return next((choice for choice in get_args(tp) if str(choice) == word), word)
    if tp is int and re.fullmatch(r"[+-]?\d[\d_]*", word):
        return int(word)
    if tp is bool:
        return {"true": True, "false": False}.get(word.lower(), word)
    return word


def _suggestion(name: str, fields: Mapping[str, Any], section: str, root: type) -> str:
    here = get_close_matches(name, fields, 1, 0.6)
    if here:
        return f"; did you mean `{section + '.' if section else ''}{here[0]}`?"
    elsewhere = [".".join(leaf.path) for leaf in iter_fields(root)]
    return did_you_mean(name, elsewhere) or f"; known here: {', '.join(fields)}"


def _override(data: dict[str, Any], key: str, value: Any, *, where: str) -> None:
    head, _, rest = key.replace("-", "_").partition(".")
    spelled = next((known for known in data if str(known).replace("-", "_") == head), head)
    if not rest and not isinstance(value, Mapping):
        data[spelled] = value
        return
    inner = data.setdefault(spelled, {})
    if not isinstance(inner, dict):
        raise InputError(f"{where}: expected a section of keys and values at `{spelled}`, found {_format_value(inner)}")
    for name, item in ({rest: value} if rest else value).items():
        _override(inner, name, item, where=where)


def _init_fields(cls: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _strip_none(tp: Any) -> Any:
    """`X` for `X | None`, else the type itself."""
    if get_origin(tp) not in (Union, types.UnionType):
        return tp
    kept = [arg for arg in get_args(tp) if arg is not type(None)]
    if len(kept) != 1:
        raise TypeError(f"settings cannot hold a union such as {tp}")
    return kept[0]


def _format_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "the truth value true", False: "the truth value false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _to_yaml(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _to_yaml(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_yaml(item) for item in value]
    return restore_uris(os.fspath(value)) if isinstance(value, str | Path) else value


def _map_strings(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


# ---------------------------------------------------------------- YAML


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        data = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise InputError(f"{path}{line}: {problem}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a section of keys and values at the top level, found {_format_value(data)}")
    return data


class _StrictLoader(yaml.SafeLoader):
    """YAML-safe, with doubled keys refused and environment variables expanded.

    Expansion happens to single scalars after parsing, so that a variable's value cannot add structure; a plain
    scalar is then typed anew, so that `steps: ${STEPS}` is a number.
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
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {_format_value(key)} is not text; put it in quotes", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _expand(match: re.Match[str], node: yaml.ScalarNode) -> str:
    escaped, name = match.groups()
    if escaped:
        return f"${{{name}}}"
    if name not in os.environ:
        raise yaml.constructor.ConstructorError(
            None, None, f"the environment variable {name} is not set; export it first", node.start_mark
        )
    return os.environ[name]
