"""Families as data: one table of tensors per family.

A row is (names, path, pattern). The pattern describes one layer's tensor in the notation of einops: parentheses fuse
axes into one dimension of the file; the right-hand side is our array without the leading layer dimension. `2of3` is
index 2 of a dimension of three (GPT-NeoX fuses query, key and value as (heads, 3, head width)). Shapes, reading and
writing follow from the pattern. To add a family, add it to `FAMILIES` and add a parity case.

The letters are `AXIS_LETTERS`. A family has the rows of its table whose parameters its config declares.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal

import numpy as np

from jax_selftrain.models import DecoderConfig, axis_sizes
from jax_selftrain.models.config import AXIS_LETTERS


@dataclass(frozen=True)
class Pattern:
    """The mapping from a file's tensor to a layer of a parameter."""

    template: str

    @cached_property
    def _sides(self) -> tuple[list[list[str]], list[str]]:
        """Axes of each dimension of the file; axes of our layer."""
        left, right = self.template.split("->")
        return [(fused or single).split() for fused, single in re.findall(r"\(([^)]*)\)|(\S+)", left)], right.split()

    def file_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Compute the shape of the tensor in the file."""
        return tuple(prod(_size(axis, sizes) for axis in group) for group in self._sides[0])

    def view(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """View a contiguous tensor of the file as our layer."""
        flat = [axis for group in self._sides[0] for axis in group]
        index = tuple(int(axis.split("of")[0]) if "of" in axis else slice(None) for axis in flat)
        named = [axis for axis in flat if "of" not in axis]
        spread = tensor.reshape([_size(axis, sizes) for axis in flat])
        return spread[index].transpose([named.index(axis) for axis in self._sides[1]])


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    return int(axis.split("of")[1]) if "of" in axis else sizes[axis]


@dataclass(frozen=True)
class TensorRule:
    """One tensor of the file, per layer where the name has `{}`."""

    names: tuple[str, ...]
    """Alternative names; the first is that of a new file."""
    path: str
    pattern: Pattern


Switch = bool | tuple[str, bool]
"""A constant, or a boolean key of config.json with its default."""


@dataclass(frozen=True)
class ConfigSchema:
    """Keys of config.json that differ between families; defaults are those of transformers."""

    keys: Mapping[str, str] = field(default_factory=dict)
    """The family's names of keys that most families call otherwise."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: tuple[str, float] = ("rms_norm_eps", 1e-6)
    activation: str = "silu"
    gated_mlp: bool = True
    parallel_residual: Switch = False
    qkv_bias: Switch = ("attention_bias", False)
    out_bias: Switch = ("attention_bias", False)
    mlp_bias: Switch = False
    mlp_ratio: int | None = None
    """The default of `intermediate_size` as a multiple of `hidden_size`; None: required."""
    qk_norm: Literal["head", "width"] | None = None
    post_norm: bool = False
    learned_positions: bool = False
    """Positions are embedded, not rotated."""
    attention_scale: float | None = None
    tie_word_embeddings: bool = False
    max_positions: int = 2048
    has_head_keys: bool = True
    """`num_key_value_heads` and `head_dim` are read."""
    head_dim: int | None = None
    windows: Literal["qwen", "mistral", "olmo3", "smollm3", "gpt_neo"] | None = None
    """The keys of sliding windows (`hub.layer_keys`)."""
    ropes: Literal["olmo3", "smollm3"] | None = None
    """The keys of layers that differ in rotation (`hub.layer_keys`)."""
    theta_key: str = "rope_theta"
    theta: float = 10_000.0
    rotary_fraction: tuple[str, float] = ("partial_rotary_factor", 1.0)
    """Key and default; with `has_head_keys`, 1 is the only value that is supported."""


@dataclass(frozen=True)
class Family:
    """The config and the tensors of one Hugging Face `model_type`."""

    model_type: str
    schema: ConfigSchema
    rows: tuple[TensorRule, ...]
    prefix: str = "model."
    """Beginning of the body's tensor names, which a file may lack."""
    ignored_buffers: tuple[str, ...] = (
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"model\.rotary_emb\.inv_freq",
    )
    """Regular expressions of buffers in old files: causal masks, rotary frequencies."""
    tied_head: tuple[str, ...] = ("lm_head.weight",)
    """Names of the output projection; with tied embeddings it is a copy and is dropped."""


