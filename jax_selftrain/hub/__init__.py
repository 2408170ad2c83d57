"""The model folder, Hugging Face's or ours: configs, tokenizers, weights, and one table per family."""

from jax_selftrain.hub.load import LoadedModel, ModelSource, convert, load_model, model_with_params
from jax_selftrain.hub.merge import merge
from jax_selftrain.hub.model_folder import (
    load_tokenizer,
    model_fingerprint,
    read_config,
    resolve,
    save_model,
    special_tokens,
    tokenizer_fingerprint,
)
from jax_selftrain.hub.tokenizer import SpecialTokens
from jax_selftrain.hub.weight_noise import add_weight_noise

__all__ = [
    "LoadedModel",
    "ModelSource",
    "SpecialTokens",
    "add_weight_noise",
    "convert",
    "load_model",
    "load_tokenizer",
    "merge",
    "model_fingerprint",
    "model_with_params",
    "read_config",
    "resolve",
    "save_model",
    "special_tokens",
    "tokenizer_fingerprint",
]
