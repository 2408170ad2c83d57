"""Requests to score and a model for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from jax_selftrain import hub
from jax_selftrain.likelihood import LoglikelihoodRequest
from jax_selftrain.likelihood.prefix_trie import TokenizedRequest
from jax_selftrain.models import DecoderConfig
from jax_selftrain.models.config import RopeConfig

POSITIONS = 640
BATCH = 1280

CONFIG = DecoderConfig(
    vocab_size=512, hidden_size=512, num_layers=6, num_heads=8, num_kv_heads=8, head_dim=64, intermediate_size=2048,
    max_positions=POSITIONS, norm="layernorm", norm_eps=1e-5, activation="gelu", gated_mlp=False,
    parallel_residual=True, rotary_dim=16, rope=RopeConfig(), qkv_bias=True, out_bias=True, mlp_bias=True,
    qk_norm=None, tie_word_embeddings=False,
)  # fmt: skip
"""Config of the planned requests."""


def load_with_positions(
    tiny_model: Callable[..., Path], family: str = "llama", mesh: str = "data=1", preset: str = "tensor"
) -> hub.LoadedModel:
    """Load a tiny model of 640 positions."""
    return hub.load_model(tiny_model(family, max_position_embeddings=POSITIONS), mesh, preset=preset)


def random_requests(n: int, vocab: int, longest: int, seed: int = 0) -> list[LoglikelihoodRequest]:
    """Return requests of random lengths, some longer than the model."""
    rng = np.random.default_rng(seed)
    requests = []
    for _ in range(n):
        total = int(rng.integers(2, longest + 1))
        continuation = int(rng.integers(1, min(total, longest // 2)))
        tokens = rng.integers(0, vocab, total).tolist()
        requests.append(LoglikelihoodRequest(tokens[:-continuation], tokens[-continuation:]))
    return requests


def questions(n: int, seed: int = 3) -> list[LoglikelihoodRequest]:
    """Return questions of four choices; one choice is a prefix of another."""
    rng = np.random.default_rng(seed)
    requests = []
    for _ in range(n):
        context = rng.integers(0, 512, int(rng.integers(5, 40))).tolist()
        long = rng.integers(0, 512, 6).tolist()
        choices = [long, long[:3], rng.integers(0, 512, 1).tolist(), rng.integers(0, 512, 4).tolist()]
        requests += [LoglikelihoodRequest(context, choice) for choice in choices]
        requests.append(LoglikelihoodRequest([*context, *long[:2]], long[2:]))  # the same text, split elsewhere
    return requests


def tokenize_all(requests: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[TokenizedRequest]:
    """Validated requests, sorted as the engine sorts them."""
    return sorted((tokenize_request(*request) for request in requests), key=lambda request: request.sort_key)


def tokenize_request(context: Sequence[int], continuation: Sequence[int]) -> TokenizedRequest:
    return TokenizedRequest(np.array([*context, *continuation], np.int32), len(continuation))
