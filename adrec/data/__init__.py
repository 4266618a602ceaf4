"""Interaction data: reading raw files, preparing them, synthetic data, and the prepared `Dataset`."""
