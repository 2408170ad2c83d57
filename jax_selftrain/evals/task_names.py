"""References to tasks: files, names and suites.

A value of `--tasks` that is neither a file nor a folder is the name of a task, group or tag of lm-evaluation-harness,
or of one of our suites. `NAME@25` has 25 few-shot examples.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_selftrain.errors import InputError

SUITES: dict[str, tuple[str, ...]] = {
    "pythia": ("lambada_openai", "piqa", "winogrande", "wsc", "arc_easy", "arc_challenge", "sciq", "logiqa"),
    "quick": ("lambada_openai", "sciq", "arc_easy", "piqa"),
    "blimp": ("blimp",),
    "paper-a": (
        *("arc_challenge@0", "mmlu@0", "truthfulqa_mc2@0", "hellaswag@0", "gsm8k@0", "minerva_math@0", "humaneval@0"),
    ),
    "paper-b": ("arc_challenge@25", "gsm8k@8", "hellaswag@5", "minerva_math@4"),
}
"""Our suites: Pythia's published tasks, tasks with signal at small sizes, the 67 sets of BLiMP, and the two suites of
arXiv:2605.31126 (zero-shot, and with few-shot examples)."""

_FILES = (".jsonl", ".json", ".yaml", ".yml", ".lst", ".parquet")


def split_names(references: Sequence[str], options: Any = None) -> tuple[list[str], dict[str, int | None]]:
    """Split the values of `--tasks` into paths and names; expand suites.

    Args:
      references: values of `--tasks`.
      options: the other options of the command; those that apply to names only are refused without names.

    Returns:
      Paths; and names with their number of few-shot examples (`NAME@25`), or None.

    Raises:
      InputError: the number is not a number, a task is requested with two numbers, or an option applies to no task.
    """
    files: list[str] = []
    names: dict[str, int | None] = {}
    for reference in references:
        if not _is_name(reference):
            files.append(reference)
            continue
        suite, at, own = reference.partition("@")
        for member in SUITES.get(suite, (suite,)):
            name, _, count = member.partition("@")
            count = own if at else count
            if (count and not count.isdecimal()) or (at and not own):
                raise InputError(f"task {reference}: give the number of few-shot examples after `@`, as in {name}@5")
            found = int(count) if count else None
            if names.setdefault(name, found) != found:
                one, other = ("its default" if n is None else n for n in (names[name], found))
                raise InputError(
                    f"task {name} is requested with {one} and with {other} few-shot examples; score it twice, with one "
                    "number each"
                )
    for option in () if names else ("num_fewshot", "task_folder"):
        if getattr(options, option, None):
            flag = f"--{option.replace('_', '-')}"
            raise InputError(f"{flag} applies to tasks of lm-evaluation-harness by name; remove it")
    return files, names


def _is_name(reference: str) -> bool:
    """Return True if a reference does not look like a path."""
    return re.fullmatch(r"[^/:]+", reference) is not None and not (
        Path(reference).exists() or Path(reference).suffix in _FILES
    )
