"""Sampling gives the same corpus after interruptions and with several workers."""

import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from launcher import launch
from safetensors.numpy import load_file, save_file

from jax_selftrain import hub
from jax_selftrain.config import SampleConfig, yaml_io
from jax_selftrain.corpus import open_corpus
from jax_selftrain.distributed.mesh import make_mesh, mesh_context
from jax_selftrain.errors import InputError, Preempted
from jax_selftrain.io import json_files
from jax_selftrain.io.manifest import sha256_file
from jax_selftrain.sampling import abstract_program, sample

SHARDS = 3


@pytest.fixture(scope="module")
def config(tiny_model) -> SampleConfig:
    """40 samples in shards of 16, 16 and 8, with 8 slots."""
    model = tiny_model("llama", vocab_size=512, tokenizer_size=400)
    return SampleConfig(
        model=str(model), samples=40, max_tokens=32, seed=5, batch_size=8, samples_per_shard=16, mesh="data=1,model=1"
    )


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    """The corpus of one uninterrupted process."""
    return sample(replace(config, out=str(tmp_path_factory.mktemp("reference") / "corpus")))


@pytest.fixture(scope="module", params=["tiny", pytest.param("stories260k", marks=pytest.mark.nightly)])
def request_and_reference(request, config, reference, tmp_path_factory) -> tuple[SampleConfig, Path]:
    """A request, and the corpus of one uninterrupted process."""
    if request.param == "tiny":
        return config, reference.folder
    model = request.getfixturevalue("stories260k")
    real = replace(config, model=str(model), max_tokens=96)
    folder = tmp_path_factory.mktemp("stories260k") / "corpus"
    return real, sample(replace(real, out=str(folder))).folder


def _content(folder: Path) -> dict[str, str]:
    """Hash the shards and the manifest of a corpus."""
    return {path.name: sha256_file(path) for path in [*folder.glob("shard-*.parquet"), folder / "corpus.json"]}


# ---------------------------------------------------------------- content


def test_a_corpus_has_the_requested_samples(config, reference):
    documents = list(reference.iter_samples())
    assert [document.sample_id for document in documents] == list(range(40))
    assert reference.manifest["kind"] == "sampled"
    assert (reference.start_id, reference.manifest["stop_ids"]) == (1, [2])
    assert reference.manifest["source"]["fingerprint"] == hub.open_model(config.model).fingerprint
    assert reference.manifest["tokenizer_fingerprint"] == hub.open_model(config.model).tokenizer_fingerprint
    assert "mesh" not in str(reference.manifest)
    for document in documents:
        stopped = document.tokens[-1] == 2
        assert document.finish_reason == ("stop" if stopped else "length")
        assert not np.isin(document.tokens[:-1], [2]).any()
        assert stopped or len(document.tokens) == 32
        assert document.tokens.max() < 400, "an id without text was drawn"
        assert -7 * len(document.tokens) < document.logprob < 0


def test_text_is_decoded_and_mismatches_are_counted(config, reference):
    tokenizer = hub.open_model(config.model).tokenizer
    lost = 0
    for document in reference.iter_samples():
        body = [token for token in document.tokens.tolist() if token not in tokenizer.all_special_ids]
        assert document.text == tokenizer.decode(body)
        lost += tokenizer(document.text, add_special_tokens=False, split_special_tokens=True)["input_ids"] != body
    assert reference.manifest["retokenization_mismatches"] == lost > 0


def test_the_folder_records_config_and_environment(config, reference):
    resolved = yaml_io.load(SampleConfig, reference.folder / "config.yaml")
    assert resolved == replace(config, out=str(reference.folder), start_id=1, stop_ids=(2,))
    record = json_files.read_json(reference.folder / "records" / "shard-000001.json")
    assert record["mesh"] == {"data": 1, "model": 1}
    assert record["slots_per_replica"] == 8
    assert record["xla_flags"].get("XLA_FLAGS", "") == os.environ.get("XLA_FLAGS", "")
    assert record["versions"]["jax"] == jax.__version__
    assert json_files.read_json(reference.folder / "timings" / "shard-000001.json")["seconds"] > 0


def test_a_model_without_tokenizer_gives_empty_text(config, tiny_model, tmp_path):
    model = tiny_model("llama", vocab_size=512, tokenizer=False)
    corpus = sample(replace(config, model=str(model), out=str(tmp_path / "corpus"), samples=8))
    assert {document.text for document in corpus.iter_samples()} == {""}
    assert corpus.manifest["tokenizer_fingerprint"] is None


