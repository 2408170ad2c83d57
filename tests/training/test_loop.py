"""The training run: exact resumption, learning rate 0, hooks, records, finished runs."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from model_params import param_bytes
from parity_cases import transformers_logits
from training_runs import Interruption, interrupt, losses

from jax_selftrain.config import ConvertConfig, ImportCorpusConfig, TrainConfig, yaml_io
from jax_selftrain.corpus import import_text
from jax_selftrain.errors import InputError
from jax_selftrain.hub import LoadedModel, convert, load_model
from jax_selftrain.io import json_files
from jax_selftrain.io.jsonl import read_log
from jax_selftrain.io.manifest import folder_manifest, sha256_file
from jax_selftrain.training import Hook, train


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_transformers_opens_the_model_with_our_logits(reference_run: Path):
    from transformers import AutoTokenizer

    model, tokens = load_model(reference_run, "data=1"), np.arange(64).reshape(2, 32)
    expected = model.logits(tokens)
    np.testing.assert_allclose(transformers_logits(reference_run / "model", tokens), expected, atol=1e-4)
    text = "Once there was a fox."
    assert AutoTokenizer.from_pretrained(reference_run / "model").encode(text) == model.tokenizer.encode(text)


def test_a_checkpoint_converts_to_the_final_model(reference_run: Path, tmp_path: Path):
    checkpoint = reference_run / "checkpoints" / "000006"
    hf = convert(ConvertConfig(source=str(checkpoint), out=str(tmp_path / "hf"), format="hf"))
    assert sha256_file(hf / "model.safetensors") == sha256_file(reference_run / "model" / "model.safetensors")
    flax = convert(ConvertConfig(source=str(reference_run), out=str(tmp_path / "flax"), format="flax"))
    assert param_bytes(flax) == param_bytes(reference_run)


def test_run_folder_holds_model_checkpoints_and_records(reference_run: Path, small_model: Path):
    assert {path.name for path in reference_run.iterdir()} == {
        "config.yaml", "run.json", "rows", "metrics.jsonl", "timings.jsonl", "launches.jsonl", "tensorboard",
        "checkpoints", "model",
    }  # fmt: skip
    assert sorted(path.name for path in (reference_run / "checkpoints").iterdir()) == ["000004", "000006"], "keeps two"
    last = param_bytes(reference_run / "checkpoints" / "000006" / "model")
    assert param_bytes(reference_run) == last != param_bytes(small_model)
    assert yaml_io.load(TrainConfig, reference_run / "config.yaml").steps == 6
    record = json_files.read_json(reference_run / "run.json")
    assert {"jax", "optax", "python"} <= record["versions"].keys()
    assert len(record["model"]["fingerprint"]) == len(record["corpus"]["fingerprint"]) == 64
    lines = read_log(reference_run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {tuple(line) for line in lines} == {("step", "loss", "grad_norm", "learning_rate", "tokens")}
    assert all(
        json.loads(line)["tokens_per_second"] > 0 for line in (reference_run / "timings.jsonl").read_text().splitlines()
    )
    assert list((reference_run / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_interrupted_run_ends_with_the_same_bits(step: int, reference_run: Path, options: Callable[..., TrainConfig]):
    with pytest.raises(Interruption):
        train(options(), hooks=[Hook(interrupt, steps=(step,))])
    run = train(options())
    assert param_bytes(run) == param_bytes(reference_run)
    assert (run / "metrics.jsonl").read_bytes() == (reference_run / "metrics.jsonl").read_bytes()


def test_finished_run_is_not_changed(
    reference_run: Path, options: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
):
    before = folder_manifest(reference_run)
    assert train(options(out=str(reference_run))) == reference_run
    assert "already finished" in capsys.readouterr().out
    assert folder_manifest(reference_run) == before


def test_missing_final_model_is_rewritten_from_the_last_checkpoint(options: Callable[..., TrainConfig]):
    run = train(options())
    before = param_bytes(run)
    (run / "model").rename(run / "moved")
    assert param_bytes(train(options())) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2e-3}, r"started with --learning-rate 0\.001, not 0\.002"),
        ({"seed": 1}, "started with --seed 0, not 1"),
        ({"packing": "single"}, "started with --packing masked, not single"),
        ({"steps": 5}, "started with --steps 6, not 5"),
    ],
)
def test_other_options_in_the_same_folder_are_refused(
    change: dict, message: str, reference_run: Path, options: Callable[..., TrainConfig]
):
    before = folder_manifest(reference_run)
    with pytest.raises(InputError, match=message):
        train(options(out=str(reference_run), **change))
    assert folder_manifest(reference_run) == before


def test_more_steps_continue_a_run_to_the_bits_of_a_long_run(options: Callable[..., TrainConfig], tmp_path: Path):
    constant = partial(options, schedule="constant", warmup_ratio=0.0, checkpoint_every=3, keep=2)
    whole = train(constant(steps=8, out=str(tmp_path / "whole")))
    train(constant(steps=4))
    with pytest.raises(Interruption):
        train(constant(steps=6), hooks=[Hook(interrupt, steps=(5,))])
    train(constant(steps=6))
    run = train(constant(steps=8))
    assert param_bytes(run) == param_bytes(whole)
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert len(json_files.read_json(run / "run.json")["continues"]) == 2
    with pytest.raises(InputError, match="started with --steps 8, not 7"):
        train(constant(steps=7))
    cosine = partial(options, schedule="cosine", out=str(tmp_path / "cosine"))
    train(cosine(steps=2))
    with pytest.raises(InputError, match=r"started with --steps 2, not 3.* more steps need --schedule constant"):
        train(cosine(steps=3))


def test_other_model_or_corpus_in_the_same_folder_is_refused(
    reference_run: Path, options: Callable[..., TrainConfig], small_model: Path, corpus_folder: Path, tmp_path: Path
):
    with pytest.raises(InputError, match="started with another model"):
        train(options(out=str(reference_run), model=str(reference_run)))
    (tmp_path / "other.jsonl").write_text('{"text": "Something else."}\n')
    import_text(
        ImportCorpusConfig(source=str(tmp_path / "other.jsonl"), model=str(small_model), out=str(tmp_path / "other"))
    )
    with pytest.raises(InputError, match="started with another corpus"):
        train(options(out=str(reference_run), corpus=str(tmp_path / "other")))


def test_learning_rate_zero_leaves_every_bit(small_model: Path, options: Callable[..., TrainConfig]):
    run = train(options(learning_rate=0.0, weight_decay=0.1))
    assert param_bytes(run) == param_bytes(small_model)


def test_model_learns(tiny_model, corpus_folder: Path, options: Callable[..., TrainConfig]):
    """The loss falls far below 5.8 nats, that of a uniform guess."""
    model = tiny_model("gpt_neox", hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=320)
    run = train(options(model=str(model), init="scratch", steps=60, learning_rate=1e-2, checkpoint_every=60))
    curve = losses(run)
    assert curve[0] == pytest.approx(np.log(320), abs=0.2), "an untrained model predicts uniformly"
    assert np.mean(curve[-5:]) < 3.0


def test_training_from_scratch_needs_no_weights_and_depends_on_the_seed(
    tmp_path: Path, small_model: Path, options: Callable[..., TrainConfig]
):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (bare / name).write_bytes((small_model / name).read_bytes())
    made = [
        param_bytes(train(options(model=str(bare), init="scratch", steps=1, seed=seed, out=str(tmp_path / out))))
        for seed, out in ((0, "a"), (0, "b"), (1, "c"))
    ]
    assert made[0] == made[1] != made[2]


def test_steps_default_to_one_epoch_and_a_small_corpus_is_repeated_within_a_batch(
    options: Callable[..., TrainConfig], small_model: Path, tmp_path: Path
):
    source = tmp_path / "few.jsonl"
    source.write_text('{"text": "Once upon a time."}\n{"text": "There was a fox, and it was red."}\n')
    import_text(ImportCorpusConfig(source=str(source), model=str(small_model), out=str(tmp_path / "few")))
    config = options(steps=None, checkpoint_every=None, corpus=str(tmp_path / "few"), packing="single")
    run = train(config)
    record = json_files.read_json(run / "run.json")
    assert (record["rows"], record["steps"], len(losses(run))) == (2, 1, 1), "two rows fill the eight of a step"
    assert train(config) == run, "found finished"


def test_hooks_are_called_at_their_steps_with_the_model_of_that_step(options: Callable[..., TrainConfig]):
    seen: dict[int, np.ndarray] = {}
    logits: list[np.ndarray] = []

    def remember(step: int, model: LoadedModel) -> None:
        seen[step] = np.array(model.params["final_norm"]["scale"])
        logits.append(np.asarray(model.logits(np.array([[1, 5, 9]], np.int32))))

    run = train(options(), hooks=[Hook(remember, steps=(0, 3), every=2)])
    assert sorted(seen) == [0, 2, 3, 4, 6]
    final = load_model(run, "data=1")
    np.testing.assert_array_equal(seen[6], np.asarray(final.params["final_norm"]["scale"]))
    assert not np.array_equal(seen[3], seen[4])
    # A 2-device and a 1-device program: rounding in another order.
    np.testing.assert_allclose(logits[-1], np.asarray(final.logits(np.array([[1, 5, 9]], np.int32))), atol=1e-4)


def test_metrics_are_written_every_log_every_steps_and_at_the_end(options: Callable[..., TrainConfig]):
    run = train(options(log_every=4))
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [4, 6]


def test_options_survive_their_yaml(reference_run: Path, options: Callable[..., TrainConfig]):
    saved = yaml_io.load(TrainConfig, reference_run / "config.yaml")
    assert saved == dataclasses.replace(options(), out=str(reference_run))
