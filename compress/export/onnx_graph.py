"""An ONNX file as the linter sees it: nodes of all its graphs, constants and dimensions, weights left on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adrec.engines.exported import ExportError
from adrec.errors import NotSupportedError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

_SMALL = 4096


@dataclass
class GraphView:
    """A parsed file.

    nodes: of the graph, its sub-graphs and model-local functions. constants: initialisers and Constant nodes by name,
    of any of them. opset: of the standard operators, None where none is declared. runtime: what the file says it is
    for. profiles: smallest and largest size by dimension, None where none were given.
    """

    path: Path
    model: ModelProto
    profiles: Mapping[str, tuple[int, int]] | None = None
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    graphs: list[GraphProto] = field(default_factory=list)

    @property
    def opset(self) -> int | None:
        return next((each.version for each in self.model.opset_import if each.domain in ("", "ai.onnx")), None)

    @property
    def runtime(self) -> str | None:
        return next((each.value for each in self.model.metadata_props if each.key == "adrec.runtime"), None)

    @property
    def functions(self) -> set[tuple[str, str]]:
        """Domain and name of the operators that the file defines itself."""
        return {(function.domain, function.name) for function in self.model.functions}

    def name(self, node: NodeProto) -> str:
        """A node in words."""
        return f"{node.op_type} '{node.name or (node.output[0] if node.output else '?')}'"

    def values(self, name: str) -> np.ndarray | None:
        """A constant's values where the file holds them, None else (a computed tensor, or weights on disk)."""
        import onnx

        tensor = self.constants.get(name)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        return np.asarray(onnx.numpy_helper.to_array(tensor))

    def small(self, name: str) -> np.ndarray | None:
        """Values of a constant of at most 4096 elements, also from disk: for scales, zero points, K and masks."""
        import onnx

        tensor = self.constants.get(name)
        if tensor is None or int(np.prod(tensor.dims)) > _SMALL:
            return None
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor = onnx.TensorProto.FromString(tensor.SerializeToString())
            try:
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(self.path.parent))
            except Exception:
                # A missing file is another rule's finding.
                return None
        return np.asarray(onnx.numpy_helper.to_array(tensor))

    def producer(self) -> dict[str, NodeProto]:
        """The node that computes each tensor."""
        return {output: node for node in self.nodes for output in node.output if output}

    def attribute(self, node: NodeProto, name: str) -> Any:
        """Value of a node's attribute, None where it has none."""
        import onnx

        return next((onnx.helper.get_attribute_value(each) for each in node.attribute if each.name == name), None)

    def shapes(self) -> dict[str, list[int | str | None]]:
        """Shapes by tensor name, as far as the file or shape inference knows them."""
        import onnx

        try:
            inferred = onnx.shape_inference.infer_shapes(self.model)
        except Exception:
            # A broken graph is the checker's finding, not this one's.
            inferred = self.model
        infos = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
        known = {info.name: dimensions(info) for info in infos if info.type.tensor_type.HasField("shape")}
        return known | {name: list(tensor.dims) for name, tensor in self.constants.items()}


def dimensions(info: ValueInfoProto) -> list[int | str | None]:
    """Sizes of a tensor: a number, a name, or None where it has neither."""
    return [
        each.dim_value if each.HasField("dim_value") else (each.dim_param or None)
        for each in info.type.tensor_type.shape.dim
    ]


def read_view(path: Path, profiles: Mapping[str, tuple[int, int]] | None = None) -> GraphView:
    """Parse a file without its external weights. Raises ExportError for what is no ONNX file."""
    try:
        import onnx
    except ImportError:
        raise NotSupportedError("reading ONNX files needs onnx: pip install 'adrec[onnx]'") from None
    if not path.is_file():
        raise ExportError(f"{path}: there is no such file")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ExportError(f"{path}: is no ONNX file, or a cut one: {str(error).splitlines()[0]}") from None
    if not model.graph.node and not model.graph.output:
        raise ExportError(f"{path}: is no ONNX file: it holds no graph")
    return view_of(path, model, profiles)


def view_of(path: Path, model: ModelProto, profiles: Mapping[str, tuple[int, int]] | None = None) -> GraphView:
    """The view of a file that is parsed already."""
    import onnx

    view = GraphView(path, model, profiles)
    for graph in all_graphs(model.graph):
        view.graphs.append(graph)
        view.nodes += graph.node
        view.constants |= {tensor.name: tensor for tensor in graph.initializer}
    for function in model.functions:
        view.nodes += function.node
    for node in view.nodes:
        if node.op_type == "Constant" and len(node.attribute) == 1:
            value = onnx.helper.get_attribute_value(node.attribute[0])
            if isinstance(value, onnx.TensorProto):
                view.constants[node.output[0]] = value
            elif node.attribute[0].name in ("value_int", "value_ints", "value_float", "value_floats"):
                view.constants[node.output[0]] = onnx.numpy_helper.from_array(np.asarray(value), node.output[0])
    return view


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph, and those that are attributes of its nodes: bodies of loops, branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_graphs(attribute.g)
            for inner in attribute.graphs:
                yield from all_graphs(inner)
