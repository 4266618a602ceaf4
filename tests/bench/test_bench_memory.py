"""Peak memory of a call."""

from __future__ import annotations

import torch

from bench.memory import peak_memory_mib


def test_peak_memory_sees_what_a_call_holds_for_a_moment() -> None:
    def call() -> None:
        torch.ones(64 * 2**20, dtype=torch.int8)

    mebibytes, meaning = peak_memory_mib(call, torch.device("cpu"))
    if mebibytes is None:
        assert "not measured" in meaning
    else:
        assert 60.0 < mebibytes < 200.0
        assert "resident set" in meaning
