"""Entrypoints for `ray job submit -- python -m jobs.NAME`: each parses, calls `pipeline`, and exits."""
