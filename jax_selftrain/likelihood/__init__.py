"""The likelihood engine: log-likelihoods of continuations under a model."""

from jax_selftrain.likelihood.engine import Likelihood, LoglikelihoodRequest, loglikelihoods, scoring_program

__all__ = ["Likelihood", "LoglikelihoodRequest", "loglikelihoods", "scoring_program"]
