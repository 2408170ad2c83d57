"""Corpora: Parquet shards and their manifest, statistics, text in and out, training rows, exact overlap."""

from jax_selftrain.corpus.derive import retokenise, shuffle
from jax_selftrain.corpus.documents import Documents, EncodedTexts, TokenArrays, map_to_disk
from jax_selftrain.corpus.exports import export
from jax_selftrain.corpus.imports import import_text
from jax_selftrain.corpus.mixture import Mixture, read_mix
from jax_selftrain.corpus.ngrams import Overlaps, find_overlaps
from jax_selftrain.corpus.reader import Corpus, open_corpus
from jax_selftrain.corpus.rows import Rows, batch_indices, build_rows, pack
from jax_selftrain.corpus.schema import FINISH_REASONS, SCHEMA, Sample
from jax_selftrain.corpus.scrub import drop_others, scrub
from jax_selftrain.corpus.shards import (
    begin_corpus,
    finish_corpus,
    missing_shards,
    read_records,
    shard_count,
    shard_ids,
    shard_name,
    write_shard,
)
from jax_selftrain.corpus.statistics import corpus_statistics

__all__ = [
    "FINISH_REASONS",
    "SCHEMA",
    "Corpus",
    "Documents",
    "EncodedTexts",
    "Mixture",
    "Overlaps",
    "Rows",
    "Sample",
    "TokenArrays",
    "batch_indices",
    "begin_corpus",
    "build_rows",
    "corpus_statistics",
    "drop_others",
    "export",
    "find_overlaps",
    "finish_corpus",
    "import_text",
    "map_to_disk",
    "missing_shards",
    "open_corpus",
    "pack",
    "read_mix",
    "read_records",
    "retokenise",
    "scrub",
    "shard_count",
    "shard_ids",
    "shard_name",
    "shuffle",
    "write_shard",
]
