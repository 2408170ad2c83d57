"""Evaluation: tasks and texts by likelihood, extraction, leakage, embeddings."""

from jax_selftrain.evals.embeddings import embed_texts
from jax_selftrain.evals.exact_match import extraction_metrics, flip_rate
from jax_selftrain.evals.extraction import extract, find_start_tokens, load_extraction_sets, make_window
from jax_selftrain.evals.item_results import ScoreResult, load_score_result
from jax_selftrain.evals.leakage import measure_leakage
from jax_selftrain.evals.overlap_classes import classify
from jax_selftrain.evals.perplexity import TextFile, load_texts
from jax_selftrain.evals.score import RequestSet, build_requests, paths_by_name, score, score_requests
from jax_selftrain.evals.sequences import PromptWindow, held_out_half, load_sequences, sequences_fingerprint
from jax_selftrain.evals.suffix_probability import n_p_discoverable
from jax_selftrain.evals.tasks import Task, load_tasks

__all__ = [
    "PromptWindow",
    "RequestSet",
    "ScoreResult",
    "Task",
    "TextFile",
    "build_requests",
    "classify",
    "embed_texts",
    "extract",
    "extraction_metrics",
    "find_start_tokens",
    "flip_rate",
    "held_out_half",
    "load_extraction_sets",
    "load_score_result",
    "load_sequences",
    "load_tasks",
    "load_texts",
    "make_window",
    "measure_leakage",
    "n_p_discoverable",
    "paths_by_name",
    "score",
    "score_requests",
    "sequences_fingerprint",
]
