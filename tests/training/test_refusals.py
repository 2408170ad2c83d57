"""Invalid inputs and damaged checkpoints are refused with one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bad_input import flip_byte
from models_factory import tiny_texts
from safetensors.numpy import load_file, save_file
from training_runs import Interruption, run_options

from jax_selftrain.config import ImportCorpusConfig, SampleConfig, TrainConfig
from jax_selftrain.corpus import import_text
from jax_selftrain.errors import InputError, UnavailableError
from jax_selftrain.hub import LoadedModel
from jax_selftrain.io.jsonl import read_log
from jax_selftrain.io.manifest import folder_manifest
from jax_selftrain.sampling import sample
from jax_selftrain.training import Hook, train


def test_corpus_of_another_tokenizer_is_refused(tiny_model, options: Callable[..., TrainConfig]):
    with pytest.raises(InputError, match="another tokenizer"):
        train(options(model=str(tiny_model("llama", vocab_size=400, hidden_size=32))))


def test_a_model_without_tokenizer_is_trained_on_its_own_corpus_alone(
    small_model: Path, corpus_folder: Path, options: Callable[..., TrainConfig], tmp_path: Path
):
    bare = shutil.copytree(small_model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "vocab*"))
    with pytest.raises(InputError, match=r"bare: holds no tokenizer, but .* was made with one"):
        train(options(model=str(bare)))
    own = str(tmp_path / "own")
    sample(SampleConfig(model=str(bare), out=own, samples=8, max_tokens=16, batch_size=8, mesh="data=1"))
    with pytest.raises(InputError, match="own: was sampled from a model without a tokenizer"):
        train(options(corpus=own))
    assert (train(options(model=str(bare), corpus=own, steps=1)) / "model" / "config.json").is_file()


def test_token_ids_beyond_the_model_are_refused(tiny_model, options: Callable[..., TrainConfig], tmp_path: Path):
    full = tiny_model("llama", vocab_size=340, hidden_size=32)
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts(5)))
    import_text(ImportCorpusConfig(source=str(source), model=str(full), out=str(tmp_path / "corpus")))
    cut = tiny_model("llama", vocab_size=330, tokenizer_size=340, hidden_size=32)  # same tokenizer, fewer rows
    with pytest.raises(InputError, match=r"holds token id 33\d, but .* has only 330 tokens"):
        train(options(model=str(cut), corpus=str(tmp_path / "corpus")))


def test_folder_without_a_run_is_refused_and_not_changed(options: Callable[..., TrainConfig], corpus_folder: Path):
    before = folder_manifest(corpus_folder)
    with pytest.raises(InputError, match="is not a run folder"):
        train(options(out=str(corpus_folder)))
    assert folder_manifest(corpus_folder) == before


def test_two_processes_in_one_folder_are_refused(options: Callable[..., TrainConfig]):
    def train_again(step: int, model: LoadedModel) -> None:
        with pytest.raises(UnavailableError, match="another process is training there"):
            train(options())

    train(options(), hooks=[Hook(train_again, steps=(1,))])


def test_weights_with_nan_are_refused_by_name(small_model: Path, tmp_path: Path, options: Callable[..., TrainConfig]):
    broken = shutil.copytree(small_model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="NaN"):
        train(options(model=str(broken)))


def test_diverging_run_stops_and_keeps_earlier_records(options: Callable[..., TrainConfig]):
    config = options(learning_rate=1e30, warmup_ratio=0.0, steps=8, checkpoint_every=1, keep=10)
    with pytest.raises(InputError, match=r"(loss|grad_norm|NaN).*step \d") as caught:
        train(config)
    assert "nothing of it was saved" in str(caught.value)
    run = Path(config.out)
    lines = read_log(run / "metrics.jsonl")
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert not (run / "model").exists()
    with pytest.raises(InputError, match="nothing of it was saved"):
        train(config)  # it says so again, instead of going on from a broken state


# ---------------------------------------------------------------- damaged checkpoints


@pytest.fixture(scope="module")
def interrupted_run(small_model: Path, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `options()`, interrupted after step 5."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"

    def stop(step: int, model: LoadedModel) -> None:
        raise Interruption

    with pytest.raises(Interruption):
        train(run_options((small_model, corpus_folder, folder)), hooks=[Hook(stop, steps=(5,))])
    return folder


@pytest.fixture
def interrupted_copy(interrupted_run: Path, options: Callable[..., TrainConfig]) -> Path:
    """A copy of it, where `options()` looks for it."""
    return Path(shutil.copytree(interrupted_run, options().out))


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped byte in the weights": lambda checkpoint: flip_byte(largest(checkpoint / "model" / "params")),
    "flipped byte in the moments": lambda checkpoint: flip_byte(largest(checkpoint / "optimizer")),
    "truncated moments": lambda checkpoint: largest(checkpoint / "optimizer").write_bytes(b"short"),
    "missing moments": lambda checkpoint: largest(checkpoint / "optimizer").unlink(),
    "missing manifest": lambda checkpoint: (checkpoint / "optimizer" / "manifest.json").unlink(),
    "missing model": lambda checkpoint: shutil.rmtree(checkpoint / "model"),
    "edited config": lambda checkpoint: flip_byte(checkpoint / "model" / "config.json"),
    "edited step": lambda checkpoint: (checkpoint / "step.json").write_text(
        (checkpoint / "step.json").read_text().replace('"step": 4', '"step": 3')
    ),
    "missing step": lambda checkpoint: (checkpoint / "step.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_refused_by_name(
    damage: str, interrupted_copy: Path, options: Callable[..., TrainConfig]
):
    newest = interrupted_copy / "checkpoints" / "000004"
    DAMAGE[damage](newest)
    with pytest.raises(InputError) as caught:
        train(options())
    message = str(caught.value)
    assert str(newest) in message
    assert f"to fall back to step 2, delete {newest} and run the same command again" in message
    assert newest.exists()
    assert not (interrupted_copy / "model").exists()


def test_after_deleting_the_damaged_checkpoint_the_run_falls_back(
    interrupted_copy: Path, options: Callable[..., TrainConfig]
):
    shutil.rmtree(interrupted_copy / "checkpoints" / "000004")
    run = train(options())
    launches = read_log(run / "launches.jsonl")
    assert [launch["from_step"] for launch in launches] == [0, 2]


def test_failure_of_a_background_save_is_raised(options: Callable[..., TrainConfig]):
    """A file blocks the folder of the checkpoint of step 2."""

    def block(step: int, model: LoadedModel) -> None:
        (Path(options().out) / "checkpoints").mkdir(exist_ok=True)
        (Path(options().out) / "checkpoints" / "000002").write_text("in the way")

    with pytest.raises(InputError, match="000002"):
        train(options(), hooks=[Hook(block, steps=(1,))])
    assert not (Path(options().out) / "model").exists()