@pytest.mark.nightly
@pytest.mark.parametrize("replicas", [2, 4])
def test_a_corpus_with_start_text_and_min_tokens_is_the_same_for_any_number_of_replicas(config, tmp_path, replicas):
    given = replace(config, start_text="<s> " + "the cat sat " * 12, min_tokens=20, temperature=1.25)
    one = sample(replace(given, out=str(tmp_path / "one")))
    assert len(one.manifest["policy"]["start_ids"]) > 33
    assert one.manifest["policy"]["min_tokens"] == 20
    assert {len(text.tokens) > 20 for text in one.iter_samples()} == {True}
    many = sample(replace(given, out=str(tmp_path / "many"), mesh=f"data={replicas}"))
    assert _content(many.folder) == _content(one.folder)
    with pytest.raises(InputError, match="min_tokens"):
        sample(replace(given, out=str(tmp_path / "one"), min_tokens=21))


# ---------------------------------------------------------------- restarts and workers


def test_a_killed_process_does_not_change_the_corpus(request_and_reference, tmp_path):
    """SIGKILL after the first shard, then the same command again."""
    config, reference = request_and_reference
    config = replace(config, out=str(tmp_path / "corpus"))
    yaml_io.save(tmp_path / "sample.yaml", config)
    process = launch("sample", "--config", tmp_path / "sample.yaml")
    try:
        process.wait_until((tmp_path / "corpus" / "records" / "shard-000000.json").exists)
        assert process.poll() is None, "the process ended before it wrote a shard"
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "corpus" / "corpus.json").exists()
    sample(config)
    assert _content(tmp_path / "corpus") == _content(reference)
    assert not list((tmp_path / "corpus").rglob("*.lease"))
    assert not list((tmp_path / "corpus").rglob(".*"))


def test_sigterm_stops_sampling_and_the_same_command_resumes_it(config, reference, tmp_path):
    config = replace(config, out=str(tmp_path / "corpus"))
    records = tmp_path / "corpus" / "records"

    def terminate_after_the_first_shard() -> None:
        while not (records / "shard-000000.json").exists():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    watcher = threading.Thread(target=terminate_after_the_first_shard)
    watcher.start()
    with pytest.raises(Preempted, match="run the same command again"):
        sample(config)
    watcher.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "corpus" / "corpus.json").exists()
    sample(config)
    assert _content(tmp_path / "corpus") == _content(reference.folder)


def test_several_workers_share_a_folder(config, reference, tmp_path):
    config = replace(config, out=str(tmp_path / "corpus"))
    with ThreadPoolExecutor(3) as workers:
        corpora = list(workers.map(sample, [config] * 3))
    assert all(corpus.manifest == reference.manifest for corpus in corpora)
    assert _content(tmp_path / "corpus") == _content(reference.folder)


