"""A small ONNX file, a platform, and plans on disk, for tests of the TensorRT builder and runner."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from adrec.engines.tensorrt.library import Gpu, Platform
from adrec.engines.tensorrt.plan import PlanKey, PlanRecord, TensorInfo, plan_name, record_path
from adrec.engines.tensorrt.profiles import parse_profile

HERE = Platform(tensorrt="10.16.1.11", gpu=Gpu(name="NVIDIA L4", capability="8.9"), system="Linux x86_64")
PROFILES = tuple(parse_profile(text) for text in ("batch=1:1:1,length=1:8:50", "batch=2:4:8,length=1:8:40"))


def save_graph(
    path: Path, *, kind: int = TensorProto.FLOAT, opset: int = 20, k: int = 3, external: bool = False
) -> Path:
    """Write ``top_k(sum over length of x [batch, length, 4] @ weight [4, 16])``, with `[batch, k]` outputs."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weight = np.arange(64, dtype=np.float32).reshape(4, 16) / 64
    initializers = [
        numpy_helper.from_array(weight.astype(dtype), "weight"),
        numpy_helper.from_array(np.array([1], np.int64), "axes"),
        numpy_helper.from_array(np.array([k], np.int64), "k"),
    ]
    nodes = [
        helper.make_node("ReduceSum", ["x", "axes"], ["rows"], keepdims=0),
        helper.make_node("MatMul", ["rows", "weight"], ["products"]),
        helper.make_node("TopK", ["products", "k"], ["scores", "items"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", kind, ["batch", "length", 4])],
        [
            helper.make_tensor_value_info("items", TensorProto.INT64, ["batch", k]),
            helper.make_tensor_value_info("scores", kind, ["batch", k]),
        ],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    if external:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.stem}.data", size_threshold=0)
    else:
        onnx.save(model, path)
    return path


def save_plan(
    folder: Path, *, content: bytes = b"a plan", options: dict[str, Any] | None = None, platform: Platform = HERE
) -> Path:
    """Write a plan with its record, as the builder would; no TensorRT would take it."""
    key = PlanKey(graph="0" * 64, profiles=PROFILES, options=options or {}, platform=platform)
    record = PlanRecord(
        key=key,
        fingerprint=key.fingerprint,
        graph_files={"small.onnx": "0" * 64},
        plan_sha256=hashlib.sha256(content).hexdigest(),
        plan_bytes=len(content),
        inputs=(TensorInfo(name="x", dtype="float32", shape=("batch", "length", 4)),),
        outputs=(
            TensorInfo(name="items", dtype="int64", shape=("batch", 3)),
            TensorInfo(name="scores", dtype="float32", shape=("batch", 3)),
        ),
    )
    plan = folder / plan_name("small", key)
    plan.write_bytes(content)
    record.write(record_path(plan))
    return plan


def edit_record(plan: Path, **changes: Any) -> None:
    """Change fields of the record beside a plan."""
    path = record_path(plan)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
