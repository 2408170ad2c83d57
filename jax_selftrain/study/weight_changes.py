"""Students whose weights are changed without training: noise, and extrapolation of training.

Noise with the norm of the change of training damages a model less than training does. A control of equal damage takes a
larger weight, which is found for each seed: the damage grows with about the square of the weight.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax_selftrain import evals, hub
from jax_selftrain.config import ArmConfig, MergeConfig, ScoreConfig, yaml_io
from jax_selftrain.config.metadata import Role
from jax_selftrain.config.study import fill_options
from jax_selftrain.errors import InputError
from jax_selftrain.io import json_files
from jax_selftrain.study.dag import Stage
from jax_selftrain.study.stage_factory import StageFactory
from jax_selftrain.study.study_model import StudyModel, model_bytes

MATCHED_WITHIN = 1.1
"""Ratio of damages at which the search ends."""
MAX_WEIGHTS = 10
"""Maximum number of weights that are tried."""


def change_weights(
    stages: StageFactory, base: StudyModel, trained: StudyModel, arm: ArmConfig, seed: int
) -> StudyModel:
    """Add weight noise, or extrapolate training.

    Raises InputError if noise shall match the damage and the text that measures it is not known.
    """
    weight = 1.0 if arm.weight is None else arm.weight
    command, label = "merge", f"{base.label} merged with {trained.label} at {weight}"
    identity: dict[str, Any] = {"weight": weight}
    inputs = {"base": base.fingerprint, "student": trained.fingerprint}
    if arm.kind == "noise":
        command, label = "noise", f"{base.label} with noise of {weight:g} times the change, seed {seed}"
        identity["seed"] = seed
    options = _damage_options(stages, base) if arm.match_damage else ScoreConfig()
    if arm.match_damage:
        label = f"{base.label} with noise as damaging as {trained.label}, seed {seed}"
        identity = {"seed": seed, "match_damage": yaml_io.to_dict(options, Role.IDENTITY)}
        inputs |= {"text": stages.hashes.texts(options.texts[0], options.text_limit), "tokenizer": base.tokenizer}

    def make(out: Path) -> None:
        folder = out / "model"
        if arm.kind == "extrapolate":
            hub.merge(MergeConfig(base=base.ref, student=trained.ref, weight=weight, out=str(folder)))
        elif arm.match_damage:
            add_matching_noise(base.ref, trained.ref, out, seed, options)
        elif not folder.exists():
            hub.add_weight_noise(base.ref, trained.ref, folder, seed, weight)

    settings: dict[str, Any] = {"needs_devices": True, "model_bytes": model_bytes(base)}
    stage = Stage(command, label, identity, inputs, make, is_collective=arm.kind == "extrapolate", **settings)
    return replace(base, ref=str(stages.folder(stage) / "model"), fingerprint=stage, label=label)


def _damage_options(stages: StageFactory, base: StudyModel) -> ScoreConfig:
    """Return the options of a score of the damage text alone."""
    score = stages.config.score
    texts = {evals.text_name(text): text for text in score.texts}
    text = texts.get(base.options.damage_text) or (score.texts[0] if len(texts) == 1 else None)
    if text is None:
        raise InputError(f"arms: `match_damage` needs the `damage_text` of {base.options.name}")
    return replace(fill_options(stages.config, score, base.ref, base.options), tasks=(), texts=(text,))


def add_matching_noise(base: str, trained: str, out: Path, seed: int, options: ScoreConfig) -> None:
    """Write `out/model`: base + noise whose damage is that of training.

    Damage is the rise of bits per byte on the text of `options`. `out/noise.json` has the weight, both damages, and all
    weights that were tried. The last weight is written if none matches, or if training did no damage.
    """
    folder = out / "model"
    if folder.exists():
        return
    search = out / "search"
    shutil.rmtree(search, ignore_errors=True)  # of a killed search

    def measure(name: str, model: str | Path) -> float:
        result = evals.score(replace(options, model=str(model), out=str(search / f"{name}.json")))
        (text,) = result["texts"].values()
        return float(text["bits_per_byte"])

    before = measure("base", base)
    target = measure("trained", trained) - before

    def measure_damage(weight: float) -> float:
        place = search / f"noise {len(tried)}"
        shutil.rmtree(place, ignore_errors=True)
        hub.add_weight_noise(base, trained, place, seed, weight)
        return measure(place.name, place) - before

    tried: list[tuple[float, float]] = []
    weight = search_weight(measure_damage, target, tried)
    chosen = [one for one, _ in tried].index(weight)
    record = {"weight": weight, "damage": tried[chosen][1], "target": target, "tried": tried}
    json_files.write_json(out / "noise.json", record)
    (search / f"noise {chosen}").rename(folder)
    shutil.rmtree(search)


def search_weight(measure_damage: Callable[[float], float], target: float, tried: list[tuple[float, float]]) -> float:
    """Return the weight whose damage is nearest to the target.

    Appends (weight, damage) to `tried`. The damage is taken to grow with the square of the weight until one weight is
    too small and another too large, then to be a power between the two; a negative damage is bisected.
    """
    weight = 1.0
    while len(tried) < MAX_WEIGHTS:
        damage = measure_damage(weight)
        tried.append((weight, damage))
        if target <= 0 or 1 / MATCHED_WITHIN <= damage / target <= MATCHED_WITHIN:
            break
        low = max(((one, found) for one, found in tried if found < target), default=None)
        high = min(((one, found) for one, found in tried if found > target), default=None)
        if low is None or high is None:
            weight *= min(8.0, max(1 / 8, math.sqrt(target / damage))) if damage > 0 else 8.0
        elif low[1] <= 0:
            weight = math.sqrt(low[0] * high[0])
        else:
            power = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
            weight = low[0] * (target / low[1]) ** (1 / power)
    matched = [(abs(math.log(damage / target)), one) for one, damage in tried if damage > 0 and target > 0]
    return min(matched)[1] if matched else tried[-1][0]