def pattern_sizes(config: DecoderConfig) -> dict[str, int]:
    """Return the sizes of the letters in patterns."""
    return {AXIS_LETTERS[axis]: size for axis, size in axis_sizes(config).items()}


def _rows(prefix: str, table: str) -> tuple[TensorRule, ...]:
    rows = []
    for line in table.strip().splitlines():
        names, path, pattern = (part.strip() for part in line.split("|"))
        full = tuple(name.replace("~", prefix) for name in names.split(" or "))
        rows.append(TensorRule(full, path, Pattern(pattern)))
    return tuple(rows)


def _replace_rows(rows: tuple[TensorRule, ...], prefix: str, table: str) -> tuple[TensorRule, ...]:
    """Replace the rows of the same parameters."""
    others = {row.path: row for row in _rows(prefix, table)}
    return tuple(others.get(row.path, row) for row in rows)


_GPT_NEOX = Family(
    "gpt_neox",
    ConfigSchema(
        norm="layernorm",
        norm_eps=("layer_norm_eps", 1e-5),
        activation="gelu",
        gated_mlp=False,
        parallel_residual=("use_parallel_residual", True),
        qkv_bias=("attention_bias", True),
        out_bias=("attention_bias", True),
        mlp_bias=True,
        has_head_keys=False,
        theta_key="rotary_emb_base",
        rotary_fraction=("rotary_pct", 0.25),
    ),
    _rows(
        "gpt_neox.layers.{}",
        """
        gpt_neox.embed_in.weight                | embed/embedding         | v d -> v d
        ~.input_layernorm.weight                | layers/attn_norm/scale  | d -> d
        ~.input_layernorm.bias                  | layers/attn_norm/bias   | d -> d
        ~.post_attention_layernorm.weight       | layers/mlp_norm/scale   | d -> d
        ~.post_attention_layernorm.bias         | layers/mlp_norm/bias    | d -> d
        ~.attention.query_key_value.weight      | layers/attn/q/kernel    | (g r 0of3 k) d -> g r k d
        ~.attention.query_key_value.weight      | layers/attn/k/kernel    | (g 1of3 k) d -> g k d
        ~.attention.query_key_value.weight      | layers/attn/v/kernel    | (g 2of3 k) d -> g k d
        ~.attention.query_key_value.bias        | layers/attn/q/bias      | (g r 0of3 k) -> g r k
        ~.attention.query_key_value.bias        | layers/attn/k/bias      | (g 1of3 k) -> g k
        ~.attention.query_key_value.bias        | layers/attn/v/bias      | (g 2of3 k) -> g k
        ~.attention.dense.weight                | layers/attn/o/kernel    | d (g r k) -> d g r k
        ~.attention.dense.bias                  | layers/attn/o/bias      | d -> d
        ~.mlp.dense_h_to_4h.weight              | layers/mlp/up/kernel    | f d -> f d
        ~.mlp.dense_h_to_4h.bias                | layers/mlp/up/bias      | f -> f
        ~.mlp.dense_4h_to_h.weight              | layers/mlp/down/kernel  | d f -> d f
        ~.mlp.dense_4h_to_h.bias                | layers/mlp/down/bias    | d -> d
        gpt_neox.final_layer_norm.weight        | final_norm/scale        | d -> d
        gpt_neox.final_layer_norm.bias          | final_norm/bias         | d -> d
        embed_out.weight or lm_head.weight      | head/kernel             | v d -> v d
        """,
    ),
    prefix="gpt_neox.",
    ignored_buffers=(
        r"gpt_neox\.layers\.\d+\.attention\.bias",
        r"gpt_neox\.layers\.\d+\.attention\.masked_bias",
        r"gpt_neox\.layers\.\d+\.attention\.rotary_emb\.inv_freq",
        r"gpt_neox\.rotary_emb\.inv_freq",
    ),
    tied_head=("embed_out.weight", "lm_head.weight"),
)

