"""A stand-in for TensorRT that builds and runs the graph of `tensorrt_cases` when it is asked in the right shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from strict_tensorrt import StrictTensorRT
from tensorrt_cases import PROFILES

TENSORS = {"x": ("INPUT", "FLOAT"), "items": ("OUTPUT", "INT64"), "scores": ("OUTPUT", "FLOAT")}


def layers(*formats: str) -> str:
    return json.dumps(
        {"Layers": [{"Name": "gemm", "Inputs": [{"Format/Datatype": each}], "Outputs": []} for each in formats]}
    )


def standin(version: str, **replies: Callable[..., Any]) -> StrictTensorRT:
    """TensorRT that builds and runs the engine of `tensorrt_cases.save_graph` when asked in the right shape."""
    trt = StrictTensorRT(version)
    shapes: dict[str, tuple[int, ...]] = {}

    def set_shape(context: Any, name: str, shape: tuple[int, ...]) -> bool:
        shapes[name] = shape
        return True

    trt.replies.update(
        {
            "INetworkDefinition.num_layers": lambda network: 3,
            "bytes": lambda memory: b"plan of TensorRT",
            "EngineInspector.get_engine_information": lambda inspector, format: layers(
                "Float", "Row major linear FP32"
            ),
            "ICudaEngine.num_io_tensors": lambda engine: len(TENSORS),
            "ICudaEngine.num_optimization_profiles": lambda engine: len(PROFILES),
            "ICudaEngine.refittable": lambda engine: True,
            "ICudaEngine.get_tensor_name": lambda engine, index: list(TENSORS)[index],
            "ICudaEngine.get_tensor_mode": lambda engine, name: getattr(trt.TensorIOMode, TENSORS[name][0]),
            "ICudaEngine.get_tensor_dtype": lambda engine, name: getattr(trt.DataType, TENSORS[name][1]),
            "IExecutionContext.set_input_shape": set_shape,
            "IExecutionContext.get_tensor_shape": lambda context, name: [shapes["x"][0], 3],
        }
    )
    trt.replies.update({name.replace("__", "."): reply for name, reply in replies.items()})
    return trt
