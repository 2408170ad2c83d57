"""Streaming export of a corpus to TFDS or JSONL.

tensorflow-datasets writes and reads `array_record` files without TensorFlow. Shuffling is off, because TFDS otherwise
permutes the rows by the hash of their keys.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from jax_selftrain.config import ExportConfig, yaml_io
from jax_selftrain.corpus.reader import Corpus, open_corpus
from jax_selftrain.errors import InputError
from jax_selftrain.io import atomic
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
    if config.format not in writers:
        raise InputError(f"--format {config.format}: choose one of {', '.join(writers)}")
    corpus = open_corpus(config.corpus)
    out = Path(config.out)
    with atomic.commit_folder(out) as aside:
        writers[config.format](corpus, aside)
        yaml_io.save(aside / "config.yaml", config)
        facts = {"corpus": corpus.manifest, "fingerprint": corpus.fingerprint, "versions": versions()}
        atomic.write_json(aside / "export.json", facts)
    return out


def _export_jsonl(corpus: Corpus, folder: Path) -> None:
    rows = (
        vars(sample)
        | {"tokens": sample.tokens.tolist(), "logprob": None if np.isnan(sample.logprob) else sample.logprob}
        for sample in corpus.iter_samples()
    )
    write_jsonl(folder / "samples.jsonl", rows)


def _export_tfds(corpus: Corpus, folder: Path) -> None:
    if absent := [name for name in ("tensorflow_datasets", "array_record") if find_spec(name) is None]:
        raise InputError(f"--format tfds needs {absent[0]}; pip install tensorflow-datasets array_record")
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    features = {
        "sample_id": np.int64,
        "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
        "text": tfds.features.Text(),
        "logprob": np.float32,
        "finish_reason": tfds.features.Text(),
    }

    with registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            name = "selftrain_corpus"
            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(
                    builder=self,
                    description=f"A {corpus.manifest['kind']} corpus of jax_selftrain, {corpus.fingerprint}",
                    features=tfds.features.FeaturesDict(features),
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
                for sample in corpus.iter_samples():
                    yield sample.sample_id, vars(sample)

    making = folder / "making"
    builder = Builder(data_dir=making, file_format="array_record")
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints a path that is renamed below
        builder.download_and_prepare()
    for path in Path(builder.data_path).iterdir():
        os.rename(path, folder / path.name)
    shutil.rmtree(making)
