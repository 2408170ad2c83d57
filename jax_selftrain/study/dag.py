"""Stages: the pieces of work that a study is made of, each done once, whoever needs it and however often it is killed.

A stage is named by what decides its result: its kind, its recipe and its inputs, all hashed into a key. Inputs are
other stages (by their keys) or things from outside (models, files, by their content), so that the name of every stage
is known before anything has been done; cells that need the same corpus or the same base scores share them without
knowing of each other, and a study whose configuration grows keeps what it has.

`STUDY/stages/KIND-KEY/` holds what a stage made, `KIND-KEY.json` says that it is done and of what. Any number of
processes may work in one folder: each takes by lease the first stage that is ready and that nobody works on. A killed
process leaves an unfinished folder, which the next one completes by the stage's own means.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic, lease
from jax_selftrain.io.manifest import hash_json

POLL_SECONDS = 0.5
"""How often to look whether a stage that another process works on has been finished or given up."""


@dataclass(frozen=True, eq=False)
class Stage:
    """One piece of work."""

    command: str
    """sample, retokenize, train, …"""
    label: str
    """What it is, for people."""
    identity: Mapping[str, Any]
    """Plain data: every option that decides the result."""
    inputs: Mapping[str, str | Stage]
    """What it reads: another stage, or the fingerprint of something from outside."""
    run: Callable[[Path], object] = field(repr=False)
    """Fills the folder, or completes it; the inputs are there."""
    tokens: int = 0
    """Tokens that are drawn or trained on, at most: the size of the work."""
    flops: float = 0.0
    """Useful arithmetic in that, by the convention of `training.flops_per_token`."""

    @cached_property
    def key(self) -> str:
        """SHA-256 of kind, recipe and inputs, in hex."""
        inputs = {name: one.key if isinstance(one, Stage) else one for name, one in self.inputs.items()}
        return hash_json({"kind": self.command, "recipe": dict(self.identity), "inputs": inputs})

    @property
    def name(self) -> str:
        return f"{self.command}-{self.key[:16]}"

    @property
    def dependencies(self) -> list[Stage]:
        return [one for one in self.inputs.values() if isinstance(one, Stage)]


def done_file(root: Path, stage: Stage) -> Path:
    """The file that says that a stage is done."""
    return root / f"{stage.name}.json"


def _lease_file(root: Path, stage: Stage) -> Path:
    return root / f".{stage.name}.lease"


def is_done(root: Path, stage: Stage) -> bool:
    """Whether the stage is finished.

    Raises:
      InputError: the note is there but damaged, or what was made is gone.
    """
    path = done_file(root, stage)
    if not path.exists():
        return False
    note = atomic.read_json(path)
    if not isinstance(note, dict) or note.get("key") != stage.key:
        raise InputError(f"{path}: is damaged; delete it and run the same command again")
    if not (root / stage.name).is_dir():
        raise InputError(f"{root / stage.name}: is gone, though its note is there; delete {path} and run again")
    return True


def topological_order(targets: Iterable[Stage]) -> list[Stage]:
    """The stages and all that they need, each once, those that are needed first."""
    found: dict[str, Stage] = {}

    def add(stage: Stage) -> None:
        if stage.key not in found:
            for needed in stage.dependencies:
                add(needed)
            found[stage.key] = stage

    for stage in targets:
        add(stage)
    return list(found.values())


def run_all(root: Path, stages: Sequence[Stage]) -> None:
    """Do all stages and what they need, sharing the work with whoever else is at it; returns when all are done."""
    stages = topological_order(stages)
    root.mkdir(parents=True, exist_ok=True)
    atomic.remove_stale_temp_files(root)
    done: set[str] = set()
    while len(done) < len(stages):
        before = len(done)
        for stage in stages:
            if stage.key in done or not all(needed.key in done for needed in stage.dependencies):
                continue
            if is_done(root, stage) or _run_if_free(root, stage):
                done.add(stage.key)
                _log(f"{len(done)} of {len(stages)}: {stage.label}")
        if len(done) == before:
            time.sleep(POLL_SECONDS)
    for stage in stages:
        if _lease_file(root, stage).exists():  # left by one that was killed when its work was done
            with lease.lease(_lease_file(root, stage)):
                pass


def _run_if_free(root: Path, stage: Stage) -> bool:
    """Do a stage unless another process is at it; whether it is done now."""
    with lease.lease(_lease_file(root, stage)) as ours:
        if not ours:
            return False
        if is_done(root, stage):  # by a process that finished it just now
            return True
        folder = root / stage.name
        folder.mkdir(exist_ok=True)
        began = time.monotonic()
        stage.run(folder)
        inputs = {name: one.key if isinstance(one, Stage) else one for name, one in stage.inputs.items()}
        note = {"key": stage.key, "kind": stage.command, "recipe": dict(stage.identity), "inputs": inputs}
        atomic.write_json(root / f"{stage.name}.seconds.json", {"seconds": time.monotonic() - began})
        atomic.write_json(done_file(root, stage), note)
        return True


def _log(text: str) -> None:
    """Tell a person at a terminal what is going on."""
    if sys.stderr.isatty():
        print(f"jax-selftrain study: {text}", file=sys.stderr, flush=True)
