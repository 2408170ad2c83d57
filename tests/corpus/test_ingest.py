"""Imported text becomes a corpus, each document once and in order."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from launcher import launch_code
from models_factory import BOS_ID, EOS_ID, tiny_texts

from jax_selftrain import hub
from jax_selftrain.config import ImportCorpusConfig, yaml_io
from jax_selftrain.corpus import import_text, open_corpus, token_source
from jax_selftrain.errors import InputError


@pytest.fixture(scope="module")
def model(tiny_model) -> str:
    return str(tiny_model("llama"))


@pytest.fixture(scope="module")
def tokenizer(model):
    return hub.open_model(model).tokenizer


def write_jsonl(path: Path, entries) -> str:
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")
    return str(path)


def stories(n: int) -> list[str]:
    return list(tiny_texts(n, seed=5))


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def results(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_documents_are_the_tokenized_texts_with_the_stop_id(tmp_path, model, tokenizer):
    texts = [*stories(7), "naïve 字 🙂", "  two spaces\n\nand lines  "]
    source = write_jsonl(tmp_path / "t.jsonl", [{"text": text, "n": i} for i, text in enumerate(texts)])
    corpus = import_text(ImportCorpusConfig(source, model, str(tmp_path / "c"), samples_per_shard=4))
    read = list(corpus.iter_samples())
    assert [s.text for s in read] == texts
    assert [s.tokens.tolist() for s in read] == [[*plain(tokenizer, text), EOS_ID] for text in texts]
    assert {s.finish_reason for s in read} == {"stop"}
    assert all(np.isnan(s.logprob) for s in read)
    assert (corpus.manifest["kind"], corpus.start_id, corpus.manifest["stop_ids"]) == ("imported", BOS_ID, [EOS_ID])
    assert corpus.manifest["tokenizer_fingerprint"] == hub.open_model(model).tokenizer_fingerprint
    assert [shard["rows"] for shard in corpus.manifest["shards"]] == [4, 4, 1]
    resolved = yaml_io.load(ImportCorpusConfig, tmp_path / "c" / "config.yaml")
    assert (resolved.source, resolved.start_id, resolved.stop_id) == (source, BOS_ID, EOS_ID)
    assert "pyarrow" in json.loads((tmp_path / "c" / "records" / "shard-000000.json").read_text())["versions"]


def test_special_strings_in_text_are_plain_text(tmp_path, model, tokenizer):
    text = "before <s> between </s> after <unk>"
    source = write_jsonl(tmp_path / "t.jsonl", [{"text": text}])
    sample = next(import_text(ImportCorpusConfig(source, model, str(tmp_path / "c"))).iter_samples())
    assert not {0, BOS_ID, EOS_ID} & set(sample.tokens[:-1].tolist())
    assert tokenizer.decode(sample.tokens[:-1].tolist()) == text
    assert EOS_ID in plain(tokenizer, text)  # what would have happened otherwise


def test_long_documents_are_cut_at_a_token_and_keep_no_stop_id(tmp_path, model, tokenizer):
    texts = [*stories(5), "short", "字" * 40]
    lengths = [len(plain(tokenizer, text)) for text in texts]
    limit = lengths[0]  # the first would fit, but not with its stop id
    source = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    corpus = import_text(ImportCorpusConfig(source, model, str(tmp_path / "c"), max_tokens=limit))
    for text, length, sample in zip(texts, lengths, corpus.iter_samples(), strict=True):
        if length < limit:
            assert (sample.finish_reason, sample.text) == ("stop", text)
            assert sample.tokens.tolist() == [*plain(tokenizer, text), EOS_ID]
        else:
            assert (sample.finish_reason, len(sample.tokens)) == ("length", limit)
            assert sample.tokens.tolist() == plain(tokenizer, text)[:limit]
            assert text.startswith(sample.text)
            assert sample.text == text if length == limit else sample.text != text
    # A cut may fall inside a character or a merge: then the kept text has other tokens, and is counted.
    again = [
        plain(tokenizer, s.text) != s.tokens.tolist() for s in corpus.iter_samples() if s.finish_reason == "length"
    ]
    assert corpus.manifest["retokenization_mismatches"] == sum(again)


def test_blank_documents_and_blank_lines_are_left_out_and_limit_counts_the_others(tmp_path, model):
    lines = [{"text": ""}, {"text": "one"}, {"text": " \n"}, {"text": "two"}, {"text": "three"}]
    path = tmp_path / "t.jsonl"
    path.write_text("\ufeff\n" + "\n\n".join(json.dumps(line) for line in lines))
    corpus = import_text(ImportCorpusConfig(str(path), model, str(tmp_path / "c"), limit=2))
    assert [s.text for s in corpus.iter_samples()] == ["one", "two"]


def test_start_and_stop_id_can_be_chosen(tmp_path, model):
    source = write_jsonl(tmp_path / "t.jsonl", [{"story": "one"}])
    config = ImportCorpusConfig(source, model, str(tmp_path / "c"), text_field="story", start_id=5, stop_id=BOS_ID)
    corpus = import_text(config)
    assert (corpus.start_id, corpus.manifest["stop_ids"]) == (5, [BOS_ID])
    assert next(corpus.iter_samples()).tokens[-1] == BOS_ID


def test_a_folder_with_nothing_but_a_tokenizer_will_do(tmp_path, model):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(Path(model, name).read_bytes())
    source = write_jsonl(tmp_path / "t.jsonl", [{"text": "one"}])
    corpus = import_text(ImportCorpusConfig(source, str(folder), str(tmp_path / "c")))
    assert (corpus.start_id, corpus.manifest["stop_ids"]) == (BOS_ID, [EOS_ID])


def test_the_batches_of_the_tokenizer_leave_no_mark(tmp_path, model, monkeypatch):

    source = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in stories(9)])
    config = ImportCorpusConfig(source, model, str(tmp_path / "a"), max_tokens=50, samples_per_shard=5)
    import_text(config)
    monkeypatch.setattr(token_source, "ENCODE_CHARACTERS", 1)
    import_text(dataclasses.replace(config, out=str(tmp_path / "b")))
    a, b = results(tmp_path / "a"), results(tmp_path / "b")
    assert {k: v for k, v in a.items() if k != "config.yaml"} == {k: v for k, v in b.items() if k != "config.yaml"}


# ---------------------------------------------------------------- restart and repair


@pytest.mark.nightly
def test_kill_9_while_importing_then_the_same_command_gives_the_same_bytes(tmp_path, model):
    source = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in stories(40)])
    killed = tmp_path / "killed"
    script = f"""
