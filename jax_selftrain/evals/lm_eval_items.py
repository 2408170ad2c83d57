"""Items of lm-evaluation-harness tasks, for the table `item_results.ITEMS`.

The right answer and `acc` come from the harness; log-odds come from the requests. A task has items if every document
has one right answer (multiple choice, or one continuation as in LAMBADA). Generation tasks, and tasks whose `acc` is
not 0 or 1, have none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jax_selftrain.evals.item_results import ITEMS, log_odds
from jax_selftrain.io.manifest import hash_json

if TYPE_CHECKING:
    from jax_selftrain.evals.lm_eval_adapter import AnsweredInstance


def items_from_answers(
    tasks: Mapping[str, Any], answered: Sequence[AnsweredInstance], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> pa.Table:
    """Tabulate the items of harness tasks, in task and document order.

    Args:
      tasks: task objects of the harness, by name.
      answered: requests with their answers, in task, document, choice order.
      samples: logged samples of the harness, by task.
    """
    requests: dict[tuple[str, int], list[AnsweredInstance]] = defaultdict(list)
    for answer in answered:
        if answer.instance.request_type == "loglikelihood":
            requests[answer.instance.task_name, answer.instance.doc_id].append(answer)
    rows = []
    for name, task in tasks.items():
        items = list(_iter_items(name, task, requests, samples.get(name, ())))
        rows += items if all(item is not None for item in items) else []
    return pa.Table.from_pylist(rows, schema=ITEMS)


def _iter_items(
    name: str,
    task: Any,
    requests: Mapping[tuple[str, int], Sequence[AnsweredInstance]],
    samples: Sequence[Mapping[str, Any]],
) -> Iterator[dict[str, Any] | None]:
    """Yield a row for each document, None without single right answer."""
    seen: set[int] = set()
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        if sample["doc_id"] in seen:
            continue  # the same document with another filter
        seen.add(sample["doc_id"])
        answers = requests.get((name, sample["doc_id"]), ())
        if "acc_mutual_info" in sample:
            answers = answers[: len(answers) // 2]  # the second half are the choices without context
        gold = _gold_index(task, sample["doc"], len(answers))
        if gold is None or sample.get("acc") not in (0, 1):
            yield None
            continue
        scores = [answer.likelihoods[0].loglikelihood for answer in answers]
        acc_norm = sample.get("acc_norm")
        yield {
            "task": name,
            "doc": sample["doc_id"],
            "item_hash": hash_json([list(answer.instance.args) for answer in answers]),
            "cluster": None,
            "choices": len(answers),
            "acc": bool(sample["acc"]),
            "acc_norm": None if acc_norm is None else bool(acc_norm),
            "loglikelihood": scores[gold],
            "log_odds": log_odds(scores, gold) if len(scores) > 1 else None,
            "tokens": answers[gold].likelihoods[0].tokens,
            "bytes": len(answers[gold].instance.args[1].encode()),
        }


def _gold_index(task: Any, document: Mapping[str, Any], choices: int) -> int | None:
    """Return the index of the single right choice, or None."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0 if choices == 1 else None
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    gold = task.doc_to_text(document) if getattr(task, "multiple_input", 0) else task.doc_to_target(document)
    return gold if type(gold) is int and 0 <= gold < choices else None
