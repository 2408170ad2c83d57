"""Translate `config.json`: every key is read, known to be irrelevant, or refused.

A key that no code reads makes a model subtly wrong. Readers take the keys that they handle (as penzai does); the rest
must be in `_IGNORED` or in `_DISABLED_VALUES`. Absent keys have the defaults of transformers; sizes are required.

Both schemas of rotary settings are read: transformers 4 (`rope_theta`, `rope_scaling`; GPT-NeoX `rotary_emb_base`,
`rotary_pct`) and 5 (`rope_parameters`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from jax_selftrain.errors import InputError
from jax_selftrain.hub.families import FAMILIES
from jax_selftrain.models import DecoderConfig
from jax_selftrain.models.config import RopeConfig

_ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "silu": "silu", "swish": "silu", "relu": "relu"}
_ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh")

_IGNORED = {
    "provenance, storage, task heads of other classes, how transformers runs": """
        architectures transformers_version dtype torch_dtype _name_or_path name_or_path _commit_hash tokenizer_class
        id2label label2id num_labels problem_type task_specific_params finetuning_task gradient_checkpointing use_cache
        output_attentions output_hidden_states return_dict use_return_dict torchscript pretraining_tp is_decoder
        attn_implementation _attn_implementation _attn_implementation_autoset _experts_implementation
        tie_last_hidden_states keys_to_ignore_at_inference chunk_size_feed_forward use_bfloat16 tf_legacy_loss
        is_llama_config transformers.js_config unsloth_fixed unsloth_version max_sequence_length""",
    "token ids, which `resolve_special_tokens` reads": """
        bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id""",
    "dropout, which acts in training with torch only": """
        attention_dropout hidden_dropout classifier_dropout resid_pdrop embd_pdrop attention_probs_dropout_prob
        hidden_dropout_prob""",
    "settings of generate() in old configs": """
        max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
        top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
        bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
        forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
        begin_suppress_tokens max_new_tokens prefix""",
}
_IGNORED_KEYS = frozenset(key for keys in _IGNORED.values() for key in keys.split())

_DISABLED_VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("quantization_config", "auto_map", "cross_attention_hidden_size"), (None,)),
    **dict.fromkeys(("per_layer_config", "pruned_heads"), (None, {})),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"), (False, None)),
    **dict.fromkeys(("use_mrope", "rope_interleaved"), (False, None)),
    "is_causal": (True, None),
}
"""Values that switch off a feature that is not supported."""

_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
}

_ROPE_REFUSED = {
    "dynamic": "dynamic NTK: its cached and its full forward pass disagree in transformers itself",
    "longrope": "its frequencies depend on the length of the input",
    "su": "longrope: its frequencies depend on the length of the input",
}


def parse_config(raw: Mapping[str, Any], path: str) -> DecoderConfig:
    """Translate a Hugging Face config.

    Args:
      raw: the content of config.json.
      path: the file, for messages.

    Raises:
      InputError: the architecture is unknown, or a key is missing, unknown, contradictory or out of range.
    """
    if not isinstance(raw, Mapping):
        raise InputError(f"{path}: is not a JSON object; it should be the config.json of a Hugging Face model")
    keys = _Keys(raw, path)
    family = keys.pop("model_type", str, None)
    if family not in _READERS:
        raise InputError(f"{path}: model_type {family!r} is not supported; choose from {', '.join(_READERS)}")
    config = _READERS[family](keys)
    keys.finish()
    return config


class _Keys:
    """The raw config and the keys that were read."""

    def __init__(self, raw: Mapping[str, Any], path: str):
        self._raw, self.path, self._read = raw, path, set[str]()

    def __contains__(self, key: str) -> bool:
        return key in self._raw

    def pop(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """Read a key; refuse another type (bool is not int)."""
        self._read.add(key)
        value = self._raw.get(key)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            self.refuse(key, f"should be {' or '.join(k.__name__ for k in kinds)}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Read a positive whole number; required unless there is a default."""
        value = self.pop(key, int, default)
        if value is None:
            raise InputError(f"{self.path}: {key} is missing; it cannot be guessed")
        if value < 1:
            self.refuse(key, "should be at least 1")
        return value

    def number(self, key: str, default: float) -> float:
        """Read a positive finite number."""
        value = self.pop(key, (int, float), default)
        if not (math.isfinite(value) and value > 0):
            self.refuse(key, "should be a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Read true or false."""
        return self.pop(key, bool, default)

    def activation(self, default: str) -> Any:
        """Read `hidden_act`."""
        name = self.pop("hidden_act", str, default)
        if name not in _ACTIVATIONS:
            self.refuse("hidden_act", f"is not supported; choose from {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise InputError about a key."""
        raise InputError(f"{self.path}: {key} = {self._raw.get(key)!r} {why}")

    def finish(self) -> None:
        """Raise InputError about any key that no reader read."""
        for key, value in self._raw.items():
            is_known = key in self._read or key in _IGNORED_KEYS
            if not is_known and value not in _DISABLED_VALUES.get(key, ()):
                self.refuse(key, "is not supported: ignoring it could change the model's output")


# ---------------------------------------------------------------- families


def _common_fields(keys: _Keys) -> dict[str, Any]:
    return {
        "vocab_size": keys.size("vocab_size"),
        "hidden_size": keys.size("hidden_size"),
        "num_layers": keys.size("num_hidden_layers"),
        "num_heads": keys.size("num_attention_heads"),
        "intermediate_size": keys.size("intermediate_size"),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", False),
        "initializer_range": keys.number("initializer_range", 0.02),
    }


def _gpt_neox(keys: _Keys) -> DecoderConfig:
    common = _common_fields(keys)
    head_dim = _default_head_dim(keys, common)
    bias = keys.flag("attention_bias", True)
    positions = keys.size("max_position_embeddings", 2048)
    rope, fraction = _rope(keys, positions, theta_key="rotary_emb_base", fraction_key="rotary_pct", fraction=0.25)
    rotary_dim = int(head_dim * fraction)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise InputError(
            f"{keys.path}: a rotary fraction of {fraction} of heads of width {head_dim} rotates {rotary_dim} "
            "dimensions; it should be an even number of at least 2 and at most the width"
        )
    return DecoderConfig(
        **common,
        num_kv_heads=common["num_heads"],
        head_dim=head_dim,
        max_positions=positions,
        norm="layernorm",
        norm_eps=keys.number("layer_norm_eps", 1e-5),
        activation=keys.activation("gelu"),
        gated_mlp=False,
        parallel_residual=keys.flag("use_parallel_residual", True),
        rotary_dim=rotary_dim,
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        qk_norm=False,
    )


def _llama(keys: _Keys) -> DecoderConfig:
    bias = keys.flag("attention_bias", False)
    return _llama_like(keys, qkv_bias=bias, out_bias=bias, mlp_bias=keys.flag("mlp_bias", False))


def _qwen2(keys: _Keys) -> DecoderConfig:
    return _llama_like(keys, qkv_bias=True, out_bias=False, has_windows=True)


def _qwen3(keys: _Keys) -> DecoderConfig:
    bias = keys.flag("attention_bias", False)
    return _llama_like(keys, qkv_bias=bias, out_bias=bias, qk_norm=True, has_windows=True, head_dim=128)


def _llama_like(
    keys: _Keys,
    *,
    qkv_bias: bool,
    out_bias: bool,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    has_windows: bool = False,
    head_dim: int | None = None,
) -> DecoderConfig:
    common = _common_fields(keys)
    # Qwen's classes default to 32 key/value heads, which fits only models that say so; absent means all heads.
    kv_heads = keys.size("num_key_value_heads", common["num_heads"])
    if common["num_heads"] % kv_heads:
        keys.refuse("num_key_value_heads", f"does not divide num_attention_heads = {common['num_heads']}")
    given = keys.pop("head_dim", int, head_dim)
    head_dim = _default_head_dim(keys, common) if given is None else keys.size("head_dim", given)
    if head_dim % 2:
        raise InputError(f"{keys.path}: heads of odd width {head_dim} cannot be rotated; head_dim should be even")
    positions = keys.size("max_position_embeddings", 32768 if has_windows else 2048)
    rope, fraction = _rope(keys, positions, theta_key="rope_theta", fraction_key="partial_rotary_factor", fraction=1.0)
    if fraction != 1.0:
        raise InputError(
            f"{keys.path}: partial_rotary_factor = {fraction} is not supported for this family; its code in "
            "transformers does not follow it consistently"
        )
    return DecoderConfig(
        **common,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=positions,
        norm="rmsnorm",
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        activation=keys.activation("silu"),
        gated_mlp=True,
        parallel_residual=False,
        rotary_dim=head_dim,
        rope=rope,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        sliding_window=_sliding_windows(keys, common["num_layers"], has_windows),
    )


_READERS: dict[str, Callable[[_Keys], DecoderConfig]] = {
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
if _READERS.keys() != FAMILIES.keys():
    raise RuntimeError("every family needs both a tensor table and a config reader")


def _default_head_dim(keys: _Keys, common: Mapping[str, Any]) -> int:
    if common["hidden_size"] % common["num_heads"]:
        keys.refuse("hidden_size", f"is not a multiple of num_attention_heads = {common['num_heads']}")
    return common["hidden_size"] // common["num_heads"]


def _sliding_windows(keys: _Keys, layers: int, has_windows: bool) -> tuple[int | None, ...] | None:
    """Read Qwen's windows: `layer_types`, else layers from `max_window_layers` on."""
    types = keys.pop("layer_types", list, None)
    if not has_windows:
        if types is not None and set(types) != {"full_attention"}:
            keys.refuse("layer_types", "is not followed by the code of this family in transformers")
        return None
    is_used = keys.flag("use_sliding_window", False)
    window = keys.pop("sliding_window", int, 4096 if "sliding_window" not in keys else None)
    first = keys.pop("max_window_layers", int, 28)
    is_on = is_used and window is not None
    if is_on and window < 1:
        keys.refuse("sliding_window", "should be at least 1")
    if types is None:
        types = ["sliding_attention" if is_on and i >= first else "full_attention" for i in range(layers)]
    if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        keys.refuse("layer_types", f"should name full_attention or sliding_attention for each of {layers} layers")
    if "sliding_attention" not in types:
        return None
    if not is_on:
        keys.refuse("layer_types", "needs windows, but use_sliding_window is not true or sliding_window unset")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


# ---------------------------------------------------------------- rotary embeddings


def _rope(
    keys: _Keys, positions: int, *, theta_key: str, fraction_key: str, fraction: float
) -> tuple[RopeConfig, float]:
    """Read rotary settings and the rotated fraction of a head."""
    scaling, parameters = keys.pop("rope_scaling", dict, None), keys.pop("rope_parameters", dict, None)
    if scaling and parameters:
        keys.refuse("rope_scaling", "is given together with rope_parameters; keep one of the two")
    given = dict(scaling or parameters or {})
    where = f"{keys.path}: {'rope_scaling' if scaling else 'rope_parameters'}"
    theta = _require_equal(keys, given, "rope_theta", {theta_key, "rope_theta"}, 10_000.0)
    fraction = _require_equal(keys, given, "partial_rotary_factor", {fraction_key, "partial_rotary_factor"}, fraction)

    names = {given.pop(key) for key in ("rope_type", "type") if given.get(key) is not None}
    if len(names) > 1:
        raise InputError(f"{where}: rope_type and type disagree ({', '.join(sorted(map(repr, names)))})")
    kind = names.pop() if names else "default"
    if kind not in _ROPE_KEYS:
        why = _ROPE_REFUSED.get(kind, f"choose from {', '.join(_ROPE_KEYS)}")
        raise InputError(f"{where}: rope type {kind!r} is not supported ({why})")
    for key, value in given.items():
        if key not in _ROPE_KEYS[kind] and value is not None:
            raise InputError(f"{where}: {key} = {value!r} is not known for rope type {kind!r}")

    def number(key: str, default: float | None = None) -> float:
        value = default if given.get(key) is None else given[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise InputError(f"{where}: {key} = {value!r} should be a positive number for rope type {kind!r}")
        return float(value)

    if kind == "default":
        return RopeConfig(theta=theta), fraction
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=number("factor")), fraction
    # Where the length before extension is given twice, transformers uses the one outside the rotary settings.
    outside = keys.pop("original_max_position_embeddings", int, None)
    original = number("original_max_position_embeddings", outside or positions)
    if outside not in (None, original):
        keys.refuse("original_max_position_embeddings", f"contradicts {original:.0f} in the rotary settings")
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            raise InputError(f"{where}: low_freq_factor = {low} should be below high_freq_factor = {high}")
        rope = RopeConfig(theta, "llama3", number("factor"), int(original), low, high)
        return rope, fraction
    return _yarn(given, number, theta, positions, original, where), fraction


def _yarn(
    given: Mapping[str, Any], number: Callable[..., float], theta: float, positions: int, original: float, where: str
) -> RopeConfig:
    factor, truncate = number("factor", positions / original), given.get("truncate", True)
    if truncate not in (True, False, None):
        raise InputError(f"{where}: truncate = {truncate!r} should be true or false")
    scale: float | None = None if factor > 1 else 1.0
    if given.get("attention_factor") is not None:
        scale = number("attention_factor")
    elif given.get("mscale") and given.get("mscale_all_dim"):
        scale = _mscale(factor, number("mscale")) / _mscale(factor, number("mscale_all_dim"))
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_position=int(original),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=scale,
        truncate=bool(truncate),
    )


def _require_equal(keys: _Keys, given: dict[str, Any], inside: str, outside: set[str], default: float) -> float:
    """Read a number inside or outside the rotary settings, which must agree."""
    stated = [key for key in sorted(outside) if keys.pop(key, (int, float), None) is not None]
    found = {key: keys.number(key, default) for key in stated}
    nested = given.pop(inside, None)
    if nested is not None:
        if isinstance(nested, bool) or not isinstance(nested, int | float) or not nested > 0:
            raise InputError(f"{keys.path}: rope_parameters: {inside} = {nested!r} should be a positive number")
        found[f"rope_parameters.{inside}"] = float(nested)
    if len(set(found.values())) > 1:
        values = ", ".join(f"{key} = {value}" for key, value in found.items())
        raise InputError(f"{keys.path}: {values} contradict each other; keep the right one")
    return next(iter(found.values()), default)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
