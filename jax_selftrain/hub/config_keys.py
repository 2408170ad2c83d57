"""The keys of a config.json: each is read by type, or refused."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from jax_selftrain.errors import InputError


class Keys:
    """The raw config or its rotary settings, with the known keys.

    Args:
      raw, path: content and path of config.json.
      ignored: keys that need no reader.
      names: the family's names of keys that readers call otherwise.
    """

    def __init__(
        self, raw: Mapping[str, Any], path: str, ignored: Iterable[str], names: Mapping[str, str] | None = None
    ):
        self._raw, self.path, self._known, self._names = raw, path, set(ignored), names or {}

    def __contains__(self, key: str) -> bool:
        return self.name(key) in self._raw

    def name(self, key: str) -> str:
        """Return the family's name of a key."""
        return self._names.get(key, key)

    def pop(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """Read a key; refuse another type (bool is not int)."""
        self._known.add(self.name(key))
        value = self._raw.get(self.name(key))
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and not {bool, object} & {*kinds}):
            self.refuse(key, f"should be {' or '.join(k.__name__ for k in kinds)}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Read a positive whole number; required unless there is a default."""
        value = self.pop(key, int, default)
        if value is None:
            raise InputError(f"{self.path}: {self.name(key)} is missing; it cannot be guessed")
        if value < 1:
            self.refuse(key, "should be at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Read a positive finite number; required unless there is a default."""
        value = self.pop(key, (int, float), default)
        if value is None or not (math.isfinite(value) and value > 0):
            self.refuse(key, "should be a positive number")
        return float(value)

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise InputError about a key."""
        raise InputError(f"{self.path}: {self.name(key)} = {self._raw.get(self.name(key))!r} {why}")

    def finish(self, disabled: Mapping[str, tuple[Any, ...]] | None = None) -> None:
        """Raise InputError about any key that no reader read.

        Null and false switch off a feature that the model does not have anyway.

        Args:
          disabled: by key the only values that switch off a feature.
        """
        remedy = "" if disabled is None else "; if it does not, drop it by `convert --ignore-config-keys`"
        disabled = disabled or {}
        for key, value in self._raw.items():
            is_off = value in disabled[key] if key in disabled else value is None or value is False
            if key not in self._known and not is_off:
                why = f"is not supported: ignoring it could change the model's output{remedy}"
                raise InputError(f"{self.path}: {key} = {value!r} {why}")
