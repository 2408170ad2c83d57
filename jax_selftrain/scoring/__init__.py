"""What a model can do and what it remembers, measured by likelihood: tasks, texts, extraction."""

from jax_selftrain.scoring.documents import Documents, Scored, load_scored, split_of
from jax_selftrain.scoring.embeddings import embed_texts
from jax_selftrain.scoring.extraction import extract, extraction_fingerprints, read_sets, start_of, summarise, window_of
from jax_selftrain.scoring.leakage import leakage
from jax_selftrain.scoring.likelihood import Likelihood, Request, TokenScores, loglikelihoods, program, token_scores
from jax_selftrain.scoring.memorisation import flip_rate, measure, teacher_forced, transitions
from jax_selftrain.scoring.overlap import classify
from jax_selftrain.scoring.policies import discoverable, read_policies
from jax_selftrain.scoring.score import Evaluation, Prepared, answer, evaluate, paths_by_name, prepare, score
from jax_selftrain.scoring.sequences import (
    ExtractionSet,
    Window,
    assigned_to_h,
    load_sequences,
    sequences_fingerprint,
)
from jax_selftrain.scoring.tasks import Question, Task, load_tasks, task_metrics
from jax_selftrain.scoring.texts import TextFile, load_texts

__all__ = [
    "Documents",
    "Evaluation",
    "ExtractionSet",
    "Likelihood",
    "Prepared",
    "Question",
    "Request",
    "Scored",
    "Task",
    "TextFile",
    "TokenScores",
    "Window",
    "answer",
    "assigned_to_h",
    "classify",
    "discoverable",
    "embed_texts",
    "evaluate",
    "extract",
    "extraction_fingerprints",
    "flip_rate",
    "leakage",
    "load_scored",
    "load_sequences",
    "load_tasks",
    "load_texts",
    "loglikelihoods",
    "measure",
    "paths_by_name",
    "prepare",
    "program",
    "read_policies",
    "read_sets",
    "score",
    "sequences_fingerprint",
    "split_of",
    "start_of",
    "summarise",
    "task_metrics",
    "teacher_forced",
    "token_scores",
    "transitions",
    "window_of",
]