_LLAMA_ROWS = _rows(
    "model.layers.{}",
    """
    model.embed_tokens.weight               | embed/embedding         | v d -> v d
    ~.input_layernorm.weight                | layers/attn_norm/scale  | d -> d
    ~.post_attention_layernorm.weight       | layers/mlp_norm/scale   | d -> d
    ~.self_attn.q_proj.weight               | layers/attn/q/kernel    | (g r k) d -> g r k d
    ~.self_attn.k_proj.weight               | layers/attn/k/kernel    | (g k) d -> g k d
    ~.self_attn.v_proj.weight               | layers/attn/v/kernel    | (g k) d -> g k d
    ~.self_attn.q_proj.bias                 | layers/attn/q/bias      | (g r k) -> g r k
    ~.self_attn.k_proj.bias                 | layers/attn/k/bias      | (g k) -> g k
    ~.self_attn.v_proj.bias                 | layers/attn/v/bias      | (g k) -> g k
    ~.self_attn.q_norm.weight               | layers/attn/q_norm/scale | k -> k
    ~.self_attn.k_norm.weight               | layers/attn/k_norm/scale | k -> k
    ~.self_attn.o_proj.weight               | layers/attn/o/kernel    | d (g r k) -> d g r k
    ~.self_attn.o_proj.bias                 | layers/attn/o/bias      | d -> d
    ~.mlp.gate_proj.weight                  | layers/mlp/gate/kernel  | f d -> f d
    ~.mlp.gate_proj.bias                    | layers/mlp/gate/bias    | f -> f
    ~.mlp.up_proj.weight                    | layers/mlp/up/kernel    | f d -> f d
    ~.mlp.up_proj.bias                      | layers/mlp/up/bias      | f -> f
    ~.mlp.down_proj.weight                  | layers/mlp/down/kernel  | d f -> d f
    ~.mlp.down_proj.bias                    | layers/mlp/down/bias    | d -> d
    model.norm.weight                       | final_norm/scale        | d -> d
    lm_head.weight                          | head/kernel             | v d -> v d
    """,
)

_OLMO_ROWS = _replace_rows(
    _LLAMA_ROWS,
    "model.layers.{}",
    """
    ~.post_attention_layernorm.weight       | layers/attn_norm/scale  | d -> d
    ~.post_feedforward_layernorm.weight     | layers/mlp_norm/scale   | d -> d
    ~.self_attn.q_norm.weight               | layers/attn/q_norm/scale | (g r k) -> g r k
    ~.self_attn.k_norm.weight               | layers/attn/k_norm/scale | (g k) -> g k
    """,
)

_GPT2_ROWS = _rows(
    "transformer.h.{}",
    """
    transformer.wte.weight                  | embed/embedding         | v d -> v d
    transformer.wpe.weight                  | embed/positions         | p d -> p d
    ~.ln_1.weight                           | layers/attn_norm/scale  | d -> d
    ~.ln_1.bias                             | layers/attn_norm/bias   | d -> d
    ~.ln_2.weight                           | layers/mlp_norm/scale   | d -> d
    ~.ln_2.bias                             | layers/mlp_norm/bias    | d -> d
    ~.attn.c_attn.weight                    | layers/attn/q/kernel    | d (0of3 g r k) -> g r k d
    ~.attn.c_attn.weight                    | layers/attn/k/kernel    | d (1of3 g k) -> g k d
    ~.attn.c_attn.weight                    | layers/attn/v/kernel    | d (2of3 g k) -> g k d
    ~.attn.c_attn.bias                      | layers/attn/q/bias      | (0of3 g r k) -> g r k
    ~.attn.c_attn.bias                      | layers/attn/k/bias      | (1of3 g k) -> g k
    ~.attn.c_attn.bias                      | layers/attn/v/bias      | (2of3 g k) -> g k
    ~.attn.c_proj.weight                    | layers/attn/o/kernel    | (g r k) d -> d g r k
    ~.attn.c_proj.bias                      | layers/attn/o/bias      | d -> d
    ~.mlp.c_fc.weight                       | layers/mlp/up/kernel    | d f -> f d
    ~.mlp.c_fc.bias                         | layers/mlp/up/bias      | f -> f
    ~.mlp.c_proj.weight                     | layers/mlp/down/kernel  | f d -> d f
    ~.mlp.c_proj.bias                       | layers/mlp/down/bias    | d -> d
    transformer.ln_f.weight                 | final_norm/scale        | d -> d
    transformer.ln_f.bias                   | final_norm/bias         | d -> d
    lm_head.weight                          | head/kernel             | v d -> v d
    """,
)

