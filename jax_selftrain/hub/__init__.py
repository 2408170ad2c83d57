"""Models in Hugging Face's format: references, configs, tokenizers, weights."""

from jax_selftrain.hub.load import LoadedModel, convert, load_model
from jax_selftrain.hub.merge import add_weight_noise, merge
from jax_selftrain.hub.model_folder import save_model
from jax_selftrain.hub.model_ref import ModelRef, open_model
from jax_selftrain.hub.tokenizer import SpecialTokens

__all__ = [
    "LoadedModel",
    "ModelRef",
    "SpecialTokens",
    "add_weight_noise",
    "convert",
    "load_model",
    "merge",
    "open_model",
    "save_model",
]
