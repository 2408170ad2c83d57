"""Per document, how the right answer fared in tasks of lm-evaluation-harness: rows of the table of `scoring.documents`.

Which answer is right, and whether it was given, is taken from the harness's own task and its own metrics; log-odds come
from the same requests. Tasks of one continuation (LAMBADA) and of choices are tabulated where every document has one
right answer; texts that are generated, and tasks that define `acc` in a way of their own, are not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jax_selftrain.evals.item_results import DOCUMENTS, log_odds
from jax_selftrain.io.manifest import hash_json

if TYPE_CHECKING:
    from jax_selftrain.evals.lm_eval_adapter import AnsweredInstance


def items_from_answers(
    tasks: Mapping[str, Any], answered: Sequence[AnsweredInstance], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> pa.Table:
    """The documents of the harness's tasks, in task and document order.

    Args:
      tasks: the harness's task objects by name.
      answered: every request and its answer, in task, document, choice order.
      samples: what the harness logged of each task's documents.
    """
    requests: dict[tuple[str, int], list[AnsweredInstance]] = defaultdict(list)
    for one in answered:
        if one.instance.request_type == "loglikelihood":
            requests[one.instance.task_name, one.instance.doc_id].append(one)
    rows = []
    for name, task in tasks.items():
        found = list(_rows(name, task, requests, samples.get(name, ())))
        rows += found if all(row is not None for row in found) else []
    return pa.Table.from_pylist(rows, schema=DOCUMENTS)


def _rows(
    name: str,
    task: Any,
    requests: Mapping[tuple[str, int], Sequence[AnsweredInstance]],
    samples: Sequence[Mapping[str, Any]],
) -> Iterator[dict[str, Any] | None]:
    """One row per document; None where a document has no single right answer."""
    seen: set[int] = set()
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        if sample["doc_id"] in seen:
            continue  # the same document behind another filter
        seen.add(sample["doc_id"])
        asked = requests.get((name, sample["doc_id"]), ())
        if "acc_mutual_info" in sample:
            asked = asked[: len(asked) // 2]  # the rest are the choices without their context
        right = _gold_index(task, sample["doc"], len(asked))
        if right is None or sample.get("acc") not in (0, 1):
            yield None
            continue
        scores = [one.likelihoods[0].loglikelihood for one in asked]
        normed = sample.get("acc_norm")
        yield {
            "task": name,
            "doc": sample["doc_id"],
            "item": hash_json([list(one.instance.args) for one in asked]),
            "cluster": None,
            "choices": len(asked),
            "acc": bool(sample["acc"]),
            "acc_norm": None if normed is None else bool(normed),
            "loglikelihood": scores[right],
            "log_odds": log_odds(scores, right) if len(scores) > 1 else None,
            "tokens": asked[right].likelihoods[0].tokens,
            "bytes": len(asked[right].instance.args[1].encode()),
        }


def _gold_index(task: Any, document: Mapping[str, Any], choices: int) -> int | None:
    """Index of the right one of the requests, as the harness's own tasks tell it."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0 if choices == 1 else None
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    right = task.doc_to_text(document) if getattr(task, "multiple_input", 0) else task.doc_to_target(document)
    return right if type(right) is int and 0 <= right < choices else None
