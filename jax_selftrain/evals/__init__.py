"""Evaluation: tasks and texts by likelihood, extraction, leakage, embeddings."""

from jax_selftrain.evals.embeddings import embed_texts
from jax_selftrain.evals.exact_match import extraction_metrics, flip_rate, kept_lost_gained, score_suffixes
from jax_selftrain.evals.extraction import (
    extract,
    extraction_fingerprints,
    find_start_tokens,
    load_extraction_sets,
    make_window,
    summarize,
)
from jax_selftrain.evals.item_results import ItemResults, ScoreResult, dev_test_split, load_score_result
from jax_selftrain.evals.leakage import measure_leakage
from jax_selftrain.evals.overlap_classes import classify
from jax_selftrain.evals.perplexity import TextFile, load_texts
from jax_selftrain.evals.score import (
    Evaluation,
    RequestSet,
    build_requests,
    paths_by_name,
    score,
    score_requests,
)
from jax_selftrain.evals.sequences import (
    ExtractionSet,
    PromptWindow,
    held_out_half,
    load_sequences,
    sequences_fingerprint,
)
from jax_selftrain.evals.suffix_probability import n_p_discoverable, parse_sampling_policies
from jax_selftrain.evals.tasks import Question, Task, load_tasks, task_metrics

__all__ = [
    "Evaluation",
    "ExtractionSet",
    "ItemResults",
    "PromptWindow",
    "Question",
    "RequestSet",
    "ScoreResult",
    "Task",
    "TextFile",
    "build_requests",
    "classify",
    "dev_test_split",
    "embed_texts",
    "extract",
    "extraction_fingerprints",
    "extraction_metrics",
    "find_start_tokens",
    "flip_rate",
    "held_out_half",
    "kept_lost_gained",
    "load_extraction_sets",
    "load_score_result",
    "load_sequences",
    "load_tasks",
    "load_texts",
    "make_window",
    "measure_leakage",
    "n_p_discoverable",
    "parse_sampling_policies",
    "paths_by_name",
    "score",
    "score_requests",
    "score_suffixes",
    "sequences_fingerprint",
    "summarize",
    "task_metrics",
]
