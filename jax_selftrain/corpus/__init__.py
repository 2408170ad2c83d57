"""Corpora: shards, manifest, statistics, import, export, packing, overlap."""

from jax_selftrain.corpus.decontaminate import remove_overlapping, size_matched_control
from jax_selftrain.corpus.export import export_corpus
from jax_selftrain.corpus.ingest import import_text
from jax_selftrain.corpus.mixture import Mixture, parse_mixture
from jax_selftrain.corpus.overlap import Overlaps, longest_overlaps
from jax_selftrain.corpus.packing import PackedRows, build_packed_rows
from jax_selftrain.corpus.reader import Corpus, open_corpus
from jax_selftrain.corpus.schema import FINISH_REASONS, SCHEMA, Sample
from jax_selftrain.corpus.shards import CorpusWriter
from jax_selftrain.corpus.token_source import LazilyTokenized, RaggedTokens, TokenSource, memmap_tokens
from jax_selftrain.corpus.transforms import retokenize, shuffle

__all__ = [
    "FINISH_REASONS",
    "SCHEMA",
    "Corpus",
    "CorpusWriter",
    "LazilyTokenized",
    "Mixture",
    "Overlaps",
    "PackedRows",
    "RaggedTokens",
    "Sample",
    "TokenSource",
    "build_packed_rows",
    "export_corpus",
    "import_text",
    "longest_overlaps",
    "memmap_tokens",
    "open_corpus",
    "parse_mixture",
    "remove_overlapping",
    "retokenize",
    "shuffle",
    "size_matched_control",
]
