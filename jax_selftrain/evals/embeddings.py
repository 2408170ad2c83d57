"""Text embeddings from decoders.

The convention of Qwen3-Embedding (arXiv:2506.05176): the text is tokenized with the special tokens of its tokenizer
(there an end token). Its embedding is the last token's hidden state after the final norm, normalized. Only models
trained for it give meaningful distances.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.distributed.sharding import ShardingRules, shard_host_array
from jax_selftrain.errors import InputError
from jax_selftrain.hub import LoadedModel
from jax_selftrain.likelihood.tokenize import check_tokenizer
from jax_selftrain.models import DecoderConfig, Params, forward

BUCKETS = (32, 128, 512)
"""Padded row lengths."""
BATCH_TOKENS = 8192
"""Token positions in one batch on each replica."""


def embed_texts(model: LoadedModel, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
    """Embed texts as unit vectors.

    Args:
      model: with a tokenizer. Texts are truncated to 512 tokens or the model's positions; special tokens are kept.
      texts: not blank.

    Raises:
      InputError: the model has no tokenizer, or an embedding is zero or not finite.
    """
    check_tokenizer(model)
    if not texts:
        return np.zeros((0, model.config.hidden_size), np.float32)
    longest, rules = min(BUCKETS[-1], model.config.max_positions), model.sharding_rules
    encoded = model.tokenizer(list(texts), truncation=True, max_length=longest, verbose=False)["input_ids"]
    embeddings = np.zeros((len(texts), model.config.hidden_size), np.float32)
    lengths = np.minimum(np.take(BUCKETS, np.searchsorted(BUCKETS, list(map(len, encoded)))), longest)
    for length in np.unique(lengths).tolist():
        members = np.flatnonzero(lengths == length)
        rows = max(1, BATCH_TOKENS // length) * rules.data_parallelism
        for start in range(0, len(members), rows):
            batch = members[start : start + rows]
            tokens, last = np.zeros((rows, length), np.int32), np.zeros((rows, 1), np.int32)
            for row, i in enumerate(batch):
                tokens[row, : len(encoded[i])] = encoded[i]
                last[row] = len(encoded[i]) - 1
            with mesh_context(rules.mesh):
                arrays = (shard_host_array(rules, array, ("batch", None)) for array in (tokens, last))
                hidden = _last_hidden(model.config, rules, model.compute_dtype, model.params, *arrays)
                embeddings[batch] = np.asarray(hidden)[: len(batch)]
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and norms.all()):
        raise InputError(f"{model.source.ref}: its embeddings are zero or not finite; choose another model")
    return embeddings / norms


@partial(jax.jit, static_argnums=(0, 1, 2))
def _last_hidden(
    config: DecoderConfig,
    rules: ShardingRules,
    dtype: DTypeLike,
    params: Params,
    tokens: Int[jax.Array, "B T"],
    last: Int[jax.Array, "B 1"],
) -> Float[jax.Array, "B D"]:
    hidden = forward(config, rules, params, tokens, query_positions=last, compute_dtype=dtype)[:, 0].astype(jnp.float32)
    return jax.reshard(hidden, rules.sharding((None, None)))
