"""Imports of commands, which the fork server of `launcher` does once."""

import jax
import orbax.checkpoint
import pandas
import pyarrow.parquet

import jax_selftrain.evals
import jax_selftrain.report
import jax_selftrain.study
from jax_selftrain import cli
from jax_selftrain.io.import_guard import block_torch_import, mark_cli_process

mark_cli_process()
with block_torch_import():
    import tensorboardX
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

__all__ = [
    "AutoTokenizer", "PreTrainedTokenizerFast", "cli", "jax", "jax_selftrain", "orbax", "pandas", "pyarrow",
    "tensorboardX",
]  # fmt: skip
