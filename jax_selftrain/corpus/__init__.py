"""Corpora: shards, manifest, statistics, import, export, packing, overlap."""

from jax_selftrain.corpus.export import export_corpus as export_corpus
from jax_selftrain.corpus.ingest import import_text as import_text
from jax_selftrain.corpus.ingest import import_tokens as import_tokens
from jax_selftrain.corpus.mixture import Mixture as Mixture
from jax_selftrain.corpus.mixture import parse_mixture as parse_mixture
from jax_selftrain.corpus.overlap import longest_overlaps as longest_overlaps
from jax_selftrain.corpus.packing import PackedRows as PackedRows
from jax_selftrain.corpus.packing import build_packed_rows as build_packed_rows
from jax_selftrain.corpus.reader import Corpus as Corpus
from jax_selftrain.corpus.reader import open_corpus as open_corpus
from jax_selftrain.corpus.schema import Sample as Sample
from jax_selftrain.corpus.shards import CorpusWriter as CorpusWriter
from jax_selftrain.corpus.token_source import LazilyTokenized as LazilyTokenized
from jax_selftrain.corpus.token_source import RaggedTokens as RaggedTokens
from jax_selftrain.corpus.token_source import TokenSource as TokenSource
from jax_selftrain.corpus.token_source import memmap_tokens as memmap_tokens
from jax_selftrain.corpus.transforms import check_subset as check_subset
from jax_selftrain.corpus.transforms import draw_subset as draw_subset
from jax_selftrain.corpus.transforms import remove_overlapping as remove_overlapping
from jax_selftrain.corpus.transforms import retokenize as retokenize
from jax_selftrain.corpus.transforms import shuffle as shuffle
from jax_selftrain.corpus.transforms import size_matched_control as size_matched_control
