"""Names of an engine's kept graphs: whatever decides the file decides the name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kernels
from adrec.config import ServingConfig
from compress.export import manifest


def test_each_fact_of_a_graph_gives_it_another_name(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    facts = {"format": "onnx", "model": model, "steps": 2, "loop": False, "precision": "fp32", "k": 20}
    others = [
        {"format": "aotinductor"},
        {"model": tiny_model(padding="masked", positions="learned")},
        {"steps": 3},
        {"steps": ServingConfig(sampler="ddim", times=(0, 9))},
        {"loop": True},
        {"precision": "fp16"},
        {"k": 10},
    ]
    names = [manifest.cache_name(**(facts | each)) for each in ({}, *others)]
    assert len(set(names)) == len(names)
    assert manifest.cache_name(**facts) == names[0]
    monkeypatch.setattr(manifest, "tool_versions", lambda: {"onnx": "0"})
    assert manifest.cache_name(**facts) not in names


def test_an_edit_of_the_code_gives_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "inner" / "code.py"
    code.parent.mkdir()
    code.write_text("A = 1\n")
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
    before = manifest._code.__wrapped__()
    (tmp_path / "notes.txt").write_text("no code")
    assert manifest._code.__wrapped__() == before
    code.write_text("A = 2\n")
    assert manifest._code.__wrapped__() != before
