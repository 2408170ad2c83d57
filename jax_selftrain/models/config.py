"""One architecture description for every family: a value of `DecoderConfig` *is* the architecture.

GPT-NeoX (all of Pythia), Llama 1/2/3, Qwen2/2.5 and Qwen3 differ only in these fields; no family has code of its own
in the forward pass. `hub` translates Hugging Face's configs into this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency and its extension to longer contexts.

    `default`; `linear` (positions divided by `factor`); `llama3` (Llama 3.1's smooth split between scaled and unscaled
    frequencies); `yarn` (arXiv:2309.00071). Formulas as in transformers' `modeling_rope_utils`.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    """Context length before extension (llama3, yarn)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Scale of the rotated queries and keys (yarn); None: 0.1·ln(factor) + 1."""
    truncate: bool = True
    """Whether yarn rounds the bounds of its ramp to whole dimensions."""


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. Dimension letters: V, D, L, H, G, K, F as in the project's glossary."""

    vocab_size: int
    """V: rows of the embedding, padding rows included."""
    hidden_size: int
    """D."""
    num_layers: int
    """L."""
    num_heads: int
    """H query heads."""
    num_kv_heads: int
    """G key/value heads; H must be a multiple of it."""
    head_dim: int
    """K."""
    intermediate_size: int
    """F."""
    max_positions: int
    """Longest sequence the model is meant for, in tokens."""
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    activation: Activation
    gated_mlp: bool
    """down(act(gate(x)) · up(x)) rather than down(act(up(x)))."""
    parallel_residual: bool
    """Attention and MLP both read the block's input (GPT-J, GPT-NeoX)."""
    rotary_dim: int
    """How many of the K dimensions of a head are rotated (even)."""
    rope: RopeConfig
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMS norm over each head of queries and keys before rotation (Qwen3)."""
    tie_word_embeddings: bool
    """The output projection is the embedding, transposed."""
    sliding_window: tuple[int | None, ...] | None = None
    """Per layer: how many latest positions a query sees, itself included; None for all."""
    initializer_range: float = 0.02
    """Standard deviation of freshly initialized matrices."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads are not a multiple of {self.num_kv_heads} key/value heads")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(f"rotary_dim {self.rotary_dim} must be even and at most head_dim {self.head_dim}")
        if self.sliding_window is not None and len(self.sliding_window) != self.num_layers:
            raise ValueError(f"{len(self.sliding_window)} sliding windows for {self.num_layers} layers")

    @property
    def num_query_groups(self) -> int:
        """R: query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


def axis_sizes(config: DecoderConfig) -> dict[str, int]:
    """Sizes of the logical axes that a mesh may divide, for `make_sharding_rules`."""
    return {
        "embed": config.hidden_size,
        "vocab": config.vocab_size,
        "mlp": config.intermediate_size,
        "kv_heads": config.num_kv_heads,
        "q_per_kv": config.num_query_groups,
    }
