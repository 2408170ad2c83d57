"""What a model can do and what it remembers, measured by likelihood: tasks, texts, extraction."""

from jax_selftrain.scoring.extraction import classify, discoverable, extract, measure, summarise
from jax_selftrain.scoring.likelihood import Likelihood, Request, TokenScores, loglikelihoods, program, token_scores
from jax_selftrain.scoring.score import Evaluation, evaluate, score
from jax_selftrain.scoring.tasks import Question, Task, load_tasks, task_metrics
from jax_selftrain.scoring.texts import TextFile, load_texts

__all__ = [
    "Evaluation",
    "Likelihood",
    "Question",
    "Request",
    "Task",
    "TextFile",
    "TokenScores",
    "classify",
    "discoverable",
    "evaluate",
    "extract",
    "load_tasks",
    "load_texts",
    "loglikelihoods",
    "measure",
    "program",
    "score",
    "summarise",
    "task_metrics",
    "token_scores",
]
