"""Roles and ranges of options, as `Input[str]` or `Execution[AtLeastOne[int]]`.

They are declared once, with the field. Stage keys, resumption checks, compilation caches, uploads and the groups of
`--help` select options by role. A field without a role has `Role.IDENTITY`.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
Options = TypeVar("Options", bound="DataclassInstance")


class Role(enum.Flag):
    """Use of an option's value."""

    IDENTITY = enum.auto()
    """The value changes the result."""
    EXECUTION = enum.auto()
    """The value changes speed, memory or bookkeeping, and the result by rounding at most."""
    INPUT = enum.auto()
    """The value names a file, folder or model to read; its content changes the result."""
    OUTPUT_FOLDER = enum.auto()
    """The value names the folder to write."""
    OUTPUT_FILE = enum.auto()
    """The value names the JSON file to write."""
    COMPILED = enum.auto()
    """Compiled programs depend on the value; a second role."""
    EVALUATION = enum.auto()
    """The option configures evaluation during training; a second role."""
    SET_BY_STUDY = enum.auto()
    """A study sets the option of each stage; a second role."""
    REQUIRED = enum.auto()
    """The option must be set; a second role."""
    OMIT_DEFAULT = enum.auto()
    """The identity has the option only if it is not the default, so that older results stay valid; a second role."""
    OUTPUT = OUTPUT_FOLDER | OUTPUT_FILE


_FIRST_ROLES = Role.IDENTITY | Role.EXECUTION | Role.INPUT | Role.OUTPUT

Execution = Annotated[T, Role.EXECUTION]
Input = Annotated[T, Role.INPUT]
OutputFolder = Annotated[T, Role.OUTPUT_FOLDER]
OutputFile = Annotated[T, Role.OUTPUT_FILE]
Compiled = Annotated[T, Role.COMPILED]
Evaluation = Annotated[T, Role.EVALUATION]
Required = Annotated[T, Role.REQUIRED]
SetByStudy = Annotated[T, Role.SET_BY_STUDY]
OmitDefault = Annotated[T, Role.OMIT_DEFAULT]


@dataclasses.dataclass(frozen=True)
class Range:
    """Valid numbers of an option, in words and as a condition."""

    text: str
    is_valid: Callable[[float], bool]


AtLeastOne = Annotated[T, Range("at least 1", lambda value: 1 <= value < math.inf)]
AtLeastTwo = Annotated[T, Range("at least 2", lambda value: 2 <= value < math.inf)]
Positive = Annotated[T, Range("a finite number above 0", lambda value: 0 < value < math.inf)]
NonNegative = Annotated[T, Range("0 or more", lambda value: 0 <= value < math.inf)]
Probability = Annotated[T, Range("in [0, 1]", lambda value: 0 <= value <= 1)]


@dataclasses.dataclass(frozen=True)
class Shorthand:
    """Section that is accepted as an entry instead of text."""

    template: str
    """The equal text, with the keys of the section, which are required, in braces."""


TaskNames = Annotated[T, Shorthand("{name}@{num_fewshot}")]


@dataclasses.dataclass(frozen=True)
class SingleValue:
    """Mark of a list that may be written as one value."""


OneOrMore = Annotated[T, SingleValue()]


@dataclasses.dataclass(frozen=True)
class AppliesTo:
    """Kinds of arm that an option of `ArmConfig` applies to."""

    kinds: tuple[str, ...]


@cache
def roles(cls: type) -> Mapping[str, Role]:
    """Return the roles of the fields of a configuration class, in order."""
    found = {}
    for name, metadata in _metadata(cls).items():
        role = Role(0)
        for item in metadata:
            role |= item if isinstance(item, Role) else Role(0)
        found[name] = role if role & _FIRST_ROLES else role | Role.IDENTITY
    return found


def fields_with_role(cls: type, role: Role) -> tuple[str, ...]:
    """Return the names of the fields with any of the roles."""
    return tuple(name for name, own in roles(cls).items() if own & role)


@cache
def ranges(cls: type) -> Mapping[str, Range]:
    """Return the ranges of the fields of a configuration class."""
    return {name: item for name, items in _metadata(cls).items() for item in items if isinstance(item, Range)}


@cache
def shorthands(cls: type) -> Mapping[str, Shorthand]:
    """Return the shorthands of the fields of a configuration class."""
    return {name: item for name, items in _metadata(cls).items() for item in items if isinstance(item, Shorthand)}


@cache
def scalar_lists(cls: type) -> frozenset[str]:
    """Return the names of lists whose single value is written alone."""
    return frozenset(name for name, items in _metadata(cls).items() if SingleValue() in items)


def applicable_kinds(cls: type, name: str) -> tuple[str, ...] | None:
    """Return the kinds of arm of a field; None: all kinds."""
    return next((item.kinds for item in _metadata(cls)[name] if isinstance(item, AppliesTo)), None)


def keep_role(options: Options, role: Role) -> Options:
    """Reset the fields without a role to their defaults."""
    default, kept = type(options)(), fields_with_role(type(options), role)
    return dataclasses.replace(default, **{name: getattr(options, name) for name in kept})


def shared_overrides(changes: Any, cls: type) -> dict[str, Any]:
    """Return the values other than None of fields that `cls` shares."""
    names = [field.name for field in dataclasses.fields(changes) if field.name in roles(cls)]
    return {name: value for name in names if (value := getattr(changes, name)) is not None}


def _metadata(cls: type) -> dict[str, tuple[Any, ...]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: getattr(hints[name], "__metadata__", ()) for name in names}
