"""What the builder must know of an ONNX file before TensorRT sees it: inputs, dynamic dimensions, precision, limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adrec.engines.tensorrt.plan import TensorInfo, combined, graph_digests
from adrec.errors import ConfigError, NotSupportedError
from compress.export.lint_rules import MOST_RESULTS
from compress.export.onnx_graph import GraphView, view_of
from compress.export.tensorrt.operators import DOMAIN

if TYPE_CHECKING:
    import onnx

# What the parsers of 10.12 to 11 read (their list of operators is for these versions of the ONNX standard).
OPSETS = range(9, 26)
_ELEMENT_TYPES = {
    "FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "FLOAT8E4M3FN": "float8_e4m3fn",
    "INT8": "int8", "UINT8": "uint8", "INT32": "int32", "INT64": "int64", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Graph:
    """An ONNX file as the builder sees it.

    files: SHA-256 of the file and of each file with its weights, by name. floats: torch names of the dtypes that matrix
    products read, ``int8`` and ``float8_e4m3fn`` where they read quantised values. plugins: operators in the project's
    own domain.
    """

    path: Path
    files: dict[str, str]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    floats: frozenset[str]
    all_floats: frozenset[str]
    plugins: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """One hash of all files."""
        return combined(self.files)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the inputs' dynamic dimensions."""
        named = (size for info in self.inputs for size in info.shape if isinstance(size, str))
        return tuple(dict.fromkeys(named))


def read_graph(path: Path) -> Graph:
    """Read an ONNX file without its weights. Raises ConfigError or NotSupportedError for what TensorRT cannot build."""
    onnx = _onnx()
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; export the run to ONNX first: adrec export RUN --to onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ConfigError(f"{path} is not an ONNX file: {error}") from None
    _check_opset(model, path)
    files = graph_digests(path, external_files(model, path))
    _check_top_k(view_of(path, model))
    inputs = _tensors(onnx, model.graph.input, path)
    floats, everything = _precisions(onnx, model)
    return Graph(
        path=path,
        files=files,
        inputs=inputs,
        outputs=_tensors(onnx, model.graph.output, path),
        floats=floats,
        all_floats=everything,
        plugins=tuple(sorted({node.op_type for node in model.graph.node if node.domain == DOMAIN})),
    )


def external_files(model: onnx.ModelProto, path: Path) -> list[Path]:
    """Files beside an ONNX file that hold weights. Raises ConfigError for one that is missing, short or elsewhere."""
    ends: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == 1:
            place = {entry.key: entry.value for entry in tensor.external_data}
            end = int(place.get("offset", 0)) + int(place.get("length", 0))
            ends[place["location"]] = max(ends.get(place["location"], 0), end)
    found = []
    for name, end in sorted(ends.items()):
        file = path.parent / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConfigError(f"{path} keeps weights in {name}, outside its folder; save the model again")
        if not file.is_file():
            raise ConfigError(f"{path} keeps weights in {name}, which is not beside it; copy both files together")
        if file.stat().st_size < end:
            raise ConfigError(f"{file} has {file.stat().st_size} bytes, and {path.name} needs {end}; copy it again")
        found.append(file)
    return found


def _onnx() -> Any:
    try:
        import onnx
    except ImportError:
        raise NotSupportedError("onnx is not installed: pip install 'adrec[onnx]' to export") from None
    return onnx


def _check_opset(model: onnx.ModelProto, path: Path) -> None:
    opset = max((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), default=0)
    if opset not in OPSETS:
        raise ConfigError(
            f"{path} is opset {opset}; TensorRT reads {OPSETS[0]} to {OPSETS[-1]}: export again with opset 20"
        )


def _check_top_k(view: GraphView) -> None:
    for node in view.nodes:
        if node.op_type == "TopK" and node.domain in ("", "ai.onnx") and len(node.input) > 1:
            values = view.small(node.input[1])
            if values is not None and (count := int(values.reshape(-1)[0])) > MOST_RESULTS:
                raise ConfigError(
                    f"{view.path} takes the best {count} items (k); TensorRT's TopK allows {MOST_RESULTS}: export with"
                    " a smaller k, or with the score outside of the graph"
                )


def _tensors(onnx: Any, values: Any, path: Path) -> tuple[TensorInfo, ...]:
    found = []
    for value in values:
        kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        if kind not in _ELEMENT_TYPES:
            raise NotSupportedError(f"{path}: '{value.name}' is {kind}; allowed: {', '.join(_ELEMENT_TYPES)}")
        shape: list[int | str] = []
        for place, size in enumerate(value.type.tensor_type.shape.dim):
            if not size.HasField("dim_value") and not size.dim_param:
                raise ConfigError(f"{path}: dimension {place} of '{value.name}' has no name; export it with a name")
            shape.append(size.dim_value if size.HasField("dim_value") else size.dim_param)
        found.append(TensorInfo(name=value.name, dtype=_ELEMENT_TYPES[kind], shape=tuple(shape)))
    return tuple(found)


def _precisions(onnx: Any, model: onnx.ModelProto) -> tuple[frozenset[str], frozenset[str]]:
    """Dtypes that matrix products read, and all dtypes of floating point in the graph."""
    names = {number: name for name, number in onnx.TensorProto.DataType.items()}
    types = {each.name: names[each.data_type] for each in model.graph.initializer}
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        types[value.name] = names[value.type.tensor_type.elem_type]
    producers = {name: node for node in model.graph.node for name in node.output}
    read: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        for name in node.input[:2]:
            maker = producers.get(name)
            if maker is not None and maker.op_type == "DequantizeLinear":
                name = maker.input[0]
            if name in types:
                read.add(types[name])
    kept = {_ELEMENT_TYPES[each] for each in read if each in _ELEMENT_TYPES}
    floating = {_ELEMENT_TYPES[each] for each in types.values() if "FLOAT" in each and each in _ELEMENT_TYPES}
    return frozenset(kept), frozenset(floating | kept)
