"""Requests per second of the likelihood engine and of lm-evaluation-harness.

    python benchmarks/scoring.py --tokenizer FOLDER arc:arc_easy_test.jsonl lambada:lambada_test.jsonl
        [--shape pythia-70m] [--documents 500] [--rounds 3] [--batch-sizes 1 8 16 64] [--batch-tokens N]

A random model is written as a Hugging Face folder and loaded by `load_model` and by `HFLM` (transformers + torch) in
float32. Both tokenize and score the same texts; HFLM uses the batch size that was fastest on the first `TRIAL`
documents. They alternate, so that a change of the machine's speed affects both. The first, compiling pass is not
counted.

* *ratio*: of requests per second and of user CPU seconds, by round: median and range.
* *forward*: share of our time that a plain forward pass over the engine's padded rows takes (the roofline).
* *difference*: the largest difference of log-likelihoods.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads must not spin during our turn
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
from measuring import CpuTime, describe_run, spend
from shapes import SHAPES, write_config

from jax_selftrain import hub
from jax_selftrain.distributed.mesh import mesh_context, xla_options
from jax_selftrain.evals import load_tasks
from jax_selftrain.likelihood import loglikelihoods
from jax_selftrain.likelihood.batching import plan_units
from jax_selftrain.likelihood.engine import deduplicate
from jax_selftrain.likelihood.tokenize import encode_pairs, start_token
from jax_selftrain.models import forward

TRIAL = 20
Texts = Sequence[tuple[str, str]]
Answers = list[tuple[float, bool]]


def model_folder(shape: str, tokenizer: Path) -> str:
    """Write a Hugging Face folder with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    config = AutoConfig.from_pretrained(write_config(SHAPES[shape]))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for file in tokenizer.glob("*token*.json"):
        shutil.copy(file, folder)
    return folder


def ours(model: hub.LoadedModel, texts: Texts, batch_tokens: int | None) -> Answers:
    prefix = start_token(model)
    requests = encode_pairs(model.tokenizer, prefix, texts)
    return [
        (answer.loglikelihood, answer.is_greedy)
        for answer in loglikelihoods(model, requests, batch_tokens=batch_tokens)
    ]


def theirs(lm: Any, texts: Texts) -> Answers:
    from lm_eval.api.instance import Instance

    instances = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(texts)]
    return lm.loglikelihood(instances, disable_tqdm=True)


def harness(folder: str, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=batch_size)


def plain(model: hub.LoadedModel, texts: Texts, batch_tokens: int | None) -> tuple[Callable[[], None], str]:
    """Return a forward pass over the planned rows, and a description."""
    prefix = start_token(model)
    requests, _ = deduplicate(model.config, encode_pairs(model.tokenizer, prefix, texts))
    units = plan_units(model.sharding_rules, model.config, requests, batch_tokens)
    batches = [batch for unit in units for batch in unit.batches]
    replicas = model.sharding_rules.data_parallelism
    shapes = [(replicas * batch.rows_per_device, batch.length) for batch in batches]
    run = jax.jit(
        lambda params, tokens: forward(model.config, model.sharding_rules, params, tokens).sum(),
        compiler_options=xla_options(),
    )
    inputs = {
        shape: jax.device_put(np.ones(shape, np.int32), model.sharding_rules.sharding(("batch", None)))
        for shape in shapes
    }

    def passes() -> None:
        with mesh_context(model.sharding_rules.mesh):
            jax.block_until_ready([run(model.params, inputs[shape]) for shape in shapes])

    total = sum(len(request.tokens) - 1 for request in requests)
    rows = sum(len(row.tokens) for batch in batches for row in batch.rows)
    queries = sum(len(row.query_positions) for batch in batches for row in batch.rows)
    targets = sum(request.num_targets for request in requests)
    description = (
        f"{len(requests):,} requests of {total:,} tokens in rows of {rows:,} "
        f"({sum(a * b for a, b in shapes):,} padded, {len(set(shapes))} lengths); "
        f"{targets:,} targets at {queries:,} query positions"
    )
    return passes, description


