"""Records as pytest-benchmark's JSON and back, so that users' own tools read what was measured here."""
