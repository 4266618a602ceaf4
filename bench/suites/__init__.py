"""Benchmarks for pytest-benchmark: `pytest bench/suites --benchmark-only`."""
