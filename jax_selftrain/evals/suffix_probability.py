"""Suffix probability p_z, and (n, p)-discoverable extraction.

log p_z is the sum over tokens of the log-probability under a sampling policy: temperature, then top-k, top-p and min-p
as in transformers, renormalized. A suffix that cannot be sampled has p_z = 0. Padded vocabulary rows are included, as
in transformers. p_z is the probability of one tokenization of the text.

A sequence is (n, p)-discoverable if n independent samples contain the suffix with probability at least p:
1 − (1 − p_z)^n ≥ p (Hayes et al., arXiv:2410.19482).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_selftrain.config import SampleConfig, yaml_io
from jax_selftrain.errors import InputError
from jax_selftrain.evals.result_files import describe_mean
from jax_selftrain.sampling.sampling_params import POLICY_FIELDS, SamplingParams

N_SAMPLES = (*(mantissa * 10**power for power in range(4) for mantissa in (1, 2, 5)), 10_000)
"""Values of n."""
P_LEVELS = (0.1, 0.5, 0.9)
"""Values of p."""


def parse_sampling_policies(specs: Sequence[str]) -> dict[str, SamplingParams]:
    """Parse policies such as `temperature=0.7,top-k=40,top-p=0.9,min-p=0.05`.

    Missing fields are off. Plain temperature 1 is dropped because it is always measured.

    Returns:
      Sampling parameters by canonical specification, `temperature=1,top-k=40`.

    Raises:
      InputError: wrong syntax, an invalid value, or a policy given twice.
    """
    policies: dict[str, SamplingParams] = {}
    for spec in specs:
        values: dict[str, Any] = {}
        for part in spec.split(","):
            flag, equals, value = (piece.strip() for piece in part.partition("="))
            name = flag.replace("-", "_")
            if name not in POLICY_FIELDS or not equals or name in values:
                raise InputError(
                    f"--sampling-policies {spec}: write temperature, top-k, top-p or min-p, each once, as in "
                    "temperature=1,top-k=40"
                )
            where = f"--sampling-policies {spec}: {flag}"
            values[name] = yaml_io.parse_value(POLICY_FIELDS[name], [value], where=where)
        yaml_io.check_ranges(SampleConfig(**values), f"--sampling-policies {spec}: --")
        policy = SamplingParams(start_ids=(0,), stop_ids=(), max_tokens=1, **values)
        name = _canonical_name(policy)
        if name in policies:
            raise InputError(f"--sampling-policies: {name} is given twice")
        policies[name] = policy
    return {name: policy for name, policy in policies.items() if policy.changes_distribution}


def _canonical_name(policy: SamplingParams) -> str:
    parts = [f"temperature={policy.temperature:g}"]
    parts += [f"top-k={policy.top_k}"] if policy.top_k else []
    parts += [f"top-p={policy.top_p:g}"] if policy.top_p < 1 else []
    parts += [f"min-p={policy.min_p:g}"] if policy.min_p else []
    return ",".join(parts)


def n_p_discoverable(logprob: np.ndarray) -> dict[str, np.ndarray]:
    """Return if each suffix is (n, p)-discoverable, bool [N] by "n@p".

    The condition is computed as n·log1p(−p_z) ≤ log1p(−p), which is exact for p_z far below machine epsilon.
    """
    with np.errstate(divide="ignore"):  # p_z = 1 gives −inf
        log_miss = np.log1p(-np.exp(np.minimum(logprob, 0.0)))
    return {f"{n}@{p}": n * log_miss <= np.log1p(-p) for n in N_SAMPLES for p in P_LEVELS}


def summarize_suffix_probability(logprob: np.ndarray) -> dict[str, Any]:
    """Summarize log p_z [N] under one policy.

    Returns:
      `logprob`: mean log p_z, nats, of sequences with p_z > 0 (improbable suffixes dominate it); `pz`: mean p_z, the
      share that one sample extracts; `discoverable` by "n@p", the share of (n, p)-discoverable sequences. Standard
      errors are under `…_stderr`. Means of nothing are None.
    """
    shares = {key: describe_mean("discoverable", flags) for key, flags in n_p_discoverable(logprob).items()}
    names = ("discoverable", "discoverable_stderr")
    return {
        **describe_mean("logprob", logprob[np.isfinite(logprob)]),
        **describe_mean("pz", np.exp(logprob)),
        **{name: {key: share[name] for key, share in shares.items()} for name in names},
    }
