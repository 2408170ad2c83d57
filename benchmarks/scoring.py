"""Requests per second of the likelihood engine beside lm-evaluation-harness with transformers + torch, in one run.

    python benchmarks/scoring.py --tokenizer FOLDER arc:arc_easy_test.jsonl lambada:lambada_test.jsonl
        [--shape pythia-70m] [--documents 500] [--rounds 3] [--batch-sizes 1 8 16 64] [--batch-tokens N]

A model of random weights is written as a Hugging Face folder with the given tokenizer and opened by both: by
`load_model`, and by `lm_eval.models.huggingface.HFLM` in float32 on the same cores. Both get the same texts (context,
continuation) and turn them into tokens themselves, within the time that is measured; HFLM sorts and batches as it
does, with the batch size of `--batch-sizes` that was fastest on the first `TRIAL` documents. The contestants take
turns, so that a machine whose speed drifts or is shared slows both. Each first answers everything once: that compiles
our programs for every length (the number is shown) and is not counted.

* *ratio*: of requests per second, round by round: median and range; also of user CPU seconds, which other work on the
  machine disturbs less.
* *forward*: a plain forward pass over the very rows that the engine computes, padding included, without attention's
  mask of branches, vocabulary or anything else: the share of it in our time is how near the engine is to this roofline.
* *difference*: the largest between the log-likelihoods of both.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads must not spin while it is our turn
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
from measuring import circumstances
from shapes import SHAPES, write_config

from jax_selftrain import hub
from jax_selftrain.distributed.mesh import mesh_context, xla_options
from jax_selftrain.evals import load_tasks
from jax_selftrain.likelihood import loglikelihoods
from jax_selftrain.likelihood.batching import batch_rows, plan_units
from jax_selftrain.likelihood.engine import deduplicate
from jax_selftrain.likelihood.tokenize import encode_pairs, start_token
from jax_selftrain.models import forward

TRIAL = 20
Texts = Sequence[tuple[str, str]]
Answers = list[tuple[float, bool]]


@dataclass(frozen=True)
class Spent:
    wall: float
    user: float
    """Seconds of all cores in user mode."""


def model_folder(shape: str, tokenizer: Path) -> str:
    """A Hugging Face folder with random weights."""
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
    """A forward pass over the rows of the plan, and what the plan is like in words."""
    prefix = start_token(model)
    asked, _ = deduplicate(model.config, encode_pairs(model.tokenizer, prefix, texts))
    units = plan_units(model.sharding_rules, model.config, asked, batch_tokens)
    batches = [batch for unit in units for batch in unit.batches]
    shapes = [(batch_rows(model.sharding_rules, batch.length, batch_tokens), batch.length) for batch in batches]
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

    alone = sum(len(request.tokens) - 1 for request in asked)
    rows = sum(len(row.tokens) for batch in batches for row in batch.rows)
    places = sum(len(row.query_positions) for batch in batches for row in batch.rows)
    predicted = sum(request.num_targets for request in asked)
    described = (
        f"{len(asked):,} requests of {alone:,} tokens in rows of {rows:,} ({sum(a * b for a, b in shapes):,} padded, "
        f"{len(set(shapes))} lengths compiled); {predicted:,} tokens predicted at {places:,} positions"
    )
    return passes, described


def spend(run: Callable[[], Any]) -> tuple[Spent, Any]:
    began, user = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    result = run()
    return Spent(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_utime - user), result


def best_batch_size(folder: str, texts: Texts, sizes: Sequence[int]) -> tuple[int, str]:
    """The harness's fastest batch size on these texts, by user CPU seconds, and all that were tried."""
    spent = {}
    for size in sizes:
        lm = harness(folder, size)
        theirs(lm, texts[:4])
        spent[size], _ = spend(lambda lm=lm: theirs(lm, texts))
    tried = ", ".join(f"{size}: {len(texts) / s.wall:.1f}/s ({s.user:.0f} s of CPU)" for size, s in spent.items())
    return min(spent, key=lambda size: spent[size].user), tried


def measure(options: argparse.Namespace, folder: str, model: hub.LoadedModel, reference: str) -> str:
    """One row of the table, and notes."""
    (task,) = load_tasks([reference], options.documents)
    texts = [(question.context, choice) for question in task.questions for choice in question.continuations]
    trial = [(question.context, choice) for question in task.questions[:TRIAL] for choice in question.continuations]
    size, tried = best_batch_size(folder, trial, options.batch_sizes)
    lm = harness(folder, size)
    passes, described = plain(model, texts, options.batch_tokens)
    contestants: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(model, texts, options.batch_tokens),
        "forward": passes,
        "harness": lambda: theirs(lm, texts),
    }
    compiling, _ = spend(contestants["ours"])
    passes()
    theirs(lm, texts[: 4 * size])
    spent: dict[str, list[Spent]] = {name: [] for name in contestants}
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
        f"* {task.name}: {described}. Harness's batch sizes on {TRIAL} documents: {tried}; {size} taken. is-greedy "
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
        "tasks", nargs="+", metavar="LAYOUT:FILE", help="task files, as `jax-selftrain score` reads them"
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
    setting = circumstances(f"{options.shape}, float32, {options.documents} documents each", options.rounds)
    text = "\n".join([setting, HEADER, *rows, "", *notes]) + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("# Likelihood scoring\n\n" + text)


if __name__ == "__main__":
    main()
