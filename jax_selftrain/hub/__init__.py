"""Models in Hugging Face's format: references, configs, tokenizers, weights."""

from jax_selftrain.hub.dataset_split import DatasetSplit as DatasetSplit
from jax_selftrain.hub.dataset_split import hash_files as hash_files
from jax_selftrain.hub.dataset_split import parse_dataset_split as parse_dataset_split
from jax_selftrain.hub.dataset_split import text_files as text_files
from jax_selftrain.hub.load import LoadedModel as LoadedModel
from jax_selftrain.hub.load import convert as convert
from jax_selftrain.hub.load import load_model as load_model
from jax_selftrain.hub.merge import add_weight_noise as add_weight_noise
from jax_selftrain.hub.merge import merge as merge
from jax_selftrain.hub.model_folder import save_model as save_model
from jax_selftrain.hub.model_ref import ModelRef as ModelRef
from jax_selftrain.hub.model_ref import open_model as open_model
from jax_selftrain.hub.tokenizer import SpecialTokens as SpecialTokens