def best_batch_size(folder: str, texts: Texts, sizes: Sequence[int]) -> tuple[int, str]:
    """Return the harness's fastest batch size, and all measurements."""
    spent = {}
    for size in sizes:
        lm = harness(folder, size)
        theirs(lm, texts[:4])
        spent[size], _ = spend(lambda lm=lm: theirs(lm, texts))
    tried = ", ".join(f"{size}: {len(texts) / s.wall:.1f}/s ({s.user:.0f} s of CPU)" for size, s in spent.items())
    return min(spent, key=lambda size: spent[size].user), tried


def measure(options: argparse.Namespace, folder: str, model: hub.LoadedModel, reference: str) -> str:
    """Return a table row and notes."""
    (task,) = load_tasks([reference], options.documents)
    texts = [(question.context, choice) for question in task.questions for choice in question.continuations]
    trial = [(question.context, choice) for question in task.questions[:TRIAL] for choice in question.continuations]
    size, tried = best_batch_size(folder, trial, options.batch_sizes)
    lm = harness(folder, size)
    passes, description = plain(model, texts, options.batch_tokens)
    contestants: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(model, texts, options.batch_tokens),
        "forward": passes,
        "harness": lambda: theirs(lm, texts),
    }
    compiling, _ = spend(contestants["ours"])
    passes()
    theirs(lm, texts[: 4 * size])
    spent: dict[str, list[CpuTime]] = {name: [] for name in contestants}
    answers: dict[str, Answers] = {}
    for turn in range(options.rounds):
        for name, run in contestants.items():
            seconds, answers[name] = spend(run)
            spent[name].append(seconds)
            print(f"{task.name} round {turn + 1}: {name} {seconds.wall:.1f} s, {seconds.user:.1f} s of CPU", flush=True)
    difference = max(abs(a[0] - b[0]) for a, b in zip(answers["ours"], answers["harness"], strict=True))
    same = sum(a[1] == b[1] for a, b in zip(answers["ours"], answers["harness"], strict=True))

    def ratio(what: str, other: str) -> str:
        values = [getattr(b, what) / getattr(a, what) for a, b in zip(spent["ours"], spent[other], strict=True)]
        return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"

    speed = {name: len(texts) / statistics.median(s.wall for s in values) for name, values in spent.items()}
    user = {name: statistics.median(s.user for s in values) for name, values in spent.items()}
    cells = [
        task.name,
        f"{len(texts):,}",
        f"{speed['ours']:.1f}",
        f"{speed['harness']:.1f}",
        ratio("wall", "harness"),
        f"{user['ours']:.0f} / {user['harness']:.0f}",
        ratio("user", "harness"),
        f"{100 * user['forward'] / user['ours']:.0f} %",
        f"{difference:.1e}",
    ]
    notes = (
        f"* {task.name}: {description}. Harness's batch sizes on {TRIAL} documents: {tried}; {size} used. is-greedy "
        f"equal in {same:,} of {len(texts):,}. First answer, compiling: {compiling.wall:.0f} s "
        f"({compiling.user:.0f} s of CPU)."
    )
    return f"| {' | '.join(cells)} |\n{notes}"


HEADER = (
    "| task | requests | ours, requests/s | harness | ratio | CPU seconds of both | ratio | forward | difference |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "tasks", nargs="+", metavar="FORMAT:FILE", help="task files, as `jax-selftrain score` reads them"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer that fits the shape")
    parser.add_argument("--shape", default="pythia-70m", choices=SHAPES)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16, 64], help="of the harness")
    parser.add_argument("--batch-tokens", type=int, help="ours; default: the engine's")
    parser.add_argument("--out", type=Path, help="write the table here too (Markdown)")
    options = parser.parse_args()
    folder = model_folder(options.shape, options.tokenizer)
    model = hub.load_model(folder, "data=1")
    results = []
    for reference in options.tasks:
        results.append(measure(options, folder, model, reference))
        print(HEADER, results[-1], sep="\n", flush=True)
    rows, notes = zip(*(result.split("\n", 1) for result in results), strict=True)
    setting = describe_run(f"{options.shape}, float32, {options.documents} documents each", options.rounds)
    text = "\n".join([setting, HEADER, *rows, "", *notes]) + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("# Likelihood scoring\n\n" + text)


if __name__ == "__main__":
    main()
