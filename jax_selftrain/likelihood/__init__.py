"""The likelihood engine: log-likelihoods of continuations under a model."""

from jax_selftrain.likelihood.engine import Likelihood, LoglikelihoodRequest, TokenScores, scoring_program
from jax_selftrain.likelihood.resumable import loglikelihoods, token_scores

__all__ = ["Likelihood", "LoglikelihoodRequest", "TokenScores", "loglikelihoods", "scoring_program", "token_scores"]
