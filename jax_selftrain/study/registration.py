"""The declaration of a study at its first run.

`claims.json` holds claims, seeds and the whole design, with their SHA-256. A claim that differs from it is *post hoc*.
A declared claim that was removed is *withdrawn* and still counts as tested. Every verdict names later changes of the
design. Verdicts ignore seeds that are added later, because results could decide when to stop.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax_selftrain.config import ClaimConfig, StudyConfig, yaml_io
from jax_selftrain.config.metadata import Role, fields_with_role
from jax_selftrain.errors import InputError
from jax_selftrain.io import json_files
from jax_selftrain.io.json_files import hash_json

PILOT_SEEDS = range(10)
"""Seeds of pilots, which inform no verdict."""
_PARTS = ("claims", "split", "seeds", "design")


class Registration(NamedTuple):
    """Differences of a study's configuration from its declaration."""

    post_hoc: tuple[str, ...]
    """Names of claims that were not declared as they are."""
    withdrawn: tuple[ClaimConfig, ...]
    """Declared claims that were removed or changed."""
    deviations: tuple[str, ...]
    """Changes of the design and of the seeds."""
    seeds: tuple[int, ...]
    """Declared seeds."""


def describe_design(config: StudyConfig, inputs: Mapping[str, str]) -> dict[str, str]:
    """Return every option that changes results, by its path, as JSON.

    `inputs` has the hashes of files and models.
    """
    machine = fields_with_role(StudyConfig, Role.OUTPUT | Role.EXECUTION | Role.INPUT)
    found: dict[str, Any] = {}
    for name in vars(config):
        value = getattr(config, name)
        if name in ("models", "arms"):
            found[name] = {one.name: yaml_io.to_dict(one, Role.IDENTITY) for one in value}
        elif name not in ("claims", "split", "seeds", *machine):
            has_options = hasattr(value, "__dataclass_fields__")
            found[name] = yaml_io.to_dict(value, Role.IDENTITY) if has_options else yaml_io.to_dict(config)[name]
    return dict(_flatten(found)) | {name: json.dumps(value) for name, value in inputs.items()}


def _flatten(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value, ensure_ascii=False)


def register(folder: Path, config: StudyConfig, inputs: Mapping[str, str]) -> Registration:
    """Freeze the declaration of the first run, or compare with it.

    A study that started without claims has frozen an empty list. Results on dev items are of pilots: the design, and
    claims about tasks and texts, may change until test items are requested, and not after another change of the split.
    New arms and options are no deviation.

    Raises InputError if the declaration was changed or is missing, or another version wrote it.
    """
    path = folder / "claims.json"
    now: dict[str, Any] = {
        "claims": [yaml_io.to_dict(claim) for claim in config.claims],
        "split": config.split,
        "seeds": list(config.seeds),
        "design": describe_design(config, inputs),
    }
    if path.exists():
        frozen = _read(path)
        if frozen["split"] == "dev" and config.split in ("dev", "test"):
            kept = [claim for claim in frozen["claims"] if not _depends_on_split(claim)]
            frozen = {**now, "claims": kept + [claim for claim in now["claims"] if _depends_on_split(claim)]}
    elif (folder / "results.json").exists():
        raise InputError(
            f"{path}: is missing, but the study has results, so what was declared before them is unknown; restore it, "
            "or choose another --out"
        )
    else:
        frozen = now
    json_files.write_json(path, {**frozen, "sha256": hash_json(frozen)}, checksum=False)
    before, after = frozen["design"], now["design"]
    deviations = [
        f"{name} {value} → {after.get(name, 'removed')}" for name, value in before.items() if after.get(name) != value
    ]
    if missing := [seed for seed in frozen["seeds"] if seed not in config.seeds]:
        deviations.append(f"seeds {', '.join(map(str, missing))} removed")
    return Registration(
        tuple(
            claim["name"]
            for claim in now["claims"]
            if claim not in frozen["claims"] or (config.split != frozen["split"] and _depends_on_split(claim))
        ),
        tuple(
            yaml_io.from_dict(ClaimConfig, claim, where=str(path))
            for claim in frozen["claims"]
            if claim not in now["claims"]
        ),
        tuple(deviations),
        tuple(frozen["seeds"]),
    )


def _read(path: Path) -> dict[str, Any]:
    """Read the declaration."""
    found = json_files.read_json(path)
    another = f"{path}: has claims of another version of this program; choose another --out"
    if not isinstance(found, dict) or not {*_PARTS} <= found.keys():
        raise InputError(another)
    frozen = {name: found[name] for name in _PARTS}
    if hash_json(frozen) != found.get("sha256"):
        raise InputError(f"{path}: was changed after it was written; restore it")
    if any(claim.keys() != yaml_io.to_dict(ClaimConfig()).keys() for claim in frozen["claims"]):
        raise InputError(another)
    return frozen


def _depends_on_split(claim: Mapping[str, Any]) -> bool:
    """Return True for a claim about tasks or texts."""
    return claim["measure"].partition("/")[0] in ("accuracy", "task", "log_odds", "text")
