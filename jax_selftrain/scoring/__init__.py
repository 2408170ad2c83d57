"""What a model can do and what it remembers, measured by likelihood: tasks, texts, extraction."""

from jax_selftrain.scoring.documents import Documents, Scored, load_scored, split_of
from jax_selftrain.scoring.extraction import classify, discoverable, extract, measure, summarise, teacher_forced
from jax_selftrain.scoring.likelihood import Likelihood, Request, TokenScores, loglikelihoods, program, token_scores
from jax_selftrain.scoring.score import Evaluation, Prepared, answer, evaluate, paths_by_name, prepare, score
from jax_selftrain.scoring.sequences import load_sequences
from jax_selftrain.scoring.tasks import Question, Task, load_tasks, task_metrics
from jax_selftrain.scoring.texts import TextFile, load_texts

__all__ = [
    "Documents",
    "Evaluation",
    "Likelihood",
    "Prepared",
    "Question",
    "Request",
    "Scored",
    "Task",
    "TextFile",
    "TokenScores",
    "answer",
    "classify",
    "discoverable",
    "evaluate",
    "extract",
    "load_scored",
    "load_sequences",
    "load_tasks",
    "load_texts",
    "loglikelihoods",
    "measure",
    "paths_by_name",
    "prepare",
    "program",
    "score",
    "split_of",
    "summarise",
    "task_metrics",
    "teacher_forced",
    "token_scores",
]