_GPT_NEO_ROWS = _replace_rows(
    _GPT2_ROWS,
    "transformer.h.{}",
    """
    ~.attn.attention.q_proj.weight          | layers/attn/q/kernel    | (g r k) d -> g r k d
    ~.attn.attention.k_proj.weight          | layers/attn/k/kernel    | (g k) d -> g k d
    ~.attn.attention.v_proj.weight          | layers/attn/v/kernel    | (g k) d -> g k d
    ~.attn.attention.out_proj.weight        | layers/attn/o/kernel    | d (g r k) -> d g r k
    ~.attn.attention.out_proj.bias          | layers/attn/o/bias      | d -> d
    ~.mlp.c_fc.weight                       | layers/mlp/up/kernel    | f d -> f d
    ~.mlp.c_proj.weight                     | layers/mlp/down/kernel  | d f -> d f
    """,
)

_QWEN: Mapping[str, Any] = {"max_positions": 32768, "windows": "qwen"}
_SMOLLM3 = ConfigSchema(
    mlp_bias=("mlp_bias", False),
    tie_word_embeddings=True,
    max_positions=32768,
    windows="smollm3",
    ropes="smollm3",
    theta=2_000_000.0,
)
_OLMO: Mapping[str, Any] = {"norm_eps": ("rms_norm_eps", 1e-5), "qk_norm": "width", "post_norm": True}
_GPT2: Mapping[str, Any] = {
    "norm": "layernorm",
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "activation": "gelu_new",
    "gated_mlp": False,
    "out_bias": True,
    "mlp_bias": True,
    "mlp_ratio": 4,
    "learned_positions": True,
    "tie_word_embeddings": True,
    "has_head_keys": False,
}
_GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
}
_GPT_NEO_KEYS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "hidden_act": "activation_function",
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _GPT_NEOX,
        Family("llama", ConfigSchema(mlp_bias=("mlp_bias", False)), _LLAMA_ROWS),
        Family("qwen2", ConfigSchema(qkv_bias=True, out_bias=False, **_QWEN), _LLAMA_ROWS),
        Family("qwen3", ConfigSchema(qk_norm="head", head_dim=128, **_QWEN), _LLAMA_ROWS),
        Family(
            "mistral",
            ConfigSchema(qkv_bias=False, out_bias=False, max_positions=131072, windows="mistral"),
            _LLAMA_ROWS,
        ),
        Family("olmo2", ConfigSchema(**_OLMO), _OLMO_ROWS),
        Family("olmo3", ConfigSchema(windows="olmo3", ropes="olmo3", theta=500_000.0, **_OLMO), _OLMO_ROWS),
        Family("smollm3", _SMOLLM3, _LLAMA_ROWS),
        Family(
            "gpt2",
            ConfigSchema(keys=_GPT2_KEYS, qkv_bias=True, max_positions=1024, **_GPT2),
            _GPT2_ROWS,
            prefix="transformer.",
            ignored_buffers=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
        ),
        Family(
            "gpt_neo",
            ConfigSchema(keys=_GPT_NEO_KEYS, qkv_bias=False, windows="gpt_neo", attention_scale=1.0, **_GPT2),
            _GPT_NEO_ROWS,
            prefix="transformer.",
            ignored_buffers=(r"(transformer\.)?h\.\d+\.attn\.attention\.(bias|masked_bias)",),
        ),
    )
}
"""All families by the `model_type` of config.json."""
