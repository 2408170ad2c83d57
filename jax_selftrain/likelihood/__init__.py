"""The likelihood engine: log-likelihoods of continuations under a model."""

from jax_selftrain.likelihood.engine import Likelihood, LoglikelihoodRequest, scoring_program
from jax_selftrain.likelihood.resumable import loglikelihoods

__all__ = ["Likelihood", "LoglikelihoodRequest", "loglikelihoods", "scoring_program"]
