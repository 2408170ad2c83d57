"""Sampling of a corpus, shard by shard, by any number of processes.

One decode loop of fixed shape (slots per replica × replicas) draws each shard, so that every device runs the same
program whatever the number of replicas or of missing shards. A thread detokenizes, hashes and writes a shard while the
loop draws the next. Processes share the folder alone: each uses a mesh of its own devices and claims shards by lease.
The process that finds all shards written commits `corpus.json`, whose bytes do not depend on it. Nothing is written
before the first shard has been drawn, so that a model that cannot be sampled leaves no trace.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_selftrain import hub
from jax_selftrain.config import SampleConfig, yaml_io
from jax_selftrain.corpus import Corpus, CorpusWriter, Sample
from jax_selftrain.corpus.token_source import tokenize_batch
from jax_selftrain.distributed import process_local, sigterm_event
from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.progress import log_line, progress_bar
from jax_selftrain.distributed.sharding import make_sharding_rules
from jax_selftrain.errors import InputError, Preempted
from jax_selftrain.hub import LoadedModel, ModelRef
from jax_selftrain.io import atomic, json_files
from jax_selftrain.io.work_queue import run_missing
from jax_selftrain.models import Params, abstract_params, axis_sizes, count_params
from jax_selftrain.sampling.continuous_batching import DecodeState, RequestQueue, initial_state
from jax_selftrain.sampling.counter_rng import per_sample_keys
from jax_selftrain.sampling.decode import DecodeLoop, DecodeProgress, DecodeSpec, SampleBatch, decode_chunks
from jax_selftrain.sampling.sampling_params import POLICY_FIELDS, SamplingParams, make_sampling_params

POLL_SECONDS = 1.0
"""Interval of checks for shards that another process has finished or given up."""


def sample(config: SampleConfig) -> Corpus:
    """Sample a corpus from a model; the same command again completes it.

    Only missing shards are drawn. Several processes, on one machine or many, may run the same command on a shared
    folder: they divide the shards.

    Raises:
      InputError: an option or the model cannot be used (its logits are NaN, say), or the folder holds another corpus:
        its source, tokenizer, type, policy, seed or number of samples differs. Mesh and batch size may differ.
      Preempted: SIGTERM arrived; finished shards stay.
    """
    yaml_io.require(config)
    with process_local(make_mesh(config.mesh, jax.local_devices())) if jax.process_count() > 1 else nullcontext():
        return _sample(config)


def _sample(config: SampleConfig) -> Corpus:
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; choose a folder")
    source = hub.open_model(config.model)
    sampling_params = _open_sampling_params(config, source)
    writer = CorpusWriter.open(out, _make_request(config, source, sampling_params))
    if config.extend:
        writer.copy_shards(config.extend)
    atomic.remove_stale_temp_files(out / "timings")
    if writer.missing():
        mesh = make_mesh(config.mesh, devices=jax.local_devices())
        model = hub.load_model(source, mesh, config.dtype, preset=config.preset)
        log_line(
            f"sampling from {config.model} ({count_params(source.config):,} parameters), {config.samples:,} samples of "
            f"at most {config.max_tokens} tokens, on {mesh.size} × {mesh.devices.flat[0].device_kind}"
        )
        with _remove_if_empty(out), sigterm_event() as stop, progress_bar("sampling", config.samples) as progress:
            _sample_missing(_SamplingRun(config, writer, sampling_params, model, stop, progress))
    return writer.finalize()


def abstract_program(
    config: SampleConfig, mesh: Mesh
) -> tuple[Callable[..., DecodeState], tuple[Params, RequestQueue, DecodeState, Any], tuple[int, ...]]:
    """Return the program of sampling with abstract arguments.

    Returns:
      (function, abstract (params, queue, state, max_chunks) with shardings, indices of the donated arguments), for
      `jax.jit(function, donate_argnums=donation).lower(*arguments)` inside `mesh_context(mesh)`.

    Raises:
      InputError: an option is invalid, the model's config cannot be read, or the mesh does not divide the model.
    """
    source = hub.open_model(config.model)
    model = source.config
    sampling_params = _open_sampling_params(config, source)
    rules = make_sharding_rules(config.preset, mesh, axis_sizes(model))
    spec = DecodeSpec(model, rules, config.dtype, config.cache_dtype)
    num_slots = config.batch_size * rules.data_parallelism
    params = abstract_params(model, config.dtype, rules)
    queue_size = _queue_size(config, rules.data_parallelism)
    keys: Any = rules.abstract_array((queue_size * rules.data_parallelism, 2), jnp.uint32, ("batch", None))
    count: Any = rules.abstract_array((rules.data_parallelism,), jnp.int32, ("batch",))
    queue = RequestQueue(keys, count)
    with mesh_context(mesh):
        capacity = sampling_params.prefilled_len + sampling_params.output_len
        cache = jax.eval_shape(partial(spec.init_cache, num_slots, capacity))
        state = jax.eval_shape(partial(initial_state, rules, sampling_params, num_slots), queue, cache)
    max_chunks = jax.ShapeDtypeStruct((), jnp.int32)
    return partial(decode_chunks, spec, sampling_params), (params, queue, state, max_chunks), (2,)


def _open_sampling_params(config: SampleConfig, source: ModelRef) -> SamplingParams:
    tokenizer = source.tokenizer if source.has_tokenizer else None
    return make_sampling_params(config, source.config, source.special_tokens, tokenizer)


def _queue_size(config: SampleConfig, replicas: int) -> int:
    """Divide the samples of a shard among the replicas."""
    return -(-min(config.samples, config.samples_per_shard) // replicas)


@dataclass(frozen=True)
class _SamplingRun:
    config: SampleConfig
    writer: CorpusWriter
    sampling_params: SamplingParams
    model: LoadedModel
    stop: threading.Event
    show: Callable[[int, str], None]
    """Updates the progress bar."""


def _make_request(config: SampleConfig, source: ModelRef, sampling_params: SamplingParams) -> dict[str, Any]:
    """Collect the options that determine the content of the corpus, for `corpus.json`."""
    types = {"dtype": config.dtype} | ({} if config.cache_dtype is None else {"cache_dtype": config.cache_dtype})
    start_ids, bos = sampling_params.start_ids, source.special_tokens.bos_token_id
    policy: dict[str, Any] = {name: getattr(sampling_params, name) for name in ("max_tokens", *POLICY_FIELDS)}
    if sampling_params.min_tokens:
        policy["min_tokens"] = sampling_params.min_tokens
    if len(start_ids) > 1:
        policy["start_ids"] = list(start_ids)
    return {
        "kind": "sampled",
        "source": {"ref": config.model, "fingerprint": source.fingerprint} | types,
        "tokenizer_fingerprint": source.tokenizer_fingerprint if source.has_tokenizer else None,
        # The first token of a training document: after a longer start text, BOS.
        "start_id": start_ids[0] if len(start_ids) == 1 or bos is None else bos,
        "stop_ids": list(sampling_params.stop_ids),
        "policy": policy,
        "seed": config.seed,
        "samples": config.samples,
        "samples_per_shard": config.samples_per_shard,
    }


def _sample_missing(run: _SamplingRun) -> None:
    """Sample every missing shard that no other process samples.

    A thread writes each shard while the next one is sampled; its lease is held until it is written.
    """
    config, spec = run.config, DecodeSpec.from_model(run.model, run.config.cache_dtype)
    queue_size = _queue_size(config, spec.sharding_rules.data_parallelism)
    loop = DecodeLoop(spec, run.sampling_params, run.model.params, num_slots=config.batch_size, queue_size=queue_size)
    start_time = time.monotonic()
    shards: list[DecodeProgress] = []  # the latest progress of each shard that this process samples

    def report(now: DecodeProgress) -> None:
        _check_stop(run)
        shards[-1] = now
        num_finished, tokens, slot_steps = map(sum, zip(*shards, strict=True))
        speed, utilization = tokens / (time.monotonic() - start_time), 100 * tokens / max(slot_steps, 1)
        run.show(num_finished, f"samples, {speed:,.0f} tokens/s, {utilization:.0f} % utilization")

    def sample_claimed(claims: Iterator[tuple[int, ExitStack]]) -> None:
        with ThreadPoolExecutor(1, "write shards") as writer:
            written = writer.submit(lambda: None)
            for index, claim in claims:
                begin = time.time()
                ids = np.asarray(run.writer.sample_ids(index), np.int64)
                shards.append(DecodeProgress(0, 0, 0))
                batch = loop.generate(per_sample_keys(config.seed, ids), progress_callback=report)
                if not batch.finite.all():
                    raise InputError(
                        f"{config.model}: its logits are NaN or infinite at {config.dtype} (seen in sample "
                        f"{ids[np.argmin(batch.finite)]}), so it cannot be sampled; check its weights, or use another "
                        "--dtype"
                    )
                written.result()
                written = writer.submit(_write_shard, run, index, claim, batch, begin)
            written.result()

    (run.writer.folder / "records").mkdir(parents=True, exist_ok=True)
    run_missing(
        range(len(run.writer.shards)),
        sample_claimed,
        is_done=run.writer.is_done,
        lease_file=lambda index: run.writer.record_path(index).with_suffix(".lease"),
        poll_seconds=POLL_SECONDS,
        on_wait=lambda: _check_stop(run),
    )


def _write_shard(run: _SamplingRun, index: int, claim: ExitStack, batch: SampleBatch, start_time: float) -> None:
    """Detokenize and commit a shard, and release its claim."""
    decode_seconds = time.time() - start_time
    with claim:
        tokens = [row[:length] for row, length in zip(batch.tokens, batch.lengths, strict=True)]
        texts, mismatches = _detokenize(run.model.tokenizer, tokens, run.sampling_params.stop_ids)
        logprobs, reasons = batch.logprobs.tolist(), np.where(batch.stopped, "stop", "length").tolist()
        samples = list(map(Sample, run.writer.sample_ids(index), tokens, texts, logprobs, reasons))
        folder = run.writer.folder
        if not (folder / "config.yaml").exists():
            ids: dict[str, Any] = {"stop_ids": run.sampling_params.stop_ids}
            if run.config.start_text is None:
                (ids["start_id"],) = run.sampling_params.start_ids
            yaml_io.save(folder / "config.yaml", replace(run.config, **ids))
        policy_logprob = math.fsum(map(float, batch.policy_logprobs))
        metadata = {"mismatches": mismatches, "policy_logprob": policy_logprob, **_describe_environment(run)}
        record = run.writer.write_shard(index, samples, metadata)
        timing = {
            "start_time": start_time,
            "seconds": time.time() - start_time,
            "decode_seconds": decode_seconds,
            "tokens_per_second": record["tokens"] / decode_seconds,
            "utilization": batch.utilization,
            "process": jax.process_index(),
        }
        json_files.write_json(folder / "timings" / f"{Path(record['file']).stem}.json", timing)


def _detokenize(tokenizer: Any, tokens: Sequence[np.ndarray], stop_ids: Sequence[int]) -> tuple[list[str], int]:
    """Decode samples without special tokens, and count re-encoding mismatches.

    The tokens stay authoritative: a model draws sequences that its tokenizer would never produce from the text (with
    byte-level vocabularies even bytes that are no text), so that text loses information. A mismatch is a text whose
    encoding, special strings as plain text, differs from the sample's tokens without stop id and special tokens.
    """
    if tokenizer is None:
        return [""] * len(tokens), 0
    special = set(tokenizer.all_special_ids)
    ended = [row[:-1] if len(row) and row[-1] in stop_ids else row for row in tokens]
    kept = [[token for token in row.tolist() if token not in special] for row in ended]
    texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in kept]
    again = tokenize_batch(tokenizer, texts)["input_ids"]
    return texts, sum(before != after for before, after in zip(kept, again, strict=True))


def _describe_environment(run: _SamplingRun) -> dict[str, Any]:
    """Record what a bitwise repetition of a shard needs besides the request."""
    mesh = run.model.sharding_rules.mesh
    return {
        "model_commit": run.model.source.commit,
        "mesh": dict(mesh.shape),
        "preset": run.config.preset,
        "slots_per_replica": run.config.batch_size,
        "device": mesh.devices.flat[0].device_kind,
        "xla_flags": {name: os.environ[name] for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if name in os.environ},
    }


def _check_stop(run: _SamplingRun) -> None:
    if run.stop.is_set():
        raise Preempted(f"{run.writer.folder}: stopped; finished shards stay, run the same command again to continue")


@contextmanager
def _remove_if_empty(out: Path) -> Iterator[None]:
    """Remove the new folders of a corpus if they stay empty."""
    made = [folder for folder in (out / "records", out) if not folder.exists()]
    try:
        yield
    finally:
        for folder in made:
            with suppress(FileNotFoundError):  # another process has removed it
                if not any(folder.iterdir()):
                    folder.rmdir()
