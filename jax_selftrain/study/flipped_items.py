"""Questions whose answer changed between a base and its student."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_selftrain import evals
from jax_selftrain.config import StudyConfig
from jax_selftrain.evals.item_results import ScoreResult, item_hash, load_score_result
from jax_selftrain.evals.task_names import split_names
from jax_selftrain.evals.tasks import Question
from jax_selftrain.study.design import Design
from jax_selftrain.study.measure_names import MAIN_EFFECT
from jax_selftrain.study.paired_results import Pair, pair_results

MAX_ITEMS = 40
"""Items of each task and direction: those with the smallest hashes, which do not depend on the models."""
MAX_CHARACTERS = 600


def collect_flips(config: StudyConfig, design: Design, bases: Mapping[str, ScoreResult]) -> list[dict[str, Any]]:
    """List changed answers of students that were trained on own text.

    The first seed counts, and task files: results of named tasks hold no text.

    Returns records with `student`, `treatment`, `seed`, `task`, `change` (lost or gained), `context` (its end),
    `choices`, `answer` and the margins `before` and `after`: log-odds of the correct choice, or the log-likelihood of
    the last word, in nats.
    """
    questions = {
        (task.name, item_hash(question.context, question.continuations)): question
        for task in evals.load_tasks(split_names(config.score.tasks)[0], config.score.limit)
        for question in task.questions
    }
    found, seen = [], set[str]()
    for cell in design.cells:
        if cell.score is None or cell.student in seen or cell.treatment != f"{MAIN_EFFECT}{cell.student}":
            continue
        seen.add(cell.student)
        scored = load_score_result(str(design.folder(cell.score) / "score.json"))
        key = {"student": cell.student, "treatment": cell.treatment, "seed": cell.seed}
        for task, pair in pair_results(bases[cell.student], scored).items():
            if pair.base.kind in ("choice", "last_word"):
                found += [key | {"task": task} | one for one in _list_flips(task, pair.part(config.split), questions)]
    return found


def _list_flips(task: str, pair: Pair, questions: Mapping[tuple[str, str], Question]) -> list[dict[str, Any]]:
    before, after = pair.right
    margins = pair.columns("log_odds" if pair.base.kind == "choice" else "loglikelihood")
    records = []
    for change, members in (("lost", before & ~after), ("gained", ~before & after)):
        rows = sorted(np.flatnonzero(members), key=lambda i: pair.base.item_hash[i])
        known = [i for i in rows if (task, pair.base.item_hash[i]) in questions]
        for i in known[:MAX_ITEMS]:
            question = questions[task, pair.base.item_hash[i]]
            records.append(
                {
                    "change": change,
                    "context": question.context[-MAX_CHARACTERS:],
                    "choices": [choice[:MAX_CHARACTERS] for choice in question.continuations],
                    "answer": question.answer,
                    "before": float(margins[0][i]),
                    "after": float(margins[1][i]),
                }
            )
    return records
