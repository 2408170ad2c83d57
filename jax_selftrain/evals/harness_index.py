"""Find the tasks of lm-evaluation-harness by name.

`TaskManager` parses all 14,000 YAML files of the harness, for 15 s. Here the folders that define the requested names
are found by text, then those of the members of groups; all files are parsed only for tags of several folders.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_selftrain.config import yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.evals.task_names import SUITES

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def make_task_manager(names: Collection[str], folder: str = "") -> TaskManager:
    """Return a task index that has all names, or raise InputError."""
    import_module("jax_selftrain.evals.lm_eval_adapter")  # raises InputError if lm-eval is not installed
    if folder and not Path(folder).is_dir():
        raise InputError(f"--task-folder {folder}: no such folder; give the one that holds the task files (*.yaml)")
    from lm_eval.tasks import TaskManager

    own = [folder] if folder else []
    manager = TaskManager(include_path=own, include_defaults=False)
    folders: set[Path] = set()
    while missing := _find_missing(manager, names):
        found = {path for name in missing for path in _find_folders(name, defined=True) or _find_folders(name)}
        if found <= folders:
            if all(name in manager.task_index or _find_folders(name) for name in names):
                manager = TaskManager(include_path=own) if own else _default_manager()
            break
        folders |= found
        paths = [path for path in _harness_texts() if path in folders]
        manager = TaskManager(include_path=[*paths, *own], include_defaults=False)
    for name in names:
        if name not in manager.task_index:
            texts = "\n".join(_harness_texts().values())
            known = re.findall(r"^(?:task|group|tag): *['\"]?([\w.-]+)", texts, re.MULTILINE)
            hint = yaml_io.did_you_mean(name, [*SUITES, *manager.all_tasks, *known])
            raise InputError(
                f"task {name!r} is neither a file nor a task, group or tag of lm-evaluation-harness "
                f"{metadata.version('lm_eval')}{f' or of {folder}' if folder else ''}{hint}"
            )
    return manager


@cache
def _default_manager() -> TaskManager:
    """Index all tasks of the harness: 14,000 files, which takes many seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@cache
def _harness_texts() -> dict[Path, str]:
    """Read the YAML files of each folder, in order of precedence."""
    import lm_eval.tasks

    texts: dict[Path, str] = defaultdict(str)
    root = Path(lm_eval.tasks.__file__).parent
    for path in sorted(root.glob("*/**/*.yaml"), key=Path.as_posix, reverse=True):
        texts[root / path.relative_to(root).parts[0]] += path.read_text(encoding="utf-8") + "\n"
    return texts


@cache
def _find_folders(name: str, *, defined: bool = False) -> list[Path]:
    """List the folders that mention a name, or define it."""
    pattern = rf"(?<![\w.-]){re.escape(name)}(?![\w.-])"
    if defined:
        pattern = rf"^['\"]?(?:task|group)['\"]?: *['\"]?{re.escape(name)}['\"]? *$"
    return [path for path, text in _harness_texts().items() if re.search(pattern, text, re.MULTILINE)]


def _find_missing(manager: TaskManager, names: Iterable[str]) -> set[str]:
    """Find names, and members of groups, that an index lacks.

    A tag of several folders counts as lacking, since the members in the last folder replace the others.
    """
    missing: set[str] = set()
    for name in names:
        entry = manager.task_index.get(name)
        if entry is None or (entry.kind.name == "TAG" and len(_find_folders(name)) > 1):
            missing.add(name)
        else:
            missing |= _find_missing(manager, map(str, task_members(entry)))
    return missing


def task_members(entry: Any) -> list[Any]:
    """Return the members of a group or tag; empty for a task."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    members = entry.cfg.get("task") if entry.kind.name == "GROUP" and entry.cfg else None
    if not isinstance(members, list):
        return []
    return [member if isinstance(member, str) else member.get("group", member.get("task")) for member in members]
