"""Rotation and sliding windows of layers, as config.json gives them.

Both schemas of rotary settings are read: transformers 4 (`rope_theta`, `rope_scaling`; GPT-NeoX `rotary_emb_base`,
`rotary_pct`) and 5 (`rope_parameters`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax_selftrain.errors import InputError
from jax_selftrain.hub.config_keys import Keys
from jax_selftrain.hub.families import ConfigSchema
from jax_selftrain.models.config import RopeConfig

_ROPE_KINDS = ("default", "linear", "llama3", "yarn")
_ROPE_REFUSED = {
    "dynamic": "dynamic NTK: its cached and its full forward pass disagree in transformers itself",
    "longrope": "its frequencies depend on the length of the input",
    "su": "longrope: its frequencies depend on the length of the input",
}


def read_windows(keys: Keys, layers: int, schema: ConfigSchema) -> tuple[int | None, ...] | None:
    """Read the window of each layer; None if no layer has one."""
    if schema.windows == "gpt_neo":
        return _gpt_neo_windows(keys, layers)
    types = keys.pop("layer_types", list, None)
    if schema.windows is None:
        if types is not None and any(kind != "full_attention" for kind in types):
            keys.refuse("layer_types", "is not followed by the code of this family in transformers")
        return None
    is_used = schema.windows in ("mistral", "olmo3") or keys.pop("use_sliding_window", bool, False)
    default = None if schema.windows == "smollm3" else 4096
    window = keys.pop("sliding_window", int, None if "sliding_window" in keys else default)
    first = keys.pop("max_window_layers", int, 28) if schema.windows == "qwen" else 0
    is_on = is_used and window is not None
    if is_on and window < 1:
        keys.refuse("sliding_window", "should be at least 1")

    rotated = _rotated_layers(keys, layers) if schema.windows == "smollm3" else [False] * layers

    def has_window(layer: int) -> bool:
        if schema.windows == "olmo3":
            return bool((layer + 1) % 4)
        return is_on and layer >= first and not rotated[layer]

    expected = ["sliding_attention" if has_window(layer) else "full_attention" for layer in range(layers)]
    if types is None:
        types = expected
    elif schema.windows == "mistral" and types != expected:
        keys.refuse("layer_types", "is not followed by the code of this family in transformers")
    if len(types) != layers or not all(kind in ("full_attention", "sliding_attention") for kind in types):
        keys.refuse("layer_types", f"should name full_attention or sliding_attention for each of {layers} layers")
    if "sliding_attention" not in types:
        return None
    if not is_on:
        keys.refuse("layer_types", "needs windows, but use_sliding_window is not true or sliding_window unset")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _gpt_neo_windows(keys: Keys, layers: int) -> tuple[int | None, ...] | None:
    """Read `attention_types`, such as [[["global", "local"], 12]], and its copy `attention_layers`."""
    groups = keys.pop("attention_types", list, [[["global", "local"], 12]])
    try:
        kinds = [kind for pattern, repeats in groups for kind in pattern * repeats]
    except (TypeError, ValueError):
        keys.refuse("attention_types", 'should be pairs of kinds and repeats, such as [[["global", "local"], 12]]')
    if len(kinds) != layers or not all(kind in ("global", "local") for kind in kinds):
        keys.refuse("attention_types", f"should give global or local for each of {layers} layers")
    if keys.pop("attention_layers", list, kinds) != kinds:
        keys.refuse("attention_layers", "contradicts attention_types")
    window = keys.size("window_size", 256)
    return tuple(window if kind == "local" else None for kind in kinds) if "local" in kinds else None


def _rotated_layers(keys: Keys, layers: int) -> list[bool]:
    """Read which layers of SmolLM3 have rotation (1 in `no_rope_layers`)."""
    interval = keys.size("no_rope_layer_interval", 4)
    flags = keys.pop("no_rope_layers", list, [int((layer + 1) % interval != 0) for layer in range(layers)])
    if len(flags) < layers or not all(flag in (0, 1) for flag in flags):
        keys.refuse("no_rope_layers", f"should have 1 or 0 for each of {layers} layers")
    return [bool(flag) for flag in flags[:layers]]


def read_ropes(
    keys: Keys, windows: Sequence[int | None] | None, layers: int, positions: int, schema: ConfigSchema
) -> tuple[RopeConfig, tuple[RopeConfig | None, ...] | None, float]:
    """Read rotary settings.

    Args:
      windows: sliding windows, of `read_windows`.

    Returns:
      The settings; those of each layer if they differ; and the rotated fraction of a head.
    """
    if schema.ropes == "olmo3":
        by_type = _olmo3_ropes(keys, positions, schema)
        kinds = ("full_attention" if window is None else "sliding_attention" for window in windows or [None] * layers)
        ropes = tuple(by_type[kind] for kind in kinds)
        return ropes[-1], ropes if len(set(ropes)) > 1 else None, 1.0
    scaling, parameters = keys.pop("rope_scaling", dict, None), keys.pop("rope_parameters", dict, None)
    given = scaling or parameters or {}
    if scaling and parameters:
        given = _agreed_settings(keys, scaling, parameters, schema)
    rope, fraction = _rope(keys, given, "rope_scaling" if scaling else "rope_parameters", positions, schema)
    if schema.ropes == "smollm3" and not all(rotated := _rotated_layers(keys, layers)):
        return rope, tuple(rope if flag else None for flag in rotated), fraction
    return rope, None, fraction


def _agreed_settings(
    keys: Keys, scaling: Mapping[str, Any], parameters: Mapping[str, Any], schema: ConfigSchema
) -> dict[str, Any]:
    """Merge the settings of both schemas, which must agree.

    transformers reads `rope_scaling` alone; its theta and rotary fraction are those outside, or the defaults.
    """
    one, other = (
        {"rope_type": "default"}
        | {"rope_type" if key == "type" else key: value for key, value in given.items() if value is not None}
        for given in (scaling, parameters)
    )
    outside = {"rope_theta": (schema.theta_key, schema.theta), "partial_rotary_factor": schema.rotary_fraction}
    for name in sorted(one.keys() | other.keys()):
        key, default = outside.get(name, ("", None))
        expected = one.get(name, default)
        if name in other and name not in one and (name in keys or key in keys):
            continue  # `_agreed_number` compares it with the value outside
        if name in other and other[name] != expected:
            keys.refuse("rope_scaling", f"contradicts rope_parameters in {name}; keep one of the two")
    return other | one


def _olmo3_ropes(keys: Keys, positions: int, schema: ConfigSchema) -> dict[str, RopeConfig]:
    """Read `rope_parameters` by type of layer.

    In older configs, `rope_scaling` is that of full attention.
    """
    kinds = ("full_attention", "sliding_attention")
    by_type, scaling = keys.pop("rope_parameters", dict, None), keys.pop("rope_scaling", dict, None)
    if by_type is None:
        by_type = {kinds[0]: scaling or {}}
        if keys.pop("rope_theta", (int, float), schema.theta) != schema.theta:
            keys.refuse("rope_theta", "outside rope_parameters: versions of transformers use it for different layers")
    elif scaling or not set(by_type) <= set(kinds):
        keys.refuse("rope_parameters", f"should have {' and '.join(kinds)}, without rope_scaling")
    return {
        kind: _rope(keys, by_type.get(kind) or {}, f"rope_parameters.{kind}", positions, schema)[0] for kind in kinds
    }


def _rope(
    keys: Keys, given: Mapping[str, Any], name: str, positions: int, schema: ConfigSchema
) -> tuple[RopeConfig, float]:
    """Read the settings in `given` and the rotated fraction of a head."""
    rope = Keys(given, f"{keys.path}: {name}", ignored=(key for key, value in given.items() if value is None))
    fraction_key, default = schema.rotary_fraction
    theta = _agreed_number(keys, schema.theta_key, rope, "rope_theta", schema.theta)
    fraction = _agreed_number(keys, fraction_key, rope, "partial_rotary_factor", default)
    kinds = {rope.pop(key, str, None) for key in ("rope_type", "type")} - {None}
    if len(kinds) > 1:
        raise InputError(f"{rope.path}: rope_type and type disagree ({', '.join(sorted(kinds))})")
    kind: Any = kinds.pop() if kinds else "default"
    if kind not in _ROPE_KINDS:
        why = _ROPE_REFUSED.get(kind, f"choose from {', '.join(_ROPE_KINDS)}")
        raise InputError(f"{rope.path}: rope type {kind!r} is not supported ({why})")
    settings: dict[str, Any] = {}
    if kind == "linear":
        settings = {"factor": rope.number("factor")}
    elif kind != "default":
        # Where the length before extension is given twice, transformers uses the one outside the rotary settings.
        outside = keys.pop("original_max_position_embeddings", int, None)
        original = rope.number("original_max_position_embeddings", outside or positions)
        if outside not in (None, original):
            keys.refuse("original_max_position_embeddings", f"contradicts {original:.0f} in the rotary settings")
        settings = _llama3(rope) if kind == "llama3" else _yarn(rope, positions / original)
        settings["original_max_position"] = int(original)
    rope.finish()
    return RopeConfig(theta, kind, **settings), fraction


def _llama3(rope: Keys) -> dict[str, Any]:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        rope.refuse("low_freq_factor", f"should be below high_freq_factor = {high}")
    return {"factor": rope.number("factor"), "low_freq_factor": low, "high_freq_factor": high}


def _yarn(rope: Keys, extension: float) -> dict[str, Any]:
    for key in ("attn_factor", "finetuned"):  # of other implementations; transformers does not read them
        rope.pop(key, object, None)
    factor = rope.number("factor", extension)
    scale: float | None = None if factor > 1 else 1.0
    numerator, denominator = (rope.pop(key, (int, float), None) for key in ("mscale", "mscale_all_dim"))
    if rope.pop("attention_factor", (int, float), None) is not None:
        scale = rope.number("attention_factor")
    elif numerator and denominator:
        scale = _mscale(factor, rope.number("mscale")) / _mscale(factor, rope.number("mscale_all_dim"))
    return {
        "factor": factor,
        "beta_fast": rope.number("beta_fast", 32.0),
        "beta_slow": rope.number("beta_slow", 1.0),
        "attention_factor": scale,
        "truncate": rope.pop("truncate", bool, "truncate" not in rope),
    }


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _agreed_number(keys: Keys, outside: str, rope: Keys, name: str, default: float) -> float:
    """Read a number inside or outside the rotary settings, which must agree."""
    stated = {outside: (keys, outside), name: (keys, name), f"rope_parameters.{name}": (rope, name)}
    found = {
        label: where.number(key)
        for label, (where, key) in stated.items()
        if where.pop(key, (int, float), None) is not None
    }
    if len(set(found.values())) > 1:
        values = ", ".join(f"{label} = {value}" for label, value in found.items())
        raise InputError(f"{keys.path}: {values} contradict each other; keep the right one")
    return next(iter(found.values()), default)
