"""Filling a corpus folder: shard by shard, by any number of processes, from wherever the last attempt ended.

A shard is drawn by a loop of one fixed shape, (rows per replica) × (replicas), whose rows take sample after sample
until none is left (see `sampling.decode_loop`). Each device thus runs the same program on its rows however many
replicas there are, and whatever is left to do. While a shard is detokenized, hashed and written, the next is drawn.
Processes share nothing but the folder: each works on a mesh of its own devices, claims shards by lease, and whoever
finds all shards whole writes `corpus.json`, whose bytes do not depend on who it was. Nothing is written before the
first shard has been drawn, so that a model that cannot be sampled leaves no trace.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
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
from jax_selftrain.corpus import (
    Corpus,
    Sample,
    finalize_corpus,
    init_corpus,
    missing_shards,
    open_corpus,
    shard_count,
    shard_ids,
    shard_name,
    write_shard,
)
from jax_selftrain.corpus.shards import REQUEST
from jax_selftrain.distributed import process_local, sigterm_handler
from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import make_sharding_rules
from jax_selftrain.errors import InputError, Preempted
from jax_selftrain.hub import LoadedModel
from jax_selftrain.io import atomic, lease
from jax_selftrain.models import Params, abstract_params, axis_sizes, param_shardings
from jax_selftrain.sampling.continuous_batching import DecodeState, RequestQueue, initial_state
from jax_selftrain.sampling.counter_rng import per_sample_keys
from jax_selftrain.sampling.decode import (
    DecodeLoop,
    DecodeProgress,
    DecodeSpec,
    SampleBatch,
    decode_chunks,
    decode_spec,
    empty_cache,
)
from jax_selftrain.sampling.detokenize import detokenize
from jax_selftrain.sampling.sampling_params import SamplingParams, check_sample_config, make_sampling_params
from jax_selftrain.version import versions

POLL_SECONDS = 1.0
"""How often to look whether a shard that another process works on has been finished or given up."""


def sample(config: SampleConfig) -> Corpus:
    """Draw `config.samples` texts from a model into a corpus folder; the same command again completes it.

    Only missing shards are drawn. Several processes, on one machine or many, may run the same command on a shared
    folder: they divide the shards among them.

    Raises:
      InputError: an option or the model cannot be used (its logits are NaN, say), or the folder holds another corpus:
        source, tokenizer, type, policy, seed or number of samples differ. Another mesh or batch is allowed.
      Stopped: SIGTERM came; whole shards stay.
    """
    yaml_io.require(config)
    check_sample_config(config)
    with process_local(make_mesh(config.mesh, jax.local_devices())) if jax.process_count() > 1 else nullcontext():
        return _sample(config)


def _sample(config: SampleConfig) -> Corpus:
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder")
    sampling_params = _read_sampling_params(config)
    request = _request(config, sampling_params)
    if (out / REQUEST).exists():
        request["source"]["ref"] = _first_ref(out, request)
        init_corpus(out, request)
        atomic.remove_stale_temp_files(out / "timings")
    n_shards = shard_count(config.samples, config.samples_per_shard)
    if missing_shards(out, n_shards):
        mesh = make_mesh(config.mesh, devices=jax.local_devices())
        model = hub.load_model(config.model, mesh, config.dtype, preset=config.preset)
        with _remove_if_empty(out), _sigterm_flag() as stop, _progress_bar(config.samples) as progress:
            _run_work_queue(_SamplingRun(config, out, sampling_params, request, model, stop, progress), n_shards)
    finalize_corpus(out, request)
    return open_corpus(out)


def abstract_program(
    config: SampleConfig, mesh: Mesh
) -> tuple[Callable[..., DecodeState], tuple[Params, RequestQueue, DecodeState, Any], tuple[int, ...]]:
    """What sampling runs, to be compiled here or ahead of time for another machine.

    Returns:
      (function, abstract (params, queue, state, pages) with shardings, indices of the donated arguments), for
      `jax.jit(function, donate_argnums=donation).lower(*arguments)` inside `using(mesh)`.

    Raises:
      InputError: an option cannot be used, the model's config cannot be read, or the mesh does not divide the model.
    """
    check_sample_config(config)
    sampling_params = _read_sampling_params(config)
    model = hub.open_model(config.model).config
    rules = make_sharding_rules(config.preset, mesh, axis_sizes(model))
    architecture = DecodeSpec(model, rules, config.dtype, config.cache_dtype)
    rows = config.batch_size * rules.data_parallelism
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params(model, config.dtype),
        param_shardings(model, rules),
    )
    places = _queue_size(config, rules.data_parallelism) * rules.data_parallelism
    keys: Any = jax.ShapeDtypeStruct((places, 2), jnp.uint32, sharding=rules.sharding(("batch", None)))
    count: Any = jax.ShapeDtypeStruct((rules.data_parallelism,), jnp.int32, sharding=rules.sharding(("batch",)))
    queue = RequestQueue(keys, count)
    with mesh_context(mesh):
        cache = jax.eval_shape(partial(empty_cache, architecture, sampling_params, rows))
        state = jax.eval_shape(partial(initial_state, rules, sampling_params, rows), queue, cache)
    pages = jax.ShapeDtypeStruct((), jnp.int32)
    return partial(decode_chunks, architecture, sampling_params), (params, queue, state, pages), (2,)


def _queue_size(config: SampleConfig, replicas: int) -> int:
    """Samples that one call of the loop draws on each replica: a batch in lockstep, else its share of a shard."""
    if config.decode_schedule == "lockstep":
        return config.batch_size
    return -(-min(config.samples, config.samples_per_shard) // replicas)


@dataclass(frozen=True)
class _SamplingRun:
    config: SampleConfig
    out: Path
    sampling_params: SamplingParams
    request: dict[str, Any]
    model: LoadedModel
    stop_requested: Callable[[], bool]
    progress: Callable[[DecodeProgress], None]
    """Told what has been drawn since it was last told."""


def _read_sampling_params(config: SampleConfig) -> SamplingParams:
    model = hub.open_model(config.model).config
    special = hub.open_model(config.model).special_tokens
    return make_sampling_params(
        config,
        start_id=special.bos_token_id,
        stop_ids=special.eos_token_ids,
        vocab_size=model.vocab_size,
        tokenizer_length=special.tokenizer_length,
        max_positions=model.max_positions,
    )


def _request(config: SampleConfig, sampling_params: SamplingParams) -> dict[str, Any]:
    """Everything that decides what is in the corpus; `corpus.json` says it again."""
    types = {"dtype": config.dtype} | ({} if config.cache_dtype is None else {"cache_dtype": config.cache_dtype})
    return {
        "kind": "sampled",
        "source": {"ref": config.model, "fingerprint": hub.open_model(config.model).fingerprint} | types,
        "tokenizer_fingerprint": _tokenizer_fingerprint(config.model),
        "start_id": sampling_params.start_id,
        "stop_ids": list(sampling_params.stop_ids),
        "policy": {
            name: getattr(sampling_params, name) for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p")
        },
        "seed": config.seed,
        "samples": config.samples,
        "samples_per_shard": config.samples_per_shard,
    }


def _tokenizer_fingerprint(ref: str) -> str | None:
    return (
        None
        if hub.open_model(ref).special_tokens.tokenizer_length is None
        else hub.open_model(ref).tokenizer_fingerprint
    )


def _first_ref(out: Path, request: dict[str, Any]) -> str:
    """The name under which the source was first given, if it is the same source: models may be moved."""
    source = atomic.read_json(out / REQUEST).get("source", {})
    return source["ref"] if source.get("fingerprint") == request["source"]["fingerprint"] else request["source"]["ref"]


def _run_work_queue(job: _SamplingRun, n_shards: int) -> None:
    """Draw shards until none is missing, leaving those that others have claimed to them while they live.

    A thread writes each shard while the next one is drawn; its lease is held until it is written.
    """
    records = job.out / "records"
    records.mkdir(parents=True, exist_ok=True)
    config, architecture = job.config, decode_spec(job.model, job.config.cache_dtype)
    places = _queue_size(config, architecture.sharding_rules.data_parallelism)
    loop = DecodeLoop(architecture, job.sampling_params, job.model.params, rows=config.batch_size, queue=places)
    with ThreadPoolExecutor(1, "write shards") as writer:
        while missing := missing_shards(job.out, n_shards):
            found_work, written = False, writer.submit(lambda: None)
            for index in missing:
                shard = job.out / shard_name(index)
                with ExitStack() as claim:
                    held = claim.enter_context(lease.lease(records / f"{shard.stem}.lease"))
                    whole = shard.exists() and (records / f"{shard.stem}.json").exists()  # by another meanwhile
                    if held and not whole:
                        found_work = True
                        start_time = time.time()
                        drawn = _sample_shard(job, loop, index)
                        written.result()
                        written = writer.submit(_write_shard, job, index, drawn, start_time, claim.pop_all())
            written.result()
            if not found_work:
                _check_stop(job)
                time.sleep(POLL_SECONDS)
    for left in records.glob("*.lease"):  # of a process killed between finishing its shard and giving back its lease
        with lease.lease(left):
            pass


def _sample_shard(job: _SamplingRun, loop: DecodeLoop, index: int) -> list[SampleBatch]:
    """The samples of a shard, in the batches they were drawn in.

    Raises:
      InputError: the model's logits are no distribution.
      Stopped: SIGTERM came.
    """
    config, room = job.config, loop.queue * loop.architecture.sharding_rules.data_parallelism
    ids = np.asarray(shard_ids(index, config.samples, config.samples_per_shard), np.int64)
    batches = []
    for first in range(0, len(ids), room):
        part, before = ids[first : first + room], DecodeProgress(0, 0, 0)

        def report(now: DecodeProgress) -> None:
            nonlocal before
            _check_stop(job)
            job.progress(
                DecodeProgress(
                    now.num_finished - before.num_finished, now.tokens - before.tokens, now.row_steps - before.row_steps
                )
            )
            before = now

        drawn = loop.generate(per_sample_keys(config.seed, part), progress_callback=report)
        if not drawn.finite.all():
            raise InputError(
                f"{config.model}: its logits are NaN or infinite at {config.dtype} (seen in sample "
                f"{part[np.argmin(drawn.finite)]}), so it cannot be sampled; check its weights, or use another --dtype"
            )
        batches.append(drawn)
    return batches


def _write_shard(job: _SamplingRun, index: int, batches: list[SampleBatch], began: float, claim: ExitStack) -> None:
    """Detokenize, commit and give back the claim."""
    drawn_in = time.time() - began
    with claim:
        rows = [(batch, row) for batch in batches for row in range(len(batch.lengths))]
        tokens = [batch.tokens[row, : batch.lengths[row]] for batch, row in rows]
        texts, mismatches = detokenize(job.model.tokenizer, tokens, stop_ids=job.sampling_params.stop_ids)
        ids = shard_ids(index, job.config.samples, job.config.samples_per_shard)
        samples = [
            Sample(
                sample_id=sample_id,
                tokens=drawn_tokens,
                text=text,
                logprob=float(batch.logprobs[row]),
                finish_reason="stop" if batch.stopped[row] else "length",
            )
            for sample_id, drawn_tokens, text, (batch, row) in zip(ids, tokens, texts, rows, strict=True)
        ]
        init_corpus(job.out, job.request)
        if not (job.out / "config.yaml").exists():
            yaml_io.save(job.out / "config.yaml", _effective_options(job.config, job.sampling_params))
        policy_logprob = math.fsum(float(x) for batch in batches for x in batch.policy_logprobs)
        given = {"mismatches": mismatches, "policy_logprob": policy_logprob, **_environment(job)}
        record = write_shard(job.out, index, samples, given)
        timing = {
            "began": began,
            "seconds": time.time() - began,
            "decode_seconds": drawn_in,
            "tokens_per_second": record["tokens"] / drawn_in,
            "utilization": record["tokens"] / sum(batch.slots for batch in batches),
            "process": jax.process_index(),
        }
        atomic.write_json(job.out / "timings" / f"{Path(record['file']).stem}.json", timing)


def _effective_options(config: SampleConfig, sampling_params: SamplingParams) -> SampleConfig:
    return replace(config, start_id=sampling_params.start_id, stop_ids=sampling_params.stop_ids)


def _environment(job: _SamplingRun) -> dict[str, Any]:
    """What a bitwise repetition of a shard would need beside the request."""
    mesh = job.model.sharding_rules.mesh
    return {
        "mesh": dict(mesh.shape),
        "preset": job.config.preset,
        "rows_per_replica": job.config.batch_size,
        "decode_schedule": job.config.decode_schedule,
        "device": mesh.devices.flat[0].device_kind,
        "xla_flags": {name: os.environ[name] for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if name in os.environ},
        "versions": versions(),
    }


def _check_stop(job: _SamplingRun) -> None:
    if job.stop_requested():
        raise Preempted(f"{job.out}: stopped; the shards that are whole stay, run the same command again to go on")


@contextmanager
def _sigterm_flag() -> Iterator[Callable[[], bool]]:
    """While inside, SIGTERM is a request: yields a function that tells whether one came.

    Signals reach the main thread only, so that sampling in another thread is simply not told.
    """
    requested = threading.Event()
    with sigterm_handler(requested.set):
        yield requested.is_set


@contextmanager
def _remove_if_empty(out: Path) -> Iterator[None]:
    """If nothing was written after all, take back the folders that were made for it."""
    made = [folder for folder in (out / "records", out) if not folder.exists()]
    try:
        yield
    finally:
        for folder in made:
            with suppress(FileNotFoundError):  # another process has taken it back
                if not any(folder.iterdir()):
                    folder.rmdir()


@contextmanager
def _progress_bar(samples: int) -> Iterator[Callable[[DecodeProgress], None]]:
    """A bar on process 0 when standard error is a terminal; yields how to advance it."""
    if jax.process_index() or not sys.stderr.isatty():
        yield lambda more: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("sampling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples, {task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    began, tokens, slots = time.monotonic(), 0, 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("sampling", total=samples, speed="compiling")

        def advance(more: DecodeProgress) -> None:
            nonlocal tokens, slots
            tokens, slots = tokens + more.tokens, slots + more.row_steps
            busy = 100 * tokens / max(slots, 1)
            speed = f"{tokens / (time.monotonic() - began):,.0f} tokens/s, {busy:.0f} % of rows busy"
            bar.update(task, advance=more.num_finished, speed=speed)

        yield advance
