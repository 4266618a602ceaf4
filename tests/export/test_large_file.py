"""Item tables above 2 GiB, which no protobuf message holds."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from adrec.config import ModelConfig
from adrec.data.jagged import Jagged
from adrec.engines import CachedEngine, OnnxRuntimeEngine
from adrec.errors import NotSupportedError
from adrec.models import build_model
from compress.export.onnx_export import ExportOptions, check_plans, export_onnx

WIDTH, ITEMS = 128, 2**22 + 5000
GIB = 2**30


def large_model(device: str) -> torch.nn.Module:
    config = ModelConfig(items=ITEMS, width=WIDTH, heads=2, encoder_blocks=1, denoiser_blocks=1, lambda_uncertainty=1.0)
    with torch.device(device):
        return build_model(config)


@pytest.mark.slow
def test_a_graph_of_a_table_above_2_gib_gives_the_lists_of_cached(tmp_path: Path) -> None:
    for module in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(module)
    if not hasattr(os, "sysconf") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 14 * GIB:
        pytest.skip("needs a machine with 14 GiB of memory")
    if shutil.disk_usage(tmp_path).free < 4 * GIB:
        pytest.skip("needs 4 GiB of disk")
    torch.manual_seed(0)
    model = large_model("cpu").eval()
    out = tmp_path / "out"
    try:
        (graph,) = export_onnx(model, out, ExportOptions()).graphs
        assert graph.data is not None
        assert (out / graph.data).stat().st_size > 4 * ITEMS * WIDTH > 2**31
        engine, exact = OnnxRuntimeEngine.from_export(out, model), CachedEngine(model)
        # Ids at both ends: an offset of 32 bits would read another row.
        histories = Jagged.from_lists([[ITEMS, 1, ITEMS - 1], [2**21 + 1], [ITEMS]])
        best, found = (each.recommend(histories, 20, 1, seed=3) for each in (exact, engine))
        torch.testing.assert_close(found.scores, best.scores, rtol=0, atol=1e-5)
        assert torch.equal(found.items, best.items)
        assert int(best.items.max()) > 2**22 - 2**20
    finally:
        shutil.rmtree(out, ignore_errors=True)


def test_a_table_that_the_quantiser_cannot_take_is_refused_before_anything_is_traced() -> None:
    model = large_model("meta")
    with pytest.raises(NotSupportedError, match=r"has 2\.00 GiB in float32.*leave --int8 dynamic out, or .*--table in"):
        check_plans(model, ExportOptions(quantised=("int8-dynamic",)))
    check_plans(model, ExportOptions(quantised=("int8-dynamic",), catalogue="input"))
    check_plans(model, ExportOptions())
