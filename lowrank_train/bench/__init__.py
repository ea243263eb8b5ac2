"""Benchmarks: rows of trainings or of optimizer steps, each with a record, a table and a plot."""
