"""The probability view of extraction: how likely sampling is to say a suffix, and in how many tries.

log p_z is summed token by token under a *policy*: temperature, then top-k, top-p and min-p as the sampler (and
transformers) applies them, renormalized over what is left. A suffix that the policy cannot say has p_z = 0, its
logarithm −∞. The vocabulary is the model's whole one, as in transformers: padded rows are not left out.

A sequence is (n, p)-discoverable if n independent samples contain the suffix with probability at least p,
1 − (1 − p_z)^n ≥ p (Hayes et al., arXiv:2410.19482). p_z is the probability of one tokenization of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_selftrain.config import SampleConfig
from jax_selftrain.errors import InputError
from jax_selftrain.sampling import SamplingParams, check_sample_config
from jax_selftrain.stats.standard_errors import mean_and_stderr

N_SAMPLES = (*(mantissa * 10**power for power in range(4) for mantissa in (1, 2, 5)), 10_000)
"""n of the (n, p) curve."""
P_LEVELS = (0.1, 0.5, 0.9)

_FIELDS = {"temperature": float, "top-k": int, "top-p": float, "min-p": float}


@dataclass(frozen=True)
class NamedSamplingParams:
    """A policy and the name that its numbers stand under."""

    name: str
    """As the user would write it, in one way: `temperature=1,top-k=40`."""
    sampling_params: SamplingParams


def read_policies(specs: Sequence[str]) -> tuple[NamedSamplingParams, ...]:
    """Policies written as `temperature=0.7,top-k=40,top-p=0.9,min-p=0.05`; what is left out is off.

    Plain temperature 1 is left out where it stands, since it is always measured.

    Raises:
      InputError: not of that form, an impossible value, or one policy twice.
    """
    found: dict[str, NamedSamplingParams] = {}
    for word in specs:
        given: dict[str, Any] = {}
        for part in word.split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if name not in _FIELDS or not equals or name in given:
                raise InputError(
                    f"--sampling-policies {word}: write temperature, top-k, top-p or min-p, each once, as in "
                    "temperature=1,top-k=40"
                )
            try:
                given[name] = _FIELDS[name](value)
            except ValueError:
                raise InputError(f"--sampling-policies {word}: {value!r} is no number for {name}") from None
        values = {name.replace("-", "_"): value for name, value in given.items()}
        try:
            check_sample_config(SampleConfig(**values))
        except InputError as error:
            raise InputError(f"--sampling-policies {word}: {error}") from None
        sampling_params = SamplingParams(start_id=0, stop_ids=(), max_tokens=1, **values)
        named = NamedSamplingParams(_name(sampling_params), sampling_params)
        if named.name in found:
            raise InputError(f"--sampling-policies: {named.name} is given twice")
        found[named.name] = named
    return tuple(named for named in found.values() if named.sampling_params.changes_distribution)


def column_name(sampling_params: NamedSamplingParams) -> str:
    """The name of log p_z under a policy, among what was measured of each sequence."""
    return f"logprob {sampling_params.name}"


def n_p_discoverable(logprob: np.ndarray) -> dict[str, np.ndarray]:
    """Whether n samples contain each suffix with probability ≥ p, as bool [N] by "n@p".

    1 − (1 − p_z)^n ≥ p is asked as n·log1p(−p_z) ≤ log1p(−p), which keeps its meaning for p_z far below the spacing
    of floating-point numbers near 1.
    """
    with np.errstate(divide="ignore"):  # p_z = 1 gives −inf, as it should
        log_miss = np.log1p(-np.exp(np.minimum(logprob, 0.0)))
    return {f"{n}@{p}": n * log_miss <= np.log1p(-p) for n in N_SAMPLES for p in P_LEVELS}


def n_p_discoverable_rate(logprob: np.ndarray) -> dict[str, Any]:
    """`discoverable` and `discoverable_stderr`: shares of the sequences by "n@p", None where there are none."""
    shares = {
        key: mean_and_stderr(flags) if len(logprob) else (None, None)
        for key, flags in n_p_discoverable(logprob).items()
    }
    return {
        "discoverable": {key: value for key, (value, _) in shares.items()},
        "discoverable_stderr": {key: stderr for key, (_, stderr) in shares.items()},
    }


def summarise_policy(logprob: np.ndarray) -> dict[str, Any]:
    """p_z of some sequences under one policy.

    Returns:
      `zeros`: sequences with p_z = 0; `logprob`: mean log p_z of the others, nats; `p_z`: mean of p_z over all, the
      expected share that one sample of each extracts; `discoverable` by "n@p". Standard errors under `…_stderr`.
      All but `zeros` are None where there is nothing to take a mean of.
    """
    possible = logprob[np.isfinite(logprob)]
    result: dict[str, Any] = {"zeros": len(logprob) - len(possible)}
    for name, values in (("logprob", possible), ("p_z", np.exp(logprob))):
        value, stderr = mean_and_stderr(values) if len(values) else (None, None)
        result |= {name: value, f"{name}_stderr": stderr}
    return result | n_p_discoverable_rate(logprob)


def _name(sampling_params: SamplingParams) -> str:
    parts = [f"temperature={sampling_params.temperature:g}"]
    parts += [f"top-k={sampling_params.top_k}"] if sampling_params.top_k else []
    parts += [f"top-p={sampling_params.top_p:g}"] if sampling_params.top_p < 1 else []
    parts += [f"min-p={sampling_params.min_p:g}"] if sampling_params.min_p else []
    return ",".join(parts)