def test_only_a_deleted_shard_is_sampled_again(reference, config, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(reference.folder, folder)
    (folder / "shard-000001.parquet").unlink()
    kept = [folder / "shard-000000.parquet", folder / "shard-000002.parquet"]
    before = [path.stat().st_mtime_ns for path in kept]
    sample(replace(config, out=str(folder)))
    assert _content(folder) == _content(reference.folder)
    assert [path.stat().st_mtime_ns for path in kept] == before


@pytest.mark.parametrize(
    "replicas", [pytest.param(2, marks=pytest.mark.nightly), 4, pytest.param(8, marks=pytest.mark.nightly)]
)
def test_the_corpus_is_the_same_for_any_number_of_replicas(request_and_reference, tmp_path, replicas):
    """With 8 slots per replica, files are bitwise the same."""
    config, reference = request_and_reference
    sample(replace(config, out=str(tmp_path / "corpus"), mesh=f"data={replicas},model=1"))
    assert _content(tmp_path / "corpus") == _content(reference)


def test_a_corpus_may_be_extended(config, reference, tmp_path):
    """Full shards of a shorter corpus are copied; the last is drawn again. The bytes are those of a new corpus."""
    shorter = sample(replace(config, out=str(tmp_path / "shorter"), samples=24))
    longer = replace(config, out=str(tmp_path / "longer"), extend=str(shorter.folder))
    sample(longer)
    files = ["corpus.json", *(f"shard-{index:06d}.parquet" for index in range(3))]
    for name in files:
        assert (tmp_path / "longer" / name).read_bytes() == (reference.folder / name).read_bytes()
    timed = sorted(path.stem for path in (tmp_path / "longer" / "timings").iterdir())
    assert timed == ["shard-000001", "shard-000002"]
    with pytest.raises(InputError, match=r"shorter: was created with policy\.temperature = 1\.0, .*cannot be extended"):
        sample(replace(longer, out=str(tmp_path / "other"), temperature=0.5))
    assert not (tmp_path / "other").exists()


def test_shard_size_does_not_change_samples(config, reference, tmp_path):
    whole = sample(replace(config, out=str(tmp_path / "corpus"), samples_per_shard=1000))
    for a, b in zip(whole.iter_samples(), reference.iter_samples(), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert (a.sample_id, a.text, a.logprob, a.finish_reason) == (b.sample_id, b.text, b.logprob, b.finish_reason)


def test_a_moved_model_and_another_mesh_and_batch_size_are_allowed(config, reference, tmp_path):
    moved, folder = tmp_path / "moved", tmp_path / "corpus"
    shutil.copytree(config.model, moved)
    shutil.copytree(reference.folder, folder)
    (folder / "shard-000002.parquet").unlink()
    (folder / "corpus.json").unlink()
    again = sample(replace(config, model=str(moved), out=str(folder), mesh="data=2,model=1", batch_size=4))
    assert again.manifest["source"] == reference.manifest["source"]
    assert [
        json_files.read_json(folder / "records" / f"shard-00000{i}.json")["slots_per_replica"] for i in range(SHARDS)
    ] == [8, 8, 4]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 6}, "seed = 5"),
        ({"temperature": 0.9}, "policy.temperature = 1.0"),
        ({"top_k": 5}, "policy.top_k = 0"),
        ({"samples": 41}, "samples = 40"),
        ({"samples_per_shard": 8}, "samples_per_shard = 16"),
        ({"stop_ids": (2, 3)}, "stop_ids = [2]"),
        ({"dtype": "bfloat16"}, "source.dtype = 'float32'"),
    ],
    ids=str,
)
def test_a_folder_of_another_request_is_refused(config, reference, change, named):
    before = _content(reference.folder)
    with pytest.raises(InputError) as error:
        sample(replace(config, out=str(reference.folder), **change))
    assert named in str(error.value)
    assert "choose another folder" in str(error.value)
    assert _content(reference.folder) == before


def test_a_folder_of_another_model_is_refused(config, reference, tiny_model):
    other = tiny_model("llama", vocab_size=512, tokenizer_size=400, seed=1)
    with pytest.raises(InputError, match=r"source\.fingerprint"):
        sample(replace(config, out=str(reference.folder), model=str(other)))


@pytest.mark.parametrize(
    ("tensor", "value", "named"),
    [
        ("model.layers.1.mlp.up_proj.weight", np.nan, "model.layers.1.mlp.up_proj.weight holds NaN"),
        ("lm_head.weight", 3e38, "its logits are NaN or infinite at float32"),
    ],
    ids=["NaN weight", "logits overflow"],
)
def test_a_broken_model_is_refused_and_writes_nothing(config, tmp_path, tensor, value, named):
    broken = tmp_path / "broken"
    shutil.copytree(config.model, broken)
    weights = load_file(broken / "model.safetensors")
    weights[tensor][3] = value
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as error:
        sample(replace(config, model=str(broken), out=str(tmp_path / "corpus")))
    assert named in str(error.value)
    assert str(broken) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "model"),
        ({"model": "/no/such/model"}, "/no/such/model"),
        ({"max_tokens": 1025}, "longer than the 1024 positions"),
        ({"stop_ids": (400,)}, "outside the vocabulary"),
        ({"temperature": -1.0}, "--temperature"),
        ({"mesh": "data=16,model=1"}, "16 devices"),
    ],
    ids=str,
)
def test_impossible_requests_are_refused_and_write_nothing(config, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        sample(replace(config, out=str(tmp_path / "corpus"), **change))
    assert not (tmp_path / "corpus").exists()


# ---------------------------------------------------------------- ahead-of-time compilation


def test_the_program_compiles_from_shapes_alone(config):
    """No weights are loaded; the state is donated to the result."""
    mesh = make_mesh("data=2,model=2")
    function, arguments, donation = abstract_program(config, mesh)
    with mesh_context(mesh):
        compiled = jax.jit(function, donate_argnums=donation).lower(*arguments).compile()
    state, cache = arguments[2], arguments[2].cache.committed.k
    shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (compiled.out_info, state)]
    assert shapes[0] == shapes[1]
    assert cache.shape == (2, 1, 16, 2, 32, 16)
    assert jax.typeof(cache).sharding.spec[:4] == (None, None, "data", "model")
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= 2 * cache.size * 4 // 4, "keys and values are copied"


def test_the_returned_corpus_equals_the_opened_one(reference):
    assert open_corpus(reference.folder).manifest == reference.manifest
