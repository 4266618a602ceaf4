"""Where a request's time goes: stages against what they need at least on this machine, and a trace for Perfetto."""
