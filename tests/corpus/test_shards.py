"""Shards and manifests are complete or absent, and deterministic."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_input import flip_byte
from launcher import launch_code

from jax_selftrain.corpus import CorpusWriter, Sample, open_corpus
from jax_selftrain.corpus.schema import SCHEMA
from jax_selftrain.errors import InputError

REQUEST: dict[str, Any] = {
    "kind": "sampled",
    "source": {"ref": "model", "fingerprint": "f" * 64},
    "tokenizer_fingerprint": "a" * 64,
    "start_id": 1,
    "stop_ids": [2],
    "policy": {"temperature": 1.0, "top_k": 0},
    "seed": 0,
    "samples": 10,
    "samples_per_shard": 4,
}


def sample(sample_id: int, length: int = 5) -> Sample:
    tokens = np.random.Generator(np.random.Philox(sample_id)).integers(0, 50_000, length).astype(np.int32)
    return Sample(sample_id, tokens, f"text {sample_id}", -1.5, "stop")


def write_all(folder: Path, order=(0, 1, 2)) -> CorpusWriter:
    writer = CorpusWriter.open(folder, REQUEST)
    for index in order:
        writer.write_shard(index, [sample(i) for i in writer.sample_ids(index)], {"mismatches": 0, "seconds": index})
    return writer


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_shard_holds_exactly_the_samples_given(tmp_path, make_corpus, documents):
    corpus = make_corpus(tmp_path / "c", documents)
    read = list(corpus.iter_samples())
    assert [s.sample_id for s in read] == list(range(len(documents)))
    assert [s.tokens.tolist() for s in read] == documents
    assert all(s.tokens.dtype == np.int32 for s in read)
    assert [s.finish_reason for s in read] == ["stop" if i % 2 else "length" for i in range(len(documents))]
    assert [s.text[:4] for s in read] == [f"té {i}" for i in range(len(documents))]
    assert [s.logprob for s in read if s.sample_id % 3] == [-0.5 * i for i in range(len(documents)) if i % 3]


def test_a_missing_logprob_is_null_in_the_file_and_nan_in_memory(tmp_path, make_corpus, documents):
    corpus = make_corpus(tmp_path / "c", documents)
    column = pq.read_table(corpus.folder / "shard-000000.parquet").column("logprob")
    assert [value is None for value in column.to_pylist()] == [i % 3 == 0 for i in range(4)]
    assert [np.isnan(s.logprob) for s in corpus.iter_samples()] == [i % 3 == 0 for i in range(len(documents))]


def test_the_columns_are_those_of_the_interface(tmp_path):
    write_all(tmp_path)
    schema = pq.read_schema(tmp_path / "shard-000000.parquet")
    assert schema.equals(SCHEMA)
    assert schema.field("tokens").type == pa.list_(pa.int32())


def test_bytes_do_not_depend_on_order_of_writing_or_on_earlier_writes(tmp_path):
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        write_all(tmp_path / name, order).finalize()
    assert files(tmp_path / "a") == files(tmp_path / "b")
    write_all(tmp_path / "b", [1])
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_manifest_copies_nothing_that_a_restart_or_mesh_could_change(tmp_path):
    writer = write_all(tmp_path)
    writer.finalize()
    manifest = json.loads((tmp_path / "corpus.json").read_text())
    assert manifest["samples"] == 10
    assert manifest["tokens"] == 50
    assert manifest["retokenization_mismatches"] == 0
    assert [shard["rows"] for shard in manifest["shards"]] == [4, 4, 2]
    assert set(manifest["shards"][0]) == {"file", "sha256", "bytes", "rows", "tokens", "mismatches"}
    assert writer.records()[2]["seconds"] == 2


def test_missing_shards_are_those_without_file_or_record(tmp_path):
    writer = write_all(tmp_path, [0, 2])
    assert writer.missing() == [1]
    (tmp_path / "shard-000002.parquet").unlink()
    (tmp_path / "records" / "shard-000000.json").unlink()
    assert writer.missing() == [0, 1, 2]


def test_a_complete_corpus_holds_no_lease_of_a_dead_process(tmp_path):
    writer = write_all(tmp_path, [0, 1, 2])
    (tmp_path / "records" / "shard-000001.lease").write_text("{}")
    writer.finalize()
    assert not list(tmp_path.rglob("*.lease"))


def test_going_on_with_a_corpus_forgets_the_records_of_deleted_shards(tmp_path):
    write_all(tmp_path)
    (tmp_path / "shard-000001.parquet").unlink()
    assert CorpusWriter.open(tmp_path, REQUEST).missing() == [1]
    assert not (tmp_path / "records" / "shard-000001.json").exists()


def test_finishing_refuses_an_incomplete_corpus_and_says_how_much_is_missing(tmp_path):
    writer = write_all(tmp_path, [0])
    with pytest.raises(InputError, match=r"2 of 3 shards are missing \(shard-000001.parquet, shard-000002.parquet\)"):
        writer.finalize()
    assert not (tmp_path / "corpus.json").exists()


def test_finishing_refuses_a_damaged_shard(tmp_path):
    writer = write_all(tmp_path)
    flip_byte(tmp_path / "shard-000001.parquet")
    with pytest.raises(InputError, match=r"shard-000001.parquet.*delete the shard and run the same command"):
        writer.finalize()


def test_finishing_refuses_shards_that_do_not_belong(tmp_path):
    writer = write_all(tmp_path)
    (tmp_path / "shard-000007.parquet").write_bytes((tmp_path / "shard-000002.parquet").read_bytes())
    with pytest.raises(InputError, match=r"shard-000007.parquet: does not belong"):
        writer.finalize()


def test_finishing_refuses_a_shard_of_other_sample_ids(tmp_path):
    writer = write_all(tmp_path)
    for name in ("shard-{}.parquet", "records/shard-{}.json"):
        (tmp_path / name.format("000001")).write_bytes((tmp_path / name.format("000000")).read_bytes())
    with pytest.raises(InputError, match=r"shard-000001.json: holds 4 samples from id 0"):
        writer.finalize()


def test_a_folder_belongs_to_the_request_it_was_begun_with(tmp_path):
    write_all(tmp_path, [0])
    CorpusWriter.open(tmp_path, REQUEST)
    other = {**REQUEST, "policy": {"temperature": 0.7, "top_k": 0}}
    with pytest.raises(InputError, match=r"policy.temperature = 1.0, this command has 0.7"):
        CorpusWriter.open(tmp_path, other)


def test_a_source_may_be_moved_while_its_fingerprint_stays(tmp_path):
    write_all(tmp_path, [0])
    moved = {**REQUEST, "source": {"ref": "elsewhere", "fingerprint": "f" * 64}}
    assert CorpusWriter.open(tmp_path, moved).request == REQUEST
    with pytest.raises(InputError, match=r"source.fingerprint = 'ffff"):
        CorpusWriter.open(tmp_path, {**moved, "source": {"ref": "model", "fingerprint": "0" * 64}})


def test_a_request_given_with_tuples_is_the_same_after_a_restart(tmp_path):
    write_all(tmp_path, [0])
    CorpusWriter.open(tmp_path, {**REQUEST, "stop_ids": (2,)})


@pytest.mark.parametrize("bad", [[], [0, 2, 1, 3], [4, 5, 6, 7]])
def test_a_shard_needs_consecutive_samples(tmp_path, bad):
    with pytest.raises(ValueError, match="shard 0"):
        CorpusWriter.open(tmp_path, REQUEST).write_shard(0, [sample(i) for i in bad], {})
    assert not list(tmp_path.iterdir())


def test_on_a_full_disk_the_shard_is_named_and_nothing_of_it_stays(tmp_path, full_disk):
    writer = write_all(tmp_path, [0])
    with pytest.raises(InputError, match=r"shard-000001.parquet: cannot be written"):
        writer.write_shard(1, [sample(i, length=100_000) for i in writer.sample_ids(1)], {})
    assert sorted(files(tmp_path)) == ["records/shard-000000.json", "request.json", "shard-000000.parquet"]


# A corpus of three shards, the middle one large enough to be caught while it is being written.
WRITER = f"""
import sys
import numpy as np
from jax_selftrain.corpus import CorpusWriter, Sample

