"""TensorRT engines from ONNX files: strongly typed builds, checked after the build and named by what they are."""

from compress.export.tensorrt.build import Exported, PlanNotBuiltError, export_tensorrt
from compress.export.tensorrt.graph import Graph, read_graph
from compress.export.tensorrt.options import BuildOptions

__all__ = ["BuildOptions", "Exported", "Graph", "PlanNotBuiltError", "export_tensorrt", "read_graph"]
