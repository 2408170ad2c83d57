"""Parse config.json in both schemas; refuse every key that is not understood."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from models_factory import FAMILIES, Family, tiny_config
from parity_cases import CASES

from jax_selftrain.errors import InputError
from jax_selftrain.hub.hf_config import parse_config
from jax_selftrain.models import abstract_params
from jax_selftrain.models.config import RopeConfig

# config.json of models as their makers published them
PUBLISHED: dict[str, dict[str, Any]] = {
    "pythia-70m": {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 512,
        "initializer_range": 0.02,
        "intermediate_size": 2048,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.24.0",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
PARAMETERS = {
    "pythia-70m": 70_426_624,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_configs_have_the_published_number_of_parameters(model: str):
    config = parse_config(PUBLISHED[model], "config.json")
    sizes = [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_params(config))]
    assert sum(sizes) == PARAMETERS[model]


def test_pythia_config_is_read():
    config = parse_config(PUBLISHED["pythia-70m"], "config.json")
    assert (config.head_dim, config.rotary_dim, config.num_kv_heads) == (64, 16, 8)
    assert config.parallel_residual
    assert config.qkv_bias
    assert config.out_bias
    assert config.mlp_bias
    assert not config.tie_word_embeddings
    assert config.rope == RopeConfig(theta=10000.0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("olmo3", "gpt2", "gpt_neo")])
def test_both_rotary_schemas_mean_the_same(family: Family):
    fraction: dict[str, Any] = (
        {"rotary_pct": 0.5, "rotary_emb_base": 30000} if family == "gpt_neox" else {"rope_theta": 30000}
    )
    old = tiny_config(family, **fraction, rope_scaling={"type": "linear", "factor": 2})
    new_rope: dict[str, Any] = {"rope_type": "linear", "rope_theta": 30000.0, "factor": 2.0}
    if family == "gpt_neox":
        new_rope["partial_rotary_factor"] = 0.5
    new = tiny_config(family, rope_parameters=new_rope)
    assert parse_config(old, "old") == parse_config(new, "new")


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_take_the_defaults_of_transformers(family: Family):
    from transformers import AutoConfig

    sizes = {"hidden_size": 256, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
    raw = {"model_type": family, "vocab_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128, **sizes}
    if family == "gpt_neox":
        del raw["num_key_value_heads"]
    if family == "gpt2":
        raw = {"model_type": family, "vocab_size": 64, "n_embd": 256, "n_head": 2, "n_layer": 2}
    if family == "gpt_neo":  # the default pattern of attention has 24 layers
        raw = {"model_type": family, "vocab_size": 64, "hidden_size": 256, "num_heads": 2, "num_layers": 24}
    written_out = json.loads(AutoConfig.for_model(**raw).to_json_string(use_diff=False))
    assert parse_config(raw, "sparse") == parse_config(written_out, "complete")


@pytest.mark.parametrize("case", CASES)
def test_what_transformers_writes_back_means_the_same(case: str, tmp_path: Path):
    from transformers import AutoConfig

    family, overrides = CASES[case]
    raw = tiny_config(family, **overrides)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert parse_config(again, "again") == parse_config(raw, "raw")


def test_olmo3_scales_the_rotation_of_full_attention_alone():
    scaled = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config = parse_config(tiny_config("olmo3", **scaled), "c")
    plain, linear = RopeConfig(500_000.0), RopeConfig(500_000.0, "linear", factor=8.0)
    assert config.layer_ropes == (plain, plain, plain, linear)
    assert config.sliding_window == (100, 100, 100, None)


def test_smollm3_rotates_all_layers_but_every_fourth():
    raw = tiny_config("smollm3", num_hidden_layers=5, no_rope_layers=None)
    ropes = parse_config(raw, "c").layer_ropes
    assert ropes is not None
    assert [rope is None for rope in ropes] == [False, False, False, True, False]


def test_qwen_windows_start_at_max_window_layers():
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "num_hidden_layers": 3}
    assert parse_config(tiny_config("qwen2", **window), "c").sliding_window == (None, 8, 8)
    off = tiny_config("qwen2", **{**window, "use_sliding_window": False})
    assert parse_config(off, "c").sliding_window is None


def test_yarn_without_factor_extends_to_all_positions():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": None, "original_max_position_embeddings": 256}
    stated = rope | {"factor": 4.0}
    assert parse_config(tiny_config("llama", rope_parameters=rope), "c") == parse_config(
        tiny_config("llama", rope_parameters=stated), "c"
    )


def test_dropout_does_not_matter_in_evaluation():
    plain = parse_config(tiny_config("gpt_neox"), "c")
    assert parse_config(tiny_config("gpt_neox", hidden_dropout=0.1, attention_dropout=0.1), "c") == plain


REFUSED: dict[str, tuple[Family, dict[str, Any], list[str]]] = {
    "unknown architecture": ("llama", {"model_type": "mamba"}, ["model_type", "'mamba'", "gpt_neox"]),
    "unknown key": ("llama", {"logit_softcapping": 30.0}, ["logit_softcapping", "30.0"]),
    "dynamic NTK": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'", "NTK"]),
    "longrope": ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ["'longrope'"]),
    "schemas that disagree": (
        "llama",
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2},
            "rope_parameters": {"rope_type": "linear", "factor": 4},
        },
        ["rope_scaling", "contradicts rope_parameters in factor"],
    ),
    "theta in one schema": (
        "llama",
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2},
            "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 5e5},
        },
        ["rope_scaling", "contradicts rope_parameters in rope_theta"],
    ),
    "layers of a damaged file": ("llama", {"num_hidden_layers": 10**9}, ["num_hidden_layers", "10,000"]),
    "theta beyond float64": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e999}},
        ["rope_theta"],
    ),
    "kinds that are no text": ("qwen2", {"layer_types": [{}, {}]}, ["layer_types"]),
    "unknown rope": ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, ["'mrope'"]),
    "stray rope key": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 1}}, ["alpha"]),
    "rope without factor": ("llama", {"rope_scaling": {"type": "linear"}}, ["factor", "None"]),
    "nested rope": ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["full_attention"]),
    "contradicting theta": ("llama", {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, ["contradict"]),
    "two rope schemas": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        ["rope_scaling", "rope_parameters"],
    ),
    "llama3 out of order": (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
        ["low_freq_factor", "high_freq_factor"],
    ),
    "activation": ("gpt_neox", {"hidden_act": "mish"}, ["hidden_act", "'mish'"]),
    "quantized": ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
    "custom code": ("llama", {"auto_map": {"AutoModel": "x.Y"}}, ["auto_map"]),
    "cross attention": ("llama", {"add_cross_attention": True}, ["add_cross_attention"]),
    "not causal": ("llama", {"is_causal": False}, ["is_causal"]),
    "missing size": ("llama", {"hidden_size": None}, ["hidden_size", "missing"]),
    "wrong type": ("llama", {"num_hidden_layers": "2"}, ["num_hidden_layers", "'2'", "int"]),
    "flag as number": ("llama", {"tie_word_embeddings": 1}, ["tie_word_embeddings", "bool"]),
    "zero layers": ("llama", {"num_hidden_layers": 0}, ["num_hidden_layers", "at least 1"]),
    "negative eps": ("llama", {"rms_norm_eps": -1.0}, ["rms_norm_eps", "positive"]),
    "heads do not divide": ("gpt_neox", {"num_attention_heads": 7}, ["hidden_size", "num_attention_heads"]),
    "kv heads do not divide": ("llama", {"num_key_value_heads": 3}, ["num_key_value_heads"]),
    "odd rotary": ("gpt_neox", {"rotary_pct": 0.2}, ["rotary fraction", "even"]),
    "partial rotary llama": ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    "window types off": (
        "qwen2",
        {"layer_types": ["sliding_attention", "full_attention"]},
        ["layer_types", "use_sliding_window"],
    ),
    "other layer types": ("qwen3", {"layer_types": ["linear_attention"] * 2}, ["layer_types"]),
    "llama windows": ("llama", {"layer_types": ["sliding_attention"] * 2}, ["layer_types"]),
    "types of another kind": ("qwen3", {"layer_types": [["full_attention"], {}]}, ["layer_types"]),
    "mistral layer types": ("mistral", {"layer_types": ["full_attention"] * 2}, ["layer_types"]),
    "olmo2 windows": ("olmo2", {"layer_types": ["sliding_attention"] * 2}, ["layer_types"]),
    "olmo3 without window": ("olmo3", {"sliding_window": None}, ["layer_types", "sliding_window"]),
    "olmo3 other theta": ("olmo3", {"rope_theta": 10000.0}, ["rope_theta", "10000.0", "versions of transformers"]),
    "olmo3 flat rope": ("olmo3", {"rope_parameters": {"rope_type": "default"}}, ["rope_parameters"]),
    "smollm3 few flags": ("smollm3", {"no_rope_layers": [1]}, ["no_rope_layers", "2 layers"]),
    "smollm3 other flags": ("smollm3", {"no_rope_layers": [1, 2]}, ["no_rope_layers"]),
    "gpt2 scale": ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights"]),
    "gpt2 scale by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
    "gpt2 cross attention": ("gpt2", {"add_cross_attention": True}, ["add_cross_attention"]),
    "gpt2 in its own words": ("gpt2", {"n_embd": 66}, ["n_embd = 66"]),
    "gpt2 in other words": ("gpt2", {"hidden_size": 64}, ["hidden_size"]),
    "gpt-neo pattern": ("gpt_neo", {"attention_types": [[["global"], 3]]}, ["attention_types", "2 layers"]),
    "gpt-neo kind": ("gpt_neo", {"attention_types": [[["sparse"], 2]]}, ["attention_types"]),
    "gpt-neo no pattern": ("gpt_neo", {"attention_types": [3]}, ["attention_types"]),
    "gpt-neo two patterns": ("gpt_neo", {"attention_layers": ["local", "local"]}, ["attention_layers"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case: str):
    family, overrides, words = REFUSED[case]
    with pytest.raises(InputError) as caught:
        parse_config(tiny_config(family, **overrides), "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json")
    for word in words:
        assert word in message
    assert "\n" not in message


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
AS_FOUND: dict[str, tuple[Family, dict[str, Any]]] = {
    "both schemas": (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": _LLAMA3, "rope_parameters": {**_LLAMA3, "rope_theta": 5e5}},
    ),
    "both schemas, old name of the type": (
        "qwen2",
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ),
    "attn_factor": ("qwen3", {"rope_theta": 1e6, "rope_scaling": {**_YARN, "attn_factor": 0.878}}),
    "finetuned": ("llama", {"rope_scaling": {**_YARN, "finetuned": True}}),
    "keys of other programs": (
        "gpt_neox",
        {"custom_pipelines": {"text-generation": {}}, "num_steps": "global_step301000", "_flash_attn_2_enabled": True},
    ),
    "more keys of other programs": (
        "llama",
        {"tokenizer_model_max_length": 2048, "tokenizer_padding_side": "right", "use_deepspeed_checkpointing": True},
    ),
    "unread long-context settings": ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 262144}}),
    "null and false": ("llama", {"sliding_window": None, "use_sliding_window": False, "bias": False}),
}


@pytest.mark.parametrize("case", AS_FOUND)
def test_configs_as_found_mean_what_transformers_reads(case: str, tmp_path: Path):
    from transformers import AutoConfig

    family, overrides = AS_FOUND[case]
    raw = tiny_config(family, **overrides)
    read = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    rope = dict(read.rope_parameters)
    for unread in ("attn_factor", "finetuned"):
        rope.pop(unread, None)
    expected = tiny_config(family, rope_parameters=rope)
    assert parse_config(raw, "found") == parse_config(expected, "transformers")


def test_features_switched_off_are_accepted():
    off: dict[str, Any] = {
        "quantization_config": None,
        "is_encoder_decoder": False,
        "pruned_heads": {},
        "tie_encoder_decoder": False,
    }
    plain = parse_config(tiny_config("qwen3"), "c")
    assert parse_config(tiny_config("qwen3", **off), "c") == plain
    assert parse_config(tiny_config("qwen3", initializer_range=0.1), "c") == replace(plain, initializer_range=0.1)
