"""Chapters of the report; a chapter without data is None."""
