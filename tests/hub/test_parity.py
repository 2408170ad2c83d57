"""Logits equal Hugging Face's for every variant of every family."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models_factory import write_tiny_hf_model
from parity_cases import CASES, GOLDEN, case_tokens, golden_logits, transformers_logits

from jax_selftrain import hub

pytestmark = pytest.mark.compat

# fp32 rounding of a few layers stays below 1e-5 here; 1e-4 is what the project promises for real models, too.
TOLERANCE = 1e-4

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed; the golden logits take over"
)


@pytest.fixture(scope="module")
def write_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(case: str) -> Path:
        family, overrides = CASES[case]
        return write_tiny_hf_model(tmp_path_factory.mktemp(case), family, tokenizer=False, **overrides)

    return make


@pytest.fixture(scope="module")
def our_logits(write_config: Callable[[str], Path]) -> Callable[[str], np.ndarray]:
    made: dict[str, np.ndarray] = {}

    def compute(case: str) -> np.ndarray:
        if case not in made:
            made[case] = hub.load_model(write_config(case), "data=1").logits(case_tokens())
        return made[case]

    return compute


SECOND_VARIANTS = ("mistral", "olmo2-gqa", "smollm3-interval", "gpt2-untied", "gpt-neo-global", "gpt-neo-local")
EVERY_CASE = [pytest.param(case, marks=[pytest.mark.nightly] if case in SECOND_VARIANTS else []) for case in CASES]


@needs_torch
@pytest.mark.parametrize("case", EVERY_CASE)
def test_logits_equal_transformers(case: str, write_config, our_logits):
    theirs = transformers_logits(write_config(case), case_tokens())
    assert theirs.shape[1] >= 512
    np.testing.assert_allclose(our_logits(case), theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", EVERY_CASE)
def test_logits_equal_the_golden_ones(case: str, our_logits):
    with np.load(GOLDEN) as golden:
        np.testing.assert_allclose(golden_logits(our_logits(case)), golden[case], rtol=0, atol=TOLERANCE)


def test_every_golden_case_is_compared():
    with np.load(GOLDEN) as golden:
        assert set(golden.files) == set(CASES)


@needs_torch
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_logits_stay_equal_far_out(theta: float, tmp_path: Path):
    # A frequency's rounding error grows with the position: 2048 is where Pythia's contexts end.
    folder = write_tiny_hf_model(tmp_path, "llama", tokenizer=False, rope_theta=theta, max_position_embeddings=2048)
    tokens = np.resize(case_tokens(), (1, 2048))
    ours = hub.load_model(folder, "data=1").logits(tokens)
    np.testing.assert_allclose(ours, transformers_logits(folder, tokens), rtol=0, atol=TOLERANCE)


@needs_torch
def test_stories260k_logits_equal_transformers(stories260k: Path):
    tokens = np.random.default_rng(0).integers(0, 512, size=(2, 512))
    ours = hub.load_model(stories260k, "data=1").logits(tokens)
    np.testing.assert_allclose(ours, transformers_logits(stories260k, tokens), rtol=0, atol=TOLERANCE)


def test_stories260k_greedy_text_begins_as_the_data_says(stories260k: Path):
    model = hub.load_model(stories260k, "data=1")
    assert model.special_tokens.bos_token_id == 1
    tokens = np.zeros((1, 64), np.int64)
    tokens[0, 0] = model.special_tokens.bos_token_id
    for position in range(tokens.shape[1] - 1):  # causal: what is behind `position` does not matter
        tokens[0, position + 1] = model.logits(tokens)[0, position].argmax()
    text = model.tokenizer.decode(tokens[0, 1:])
    begins = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert text.startswith(begins)
