"""Compare log-likelihoods with lm-evaluation-harness's Hugging Face backend in fp32.

    JAX_SELFTRAIN_DATA=… python benchmarks/harness_parity.py [--models stories260k pythia-14m] [--limit N]

Both backends score the same tasks over the same local files. A row of the table is one set: number of requests, largest
difference (nats), number of disagreements on is-greedy, and both accuracies. Each disagreement is listed with the
smallest distance between the two best logits: in fp32 rounding breaks such ties. Questions of PIQA with a choice longer
than the model are removed (stories260k). `pythia-14m` has random weights and Pythia's tokenizer; other names are model
folders.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from harness_sets import published_sets, write_pythia_shape

from jax_selftrain import hub
from jax_selftrain.evals.lm_eval_adapter import HarnessLM


def score_task(lm: Any, spec: dict[str, Any]) -> tuple[list[Any], dict[str, Any], float]:
    """Return instances with their answers, metrics and seconds of one task."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False).load([spec])
    (task,) = loaded["tasks"].values()
    task.set_config(key="num_fewshot", value=0)
    began = time.perf_counter()
    found = evaluate(lm, loaded, bootstrap_iters=0, log_samples=False)
    return task.instances, found["results"][task.task_name], time.perf_counter() - began


def min_logit_gap(model: hub.LoadedModel, lm: HarnessLM, instance: Any) -> str:
    """Return the smallest distance between the two best logits."""
    context, continuation = instance.args
    tokens = lm.tok_encode(context + continuation) if context else [lm.prefix_token_id, *lm.tok_encode(continuation)]
    logits = np.sort(model.logits(np.array([tokens[-model.config.max_positions :]]))[0], axis=-1)
    return f"{(logits[:, -1] - logits[:, -2]).min():.1e}"


def main() -> None:
    """Print one table per model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["stories260k", "pythia-14m"])
    parser.add_argument("--limit", type=int, help="documents of each set")
    parser.add_argument("--sets", nargs="*", default=[], help="only sets whose name begins with one of these")
    parser.add_argument("--batch-size", type=int, default=32, help="of the Hugging Face backend")
    options = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    data = Path(os.environ["JAX_SELFTRAIN_DATA"]).resolve()
    with tempfile.TemporaryDirectory() as work:
        for name in options.models:
            folder = data / name if name == "stories260k" else Path(name)
            if name == "pythia-14m":
                folder = write_pythia_shape(data, Path(work) / name)
            model = hub.load_model(folder, "data=1")
            ours = HarnessLM(model)

            def fits(text: str, lm: HarnessLM = ours) -> bool:
                return len(lm.tok_encode(text)) <= lm.max_length

            sets = published_sets(data, Path(work) / f"sets of {folder.name}", options.limit, fits)
            sets = [spec for spec in sets if spec["task"].startswith(tuple(options.sets or [""]))]
            theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=options.batch_size)
            print(f"\n{name}\n")
            print("| set | requests | max difference | greedy disagreements | acc | acc, HF | seconds | seconds, HF |")
            print("|---|---|---|---|---|---|---|---|", flush=True)
            for spec in sets:
                mine, found, seconds = score_task(ours, spec)
                other, expected, their_seconds = score_task(theirs, spec)
                pairs = [(a.resps[0], b.resps[0]) for a, b in zip(mine, other, strict=True)]
                difference = max(abs(a[0] - b[0]) for a, b in pairs)
                ties = [a for a, (x, y) in zip(mine, pairs, strict=True) if x[1] != y[1]]
                print(
                    f"| {spec['task']} | {len(pairs)} | {difference:.1e} | {len(ties)} | {found['acc,none']:.6f} | "
                    f"{expected['acc,none']:.6f} | {seconds:.1f} | {their_seconds:.1f} |",
                    flush=True,
                )
                for instance in ties:
                    print(
                        f"  document {instance.doc_id}, choice {instance.idx}: {min_logit_gap(model, ours, instance)}"
                    )


if __name__ == "__main__":
    main()
