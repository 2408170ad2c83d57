"""Evaluation: tasks and texts by likelihood, extraction, leakage, embeddings."""

from jax_selftrain.evals.decontamination import decontaminate as decontaminate
from jax_selftrain.evals.embeddings import embed_texts as embed_texts
from jax_selftrain.evals.exact_match import extraction_metrics as extraction_metrics
from jax_selftrain.evals.extraction import classify as classify
from jax_selftrain.evals.extraction import corpus_overlap as corpus_overlap
from jax_selftrain.evals.extraction import extract as extract
from jax_selftrain.evals.extraction import find_start_tokens as find_start_tokens
from jax_selftrain.evals.extraction import load_extraction_sets as load_extraction_sets
from jax_selftrain.evals.extraction import make_window as make_window
from jax_selftrain.evals.held_out import held_out_half as held_out_half
from jax_selftrain.evals.held_out import relearned_halves as relearned_halves
from jax_selftrain.evals.leakage import measure_leakage as measure_leakage
from jax_selftrain.evals.membership import measure_membership as measure_membership
from jax_selftrain.evals.score import build_requests as build_requests
from jax_selftrain.evals.score import score as score
from jax_selftrain.evals.score import score_requests as score_requests
from jax_selftrain.evals.sequences import sequences_fingerprint as sequences_fingerprint
from jax_selftrain.evals.tasks import load_tasks as load_tasks
from jax_selftrain.evals.tasks import load_texts as load_texts
from jax_selftrain.evals.tasks import paths_by_name as paths_by_name
from jax_selftrain.evals.tasks import select_split as select_split
from jax_selftrain.evals.tasks import text_name as text_name
from jax_selftrain.evals.token_gap import measure_token_gap as measure_token_gap
from jax_selftrain.evals.windows import measure_windows as measure_windows
