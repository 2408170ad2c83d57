"""The `configs` command: ready configurations, in a checkout and in a wheel."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jax_selftrain.config import yaml_io
from jax_selftrain.errors import InputError

SCRIPTS = "tpu_scripts"
"""Folder of scripts for TPU slices, which is copied as a whole."""
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class ConfigsConfig:
    """List the ready configurations, or copy one to edit it."""

    action: Literal["list", "copy"] = "list"
    """`list`, or `copy`."""
    name: str = ""
    """Configuration to copy, or `tpu_scripts`."""
    destination: str = ""
    """File or folder to write, which is not overwritten; unset: the current folder."""


def ready_configs() -> dict[str, Path]:
    """Return the configurations and the folder of scripts, by name."""
    root = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent  # a wheel, or a checkout
    found = {path.stem: path for path in sorted((root / "configs").glob("*.yaml"), key=lambda path: path.stem)}
    return found | ({SCRIPTS: root / SCRIPTS} if (root / SCRIPTS).is_dir() else {})


def list_or_copy_configs(options: ConfigsConfig) -> str:
    """List the ready configurations, or copy one; return text for the terminal.

    Raises:
      InputError: the name is unknown, or the destination exists or cannot be written.
    """
    found = ready_configs()
    if options.action == "list":
        if options.name:
            raise InputError(
                f"configs list {options.name}: takes no name; write `configs copy {options.name}` to copy it"
            )
        return "\n".join(f"{name:<{max(map(len, found))}}  {_first_sentence(path)}" for name, path in found.items())
    name = options.name.removesuffix(".yaml")
    if name not in found:
        hint = yaml_io.did_you_mean(name, found) or "; jax-selftrain configs lists them"
        raise InputError(f"configs copy: there is no configuration {options.name!r}{hint}")
    source, out = found[name], Path(options.destination or ".")
    if out.is_dir():
        out /= source.name
    if out.exists():
        raise InputError(f"{out}: exists already; remove it, or name another destination")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from error
    return f"written: {out}"


def _first_sentence(path: Path) -> str:
    if path.is_dir():
        return "Scripts that create TPU slices and run commands on them."
    head = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    words = " ".join(re.sub(r"(?m)^#", "", head[0]).split()) if head else ""
    return re.split(r"(?<=[.?]) ", words, maxsplit=1)[0]
