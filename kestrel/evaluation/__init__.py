"""Scores of generated replies, without a model: reading, metrics, trivial systems, statistics, tables, report."""
