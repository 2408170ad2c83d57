"""What people see of a round, a study or a comparison: pages, chapters, figures, tables; from `results.json` alone."""

from jax_selftrain.report.comparison_table import comparison_table
from jax_selftrain.report.report import write_report

__all__ = ["comparison_table", "write_report"]
