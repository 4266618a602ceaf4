"""Write the part of TensorRT's Python API that this project uses, as read off an installed TensorRT, to a JSON file.

    python tests/export/tensorrt_surface.py tests/export/tensorrt_surface_11_4.json

The files beside this script were written by it from NVIDIA's own bindings (see `stub_bindings`); the tests hold the
project's calls to them. A name that the project starts to use goes to `USED` here, one of `tensorrt.plugin` to
`USED_PLUGIN` or `USED_FUNCTIONS`.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, ForwardRef, Union, get_args, get_origin

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
MENTIONED = ("Dims", "IDimensionExpr", "IRuntimeConfig", "IStreamReaderV2")

# `tensorrt.plugin`: what the plugins call, bases before the classes derived from them.
USED_PLUGIN: dict[str, tuple[str, ...]] = {
    "SymInt32": ("__init__",),
    "ShapeExpr": ("__init__", "__mul__", "__floordiv__"),
    "ShapeExprs": ("__getitem__",),
    "SymIntExprs": ("__init__", "__setitem__"),
    "TensorDesc": ("shape_expr", "dtype"),
    "KernelLaunchParams": ("__init__", "grid_x", "grid_y", "block_x", "shared_mem"),
}
USED_FUNCTIONS = ("register", "aot_impl", "from_shape_expr", "cdiv", "min", "max")
# Bases and types of parameters that `tensorrt.plugin` does not export.
PRIVATE_PLUGIN = ("SymIntExpr",)


def read_surface(trt: ModuleType, plugin: ModuleType) -> dict[str, Any]:
    """The used names of `tensorrt` and `tensorrt.plugin`: signatures, which properties can be written, enum members."""
    classes: dict[str, Any] = {name: _read_class(getattr(trt, name), members) for name, members in USED.items()}
    for name in MENTIONED:
        classes[name] = {"methods": {}, "properties": {}}
    enums = {name: _members(trt, name) for name in USED_ENUMS}
    return {"version": trt.__version__, "classes": classes, "enums": enums, "plugin": _read_plugin(plugin)}


def _read_plugin(plugin: ModuleType) -> dict[str, Any]:
    assert not any(hasattr(plugin, name) for name in PRIVATE_PLUGIN)
    classes: dict[str, Any] = {}
    for name, members in USED_PLUGIN.items():
        kind = getattr(plugin, name)
        bases = [base.__name__ for base in kind.__mro__[1:] if base.__name__ in {*PRIVATE_PLUGIN, *classes}]
        classes[name] = {"bases": bases[:1], **_read_class(kind, members)}
    functions = {name: [python_signature(getattr(plugin, name))] for name in USED_FUNCTIONS}
    return {"private": list(PRIVATE_PLUGIN), "functions": functions, "classes": classes}


def _read_class(kind: type, members: Sequence[str]) -> dict[str, Any]:
    methods: dict[str, list[str]] = {}
    properties: dict[str, dict[str, bool]] = {}
    for member in members:
        found = inspect.getattr_static(kind, member, None)
        if isinstance(found, property):
            properties[member] = {"writable": found.fset is not None}
        elif inspect.isfunction(found):
            methods[member] = [python_signature(found, kind.__name__)]
        elif found is None:
            # Objects get it when they are made. Raises where they refuse to have it written.
            made = kind()
            setattr(made, member, getattr(made, member))
            properties[member] = {"writable": True}
        else:
            methods[member] = signatures(getattr(kind, member).__doc__ or "")
    return {"methods": methods, "properties": properties}


def python_signature(function: Callable[..., Any], owner: str = "") -> str:
    """The signature of a Python function as pybind11 would write it. owner: class of a method."""
    signature = inspect.signature(function)
    parts = []
    for name, parameter in signature.parameters.items():
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD, f"{function.__qualname__} has {parameter.kind}"
        kind = owner if owner and not parts else _type_name(parameter.annotation)
        parts.append(f"{name}: {kind}" + ("" if parameter.default is parameter.empty else f" = {parameter.default!r}"))
    returns = signature.return_annotation
    arrow = "" if returns is signature.empty else f" -> {_type_name(returns)}"
    return f"{function.__name__}({', '.join(parts)}){arrow}"


def _type_name(annotation: Any) -> str:
    """An annotation without module names; ``object`` where there is none."""
    if annotation is inspect.Parameter.empty:
        return "object"
    if isinstance(annotation, str):
        return annotation
    if isinstance(annotation, ForwardRef):
        return annotation.__forward_arg__
    origin, arguments = get_origin(annotation), [_type_name(each) for each in get_args(annotation)]
    if origin in (Union, UnionType):
        return " | ".join(arguments)
    name: str = (origin or annotation).__name__
    return f"{name}[{', '.join(arguments)}]" if arguments else name


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
    import tensorrt.plugin

    text = json.dumps(read_surface(tensorrt, tensorrt.plugin), indent=1) + "\n"
    Path(arguments[0]).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
