"""One architecture config for every family.

All families (`hub.families`) differ in these fields alone; no family has code of its own in the forward pass. `hub`
translates Hugging Face configs.
"""

from dataclasses import dataclass
from typing import Literal

Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding and its extension to longer contexts.

    `linear` divides positions by `factor`; `llama3` interpolates between scaled and unscaled frequencies (Llama 3.1);
    `yarn` is arXiv:2309.00071. Formulas are those of transformers' `modeling_rope_utils`.
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
    """Round the bounds of yarn's ramp to whole dimensions."""


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer."""

    vocab_size: int
    """V: rows of the embedding, padding rows included."""
    hidden_size: int
    """D: model width."""
    num_layers: int
    """L."""
    num_heads: int
    """H: query heads."""
    num_kv_heads: int
    """G: key/value heads; divides H."""
    head_dim: int
    """K: width of a head."""
    intermediate_size: int
    """F: width of the MLP."""
    max_positions: int
    """Maximum sequence length in tokens."""
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    activation: Activation
    gated_mlp: bool
    """down(act(gate(x)) · up(x)) rather than down(act(up(x)))."""
    parallel_residual: bool
    """Attention and MLP both read the input of the layer (GPT-J, GPT-NeoX)."""
    rotary_dim: int
    """Rotated dimensions of a head (even); 0: no rotation."""
    rope: RopeConfig
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: Literal["head", "width"] | None
    """RMSNorm of queries and keys before rotation: over each head (Qwen3), or over all heads (OLMo-2)."""
    tie_word_embeddings: bool
    """The output projection is the embedding, transposed."""
    sliding_window: tuple[int | None, ...] | None = None
    """Window of each layer: visible positions, the query's own included; None: all."""
    layer_ropes: tuple[RopeConfig | None, ...] | None = None
    """Rotation of each layer instead of `rope`; an entry None: no rotation."""
    post_norm: bool = False
    """Norms are applied to the outputs of attention and MLP (OLMo-2), not to their inputs."""
    learned_positions: bool = False
    """Embeddings of positions are added to those of tokens (GPT-2)."""
    attention_scale: float | None = None
    """Factor of the attention scores; None: 1/√K."""
    initializer_range: float = 0.02
    """Standard deviation of initialized matrices."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads are not a multiple of {self.num_kv_heads} key/value heads")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(f"rotary_dim {self.rotary_dim} must be even and at most head_dim {self.head_dim}")
        if self.sliding_window is not None and len(self.sliding_window) != self.num_layers:
            raise ValueError(f"{len(self.sliding_window)} sliding windows for {self.num_layers} layers")
        if self.layer_ropes is not None and len(self.layer_ropes) != self.num_layers:
            raise ValueError(f"{len(self.layer_ropes)} rotations for {self.num_layers} layers")
        if self.post_norm and self.parallel_residual:
            raise ValueError("a parallel residual reads normed inputs; post_norm has none")


AXIS_LETTERS = {
    "embed": "d",
    "vocab": "v",
    "positions": "p",
    "mlp": "f",
    "kv_heads": "g",
    "q_per_kv": "r",
    "head_dim": "k",
}
"""Letters of the logical axes of a layer, in equations."""


def axis_sizes(config: DecoderConfig) -> dict[str, int]:
    """Return the sizes of the logical axes of a layer."""
    return {
        "embed": config.hidden_size,
        "vocab": config.vocab_size,
        "positions": config.max_positions,
        "mlp": config.intermediate_size,
        "kv_heads": config.num_kv_heads,
        "q_per_kv": config.num_heads // config.num_kv_heads,
        "head_dim": config.head_dim,
    }
