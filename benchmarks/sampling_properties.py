"""Properties of the sampler besides speed.

    python benchmarks/sampling_properties.py compilation|utilization|memory|length|divergences|cache [--model DIR]

All but `compilation`, `length` and half of `divergences` need a trained model whose texts end by themselves: `--model`,
by default `stories260k` in the folder JAX_SELFTRAIN_DATA.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import jax
import jax.numpy as jnp
import numpy as np
from shapes import SHAPES, write_config

from jax_selftrain import hub
from jax_selftrain.config import SampleConfig
from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import make_sharding_rules, shard_host_array
from jax_selftrain.models import DecoderConfig, Params, axis_sizes, forward, init_params, unembed
from jax_selftrain.models.kv_cache import TAIL_LEN
from jax_selftrain.planning import neox_config
from jax_selftrain.sampling import SamplingParams, sample
from jax_selftrain.sampling.categorical import take_per_row
from jax_selftrain.sampling.counter_rng import per_sample_keys
from jax_selftrain.sampling.decode import DecodeLoop, DecodeSpec, SampleBatch, compute_logits, decode_chunk


def random_model(config: DecoderConfig, mesh: str = "data=1,model=1") -> tuple[DecodeSpec, Params]:
    rules = make_sharding_rules("tensor", make_mesh(mesh), axis_sizes(config))
    return DecodeSpec(config, rules, "float32"), init_params(config, 0, rules)


def compilation(_: str) -> None:
    """Measure compile time by depth, and count programs by length."""
    config = hub.open_model(write_config(neox_config(6, 128, 8, vocabulary=512))).config
    sampling_params, keys = SamplingParams(start_ids=(0,), stop_ids=(), max_tokens=32), per_sample_keys(0, np.arange(8))
    for layers in (6, 36, 6, 36):
        spec, params = random_model(replace(config, num_layers=layers))
        jax.clear_caches()
        start = time.perf_counter()
        DecodeLoop(spec, sampling_params, params, num_slots=8, queue_size=8).generate(keys)
        first = time.perf_counter() - start
        start = time.perf_counter()
        DecodeLoop(spec, sampling_params, params, num_slots=8, queue_size=8).generate(keys)
        print(f"{layers} layers: {first - (time.perf_counter() - start):.2f} s to trace and compile")
    spec, params = random_model(config)
    for tokens in (20, 256, 2048):
        jax.clear_caches()
        loop = DecodeLoop(spec, replace(sampling_params, max_tokens=tokens), params, num_slots=8, queue_size=8)
        print(f"{tokens} tokens: {_compilations(loop, keys)} programs compiled")


def _compilations(loop: DecodeLoop, keys: np.ndarray) -> int:
    counted: list[str] = []

    def count(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            counted.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    loop.generate(keys)
    jax.monitoring.clear_event_listeners()
    return len(counted)


def utilization(ref: str) -> None:
    """Compare continuous with static batching, 2,048 samples of up to 512 tokens."""
    model = hub.load_model(ref, "data=1,model=1")
    sampling_params = SamplingParams(start_ids=(1,), stop_ids=(1, 2), max_tokens=512)
    keys, results = per_sample_keys(0, np.arange(2048)), {}
    for name, queue in (("refill", 2048), ("static", 64)):
        loop = DecodeLoop(DecodeSpec.from_model(model), sampling_params, model.params, num_slots=64, queue_size=queue)
        loop.generate(keys[:64])
        start = time.perf_counter()
        batches = [loop.generate(keys[i : i + queue]) for i in range(0, 2048, queue)]
        seconds = time.perf_counter() - start
        tokens = sum(int(batch.lengths.sum()) for batch in batches)
        slot_steps = sum(batch.slot_steps for batch in batches)
        results[name] = np.concatenate([batch.tokens for batch in batches])
        stopped = np.mean(np.concatenate([batch.stopped for batch in batches]))
        print(
            f"{name}: utilization {100 * tokens / slot_steps:.1f} %, {tokens / seconds:,.0f} tokens/s, "
            f"mean length {tokens / 2048:.0f}, {100 * stopped:.0f} % ended by a stop id"
        )
    print("same tokens:", np.array_equal(results["refill"], results["static"]))


def memory(ref: str) -> None:
    """Measure resident memory over 100,000 samples of up to 16 tokens."""
    seen: dict[int, float] = {}
    ended = threading.Event()

    def watch(folder: Path) -> None:
        while not ended.wait(0.2):
            written = 1024 * len(list(folder.glob("shard-*.parquet")))
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.setdefault(written, pages * resource.getpagesize() / 2**20)

    with tempfile.TemporaryDirectory() as folder:
        config = SampleConfig(model=ref, out=f"{folder}/corpus", samples=100_000, max_tokens=16, batch_size=256)
        watcher = threading.Thread(target=watch, args=(Path(config.out),))
        watcher.start()
        sample(replace(config, mesh="data=1,model=1"))
        ended.set()
        watcher.join()
    for wanted in (10_000, 30_000, 50_000, 70_000, 100_000):
        written = min(seen, key=partial(_distance, wanted))
        print(f"{written:,} samples written: {seen[written]:.0f} MiB")


def _distance(a: int, b: int) -> int:
    return abs(a - b)


def length(_: str) -> None:
    """Measure milliseconds per step by position, Pythia-70m, 32 slots."""
    config = hub.open_model(write_config(SHAPES["pythia-70m"])).config
    spec, params = random_model(config)
    sampling_params = SamplingParams(start_ids=(0,), stop_ids=(), max_tokens=1024)
    steps: list[tuple[int, float]] = []
    last = time.perf_counter()

    def report(progress: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        steps.append((progress.slot_steps // 32, now - last))
        last = now

    loop = DecodeLoop(spec, sampling_params, params, num_slots=32, queue_size=32)
    loop.generate(per_sample_keys(0, np.arange(32)))
    steps.clear()
    last = time.perf_counter()
    loop.generate(per_sample_keys(0, np.arange(32)), progress_callback=report)
    before = 0
    for position, seconds in steps:
        print(f"positions {before}–{position}: {1000 * seconds / (position - before):.1f} ms a step")
        before = position


def divergences(ref: str) -> None:
    """Count divergences between programs of different shapes, per token."""
    found = {}
    for mesh, rows in (("data=1,model=1", 64), ("data=1,model=1", 16), ("data=1,model=1", 7), ("data=1,model=2", 64)):
        model = hub.load_model(ref, mesh)
        sampling_params = SamplingParams(start_ids=(1,), stop_ids=(1, 2), max_tokens=256)
        found[mesh, rows] = _draw(DecodeSpec.from_model(model), sampling_params, model.params, 2048, rows)
    _print_divergences("V = 512 (trained)", found)
    config = hub.open_model(write_config(SHAPES["pythia-70m"])).config
    found = {}
    for mesh, rows in (("data=1,model=1", 32), ("data=1,model=1", 16), ("data=1,model=2", 32)):
        spec, params = random_model(config, mesh)
        with mesh_context(spec.sharding_rules.mesh):
            params["head"]["kernel"] = params["head"]["kernel"] * 8.0  # logits of a spread like a trained model's
        sampling_params = SamplingParams(start_ids=(0,), stop_ids=(), max_tokens=128)
        found[mesh, rows] = _draw(spec, sampling_params, params, 512, rows)
        drawn = found[mesh, rows]
        print(f"entropy {-drawn.policy_logprobs.sum() / drawn.lengths.sum():.2f} nats a token")
    _print_divergences("V = 50304 (random, head × 8)", found)


def cache(ref: str) -> None:
    """Measure log-likelihood per token by cache type, 256 × 256 tokens."""
    model = hub.load_model(ref, "data=1,model=1")
    spec, rules = DecodeSpec.from_model(model), model.sharding_rules
    sampling_params = SamplingParams(start_ids=(1,), stop_ids=(), max_tokens=256)
    tokens = _draw(spec, sampling_params, model.params, 256, 64).tokens
    fed = np.concatenate([np.full((256, 1), 1), tokens[:, :-1]], axis=1).astype(np.int32)

    def log_likelihoods(logits: jax.Array, wanted: jax.Array) -> jax.Array:
        return take_per_row(jax.nn.log_softmax(logits), wanted)

    @partial(jax.jit, static_argnums=0)
    def score_by_decoding(spec: DecodeSpec, params: Params, fed: jax.Array, wanted: jax.Array) -> jax.Array:
        """Score each wanted token [T, B] after its inputs by decode steps."""

        def next_token_fn(hidden: jax.Array, position: jax.Array, index: jax.Array) -> tuple:
            given = jax.lax.dynamic_index_in_dim(wanted, index, 0, keepdims=False)
            return given, index + 1, log_likelihoods(compute_logits(spec, params, hidden), given)

        def run_chunk(state: tuple, _: None) -> tuple[tuple, jax.Array]:
            cache, committed_len, token, index = state
            cache, token, index, out = decode_chunk(spec, params, cache, committed_len, token, index, next_token_fn)
            return (cache, committed_len + TAIL_LEN, token, index), out

        begin = (spec.init_cache(fed.shape[1], len(fed)), jnp.zeros_like(fed[0]), fed[0], jnp.int32(0))
        return jax.lax.scan(run_chunk, begin, length=len(fed) // TAIL_LEN)[1].reshape(fed.shape)

    with mesh_context(rules.mesh):
        there = [shard_host_array(rules, np.ascontiguousarray(x.T), (None, "batch")) for x in (fed, tokens)]
        hidden = forward(model.config, rules, model.params, shard_host_array(rules, fed, ("batch", None)))
        logits = unembed(model.config, rules, model.params, hidden)
        logprobs = np.asarray(jax.nn.log_softmax(jax.device_get(logits)), np.float64)
        exact = np.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0].T
        for dtype in ("float32", "bfloat16", "int8"):
            found = np.asarray(score_by_decoding(replace(spec, cache_dtype=dtype), model.params, *there), np.float64)
            error = found - exact
            print(
                f"cache {dtype}: {found.mean():.6f} nats a token (full forward {exact.mean():.6f}), mean difference "
                f"{error.mean():+.1e}, rms {np.sqrt(np.mean(error**2)):.1e}, largest {np.abs(error).max():.1e}"
            )


def _draw(spec: DecodeSpec, sampling_params: SamplingParams, params: Params, samples: int, rows: int) -> SampleBatch:
    loop = DecodeLoop(spec, sampling_params, params, num_slots=rows, queue_size=samples)
    return loop.generate(per_sample_keys(0, np.arange(samples)))


def _print_divergences(name: str, found: dict[tuple[str, int], SampleBatch]) -> None:
    (first, reference), *others = found.items()
    for other, drawn in others:
        differs = drawn.tokens != reference.tokens
        diverged = differs.any(axis=1)
        compared = int(np.where(diverged, differs.argmax(axis=1) + 1, reference.lengths).sum())
        print(f"{name}: {first} and {other}: {diverged.sum()} divergences in {compared:,} tokens compared")


def main() -> None:
    measurements = {f.__name__: f for f in (compilation, utilization, memory, length, divergences, cache)}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="+", choices=list(measurements))
    parser.add_argument("--model", default=os.path.join(os.environ.get("JAX_SELFTRAIN_DATA", ""), "stories260k"))
    options = parser.parse_args()
    for name in options.what:
        print(f"# {measurements[name].__doc__}", flush=True)
        measurements[name](options.model)


if __name__ == "__main__":
    main()
