"""Suffix probability p_z, and (n, p)-discoverable extraction.

log p_z is the sum over tokens of the log-probability under a sampling policy: temperature, then top-k, top-p and min-p
as in transformers, renormalized. A suffix that cannot be sampled has p_z = 0. Padded vocabulary rows are included, as
in transformers. p_z is the probability of one tokenization of the text.

A sequence is (n, p)-discoverable if n independent samples contain the suffix with probability at least p:
1 − (1 − p_z)^n ≥ p (Hayes et al., arXiv:2410.19482).
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
"""Values of n."""
P_LEVELS = (0.1, 0.5, 0.9)
"""Values of p."""

_FIELDS = {"temperature": float, "top-k": int, "top-p": float, "min-p": float}


@dataclass(frozen=True)
class NamedSamplingParams:
    """Sampling policy with a canonical name."""

    name: str
    """Canonical specification: `temperature=1,top-k=40`."""
    sampling_params: SamplingParams


def parse_sampling_policies(specs: Sequence[str]) -> tuple[NamedSamplingParams, ...]:
    """Parse policies such as `temperature=0.7,top-k=40,top-p=0.9,min-p=0.05`.

    Missing fields are off. Plain temperature 1 is dropped because it is always measured.

    Raises:
      InputError: wrong syntax, an invalid value, or a policy given twice.
    """
    policies: dict[str, NamedSamplingParams] = {}
    for spec in specs:
        given: dict[str, Any] = {}
        for part in spec.split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if name not in _FIELDS or not equals or name in given:
                raise InputError(
                    f"--sampling-policies {spec}: write temperature, top-k, top-p or min-p, each once, as in "
                    "temperature=1,top-k=40"
                )
            try:
                given[name] = _FIELDS[name](value)
            except ValueError:
                raise InputError(f"--sampling-policies {spec}: {value!r} is not a number for {name}") from None
        values = {name.replace("-", "_"): value for name, value in given.items()}
        try:
            check_sample_config(SampleConfig(**values))
        except InputError as error:
            raise InputError(f"--sampling-policies {spec}: {error}") from None
        sampling_params = SamplingParams(start_id=0, stop_ids=(), max_tokens=1, **values)
        named = NamedSamplingParams(_name(sampling_params), sampling_params)
        if named.name in policies:
            raise InputError(f"--sampling-policies: {named.name} is given twice")
        policies[named.name] = named
    return tuple(named for named in policies.values() if named.sampling_params.changes_distribution)


def column_name(policy: NamedSamplingParams) -> str:
    """Return the column of log p_z under a policy."""
    return f"logprob {policy.name}"


def n_p_discoverable(logprob: np.ndarray) -> dict[str, np.ndarray]:
    """Return if each suffix is (n, p)-discoverable, bool [N] by "n@p".

    The condition is computed as n·log1p(−p_z) ≤ log1p(−p), which is exact for p_z far below machine epsilon.
    """
    with np.errstate(divide="ignore"):  # p_z = 1 gives −inf
        log_miss = np.log1p(-np.exp(np.minimum(logprob, 0.0)))
    return {f"{n}@{p}": n * log_miss <= np.log1p(-p) for n in N_SAMPLES for p in P_LEVELS}


def n_p_discoverable_rate(logprob: np.ndarray) -> dict[str, Any]:
    """Return the share of discoverable sequences and its standard error by "n@p"."""
    shares = {
        key: mean_and_stderr(flags) if len(logprob) else (None, None)
        for key, flags in n_p_discoverable(logprob).items()
    }
    return {
        "discoverable": {key: value for key, (value, _) in shares.items()},
        "discoverable_stderr": {key: stderr for key, (_, stderr) in shares.items()},
    }


def summarize_suffix_probability(logprob: np.ndarray) -> dict[str, Any]:
    """Summarize log p_z [N] under one policy.

    Returns:
      `zeros`: number of sequences with p_z = 0; `logprob`: mean log p_z of the others, nats; `pz`: mean p_z, the share
      that one sample extracts; `discoverable` by "n@p". Standard errors are under `…_stderr`. Means of nothing are
      None.
    """
    possible = logprob[np.isfinite(logprob)]
    result: dict[str, Any] = {"zeros": len(logprob) - len(possible)}
    for name, values in (("logprob", possible), ("pz", np.exp(logprob))):
        value, stderr = mean_and_stderr(values) if len(values) else (None, None)
        result |= {name: value, f"{name}_stderr": stderr}
    return result | n_p_discoverable_rate(logprob)


def _name(sampling_params: SamplingParams) -> str:
    parts = [f"temperature={sampling_params.temperature:g}"]
    parts += [f"top-k={sampling_params.top_k}"] if sampling_params.top_k else []
    parts += [f"top-p={sampling_params.top_p:g}"] if sampling_params.top_p < 1 else []
    parts += [f"min-p={sampling_params.min_p:g}"] if sampling_params.min_p else []
    return ",".join(parts)
