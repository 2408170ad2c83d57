"""Translate `config.json`: every key is read, known to be irrelevant, or refused.

A key that no code reads makes a model subtly wrong. Keys that are not read must be in `_IGNORED` or `_DISABLED_VALUES`
(as in penzai). Absent keys have the defaults of transformers; sizes are required.
"""

from collections.abc import Mapping
from typing import Any

from jax_selftrain.errors import InputError
from jax_selftrain.hub.config_keys import Keys
from jax_selftrain.hub.families import FAMILIES, ConfigSchema, Switch
from jax_selftrain.hub.layer_keys import read_ropes, read_windows
from jax_selftrain.models import DecoderConfig
from jax_selftrain.models.config import RopeConfig

_ACTIVATIONS: dict[str, Any] = {"gelu": "gelu", "gelu_python": "gelu", "silu": "silu", "swish": "silu", "relu": "relu"}
_ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh")

_IGNORED = {
    "provenance, storage, task heads of other classes, how transformers runs": """
        summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
        architectures transformers_version dtype torch_dtype _name_or_path name_or_path _commit_hash tokenizer_class
        id2label label2id num_labels problem_type task_specific_params finetuning_task gradient_checkpointing use_cache
        output_attentions output_hidden_states return_dict use_return_dict torchscript pretraining_tp is_decoder
        attn_implementation _attn_implementation _attn_implementation_autoset _experts_implementation
        tie_last_hidden_states keys_to_ignore_at_inference chunk_size_feed_forward use_bfloat16 tf_legacy_loss
        is_llama_config transformers.js_config unsloth_fixed unsloth_version model_type
        reorder_and_upcast_attn custom_pipelines num_steps _flash_attn_2_enabled tokenizer_model_max_length
        tokenizer_padding_side use_deepspeed_checkpointing dual_chunk_attention_config""",
    "lengths that old configs repeat": "max_sequence_length seq_length n_ctx",
    "token ids, which `resolve_special_tokens` reads": """
        bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id end_token_id""",
    "dropout, which acts in training with torch only": """
        attention_dropout hidden_dropout classifier_dropout resid_pdrop embd_pdrop attn_pdrop
        attention_probs_dropout_prob hidden_dropout_prob resid_dropout embed_dropout""",
    "settings of generate() in old configs": """
        max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
        top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
        bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
        forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
        begin_suppress_tokens max_new_tokens prefix""",
}
_MAX_LAYERS = 10_000
_IGNORED_KEYS = frozenset(key for keys in _IGNORED.values() for key in keys.split())

_DISABLED_VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("quantization_config", "auto_map", "cross_attention_hidden_size"), (None,)),
    **dict.fromkeys(("per_layer_config", "pruned_heads"), (None, {})),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"), (False, None)),
    **dict.fromkeys(("use_mrope", "rope_interleaved"), (False, None)),
    "is_causal": (True, None),
    "scale_attn_weights": (True, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
}
"""Values that switch off a feature that is not supported."""


def parse_config(raw: Mapping[str, Any], path: str) -> DecoderConfig:
    """Translate the content of the config.json at `path`.

    Raises:
      InputError: the architecture is unknown, or a key is missing, unknown, contradictory or out of range.
    """
    if not isinstance(raw, Mapping):
        raise InputError(f"{path}: is not a JSON object; it should be the config.json of a Hugging Face model")
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise InputError(
            f"{path}: model_type {raw.get('model_type')!r} is not supported; choose from {', '.join(FAMILIES)}"
        )
    keys = Keys(raw, path, _IGNORED_KEYS, family.schema.keys)
    config = _decoder_config(keys, family.schema)
    keys.finish(_DISABLED_VALUES)
    return config


def _decoder_config(keys: Keys, schema: ConfigSchema) -> DecoderConfig:
    def read(switch: Switch) -> bool:
        return switch if isinstance(switch, bool) else keys.pop(switch[0], bool, switch[1])

    hidden_size, layers, heads = map(keys.size, ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    if layers > _MAX_LAYERS:
        keys.refuse("num_hidden_layers", f"is more than {_MAX_LAYERS:,} layers; the file is damaged")
    kv_heads, head_dim = heads, schema.head_dim
    if schema.has_head_keys:
        # Qwen's classes default to 32 key/value heads, which fits only models that say so; absent means all heads.
        kv_heads = keys.size("num_key_value_heads", heads)
        if heads % kv_heads:
            keys.refuse("num_key_value_heads", f"does not divide num_attention_heads = {heads}")
        head_dim = keys.pop("head_dim", int, head_dim)
    if head_dim is None:
        if hidden_size % heads:
            keys.refuse("hidden_size", f"is not a multiple of {keys.name('num_attention_heads')} = {heads}")
        head_dim = hidden_size // heads
    positions = keys.size("max_position_embeddings", schema.max_positions)
    windows = read_windows(keys, layers, schema) if schema.has_head_keys or schema.windows else None
    rope, layer_ropes, fraction = RopeConfig(), None, 0.0
    if not schema.learned_positions:
        rope, layer_ropes, fraction = read_ropes(keys, windows, layers, positions, schema)
        if schema.has_head_keys and fraction != 1.0:
            raise InputError(f"{keys.path}: partial_rotary_factor = {fraction} is not supported for this family")
    rotary_dim = int(head_dim * fraction)
    if rotary_dim % 2 or not (schema.learned_positions or 0 < rotary_dim <= head_dim):
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
        intermediate_size=keys.size("intermediate_size", schema.mlp_ratio and schema.mlp_ratio * hidden_size),
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
        tie_word_embeddings=keys.pop("tie_word_embeddings", bool, schema.tie_word_embeddings),
        sliding_window=windows,
        layer_ropes=layer_ropes,
        post_norm=schema.post_norm,
        learned_positions=schema.learned_positions,
        attention_scale=schema.attention_scale,
        initializer_range=keys.number("initializer_range", 0.02),
    )
