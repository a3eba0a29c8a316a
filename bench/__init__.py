"""Benchmarks: every speed is a ratio to the strongest alternative, measured in the same run."""
