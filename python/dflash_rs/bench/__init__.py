"""Measurements: workloads (what is run), runner (how it is timed), report (tables, JSON, plots), ngram (yardsticks)."""
