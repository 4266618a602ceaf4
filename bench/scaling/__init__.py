"""How an engine's time grows with the catalogue, the history length and the batch size."""
