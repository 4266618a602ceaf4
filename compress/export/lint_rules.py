"""The linter's rules, each a fact about ONNX Runtime or TensorRT (10.12 and newer) that has cost somebody a day."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from compress.export.lint import Rule
from compress.export.onnx_graph import GraphView, dimensions
from compress.export.tensorrt_operators import OPERATORS

Faults = Iterator[tuple[str, str]]

OPSETS = (9, 25)
IR_VERSIONS = (4, 11)
MOST_RESULTS = 3840
MOST_VOLUME = 2**31
_STORED_TWICE = 2**16
_INTEGER = {"MatMulInteger", "ConvInteger", "DynamicQuantizeLinear"}
_RANDOM = {"Multinomial", "Bernoulli"}
_STANDARD = ("", "ai.onnx")
# TensorProto.DataType, whose numbers are part of the format.
_FLOAT16, _DOUBLE, _INT8, _FLOAT8 = 10, 11, 3, 17
_MOST_FLOAT16 = 65504.0


def _checker(view: GraphView) -> Faults:
    import onnx

    if any(_external_faults(view)):
        return
    try:
        onnx.checker.check_model(str(view.path))
    except Exception as error:
        yield "file", str(error).strip().splitlines()[0]


def _ir_version(view: GraphView) -> Faults:
    low, high = IR_VERSIONS
    if not low <= view.model.ir_version <= high:
        yield "file", f"IR version {view.model.ir_version}; read by the runtimes of today: {low} to {high}"


def _opset(view: GraphView) -> Faults:
    low, high = OPSETS
    if view.opset is None:
        yield "file", "declares no opset of the standard operators"
    elif not low <= view.opset <= high:
        yield "file", f"opset {view.opset}; TensorRT's parser reads {low} to {high}"


def _domain(view: GraphView) -> Faults:
    for node in view.nodes:
        if node.domain not in _STANDARD and (node.domain, node.op_type) not in view.functions:
            yield view.name(node), f"operator of the domain '{node.domain}', which other runtimes do not have"


def _operator(view: GraphView) -> Faults:
    for node in view.nodes:
        known = node.op_type in OPERATORS or node.op_type in _INTEGER or _is_random(node.op_type)
        if node.domain in _STANDARD and not known and not node.op_type.startswith("QLinear"):
            yield view.name(node), f"TensorRT's parser has no {node.op_type}"


def _random(view: GraphView) -> Faults:
    for node in view.nodes:
        if _is_random(node.op_type):
            yield view.name(node), "draws in the graph: TensorRT ignores its seed, and no draw can be repeated"


def _is_random(operator: str) -> bool:
    return operator.startswith("Random") or operator in _RANDOM


def _double(view: GraphView) -> Faults:
    for name, tensor in view.constants.items():
        if tensor.data_type == _DOUBLE:
            yield f"constant '{name}'", "holds float64"
    for graph in view.graphs:
        for info in (*graph.input, *graph.output, *graph.value_info):
            if info.type.tensor_type.elem_type == _DOUBLE:
                yield f"tensor '{info.name}'", "is float64"
    for node in view.nodes:
        if node.op_type == "Cast" and view.attribute(node, "to") == _DOUBLE:
            yield view.name(node), "casts to float64"


def _integer_product(view: GraphView) -> Faults:
    for node in view.nodes:
        if node.domain in _STANDARD and (node.op_type in _INTEGER or node.op_type.startswith("QLinear")):
            yield view.name(node), f"{node.op_type} is dynamic or integer quantisation of ONNX Runtime on CPUs"


def _zero_point(view: GraphView) -> Faults:
    for node in _quantisers(view):
        if len(node.input) < 3 or not node.input[2]:
            continue
        values = view.small(node.input[2])
        if values is None and node.input[2] not in view.constants:
            yield view.name(node), "the zero point is computed"
        elif values is not None and np.any(values.astype(np.float32) != 0.0):
            yield (
                view.name(node),
                f"the zero point is {values.reshape(-1)[0]}; TensorRT has symmetric quantisation only",
            )


def _scale(view: GraphView) -> Faults:
    for node in _quantisers(view):
        if node.input[1] not in view.constants:
            yield view.name(node), "the scale is computed, TensorRT needs a constant"
        elif (values := view.small(node.input[1])) is not None and not np.all(np.isfinite(values) & (values > 0)):
            yield view.name(node), f"a scale is {values.min()}; allowed: finite and above 0"


def _quantised_type(view: GraphView) -> Faults:
    for node in _quantisers(view):
        zero = view.constants.get(node.input[2]) if len(node.input) > 2 else None
        stored = view.constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        kind = next((each.data_type for each in (zero, stored) if each is not None), None)
        chosen = view.attribute(node, "output_dtype") if node.op_type == "QuantizeLinear" else None
        if kind is None and chosen is None and node.op_type == "QuantizeLinear":
            yield view.name(node), "without a zero point it makes uint8"
        elif (kind or chosen or _INT8) not in (_INT8, _FLOAT8):
            yield view.name(node), "quantises to another type than int8 or float8_e4m3fn"


def _granularity(view: GraphView) -> Faults:
    for node in view.nodes:
        if node.op_type != "QuantizeLinear" or node.input[0] in view.constants:
            continue
        scale = view.constants.get(node.input[1])
        if scale is not None and int(np.prod(scale.dims)) > 1:
            yield view.name(node), "an activation has a scale per channel; TensorRT takes one per tensor"


def _weight_granularity(view: GraphView) -> Faults:
    weights = {node.input[1] for node in view.nodes if node.op_type in ("Gemm", "MatMul")}
    producer = view.producer()
    for node in view.nodes:
        if node.op_type != "DequantizeLinear" or node.output[0] not in weights:
            continue
        stored, source = view.constants.get(node.input[0]), producer.get(node.input[0])
        scale = view.constants.get(node.input[1])
        if source is not None and source.op_type == "QuantizeLinear" and _is_constant(view, source.input[0], producer):
            yield view.name(source), "quantises a weight in the graph, as if it were an activation"
        elif stored is not None and stored.data_type == _INT8 and scale is not None and int(np.prod(scale.dims)) == 1:
            yield view.name(node), "an int8 weight has one scale for all channels, the largest one's"


def _is_constant(view: GraphView, name: str, producer: Mapping[str, Any]) -> bool:
    """Whether a tensor is computed from constants alone, and is none itself."""
    node = producer.get(name)
    if node is None or name in view.constants or not node.input:
        return False
    return all(each in view.constants or _is_constant(view, each, producer) for each in node.input if each)


def _quantisers(view: GraphView) -> Iterator:
    return (node for node in view.nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear"))


def _top_k(view: GraphView) -> Faults:
    shapes = None
    for node in view.nodes:
        if node.op_type != "TopK":
            continue
        values = view.small(node.input[1]) if len(node.input) > 1 else np.array(view.attribute(node, "k") or 0)
        if values is None:
            yield view.name(node), "K is computed; TensorRT needs a constant"
        elif int(values.reshape(-1)[0]) > MOST_RESULTS:
            yield view.name(node), f"K is {int(values.reshape(-1)[0])}; TensorRT allows at most {MOST_RESULTS}"
        shapes = view.shapes() if shapes is None else shapes
        volume = 1
        for size in shapes.get(node.input[0], []):
            largest = (view.profiles or {}).get(str(size), (1, 1))[1]
            volume *= size if isinstance(size, int) else largest
        if volume >= MOST_VOLUME:
            yield view.name(node), f"ranks up to {volume} numbers at once; TensorRT allows fewer than 2^31"


def _dimension_name(view: GraphView) -> Faults:
    for info in (*view.model.graph.input, *view.model.graph.output):
        for axis, size in enumerate(dimensions(info)):
            if size is None:
                yield f"'{info.name}', axis {axis}", "a dynamic size without a name, which no profile can cover"


def _profile(view: GraphView) -> Faults:
    if view.profiles is None:
        return
    names = {size for info in view.model.graph.input for size in dimensions(info) if isinstance(size, str)}
    for name in sorted(names - set(view.profiles)):
        yield f"dimension '{name}'", "no profile covers it"
    for name in sorted(set(view.profiles) - names):
        yield f"dimension '{name}'", f"a profile covers it, but the inputs have {', '.join(sorted(names)) or 'none'}"
    for name, (low, high) in view.profiles.items():
        if not 1 <= low <= high:
            yield f"dimension '{name}'", f"covered from {low} to {high}; allowed: 1 <= min <= max"


def _external_data(view: GraphView) -> Faults:
    yield from _external_faults(view)


def _external_faults(view: GraphView) -> Faults:
    folder = view.path.resolve().parent
    said: set[str] = set()
    for name, tensor in view.constants.items():
        if tensor.data_location != 1:
            continue
        entries = {each.key: each.value for each in tensor.external_data}
        location = entries.get("location", "")
        file = (folder / location).resolve()
        if not location or not file.is_relative_to(folder):
            yield f"constant '{name}'", f"its values are in '{location}', outside the folder of the file"
        elif not file.is_file():
            if location not in said:
                said.add(location)
                yield f"file '{location}'", "holds weights and is missing"
        elif not all(entries.get(part, "0").isdecimal() for part in ("offset", "length")):
            yield f"constant '{name}'", f"its place in '{location}' is no pair of numbers"
        elif file.stat().st_size < int(entries.get("offset", 0)) + int(entries.get("length", 0)):
            yield f"constant '{name}'", f"its values end beyond the end of '{location}': the file was cut"


def _stored_twice(view: GraphView) -> Faults:
    seen: dict[bytes, str] = {}
    for name, tensor in view.constants.items():
        if int(np.prod(tensor.dims)) < _STORED_TWICE or (values := view.values(name)) is None:
            continue
        flat = values if values.ndim < 2 or values.shape[0] >= values.shape[1] else values.T
        digest = hashlib.sha256(np.ascontiguousarray(flat).tobytes()).digest()
        if digest in seen:
            yield f"constant '{name}'", f"has the values of '{seen[digest]}'"
        seen.setdefault(digest, name)


def _finite(view: GraphView) -> Faults:
    for name, tensor in view.constants.items():
        if tensor.data_type == _FLOAT16 and (values := view.small(name)) is not None and np.isinf(values).any():
            yield f"constant '{name}'", f"is infinite in float16, whose largest number is {_MOST_FLOAT16:.0f}"


def _softmax_guard(view: GraphView) -> Faults:
    producer = view.producer()
    for node in view.nodes:
        source = producer.get(node.input[0]) if node.input else None
        if node.op_type == "IsNaN" and source is not None and source.op_type == "Softmax":
            yield view.name(node), "tests a softmax for NaN, which may keep attention from being fused"


def _attention_operator(view: GraphView) -> Faults:
    for node in view.nodes:
        if node.op_type == "Attention" and node.domain in _STANDARD:
            yield view.name(node), "the Attention operator of opset 23 has open bugs in TensorRT"


def _unknown_size(view: GraphView) -> Faults:
    names = [size for info in view.model.graph.value_info for size in dimensions(info) if isinstance(size, str)]
    if any(name.startswith("unk") for name in names):
        yield "value_info", "one name stands for different unknown sizes, and ONNX Runtime then reuses a wrong buffer"


_ATTENTION = "write attention as MatMul, added mask, Softmax"

RULES = (
    Rule("external-data", _external_data, "put the file of the weights beside the graph, or export again"),
    Rule("checker", _checker, "export again; the file is not valid ONNX"),
    Rule("ir-version", _ir_version, "write it with an older onnx, or set ir_version if no newer type is used"),
    Rule("opset", _opset, "export with opset 20, which has Gelu and LayerNormalization", tensorrt=True),
    Rule("domain", _domain, "express it in standard operators, or add a model-local function", tensorrt=True),
    Rule("operator", _operator, "express it in other operators", tensorrt=True),
    Rule("random", _random, "make the noise an input of the graph"),
    Rule("double", _double, "compute in float32: cast the model and its constants before the export"),
    Rule("integer-product", _integer_product, "use --int8 qdq, or run it with ONNX Runtime on CPUs", tensorrt=True),
    Rule("zero-point", _zero_point, "quantise symmetrically: zero points 0", tensorrt=True),
    Rule("scale", _scale, "calibrate once and store the scales", tensorrt=True),
    Rule("quantised-type", _quantised_type, "quantise to int8 or float8_e4m3fn", tensorrt=True),
    Rule("granularity", _granularity, "one scale per tensor for activations, per channel for weights", tensorrt=True),
    Rule(
        "weight-granularity",
        _weight_granularity,
        "store the weight in int8, with one scale a channel",
        "warning",
        tensorrt=True,
    ),
    Rule("top-k", _top_k, "export a smaller constant k, or score the catalogue outside the graph", tensorrt=True),
    Rule("dimension-name", _dimension_name, "give the size a name when exporting (torch.export.Dim)"),
    Rule("profile", _profile, "give every dimension of the inputs a range, and no other"),
    Rule("infinite", _finite, "mask with -1e4, which float16 holds"),
    Rule("stored-twice", _stored_twice, "use one tensor as it lies (F.linear for a table also looked up)", "warning"),
    Rule("softmax-guard", _softmax_guard, _ATTENTION, "warning", tensorrt=True),
    Rule("attention-operator", _attention_operator, _ATTENTION, "warning", tensorrt=True),
    Rule("unknown-size", _unknown_size, "clear graph.value_info"),
)