import sys
from jax_selftrain.config import ImportCorpusConfig
from jax_selftrain.corpus import import_text
import_text(ImportCorpusConfig({source!r}, {model!r}, sys.argv[1], samples_per_shard=1))
"""
    process = launch_code(script, killed)
    process.wait_until(lambda: len(list(killed.glob("shard-*"))) >= 3)
    process.kill()
    process.wait()

    def count_committed() -> dict[str, tuple[int, int]]:
        return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in killed.glob("shard-*")}

    before = count_committed()
    assert 3 <= len(before) < 40
    with pytest.raises(InputError, match=r"of 40 shards are missing"):
        open_corpus(killed)

    def finish(name: str) -> dict[str, bytes]:
        import_text(ImportCorpusConfig(source, model, str(tmp_path / name), samples_per_shard=1))
        return {name: data for name, data in results(tmp_path / name).items() if name != "config.yaml"}

    assert finish("killed") == finish("undisturbed")
    recorded = {name for name in before if name != max(before)}  # the last one may have lacked its record
    assert {name: count_committed()[name] for name in recorded} == {name: before[name] for name in recorded}


def test_a_deleted_shard_is_regenerated_and_a_damaged_one_named(tmp_path, model):
    source = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in stories(9)])
    config = ImportCorpusConfig(source, model, str(tmp_path / "c"), samples_per_shard=4)
    import_text(config)
    before = results(tmp_path / "c")
    shard = tmp_path / "c" / "shard-000001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"X")
    with pytest.raises(InputError, match=r"shard-000001.parquet.*delete the shard"):
        import_text(config)
    shard.unlink()
    import_text(config)
    assert results(tmp_path / "c") == before


def test_a_changed_source_or_option_is_refused(tmp_path, model):
    texts = stories(4)
    path = tmp_path / "t.jsonl"
    config = ImportCorpusConfig(write_jsonl(path, [{"text": t} for t in texts]), model, str(tmp_path / "c"))
    import_text(config)
    before = results(tmp_path / "c")
    with pytest.raises(InputError, match=r"policy.max_tokens = None, this command has 9"):
        import_text(dataclasses.replace(config, max_tokens=9))
    write_jsonl(path, [{"text": t} for t in [*texts[:2], texts[2] + texts[3], "x"]])
    with pytest.raises(InputError, match=r"source.fingerprint"):
        import_text(config)
    assert results(tmp_path / "c") == before
    write_jsonl(tmp_path / "moved.jsonl", [{"text": t} for t in texts])
    import_text(dataclasses.replace(config, source=str(tmp_path / "moved.jsonl")))
    assert json.loads(before["corpus.json"]) == json.loads((tmp_path / "c" / "corpus.json").read_text())


# ---------------------------------------------------------------- other libraries' data sets


def test_a_saved_data_set_is_read(tmp_path, model):
    datasets = pytest.importorskip("datasets")
    texts = stories(6)
    datasets.Dataset.from_dict({"text": texts, "n": range(6)}).save_to_disk(tmp_path / "one")
    corpus = import_text(ImportCorpusConfig(str(tmp_path / "one"), model, str(tmp_path / "c")))
    assert [s.text for s in corpus.iter_samples()] == texts

    both = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": [f"{name} {text}" for text in texts]}) for name in ("train", "test")}
    )
    both.save_to_disk(tmp_path / "both")
    corpus = import_text(ImportCorpusConfig(str(tmp_path / "both"), model, str(tmp_path / "d"), split="test"))
    assert [s.text for s in corpus.iter_samples()] == [f"test {text}" for text in texts]
    with pytest.raises(InputError, match=r"no split 'dev' \(it has: train, test\)"):
        import_text(ImportCorpusConfig(str(tmp_path / "both"), model, str(tmp_path / "e"), split="dev"))


def test_a_split_of_a_source_without_splits_is_refused(tmp_path, model):
    datasets = pytest.importorskip("datasets")
    write_jsonl(tmp_path / "t.jsonl", [{"text": "one"}])
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "saved")
    for name in ("t.jsonl", "saved"):
        config = ImportCorpusConfig(str(tmp_path / name), model, str(tmp_path / "c"), split="test")
        with pytest.raises(InputError, match=r"--split test: .* has no splits"):
            import_text(config)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json"])
def test_damaged_saved_data_sets_are_one_sentence(tmp_path, model, file):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / file).write_text("[]")
    with pytest.raises(InputError, match="cannot open it"):
        import_text(ImportCorpusConfig(str(tmp_path / "saved"), model, str(tmp_path / "c")))


def test_texts_of_other_formats_are_read(tmp_path, model):
    texts = stories(3)
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet")
    (tmp_path / "t.txt").write_text(texts[0])
    for name, expected in (("t.parquet", texts), ("t.txt", texts[:1])):
        corpus = import_text(ImportCorpusConfig(str(tmp_path / name), model, str(tmp_path / f"c-{name}")))
        assert [sample.text for sample in corpus.iter_samples()] == expected


def test_a_named_data_set_is_read(tmp_path, model, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = stories(4)
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": text} for text in texts])
    corpus = import_text(ImportCorpusConfig(f"datasets:{tmp_path / 'set'}", model, str(tmp_path / "c")))
    assert [s.text for s in corpus.iter_samples()] == texts


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"t.jsonl:3: not a line of JSON"),
        (b"\xff\xfe", r"t.jsonl:3: not a line of JSON"),
        (b"[" * 100_000, r"t.jsonl:3: not a line of JSON"),
        (b'["text"]', r"t.jsonl:3: list instead of a JSON object"),
        (b"null", r"t.jsonl:3: NoneType instead of a JSON object"),
        (b'{"texts": "a"}', r"t.jsonl:3: has no field 'text' \(its fields: texts\)"),
        (b'{"text": 5}', r"t.jsonl:3: the text field holds int"),
        (b'{"text": "\\ud800"}', r"t.jsonl:3: the text is not valid UTF-8"),
    ],
)
def test_a_malformed_line_is_named_and_nothing_is_written(tmp_path, model, line, message):
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(InputError, match=message) as caught:
        import_text(ImportCorpusConfig(str(tmp_path / "t.jsonl"), model, str(tmp_path / "c"), samples_per_shard=1))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "nowhere.jsonl"}, "nowhere.jsonl: no such file or folder"),
        ({"source": ""}, "`source` is required"),
        ({"source": "."}, "`datasets.load_from_disk` cannot open it"),
        ({"source": "datasets:./nowhere"}, "`datasets.load_dataset` cannot open it"),
        ({"source": "tfds:nowhere"}, "tfds:nowhere: not a TFDS folder"),
        ({"limit": 0}, "--limit 0: must be at least 1"),
        ({"max_tokens": 0}, "--max-tokens 0: must be at least 1"),
        ({"samples_per_shard": 0}, "--samples-per-shard 0: must be at least 1"),
        ({"stop_id": 512}, "--stop-id 512: is no token of .*, whose ids are below 512"),
        ({"source": "blank.jsonl"}, "holds no text"),
    ],
)
def test_impossible_imports_are_refused_before_anything_is_written(tmp_path, monkeypatch, model, changes, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "t.jsonl", [{"text": "one"}])
    write_jsonl(tmp_path / "blank.jsonl", [{"text": " "}])
    config = dataclasses.replace(ImportCorpusConfig("t.jsonl", model, "c"), **changes)
    with pytest.raises(InputError, match=message) as caught:
        import_text(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_real_stories_survive_the_round_trip_through_their_tokenizer(tmp_path, data_dir, stories260k):
    config = ImportCorpusConfig(
        str(data_dir / "tinystories/train.jsonl"), str(stories260k), str(tmp_path / "c"), limit=300
    )
    corpus = import_text(dataclasses.replace(config, stop_id=1))
    tokenizer = hub.open_model(str(stories260k)).tokenizer
    for sample in corpus.iter_samples():
        assert sample.tokens[-1] == 1
        assert tokenizer.decode(sample.tokens[:-1].tolist()) == sample.text
