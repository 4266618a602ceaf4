"""Serving scenarios as in MLPerf inference: single stream, server with Poisson arrivals, offline."""
