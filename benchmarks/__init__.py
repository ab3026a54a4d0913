"""Benchmarks: one file, one question, written at its top with the baseline. Results are kept in `results/`."""
