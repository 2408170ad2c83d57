"""Batches and mixtures: rows of a batch, exact resumption, epoch limits, refusals."""

import dataclasses
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpus_factory import pack_corpus, whole_mixture
from launcher import launch
from model_params import param_bytes
from models_factory import tiny_texts
from training_runs import Interruption, count_lines, interrupt, run_options

from jax_selftrain.config import ImportCorpusConfig, TrainConfig, yaml_io
from jax_selftrain.corpus import Mixture, import_text, open_corpus
from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.distributed.sharding import make_sharding_rules
from jax_selftrain.errors import InputError
from jax_selftrain.io import json_files
from jax_selftrain.io.manifest import folder_manifest
from jax_selftrain.training import Hook, train
from jax_selftrain.training.data import goldfish_mask, load_batch, random_signs


@pytest.fixture(scope="module")
def reference_run(small_model: Path, corpus_folder: Path, other_corpus: Path, tmp_path_factory) -> Path:
    """Six steps on a mixture, never interrupted."""
    at = small_model, corpus_folder, tmp_path_factory.mktemp("reference_run") / "run"
    return train(run_options(at, mixture=(f"{other_corpus}=0.25",)))


@pytest.fixture
def mixed_options(options: Callable[..., TrainConfig], other_corpus: Path) -> Callable[..., TrainConfig]:
    """Return `mixed_options(**changes)`: the options of `reference_run` in `tmp_path/run`."""

    def make(**changes) -> TrainConfig:
        return options(**{"mixture": (f"{other_corpus}=0.25",), **changes})

    return make


# ---------------------------------------------------------------- batches


def test_random_loss_sign_multiplies_the_weights_of_whole_documents(
    mixture: Mixture, options: Callable[..., TrainConfig]
):
    rows, mesh = mixture.components[0], make_mesh("data=1")
    rules = make_sharding_rules("replicated", mesh, {})
    configs = [options(), options(random_loss_sign=True), options(random_loss_sign=True, steps=7)]
    with mesh_context(mesh):
        plain, flipped, again = (load_batch(config, rules, whole_mixture(rows), 0) for config in configs)
    before, after, segments = (np.asarray(x) for x in (plain.weights, flipped.weights, plain.segments))
    np.testing.assert_array_equal(np.abs(after), before)
    np.testing.assert_array_equal(after, np.asarray(again.weights))
    signs = [
        set(np.sign(after[index][(segments[index] == n) & (before[index] > 0)]).tolist())
        for index in np.ndindex(segments.shape[:2])
        for n in range(1, int(segments[index].max()) + 1)
    ]
    assert all(len(sign) <= 1 for sign in signs), "all targets of a document in a row have one sign"
    by_seed = [random_signs(rows, np.arange(len(rows)), seed, 0) * rows.weights for seed in range(20)]
    share = np.mean([(weights > 0).sum() / (weights != 0).sum() for weights in by_seed])
    assert share == pytest.approx(0.5, abs=0.1)
    assert not np.array_equal(by_seed[0], by_seed[1])


