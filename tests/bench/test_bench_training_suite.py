"""Which precisions the suite of training measures where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adrec.environment import read_environment
from bench.running import registry
from bench.running.runner import select
from bench.running.unit import Context


@pytest.mark.parametrize(("instructions", "asked"), [("avx2", False), ("avx2 avx512_bf16", True), (None, False)])
def test_bf16_is_trained_where_the_processor_computes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instructions: str | None, asked: bool
) -> None:
    found = read_environment()
    machine = found.machine.model_copy(update={"instructions": instructions})
    monkeypatch.setattr(registry, "read_environment", lambda: found.model_copy(update={"machine": machine}))
    context = Context(tmp_path, torch.device("cpu"), "", smoke=False)
    units, _ = select(["training"], context)
    assert any(unit.name.endswith("bf16-mixed") for unit in units) is asked
    assert any("leaves bf16-mixed out" in notice for notice in context.notices) is not asked
    other = Context(tmp_path, torch.device("cpu"), "")
    select(["scaling"], other)
    assert not any("bf16" in notice for notice in other.notices)