writer = CorpusWriter.open(sys.argv[1], {REQUEST | {"samples": 30, "samples_per_shard": 10}})
for index in writer.missing():
    length = 200_000 if index == 1 else 10
    rngs = {{i: np.random.Generator(np.random.Philox(i)) for i in writer.sample_ids(index)}}
    tokens = {{i: rng.integers(0, 50_000, length).astype(np.int32) for i, rng in rngs.items()}}
    samples = [Sample(i, tokens[i], f"text {{i}}", -1.5, "stop") for i in tokens]
    writer.write_shard(index, samples, {{"mismatches": 0}})
writer.finalize()
"""


def test_kill_9_while_a_shard_is_written_then_the_same_command_gives_the_same_bytes(tmp_path):
    killed = launch_code(WRITER, tmp_path / "killed")
    killed.wait_until(lambda: any((tmp_path / "killed").glob(".shard-000001*")))
    killed.kill()
    assert killed.wait() == -signal.SIGKILL, "the writer ended before it could be killed"
    assert list((tmp_path / "killed").glob(".shard-000001*"))
    assert sorted(path.name for path in (tmp_path / "killed").glob("shard-*")) == ["shard-000000.parquet"]
    with pytest.raises(InputError, match="2 of 3 shards are missing"):
        open_corpus(tmp_path / "killed")

    assert launch_code(WRITER, tmp_path / "killed").wait() == 0
    assert launch_code(WRITER, tmp_path / "undisturbed").wait() == 0
    assert files(tmp_path / "killed") == files(tmp_path / "undisturbed")
