"""Chapters of the report; each returns a `Chapter`, or None if the results have nothing for it."""
