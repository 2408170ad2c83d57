"""Greedy or sampled generation from prompts of any length.

A forward pass fills the cache with the whole chunks of each prompt. The remaining prompt tokens are forced through the
decode steps, so that all rows share one offset in the tail of the cache. The host checks the stop criterion after each
chunk: a stop string may end inside a token, which no device program can see.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, UInt32

from jax_selftrain.distributed.mesh import mesh_context
from jax_selftrain.distributed.sharding import shard_host_array
from jax_selftrain.errors import InputError
from jax_selftrain.hub import LoadedModel
from jax_selftrain.models import Params
from jax_selftrain.models.kv_cache import TAIL_LEN, KVCache
from jax_selftrain.sampling.categorical import categorical, level_sizes
from jax_selftrain.sampling.counter_rng import per_sample_keys, token_random_bits
from jax_selftrain.sampling.decode import DecodeSpec, compute_logits, decode_chunk, prefill_cache
from jax_selftrain.sampling.sampling_params import SamplingParams, warp_logits

PROMPT_TOKENS = 8192
"""Default number of prompt tokens in one forward pass of a replica."""

StopCriterion = Callable[[Sequence[int]], bool]
"""Returns True if the generated tokens (all so far, at least one) end with the last."""


@dataclass
class _Request:
    prompt: Sequence[int]
    index: int
    """Its random bits depend on it."""
    generated: list[int] = field(default_factory=list)
    done: bool = False

    @property
    def prefilled_len(self) -> int:
        """Prompt tokens in whole chunks; at least one token remains."""
        return (len(self.prompt) - 1) // TAIL_LEN * TAIL_LEN

    def append(self, tokens: Sequence[int], sampling_params: SamplingParams, stop: StopCriterion | None) -> None:
        """Append tokens up to the end of the generation."""
        for token in tokens:
            if self.done:
                return
            self.generated.append(token)
            is_last = len(self.generated) == sampling_params.max_tokens or token in sampling_params.stop_ids
            self.done = is_last or (stop is not None and stop(self.generated))


def generate(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling_params: SamplingParams,
    *,
    seed: int = 0,
    request_ids: Sequence[int] | None = None,
    stop: StopCriterion | None = None,
    batch_size: int = 64,
    batch_tokens: int = PROMPT_TOKENS,
) -> list[list[int]]:
    """Generate a continuation of each prompt.

    Args:
      model: on any mesh.
      prompts: token ids, at least one each; nothing is prepended.
      sampling_params: temperature 0 is greedy decoding; `start_ids` and `min_tokens` are unused.
      seed: token t of request i is drawn with random bits that depend on (seed, i, t) alone.
      request_ids: the number i of each prompt; default: 0, 1, 2, …
      stop: called after each new token.
      batch_size: maximum number of rows per replica.
      batch_tokens: maximum number of prompt tokens in one forward pass of a replica; long prompts reduce the rows.

    Returns:
      The new tokens of each prompt, the last one (a stop id, say) included.

    Raises:
      InputError: a prompt and its continuation exceed the model's positions.
    """
    max_tokens = sampling_params.max_tokens
    if max_tokens < 1 or not all(len(prompt) for prompt in prompts):
        raise ValueError(f"an empty prompt, or {max_tokens} tokens to generate")
    longest = max(map(len, prompts), default=1)
    if longest + max_tokens > model.config.max_positions:
        raise InputError(
            f"a prompt of {longest} tokens and {max_tokens} more are longer than the model's "
            f"{model.config.max_positions} positions; shorten the prompt or generate fewer tokens"
        )
    ids = range(len(prompts)) if request_ids is None else request_ids
    requests = [_Request(prompt, index) for prompt, index in zip(prompts, ids, strict=True)]
    queue = sorted(requests, key=lambda request: -len(request.prompt))  # longest first: too little memory shows early
    while queue:
        # A power of two: few programs are compiled.
        width = max(TAIL_LEN, 1 << (len(queue[0].prompt) - 1).bit_length())
        num_rows = max(1, min(batch_size, batch_tokens // width)) * model.sharding_rules.data_parallelism
        batch, queue = queue[:num_rows], queue[num_rows:]
        _generate_batch(model, batch, num_rows, width, sampling_params, seed, stop)
    return [request.generated for request in requests]


def _generate_batch(
    model: LoadedModel,
    requests: Sequence[_Request],
    num_rows: int,
    width: int,
    sampling_params: SamplingParams,
    seed: int,
    stop: StopCriterion | None,
) -> None:
    rules, spec = model.sharding_rules, DecodeSpec.from_model(model)
    static_params = replace(sampling_params, max_tokens=0, min_tokens=0, stop_ids=())  # one program for any length
    rows = [*requests, *(_Request([0], 0, done=True) for _ in range(num_rows - len(requests)))]
    num_chunks = -(-(TAIL_LEN + sampling_params.max_tokens) // TAIL_LEN)
    prompts = np.zeros((num_rows, width), np.int32)
    inputs = np.zeros((TAIL_LEN + 1, num_rows), np.int32)
    for b, row in enumerate(rows):
        prompts[b, : len(row.prompt)] = row.prompt
        inputs[: len(row.prompt) - row.prefilled_len, b] = row.prompt[row.prefilled_len :]
    committed_len = np.array([row.prefilled_len for row in rows], np.int32)
    prompt_len = np.array([len(row.prompt) for row in rows], np.int32)
    is_forced = np.arange(1, TAIL_LEN + 1)[:, None] < prompt_len - committed_len
    num_forced = is_forced.sum(axis=0, dtype=np.int32)
    all_forced = num_forced[: len(requests)].min()
    has_prefill = bool(committed_len.any())
    with mesh_context(rules.mesh):
        by_row = partial(shard_host_array, rules, axes=("batch",))
        prefilled = shard_host_array(rules, prompts if has_prefill else prompts[:, :0], ("batch", None))
        cache = prefill_cache(spec, prefilled.shape[1] + num_chunks * TAIL_LEN, model.params, prefilled)
        keys = shard_host_array(rules, per_sample_keys(seed, [row.index for row in rows]), ("batch", None))
        state = cache, by_row(committed_len), by_row(inputs[0])
        for _ in range(num_chunks):
            state, outputs = _generate_chunk(
                spec,
                static_params,
                model.params,
                *state,
                shard_host_array(rules, inputs[1:], (None, "batch")),
                shard_host_array(rules, is_forced, (None, "batch")),
                all_forced,
                keys,
                by_row(prompt_len),
            )
            for row, tokens, skipped in zip(rows, np.asarray(outputs).T, num_forced, strict=True):
                row.append(tokens[skipped:].tolist(), sampling_params, stop)
            if all(row.done for row in rows):
                return
            is_forced, num_forced, all_forced = np.zeros_like(is_forced), np.zeros_like(num_forced), np.int32(0)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _generate_chunk(
    spec: DecodeSpec,
    sampling_params: SamplingParams,
    params: Params,
    cache: KVCache,
    committed_len: Int32[Array, " B"],
    token: Int32[Array, " B"],
    forced_tokens: Int32[Array, "steps B"],
    is_forced: Bool[Array, "steps B"],
    all_forced: Int32[Array, ""],
    keys: UInt32[Array, "B 2"],
    prompt_len: Int32[Array, " B"],
) -> tuple[tuple[KVCache, Int32[Array, " B"], Int32[Array, " B"]], Int32[Array, "steps B"]]:
    """Decode a chunk; return the loop state and the replicated outputs.

    Logits are not computed in the first `all_forced` steps, whose outputs are forced in every row.
    """

    def next_token_fn(hidden: Array, position: Array, index: Array) -> tuple[Array, Array, Array]:
        forced, mask = (jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False) for x in (forced_tokens, is_forced))

        def choose() -> Array:
            logits = compute_logits(spec, params, hidden)
            if sampling_params.temperature == 0:
                chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            else:
                bits = token_random_bits(keys, position + 1 - prompt_len, len(level_sizes(spec.config.vocab_size)))
                chosen, _ = categorical(warp_logits(logits, sampling_params), bits)
            return jnp.where(mask, forced, chosen)

        token = jax.lax.cond(index < all_forced, lambda: forced, choose)
        return token, index + 1, token

    cache, token, _, outputs = decode_chunk(spec, params, cache, committed_len, token, jnp.int32(0), next_token_fn)
    return (cache, committed_len + TAIL_LEN, token), jax.reshard(outputs, spec.sharding_rules.sharding((None, None)))
