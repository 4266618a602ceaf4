"""Measuring: trade-offs between steps, engines and accuracy, as records and as a report."""
