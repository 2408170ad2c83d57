"""Small Hugging Face models with random weights for tests, written without torch.

`write_tiny_hf_model` writes config.json, model.safetensors and tokenizer.json, as `transformers` does. The names and
shapes of tensors do not come from `jax_selftrain.hub`, so that the tests find errors there. Norm scales and biases are
not 1 and 0, so that a forward pass without one of them gives other logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

Family = Literal["gpt_neox", "llama", "qwen2", "qwen3", "mistral", "olmo2", "olmo3", "smollm3", "gpt2", "gpt_neo"]
FAMILIES: tuple[Family, ...] = get_args(Family)
OF_EACH_TABLE = [
    pytest.param(family, marks=[] if family in ("gpt_neox", "llama", "olmo2", "gpt2") else pytest.mark.nightly)
    for family in FAMILIES
]
"""All families, every day one of each kind of table."""
WeightType = Literal["float32", "bfloat16", "float16", "mixed"]

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
_CLASSES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "smollm3": "SmolLM3",
}
_ROPE_KEYS = {"rope_parameters", "rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base", "partial_rotary_factor"}


def tiny_config(family: Family, *, vocab_size: int = 512, **overrides: Any) -> dict[str, Any]:
    """Return the raw `config.json` of a small model.

    It has D 64, L 2, H 4, K 16, F 96 (GPT-NeoX: 128) and 1024 positions. `overrides` are raw config keys. A rotary key
    among them replaces all default rotary keys of the family, so that a test can use the keys of transformers 4
    (`rope_theta`, `rope_scaling`, `rotary_pct`) or 5 (`rope_parameters`).
    """
    common: dict[str, Any] = {
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "tie_word_embeddings": False,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if family == "gpt_neox":
        own = {
            "architectures": ["GPTNeoXForCausalLM"],
            "intermediate_size": 128,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "attention_bias": True,
        }
        rope["partial_rotary_factor"] = 0.25
    elif family in ("gpt2", "gpt_neo"):
        return _gpt2_config(common) | overrides if family == "gpt2" else _gpt_neo_config(common) | overrides
    else:
        own = {
            "architectures": [_CLASSES[family] + "ForCausalLM"],
            "intermediate_size": 96,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
        }
        if family == "llama":
            own |= {"attention_bias": False, "mlp_bias": False}
        if family == "qwen3":
            own |= {"attention_bias": False, "head_dim": 16}
        if family == "mistral":
            own |= {"sliding_window": 100}
        if family == "olmo3":
            own |= {"num_hidden_layers": 4, "sliding_window": 100}
            rope = {"full_attention": rope, "sliding_attention": rope}
        if family == "smollm3":
            own |= {"no_rope_layers": [1, 0], "use_sliding_window": False, "mlp_bias": False, "pad_token_id": EOS_ID}
    schema = {} if _ROPE_KEYS & overrides.keys() else {"rope_parameters": rope}
    return common | own | schema | overrides


def _gpt2_config(common: dict[str, Any]) -> dict[str, Any]:
    names = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }
    own = {"architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    return {names.get(key, key): value for key, value in common.items()} | own | {"tie_word_embeddings": True}


def _gpt_neo_config(common: dict[str, Any]) -> dict[str, Any]:
    names = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
    own = {
        "architectures": ["GPTNeoForCausalLM"],
        "activation_function": "gelu_new",
        "attention_types": [[["global", "local"], 1]],
        "window_size": 100,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    }
    return {names.get(key, key): value for key, value in common.items()} | own


def _gpt2_tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of GPT-2, whose matrices are stored inputs first, and of GPT-Neo."""
    is_gpt2 = config["model_type"] == "gpt2"
    width = config["n_embd" if is_gpt2 else "hidden_size"]
    mlp = config.get("n_inner" if is_gpt2 else "intermediate_size") or 4 * width
    positions = config["n_positions" if is_gpt2 else "max_position_embeddings"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config["vocab_size"], width),
        "transformer.wpe.weight": (positions, width),
    }
    for i in range(config["n_layer" if is_gpt2 else "num_layers"]):
        layer = f"transformer.h.{i}"
        for norm in ("ln_1", "ln_2"):
            shapes[f"{layer}.{norm}.weight"] = shapes[f"{layer}.{norm}.bias"] = (width,)
        if is_gpt2:
            matrices = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
            matrices |= {"mlp.c_fc": (width, mlp), "mlp.c_proj": (mlp, width)}
        else:
            matrices = {f"attn.attention.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
            matrices |= {"mlp.c_fc": (mlp, width), "mlp.c_proj": (width, mlp)}
        for name, shape in matrices.items():
            shapes[f"{layer}.{name}.weight"] = shape
            if not name.endswith(("q_proj", "k_proj", "v_proj")):
                shapes[f"{layer}.{name}.bias"] = (shape[1 if is_gpt2 else 0],)
    shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return shapes


def tiny_tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors of a raw config."""
    family = config["model_type"]
    if family in ("gpt2", "gpt_neo"):
        return _gpt2_tensor_shapes(config)
    width, heads, vocab = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    mlp = config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    if family == "gpt_neox":
        shapes["gpt_neox.embed_in.weight"] = (vocab, width)
        bias = config.get("attention_bias", True)
        for i in range(config["num_hidden_layers"]):
            layer = f"gpt_neox.layers.{i}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{layer}.{norm}.weight"] = shapes[f"{layer}.{norm}.bias"] = (width,)
            linear(f"{layer}.attention.query_key_value", 3 * width, width, bias)
            linear(f"{layer}.attention.dense", width, width, bias)
            linear(f"{layer}.mlp.dense_h_to_4h", mlp, width, True)
            linear(f"{layer}.mlp.dense_4h_to_h", width, mlp, True)
        shapes["gpt_neox.final_layer_norm.weight"] = shapes["gpt_neox.final_layer_norm.bias"] = (width,)
        if not config["tie_word_embeddings"]:
            shapes["embed_out.weight"] = (vocab, width)
        return shapes

    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or width // heads
    attention_bias = bool(config.get("attention_bias", False))
    qkv_bias = True if family == "qwen2" else attention_bias
    out_bias = False if family == "qwen2" else attention_bias
    is_olmo = family in ("olmo2", "olmo3")
    norms = ("post_attention_layernorm", "post_feedforward_layernorm" if is_olmo else "input_layernorm")
    mlp_bias = family in ("llama", "smollm3") and bool(config.get("mlp_bias", False))
    shapes["model.embed_tokens.weight"] = (vocab, width)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}.weight": (width,) for norm in norms}
        linear(f"{layer}.self_attn.q_proj", heads * head_dim, width, qkv_bias)
        linear(f"{layer}.self_attn.k_proj", kv_heads * head_dim, width, qkv_bias)
        linear(f"{layer}.self_attn.v_proj", kv_heads * head_dim, width, qkv_bias)
        linear(f"{layer}.self_attn.o_proj", width, heads * head_dim, out_bias)
        if family == "qwen3":
            shapes[f"{layer}.self_attn.q_norm.weight"] = shapes[f"{layer}.self_attn.k_norm.weight"] = (head_dim,)
        if is_olmo:
            shapes[f"{layer}.self_attn.q_norm.weight"] = (heads * head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (kv_heads * head_dim,)
        linear(f"{layer}.mlp.gate_proj", mlp, width, mlp_bias)
        linear(f"{layer}.mlp.up_proj", mlp, width, mlp_bias)
        linear(f"{layer}.mlp.down_proj", width, mlp, mlp_bias)
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    return shapes


def tiny_weights(config: Mapping[str, Any], seed: int = 0, dtype: WeightType = "float32") -> dict[str, np.ndarray]:
    """Return random tensors, the same on every platform and NumPy version.

    Matrices preserve the variance of their input, so that every part of a layer affects the logits (whose standard
    deviation is between 1 and 3). `mixed` cycles through float32, bfloat16 and float16.
    """
    width = config.get("hidden_size") or config["n_embd"]
    bits = np.random.Philox(seed)
    types = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
    one_type = {"float32": types[0], "bfloat16": types[1], "float16": types[2]}
    weights = {}
    for n, (name, shape) in enumerate(sorted(tiny_tensor_shapes(config).items())):
        draw = _draw_irwin_hall(bits, shape)
        if name.endswith(("embed_tokens.weight", "embed_in.weight", "wte.weight", "wpe.weight")):
            draw *= 2.0 / np.sqrt(width)
        elif len(shape) == 2:
            draw /= np.sqrt(shape[0 if config["model_type"] == "gpt2" and name != "lm_head.weight" else 1])
        else:
            draw *= 0.2
            if name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
                draw += 1.0
        weights[name] = draw.astype(types[n % 3] if dtype == "mixed" else one_type[dtype])
    return weights


def _draw_irwin_hall(bits: np.random.Philox, shape: tuple[int, ...]) -> np.ndarray:
    """Return sums of four 16-bit uniforms with zero mean and unit variance.

    NumPy guarantees the raw bits of a generator in all versions, but not its normal variates; golden logits need the
    same weights on every machine.
    """
    raw = np.asarray(bits.random_raw(int(np.prod(shape))), dtype="<u8").view("<u2").reshape(-1, 4)
    centered = raw.sum(axis=1, dtype=np.int64) - 2 * 65535
    return (centered / np.sqrt((65536.0**2 - 1) / 3)).astype(np.float32).reshape(shape)


def write_tiny_hf_model(
    folder: str | Path,
    family: Family,
    *,
    vocab_size: int = 512,
    seed: int = 0,
    tokenizer: bool = True,
    tokenizer_size: int | None = None,
    dtype: WeightType = "float32",
    legacy_buffers: bool = False,
    max_shard_bytes: int | None = None,
    **overrides: Any,
) -> Path:
    """Write a small random model as a Hugging Face folder.

    Args:
        vocab_size: rows of the embedding.
        tokenizer: also write a byte-level BPE tokenizer trained on `tiny_texts` (`<unk>` 0, `<s>` 1 = BOS, `</s>` 2 =
            EOS) and a generation_config.json.
        tokenizer_size: entries of the tokenizer; unset: `vocab_size`. A smaller one leaves padded rows, as in Pythia.
        dtype: type of the weights; `mixed` cycles through the types.
        legacy_buffers: GPT-NeoX only: add the `attention.bias`, `attention.masked_bias` and `rotary_emb.inv_freq`
            tensors that old checkpoints contain.
        max_shard_bytes: split the weights into files of at most about this size, with an index.
        overrides: raw config keys, see `tiny_config`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, vocab_size=vocab_size, **overrides)
    weights = tiny_weights(config, seed, dtype)
    if legacy_buffers:
        weights |= _neox_legacy_buffers(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_safetensors(folder, weights, max_shard_bytes)
    if tokenizer:
        write_tiny_tokenizer(folder, tokenizer_size or vocab_size)
        ids = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    return folder


def write_model_pair(folder: Path, family: Family, **changes: Any) -> tuple[Path, Path]:
    """Write a base and a student that differ in every weight."""
    base = write_tiny_hf_model(folder / "base", family, seed=1, **changes)
    return base, write_tiny_hf_model(folder / "student", family, seed=2, **changes)


def write_safetensors(folder: Path, weights: Mapping[str, np.ndarray], max_shard_bytes: int | None = None) -> None:
    """Write `model.safetensors`, or several files with `model.safetensors.index.json`."""
    metadata = {"format": "pt"}
    if max_shard_bytes is None:
        save_file(dict(weights), folder / "model.safetensors", metadata=metadata)
        return
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, value in weights.items():
        if shards[-1] and sum(v.nbytes for v in shards[-1].values()) + value.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = value
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata=metadata)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(v.nbytes for v in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def tiny_texts(n: int, seed: int = 0) -> Iterator[str]:
    """Yield `n` short stories, generated from the seed."""
    rng = np.random.Generator(np.random.Philox(seed))
    syllables = ["ka", "lo", "mi", "ren", "tu", "sa", "vo", "bel", "dri", "fa", "gon", "hu", "jin", "pa", "quo", "zel"]
    creatures = ["fox", "bear", "girl", "boy", "owl", "cat", "frog", "king"]
    things = ["ball", "stone", "book", "apple", "lamp", "boat", "hat", "key"]
    colors = ["red", "blue", "green", "small", "big", "old", "bright", "soft"]
    locations = ["river", "forest", "park", "house", "hill", "garden", "castle", "lake"]
    question_verb = "asked"

    def pick(words: list[str]) -> str:
        return words[int(rng.integers(len(words)))]

    for _ in range(n):
        name = "".join(pick(syllables) for _ in range(int(rng.integers(2, 4)))).capitalize()
        thing, friend = pick(things), "".join(pick(syllables) for _ in range(2)).capitalize()
        yield (
            f"Once there was a {pick(colors)} {pick(creatures)} named {name}. "
            f"{name} found a {pick(colors)} {thing} near the {pick(locations)}. "
            f'"Is this your {thing}?" {question_verb} {name}. "No," said {friend} the {pick(creatures)}, "but I have '
            f'{int(rng.integers(2, 100))} more." They went to the {pick(locations)} and were happy.'
        )


def write_tiny_tokenizer(folder: str | Path, size: int) -> None:
    """Train a byte-level BPE with `size` entries on `tiny_texts` and save it.

    With 320 entries or more, every byte has a token; smaller tokenizers have only the characters of the texts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[UNK, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()) if size >= 320 else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny_texts(400), trainer)
    if tokenizer.get_vocab_size() != size:
        raise ValueError(f"expected a tokenizer with {size} entries, got {tokenizer.get_vocab_size()}")
    folder = Path(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": EOS,  # if unset, transformers' Qwen2 class adds a token outside the vocabulary
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _neox_legacy_buffers(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    positions, head_dim = config["max_position_embeddings"], config["hidden_size"] // config["num_attention_heads"]
    buffers = {}
    for i in range(config["num_hidden_layers"]):
        attention = f"gpt_neox.layers.{i}.attention"
        buffers[f"{attention}.bias"] = np.tril(np.ones((1, 1, positions, positions), dtype=bool))
        buffers[f"{attention}.masked_bias"] = np.array(-1e9, dtype=np.float32)
        buffers[f"{attention}.rotary_emb.inv_freq"] = np.ones(head_dim // 8, dtype=np.float32)
    return buffers
