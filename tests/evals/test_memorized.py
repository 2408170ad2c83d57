"""Extraction from a model that memorized 500 planted sequences.

It never saw 500 control sequences from the same generator. Results must equal those of transformers on its export.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_factory import write_sampled_corpus
from models_factory import write_tiny_hf_model

from jax_selftrain import hub
from jax_selftrain.config import ExtractConfig, TrainConfig, yaml_io
from jax_selftrain.corpus import Sample
from jax_selftrain.evals import extract, extraction_metrics
from jax_selftrain.evals.suffix_probability import parse_sampling_policies

PREFIX, SUFFIX, N = 8, 16, 500
STEPS = 800
POLICIES = ("temperature=1,top-k=40", "temperature=0.8,top-k=20,top-p=0.9")


@pytest.fixture(scope="module")
def sequences() -> tuple[np.ndarray, np.ndarray]:
    """Planted and control sequences [500, 24]: random tokens, predictable by memory only."""
    rows = np.random.default_rng(0).integers(3, 103, (2 * N, PREFIX + SUFFIX)).astype(np.int32)
    return rows[:N], rows[N:]


@pytest.fixture(scope="module")
def run(tmp_path_factory, sequences) -> Path:
    folder = tmp_path_factory.mktemp("memorized")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "max_position_embeddings": 64}
    model = write_tiny_hf_model(folder / "model", "llama", vocab_size=320, **shape)
    samples = [Sample(i, row, "", float("nan"), "length") for i, row in enumerate(sequences[0])]
    write_sampled_corpus(folder / "corpus", model, samples)
    config = TrainConfig(
        model=str(model),
        corpus=str(folder / "corpus"),
        out=str(folder / "run"),
        init="scratch",
        packing="single",
        steps=STEPS,
        batch_size=50,
        seq_len=PREFIX + SUFFIX,
        learning_rate=3e-3,
        schedule="linear",
        mesh="data=1",
        checkpoint_every=STEPS,
    )
    yaml_io.save(folder / "train.yaml", config)
    # The tests may run with XLA optimizations off; these steps are faster with them.
    flags = re.sub(r"--xla_backend_optimization_level=\d", "", os.environ.get("XLA_FLAGS", ""))
    command = [sys.executable, "-m", "jax_selftrain", "train", "--config", str(folder / "train.yaml")]
    subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, check=True)
    return folder / "run"


@pytest.mark.nightly
def test_planted_sequences_are_extracted_and_controls_are_not(run, sequences, tmp_path):
    for name, rows in zip(("planted", "controls"), sequences, strict=True):
        np.save(tmp_path / f"{name}.npy", rows)
    options: dict[str, Any] = {
        "model": str(run),
        "sequences": str(tmp_path / "planted.npy"),
        "control_sequences": str(tmp_path / "controls.npy"),
        "untrained_baseline": str(run.parent / "model"),
        "corpus": str(run.parent / "corpus"),
        "prefix": PREFIX,
        "suffix": SUFFIX,
        "start_token": "bos",
        "mesh": "data=1",
    }
    result = extract(ExtractConfig(**options, out=str(tmp_path / "with.json")))
    controls = result["controls"]
    assert (result["n"], controls["n"], result["seen"]["n"]) == (N, N, N)
    assert result["exact_match"] >= 0.95
    assert controls["exact_match"] <= 0.01
    assert result["baseline"]["exact_match"] <= 0.01
    assert result["token_accuracy"] >= 0.95
    assert controls["token_accuracy"] <= 0.05  # one in a hundred by chance
    # 10,000 samples contain nearly all planted sequences and no controls, whose p_z is 10^-30 or less.
    for summary in (result, result["sampling_policies"]["temperature=1,top-k=40"]):
        assert summary["discoverable"]["10000@0.9"] >= 0.95
    for summary in (controls, controls["sampling_policies"]["temperature=1,top-k=40"]):
        assert set(summary["discoverable"].values()) == {0.0}
    # Documents began with BOS in training.
    without = extract(ExtractConfig(**options | {"start_token": "none"}, out=str(tmp_path / "without.json")))
    assert without["exact_match"] <= 0.5 * result["exact_match"]


@pytest.mark.nightly
def test_all_measures_equal_those_of_transformers_on_the_export(run, sequences, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers needs torch to run the exported model")
    from transformers import (
        AutoModelForCausalLM,
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    model = hub.load_model(run, "data=1")
    model.save_pretrained(tmp_path / "export")
    judge = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    start = np.full((400, 1), 1, np.int32)  # BOS
    rows = np.concatenate([start, np.concatenate([part[:200] for part in sequences])], axis=1)
    ours = extraction_metrics(model, rows, PREFIX + 1, policies=parse_sampling_policies(POLICIES))
    tokens = torch.from_numpy(rows).long()
    given, suffix = tokens[:, : PREFIX + 1], tokens[:, PREFIX + 1 :]
    with torch.no_grad():
        decoded = judge.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            min_new_tokens=SUFFIX,
            max_new_tokens=SUFFIX,
            eos_token_id=None,
            pad_token_id=0,
        )[:, PREFIX + 1 :]
        logits = judge(tokens).logits[:, PREFIX:-1]
    same = (decoded == suffix).numpy()
    np.testing.assert_array_equal(ours["exact_match"], same.all(axis=1))
    np.testing.assert_array_equal(ours["token_accuracy"], same.mean(axis=1))
    np.testing.assert_array_equal(ours["teacher_forced_accuracy"], (logits.argmax(-1) == suffix).numpy().mean(axis=1))
    warpers = {
        "logprob": [],
        POLICIES[0]: [TemperatureLogitsWarper(1.0), TopKLogitsWarper(40)],
        POLICIES[1]: [TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.9)],
    }
    names = ["logprob", *(f"logprob {name}" for name in parse_sampling_policies(POLICIES))]
    for name, chain in zip(names, warpers.values(), strict=True):
        flat = LogitsProcessorList(chain)(None, logits.reshape(-1, logits.shape[-1]))
        shares = torch.log_softmax(flat.double(), -1).reshape(logits.shape)
        theirs = shares.gather(-1, suffix[..., None])[..., 0].sum(-1).numpy()
        np.testing.assert_array_equal(np.isinf(ours[name]), np.isinf(theirs), err_msg=name)
        possible = np.isfinite(theirs)
        assert possible[:200].mean() > 0.9  # what was planted is possible under every policy
        np.testing.assert_allclose(ours[name][possible], theirs[possible], atol=1e-3, err_msg=name)
    assert np.isinf(ours[names[1]][200:]).any()  # and some twins are not
