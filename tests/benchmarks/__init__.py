"""Benchmarks: both sides turn by turn in one process, medians and ratios printed. See docs/benchmarks.md."""
