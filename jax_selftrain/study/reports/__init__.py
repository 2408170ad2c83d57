"""What people see of a round, a study or a comparison: pages, chapters, figures, tables; from `results.json` alone."""
