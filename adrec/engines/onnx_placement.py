"""Which nodes of an ONNX graph a session runs on the CPU although another provider was asked for.

ONNX Runtime gives a node that a provider has no kernel for to the CPU without a word: the session still names the
provider, and every request waits for copies. Arithmetic on sizes is meant to be there, and is let be.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adrec.engines.exported import ExportError
from adrec.errors import NotSupportedError

if TYPE_CHECKING:
    from onnx import GraphProto

RECORD = "session.record_ep_graph_assignment_info"
"""Entry of a session's configuration that makes it keep what `check_placement` reads."""
_CPU = "CPUExecutionProvider"
_NAMED = 10
# TensorProto.DataType, whose numbers are part of the format: int32, int64, bool.
_WHOLE = (6, 7, 9)


def check_placement(session: Any, path: Path, provider: str) -> None:
    """Raise ExportError, naming the nodes, where a session computes anything but sizes on the CPU.

    session: made with ``RECORD``. path: of its graph. provider: what was asked for, by ONNX Runtime's name. Raises
    NotSupportedError where ONNX Runtime or onnx is too old or missing, so that nothing could be told.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise NotSupportedError(
            f"this ONNX Runtime cannot tell which nodes {provider} leaves to the CPU; pip install a newer"
            " onnxruntime-gpu, or use provider 'cpu'"
        )
    sizes = size_nodes(path)
    left = [
        f"{node.op_type} '{node.name}'"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == _CPU
        for node in part.get_nodes()
        if node.name not in sizes
    ]
    if left:
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        raise ExportError(
            f"{path}: {provider} leaves {len(left)} nodes to the CPU: {', '.join(left[:_NAMED])}{more}; use provider"
            " 'cpu', or a graph of operators that it has"
        )


def size_nodes(path: Path) -> frozenset[str]:
    """Names of a graph's nodes that compute from shapes and whole numbers alone."""
    try:
        import onnx
    except ImportError:
        raise NotSupportedError("reading ONNX files needs onnx: pip install 'adrec[onnx]'") from None
    graph = onnx.load(str(path), load_external_data=False).graph
    return frozenset(_size_nodes(graph, set(), set()))


def _size_nodes(graph: GraphProto, constants: set[str], sizes: set[str]) -> Iterator[str]:
    """Both sets hold tensors of the graphs around this one, and are added to. constants: whole numbers and truths."""
    constants |= {tensor.name for tensor in graph.initializer if tensor.data_type in _WHOLE}
    for node in graph.node:
        read = {name for name in node.input if name}
        if node.op_type == "Constant":
            if node.attribute[0].name != "value" or node.attribute[0].t.data_type in _WHOLE:
                constants |= set(node.output)
        elif node.op_type in ("Shape", "Size") or (read & sizes and read <= sizes | constants):
            sizes |= set(node.output)
            yield node.name
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _size_nodes(attribute.g, constants, sizes)
