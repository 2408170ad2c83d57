"""Streaming export of a corpus to TFDS or JSONL.

tensorflow-datasets writes and reads `array_record` files without TensorFlow.
"""

from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np

from jax_selftrain.config import ExportConfig, yaml_io
from jax_selftrain.corpus.reader import Corpus, open_corpus
from jax_selftrain.corpus.schema import SCHEMA
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic, json_files
from jax_selftrain.io.jsonl import write_jsonl
from jax_selftrain.version import versions


def export_corpus(config: ExportConfig) -> Path:
    """Write a corpus as a TFDS folder or as `samples.jsonl`.

    `tfds.builder_from_directory` opens the TFDS folder; its split is `train`. A missing logprob is NaN in TFDS and null
    in JSONL. The folder also holds `config.yaml` and `export.json` (with the fingerprint of the corpus).

    Returns:
        The folder written.

    Raises:
        InputError: the corpus is damaged, the folder is not empty, the format is unknown or its library is missing.
    """
    yaml_io.require(config)
    writers = {"tfds": _export_tfds, "jsonl": _export_jsonl}
    corpus = open_corpus(config.corpus)
    out = Path(config.out)
    with atomic.commit_folder(out) as aside:
        writers[config.format](corpus, aside)
        yaml_io.save(aside / "config.yaml", config)
        facts = {"corpus": corpus.manifest, "fingerprint": corpus.fingerprint, "versions": versions()}
        json_files.write_json(aside / "export.json", facts)
    return out


def _export_jsonl(corpus: Corpus, folder: Path) -> None:
    rows = chain.from_iterable(batch.to_pylist() for batch in corpus.batches(SCHEMA.names))
    write_jsonl(folder / "samples.jsonl", rows)


def _export_tfds(corpus: Corpus, folder: Path) -> None:
    if absent := [name for name in ("tensorflow_datasets", "array_record") if find_spec(name) is None]:
        raise InputError(f"--format tfds needs {absent[0]}; pip install tensorflow-datasets array_record")
    import tensorflow_datasets as tfds

    identity = tfds.core.DatasetIdentity(
        "selftrain_corpus", tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=__name__
    )
    features = {
        "sample_id": np.int64,
        "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
        "text": tfds.features.Text(),
        "logprob": np.float32,
        "finish_reason": tfds.features.Text(),
    }
    info = tfds.core.DatasetInfo(
        builder=identity,
        description=f"A {corpus.manifest['kind']} corpus of jax_selftrain, {corpus.fingerprint}",
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,
    )
    size = corpus.manifest["samples_per_shard"]
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=size, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": map(vars, corpus.iter_samples())})
    writer.close_all()
