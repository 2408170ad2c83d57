"""Translate `config.json`: every key is read, known to be irrelevant, or refused.

A key that no code reads makes a model subtly wrong. Keys that are not read must be in `_IGNORED` or `_DISABLED_VALUES`
(as in penzai). Absent keys have the defaults of transformers; sizes are required.

Both schemas of rotary settings are read: transformers 4 (`rope_theta`, `rope_scaling`; GPT-NeoX `rotary_emb_base`,
`rotary_pct`) and 5 (`rope_parameters`).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from jax_selftrain.errors import InputError
from jax_selftrain.hub.families import FAMILIES, ConfigSchema, Switch
from jax_selftrain.models import DecoderConfig
from jax_selftrain.models.config import RopeConfig

_ACTIVATIONS: dict[str, Any] = {"gelu": "gelu", "gelu_python": "gelu", "silu": "silu", "swish": "silu", "relu": "relu"}
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

_ROPE_KINDS = ("default", "linear", "llama3", "yarn")
_ROPE_REFUSED = {
    "dynamic": "dynamic NTK: its cached and its full forward pass disagree in transformers itself",
    "longrope": "its frequencies depend on the length of the input",
    "su": "longrope: its frequencies depend on the length of the input",
}


def parse_config(raw: Mapping[str, Any], path: str) -> DecoderConfig:
    """Translate the content of the config.json at `path`.

    Raises:
      InputError: the architecture is unknown, or a key is missing, unknown, contradictory or out of range.
    """
    if not isinstance(raw, Mapping):
        raise InputError(f"{path}: is not a JSON object; it should be the config.json of a Hugging Face model")
    keys = _Keys(raw, path, _IGNORED_KEYS)
    family = keys.pop("model_type", str, None)
    if family not in FAMILIES:
        raise InputError(f"{path}: model_type {family!r} is not supported; choose from {', '.join(FAMILIES)}")
    config = _decoder_config(keys, FAMILIES[family].schema)
    keys.finish()
    return config


class _Keys:
    """The raw config or its rotary settings, with the known keys."""

    def __init__(self, raw: Mapping[str, Any], path: str, ignored: Iterable[str]):
        self._raw, self.path, self._known = raw, path, set(ignored)

    def __contains__(self, key: str) -> bool:
        return key in self._raw

    def pop(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """Read a key; refuse another type (bool is not int)."""
        self._known.add(key)
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

    def number(self, key: str, default: float | None = None) -> float:
        """Read a positive finite number; required unless there is a default."""
        value = self.pop(key, (int, float), default)
        if value is None or not (math.isfinite(value) and value > 0):
            self.refuse(key, "should be a positive number")
        return float(value)

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise InputError about a key."""
        raise InputError(f"{self.path}: {key} = {self._raw.get(key)!r} {why}")

    def finish(self) -> None:
        """Raise InputError about any key that no reader read."""
        for key, value in self._raw.items():
            if key not in self._known and value not in _DISABLED_VALUES.get(key, ()):
                self.refuse(key, "is not supported: ignoring it could change the model's output")


def _decoder_config(keys: _Keys, schema: ConfigSchema) -> DecoderConfig:
    def read(switch: Switch) -> bool:
        return switch if isinstance(switch, bool) else keys.pop(switch[0], bool, switch[1])

    hidden_size, layers, heads = map(keys.size, ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    kv_heads, head_dim = heads, schema.head_dim
    if schema.has_head_keys:
        # Qwen's classes default to 32 key/value heads, which fits only models that say so; absent means all heads.
        kv_heads = keys.size("num_key_value_heads", heads)
        if heads % kv_heads:
            keys.refuse("num_key_value_heads", f"does not divide num_attention_heads = {heads}")
        head_dim = keys.pop("head_dim", int, head_dim)
    if head_dim is None:
        if hidden_size % heads:
            keys.refuse("hidden_size", f"is not a multiple of num_attention_heads = {heads}")
        head_dim = hidden_size // heads
    positions = keys.size("max_position_embeddings", schema.max_positions)
    rope, fraction = _rope(keys, positions, schema)
    if schema.has_head_keys and fraction != 1.0:
        raise InputError(f"{keys.path}: partial_rotary_factor = {fraction} is not supported for this family")
    rotary_dim = int(head_dim * fraction)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise InputError(
            f"{keys.path}: rotary fraction {fraction} rotates {rotary_dim} of {head_dim}; it should be even"
        )
    activation = keys.pop("hidden_act", str, schema.activation)
    if activation not in _ACTIVATIONS:
        keys.refuse("hidden_act", f"is not supported; choose from {', '.join(_ACTIVATIONS)}")
    return DecoderConfig(
        vocab_size=keys.size("vocab_size"),
        hidden_size=hidden_size,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=keys.size("intermediate_size"),
        max_positions=positions,
        norm=schema.norm,
        norm_eps=keys.number(*schema.norm_eps),
        activation=_ACTIVATIONS[activation],
        gated_mlp=schema.gated_mlp,
        parallel_residual=read(schema.parallel_residual),
        rotary_dim=rotary_dim,
        rope=rope,
        qkv_bias=read(schema.qkv_bias),
        out_bias=read(schema.out_bias),
        mlp_bias=read(schema.mlp_bias),
        qk_norm=schema.qk_norm,
        tie_word_embeddings=keys.pop("tie_word_embeddings", bool, False),
        sliding_window=_sliding_windows(keys, layers, schema.has_windows) if schema.has_head_keys else None,
        initializer_range=keys.number("initializer_range", 0.02),
    )


def _sliding_windows(keys: _Keys, layers: int, has_windows: bool) -> tuple[int | None, ...] | None:
    """Read Qwen's windows: `layer_types`, else layers from `max_window_layers` on."""
    types = keys.pop("layer_types", list, None)
    if not has_windows:
        if types is not None and set(types) != {"full_attention"}:
            keys.refuse("layer_types", "is not followed by the code of this family in transformers")
        return None
    is_used = keys.pop("use_sliding_window", bool, False)
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


def _rope(keys: _Keys, positions: int, schema: ConfigSchema) -> tuple[RopeConfig, float]:
    """Read rotary settings and the rotated fraction of a head."""
    scaling, parameters = keys.pop("rope_scaling", dict, None), keys.pop("rope_parameters", dict, None)
    if scaling and parameters:
        keys.refuse("rope_scaling", "is given together with rope_parameters; keep one of the two")
    given, name = scaling or parameters or {}, "rope_scaling" if scaling else "rope_parameters"
    rope = _Keys(given, f"{keys.path}: {name}", ignored=(key for key, value in given.items() if value is None))
    fraction_key, default = schema.rotary_fraction
    theta = _agreed_number(keys, schema.theta_key, rope, "rope_theta", 10_000.0)
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


def _llama3(rope: _Keys) -> dict[str, Any]:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        rope.refuse("low_freq_factor", f"should be below high_freq_factor = {high}")
    return {"factor": rope.number("factor"), "low_freq_factor": low, "high_freq_factor": high}


def _yarn(rope: _Keys, extension: float) -> dict[str, Any]:
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


def _agreed_number(keys: _Keys, outside: str, rope: _Keys, name: str, default: float) -> float:
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
