"""Suites of benchmarks under one registry and one command, with resumption and the time left."""
