"""The likelihood engine: log-likelihoods of continuations under a model."""

from jax_selftrain.likelihood.engine import (
    Likelihood,
    LoglikelihoodRequest,
    TokenScores,
    loglikelihoods,
    scoring_program,
    token_scores,
)

__all__ = [
    "Likelihood",
    "LoglikelihoodRequest",
    "TokenScores",
    "loglikelihoods",
    "scoring_program",
    "token_scores",
]
