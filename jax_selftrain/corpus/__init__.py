"""Corpora: shards, manifest, statistics, import, export, packing, overlap."""

from jax_selftrain.corpus.decontaminate import remove_overlapping, size_matched_control
from jax_selftrain.corpus.export import export_corpus
from jax_selftrain.corpus.ingest import import_text
from jax_selftrain.corpus.mixture import Mixture, parse_mixture
from jax_selftrain.corpus.overlap import Overlaps, longest_overlaps
from jax_selftrain.corpus.packing import PackedRows, batch_indices, build_packed_rows, pack_corpus
from jax_selftrain.corpus.reader import Corpus, open_corpus
from jax_selftrain.corpus.schema import FINISH_REASONS, SCHEMA, Sample
from jax_selftrain.corpus.shards import (
    finalize_corpus,
    init_corpus,
    is_shard_done,
    missing_shards,
    read_records,
    shard_count,
    shard_ids,
    shard_name,
    write_shard,
)
from jax_selftrain.corpus.statistics import corpus_statistics
from jax_selftrain.corpus.token_source import LazilyTokenized, RaggedTokens, TokenSource, memmap_tokens
from jax_selftrain.corpus.transforms import retokenize, shuffle

__all__ = [
    "FINISH_REASONS",
    "SCHEMA",
    "Corpus",
    "LazilyTokenized",
    "Mixture",
    "Overlaps",
    "PackedRows",
    "RaggedTokens",
    "Sample",
    "TokenSource",
    "batch_indices",
    "build_packed_rows",
    "corpus_statistics",
    "export_corpus",
    "finalize_corpus",
    "import_text",
    "init_corpus",
    "is_shard_done",
    "longest_overlaps",
    "memmap_tokens",
    "missing_shards",
    "open_corpus",
    "pack_corpus",
    "parse_mixture",
    "read_records",
    "remove_overlapping",
    "retokenize",
    "shard_count",
    "shard_ids",
    "shard_name",
    "shuffle",
    "size_matched_control",
    "write_shard",
]