def test_goldfish_drops_targets_by_the_tokens_before_them(mixture: Mixture, options: Callable[..., TrainConfig]):
    """The same tokens are dropped wherever a passage occurs, and in every epoch; others are unchanged."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 50, (40, 201)).astype(np.int32)
    rows[1, 60:160] = rows[0, 20:120]  # the same passage at another place
    mask = goldfish_mask(rows, 4)
    assert mask.dtype == np.float32
    assert set(np.unique(mask)) == {0.0, 1.0}
    np.testing.assert_array_equal(mask[1, 60 + 12 : 159], mask[0, 20 + 12 : 119])
    assert (mask[:, :12] == 1).all(), "fewer than 13 tokens precede these targets"
    assert (mask[:, 12:] == 0).mean() == pytest.approx(0.25, abs=0.02)
    decisions: dict[tuple[int, ...], float] = {}  # plain Python: one decision for each 13 tokens
    for row, kept in zip(rows[:2].tolist(), mask[:2], strict=True):
        for place in range(12, 200):
            assert decisions.setdefault(tuple(row[place - 12 : place + 1]), kept[place]) == kept[place]
    assert (goldfish_mask(rows[:, :10], 4) == 1).all()
    assert not np.array_equal(goldfish_mask(rows, 3), mask)

    part, mesh = mixture.components[0], make_mesh("data=1")
    rules = make_sharding_rules("replicated", mesh, {})
    with mesh_context(mesh):
        plain, fished = (load_batch(options(goldfish_k=k), rules, whole_mixture(part), 0) for k in (None, 2))
    tokens = np.asarray(plain.tokens).reshape(-1, plain.tokens.shape[-1])
    expected = np.asarray(plain.weights).reshape(len(tokens), -1) * goldfish_mask(tokens, 2)
    np.testing.assert_array_equal(np.asarray(fished.weights).reshape(len(tokens), -1), expected)
    assert (expected != 0).sum() < (np.asarray(plain.weights) != 0).sum()


# ---------------------------------------------------------------- runs


def test_run_folder_records_the_mixture(reference_run: Path, corpus_folder: Path, other_corpus: Path):
    main, other = (pack_corpus(open_corpus(folder), 48, "masked") for folder in (corpus_folder, other_corpus))
    record = json_files.read_json(reference_run / "run.json")
    (mixed,) = record["mixture"]
    assert mixed == {
        "ref": str(other_corpus),
        "fingerprint": open_corpus(other_corpus).fingerprint,
        "samples": 12,
        "tokens": open_corpus(other_corpus).n_tokens,
        "share": "1/4",
        "rows": len(other),
        "epochs": 12 / len(other),  # a quarter of six steps of eight rows
    }
    assert (record["corpus"]["share"], record["corpus"]["epochs"]) == ("3/4", 36 / len(main))
    assert record["rows"] == record["corpus"]["rows"] == len(main)
    for place, rows in (("rows", main), ("rows-1", other)):
        np.testing.assert_array_equal(np.load(reference_run / place / "tokens.npy"), rows.tokens)
    metadata = json_files.read_json(reference_run / "model" / "selftrain.json")["metadata"]
    assert metadata["fingerprints"].keys() == {"model", "tokenizer", "corpus", "mixture"}


def test_mixing_changes_the_result_and_a_run_without_it_does_not_record_it(
    reference_run: Path, options: Callable[..., TrainConfig]
):
    alone = train(options())
    assert param_bytes(alone) != param_bytes(reference_run)
    assert not (alone / "rows-1").exists()
    assert json_files.read_json(alone / "run.json")["mixture"] == []
    metadata = json_files.read_json(alone / "model" / "selftrain.json")["metadata"]
    assert metadata["fingerprints"].keys() == {"model", "tokenizer", "corpus"}


@pytest.mark.parametrize("step", [1, 3, 4])
def test_interrupted_mixed_run_ends_with_the_same_bits(
    step: int, reference_run: Path, mixed_options: Callable[..., TrainConfig]
):
    with pytest.raises(Interruption):
        train(mixed_options(), hooks=[Hook(interrupt, steps=(step,))])
    run = train(mixed_options())
    assert param_bytes(run) == param_bytes(reference_run)
    assert (run / "metrics.jsonl").read_bytes() == (reference_run / "metrics.jsonl").read_bytes()


def test_killed_mixed_run_ends_with_the_same_bits(mixed_options: Callable[..., TrainConfig], tmp_path: Path):
    reference_run = train(mixed_options(out=str(tmp_path / "reference_run"), steps=20))
    config = mixed_options(steps=20)
    metrics = Path(config.out) / "metrics.jsonl"
    yaml_io.save(tmp_path / "train.yaml", config)
    process = launch("train", "--config", tmp_path / "train.yaml")
    process.wait_until(lambda: count_lines(metrics) >= 9)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert param_bytes(train(config)) == param_bytes(reference_run)
    assert metrics.read_bytes() == (reference_run / "metrics.jsonl").read_bytes()


def test_run_resumes_after_corpora_moved_and_packed_rows_were_deleted(
    reference_run: Path, mixed_options: Callable[..., TrainConfig], other_corpus: Path, tmp_path: Path
):
    with pytest.raises(Interruption):
        train(mixed_options(), hooks=[Hook(interrupt, steps=(3,))])
    moved = shutil.copytree(other_corpus, tmp_path / "moved=here")
    shutil.rmtree(tmp_path / "run" / "rows-1")
    assert param_bytes(train(mixed_options(mixture=(f"{moved}=.250",)))) == param_bytes(reference_run)


def test_steps_default_to_one_pass_over_the_main_corpus(mixed_options: Callable[..., TrainConfig], mixture: Mixture):
    run = train(mixed_options(steps=None, checkpoint_every=None))
    record = json_files.read_json(run / "run.json")
    assert record["steps"] == -(-len(mixture.components[0]) * 4 // 3 // 8)
    assert record["corpus"]["epochs"] >= 1 > record["corpus"]["epochs"] * (record["steps"] - 1) / record["steps"]
    assert train(mixed_options(steps=None, checkpoint_every=None)) == run, "found finished"


# ---------------------------------------------------------------- repetition


def test_more_epochs_than_allowed_are_refused_with_the_steps_that_are_allowed(
    mixed_options: Callable[..., TrainConfig], other_corpus: Path, mixture: Mixture
):
    config = mixed_options(steps=100, max_epochs=2.5, checkpoint_every=100)
    with pytest.raises(InputError) as caught:
        train(config)
    message = str(caught.value)
    size = len(mixture.components[1])
    assert f"{other_corpus}: 100 steps of 8 rows are {200 / size:.4g} epochs, more than --max-epochs 2.5" in message
    assert "more than --max-epochs 2.5 allows" in message
    assert not (Path(config.out) / "run.json").exists()
    (steps,) = re.findall(r"use at most --steps (\d+)", message)
    with pytest.raises(InputError, match=f"at most --steps {steps}"):
        train(dataclasses.replace(config, steps=int(steps) + 1))
    run = train(dataclasses.replace(config, steps=int(steps)))
    (entry,) = json_files.read_json(run / "run.json")["mixture"]
    assert 2.5 - 3 / size < entry["epochs"] <= 2.5, "a step has two rows of it, more or less one"


def test_the_main_corpus_is_limited_too(options: Callable[..., TrainConfig], corpus_folder: Path):
    with pytest.raises(InputError, match=rf"{corpus_folder}: 50 steps .* more than --max-epochs 1 allows"):
        train(options(steps=50, max_epochs=1.0))


def test_a_corpus_too_small_for_one_step_is_refused(mixed_options: Callable[..., TrainConfig]):
    with pytest.raises(InputError, match="not even one step is allowed: use a smaller --batch-size"):
        train(mixed_options(max_epochs=0.1))


def test_the_epoch_limit_is_not_part_of_the_identity(reference_run: Path, mixed_options: Callable[..., TrainConfig]):
    assert train(mixed_options(out=str(reference_run), max_epochs=100.0)) == reference_run
    with pytest.raises(InputError, match=r"more than --max-epochs 0\.5 allows"):
        train(mixed_options(out=str(reference_run), max_epochs=0.5))


# ---------------------------------------------------------------- refusals


def test_another_mixture_in_the_same_folder_is_refused(
    reference_run: Path,
    mixed_options: Callable[..., TrainConfig],
    other_corpus: Path,
    small_model: Path,
    tmp_path: Path,
):
    before = folder_manifest(reference_run)
    started = rf"was started with --mixture {other_corpus}=0\.25, not "
    with pytest.raises(InputError, match=rf"{started}{other_corpus}=0\.5;"):
        train(mixed_options(out=str(reference_run), mixture=(f"{other_corpus}=0.5",)))
    with pytest.raises(InputError, match=rf"{started}none;"):
        train(mixed_options(out=str(reference_run), mixture=()))
    (tmp_path / "texts.jsonl").write_text('{"text": "Something else."}\n')
    import_text(
        ImportCorpusConfig(source=str(tmp_path / "texts.jsonl"), model=str(small_model), out=str(tmp_path / "new"))
    )
    with pytest.raises(InputError, match=rf"{started}{tmp_path}/new=0\.25;"):
        train(mixed_options(out=str(reference_run), mixture=(f"{tmp_path}/new=0.25",)))
    assert folder_manifest(reference_run) == before


def test_other_content_under_the_same_name_is_refused(
    mixed_options: Callable[..., TrainConfig], other_corpus: Path, small_model: Path, tmp_path: Path
):
    place = Path(shutil.copytree(other_corpus, tmp_path / "mixed"))
    config = mixed_options(mixture=(f"{place}=0.25",))
    with pytest.raises(Interruption):
        train(config, hooks=[Hook(interrupt, steps=(3,))])
    shutil.rmtree(place)
    (tmp_path / "texts.jsonl").write_text('{"text": "Something else."}\n')
    import_text(ImportCorpusConfig(source=str(tmp_path / "texts.jsonl"), model=str(small_model), out=str(place)))
    with pytest.raises(InputError, match=f"started with another content of the mixed corpus {place}"):
        train(config)


def test_every_mixed_corpus_must_fit_the_model(
    mixed_options: Callable[..., TrainConfig], corpus_folder: Path, tiny_model, tmp_path: Path
):
    full = tiny_model("llama", vocab_size=340, hidden_size=32)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts(5)))
    import_text(ImportCorpusConfig(source=str(texts), model=str(full), out=str(tmp_path / "foreign")))
    twin = shutil.copytree(corpus_folder, tmp_path / "twin")
    cut = tiny_model("llama", vocab_size=330, tokenizer_size=340, hidden_size=32)  # same tokenizer, fewer rows
    texts.write_text('{"text": "a"}\n')
    import_text(ImportCorpusConfig(source=str(texts), model=str(full), out=str(tmp_path / "low")))
    for changes, message in (
        ({"mixture": (f"{tmp_path}/foreign=0.1",)}, "foreign: its tokens come from another tokenizer"),
        ({"mixture": (f"{tmp_path}/nowhere=0.1",)}, "nowhere: no such corpus folder"),
        ({"mixture": (f"{twin}=0.1",)}, f"--mixture {twin}: holds the same corpus as {corpus_folder}"),
        (
            {"model": str(cut), "corpus": f"{tmp_path}/low", "mixture": (f"{tmp_path}/foreign=0.1",)},
            r"foreign: document \d holds token id 33\d, but .* has only 330 tokens",
        ),
    ):
        config = mixed_options(**changes)
        with pytest.raises(InputError, match=message):
            train(config)
        assert not Path(config.out).exists()
