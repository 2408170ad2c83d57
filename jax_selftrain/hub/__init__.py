"""The model folder, Hugging Face's or ours: configs, tokenizers, weights, and one table per family."""

from jax_selftrain.hub.folder import (
    load_tokenizer,
    model_fingerprint,
    read_config,
    resolve,
    save_model,
    special_tokens,
    tokenizer_fingerprint,
)
from jax_selftrain.hub.load import LoadedModel, ModelSource, convert, load_model, with_params
from jax_selftrain.hub.merge import merge
from jax_selftrain.hub.noise import add_noise
from jax_selftrain.hub.tokens import SpecialTokens

__all__ = [
    "LoadedModel",
    "ModelSource",
    "SpecialTokens",
    "add_noise",
    "convert",
    "load_model",
    "load_tokenizer",
    "merge",
    "model_fingerprint",
    "read_config",
    "resolve",
    "save_model",
    "special_tokens",
    "tokenizer_fingerprint",
    "with_params",
]
