"""Write the part of TensorRT's Python API that this project uses, as read off an installed TensorRT, to a JSON file.

    python tests/export/tensorrt_surface.py tests/export/tensorrt_surface_11_4.json

The files beside this script were written by it from NVIDIA's own bindings (see `stub_bindings`); the tests hold the
project's calls to them. A name that the project starts to use goes to `USED` here.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

USED: dict[str, tuple[str, ...]] = {
    "Builder": (
        "__init__", "create_network", "create_builder_config", "create_optimization_profile",
        "build_serialized_network",
    ),
    "INetworkDefinition": ("num_layers",),
    "IBuilderConfig": (
        "set_memory_pool_limit", "profiling_verbosity", "builder_optimization_level", "hardware_compatibility_level",
        "set_flag", "clear_flag", "add_optimization_profile", "create_timing_cache", "set_timing_cache",
        "get_timing_cache",
    ),
    "IOptimizationProfile": ("set_shape",),
    "ITimingCache": ("serialize",),
    "IHostMemory": ("nbytes",),
    "ILogger": ("__init__", "log"),
    "OnnxParser": ("__init__", "parse_from_file", "num_errors", "get_error", "set_flag"),
    "ParserError": ("desc", "node", "node_name", "node_operator"),
    "Runtime": ("__init__", "deserialize_cuda_engine", "engine_host_code_allowed"),
    "ICudaEngine": (
        "create_engine_inspector", "create_execution_context", "num_io_tensors", "num_optimization_profiles",
        "refittable", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype",
    ),
    "EngineInspector": ("execution_context", "get_engine_information"),
    "IExecutionContext": (
        "set_optimization_profile_async", "set_input_shape", "set_tensor_address", "get_tensor_shape", "infer_shapes",
        "execute_async_v3",
    ),
    "Refitter": ("__init__", "get_missing_weights", "refit_cuda_engine"),
    "OnnxParserRefitter": ("__init__", "refit_from_file", "num_errors", "get_error"),
}  # fmt: skip
USED_ENUMS = (
    "BuilderFlag", "DataType", "HardwareCompatibilityLevel", "LayerInformationFormat", "MemoryPoolType",
    "NetworkDefinitionCreationFlag", "OnnxParserFlag", "ProfilingVerbosity", "TensorIOMode",
    "ExecutionContextAllocationStrategy", "ILogger.Severity",
)  # fmt: skip
# Types of parameters only: stand-ins for objects that the project passes through.
MENTIONED = ("Dims", "IRuntimeConfig", "IStreamReaderV2")


def read_surface(trt: ModuleType) -> dict[str, Any]:
    """The used names of a TensorRT module: signatures of methods, which properties can be written, enum members."""
    classes: dict[str, Any] = {}
    for name, members in USED.items():
        kind = getattr(trt, name)
        methods, properties = {}, {}
        for member in members:
            found = inspect.getattr_static(kind, member)
            if isinstance(found, property):
                properties[member] = {"writable": found.fset is not None}
            else:
                methods[member] = signatures(getattr(kind, member).__doc__ or "")
        classes[name] = {"methods": methods, "properties": properties}
    for name in MENTIONED:
        classes[name] = {"methods": {}, "properties": {}}
    enums = {name: _members(trt, name) for name in USED_ENUMS}
    return {"version": trt.__version__, "classes": classes, "enums": enums}


def signatures(doc: str) -> list[str]:
    """The overloads in a pybind11 docstring, without module names."""
    found = []
    for line in doc.splitlines():
        line = re.sub(r"^\d+\.\s+", "", line.strip())
        if re.match(r"^[A-Za-z_]\w*\(self: .*\)( -> .+)?$", line):
            line = re.sub(r"\b(?:tensorrt_bindings\.)?tensorrt\.|\bnv(?:infer1|onnxparser)::", "", line)
            # The class was not yet known to Python under its own name where the method was bound.
            found.append(line.replace("IParserError", "ParserError"))
    return found


def _members(trt: ModuleType, name: str) -> dict[str, int]:
    kind: Any = trt
    for part in name.split("."):
        kind = getattr(kind, part)
    members = {member: int(value) for member, value in kind.__members__.items()}
    return dict(sorted(members.items(), key=lambda item: item[1]))


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    import tensorrt

    text = json.dumps(read_surface(tensorrt), indent=1) + "\n"
    Path(arguments[0]).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
