"""Reports of runs, studies and comparisons from their results; uploads."""

from jax_selftrain.report.comparison_table import format_comparison as format_comparison
from jax_selftrain.report.comparison_table import format_effects as format_effects
from jax_selftrain.report.heat_map import extract_windows as extract_windows
from jax_selftrain.report.push import push as push
from jax_selftrain.report.report import write_report as write_report
