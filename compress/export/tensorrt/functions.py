"""Model-local functions of the own operators: what runtimes without the plugins run, in standard operators.

What flows between ``score_splits`` and ``merge_splits`` is their own affair: in the plugins lists of packed keys and
bounds, here the best items and their scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.export.request import MASKED
from compress.export.tensorrt.operators import DENOISE_INPUTS, DOMAIN, OPERATORS, WEIGHTS
from kernels._reverse_steps import reverse_steps
from kernels.block_weights import BlockWeights, finish_block, pad_weights, split_qkv

if TYPE_CHECKING:
    import onnx
    import onnx_ir

OPSET = 20
_TENSORRT_ATTRIBUTES = ("plugin_namespace", "plugin_version", "aot")


def add_functions(model: onnx_ir.Model) -> None:
    """Add a function for every node of this project's domain; all nodes of one name must have the same attributes."""
    import onnx_ir

    made: dict[str, dict[str, Any]] = {}
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN:
            continue
        attributes = {name: each.value for name, each in node.attributes.items() if name not in _TENSORRT_ATTRIBUTES}
        if made.setdefault(node.op_type, attributes) != attributes:
            raise ValueError(f"two nodes {DOMAIN}::{node.op_type} differ in attributes; a file has one function")
        dtypes = [str(value.dtype) for value in node.inputs if value is not None]
        function = onnx_ir.serde.deserialize_function(function_proto(node.op_type, attributes, dtypes))
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1


def function_proto(name: str, attributes: dict[str, Any], dtypes: Sequence[str]) -> onnx.FunctionProto:
    """The function of one operator. dtypes: of its inputs, as ONNX names them."""
    import onnx.helper as helper

    if name == "denoise_last":
        nodes = _denoise_nodes(attributes, dtypes)
    else:
        nodes = _score_nodes(attributes) if name == "score_splits" else _merge_nodes()
    operator = OPERATORS[name]
    return helper.make_function(
        DOMAIN,
        name,
        operator.inputs,
        operator.outputs,
        nodes,
        [helper.make_opsetid("", OPSET)],
        attributes=[*operator.attributes, *_TENSORRT_ATTRIBUTES],
    )


def _score_nodes(attributes: dict[str, Any]) -> list[onnx.NodeProto]:
    import onnx.helper as helper

    first, count, k = attributes["first"], attributes["count"], attributes["k"]
    return [
        _constant("first", [first]),
        _constant("count", [count]),
        _constant("one", [1]),
        _constant("k", [k]),
        helper.make_node("Gemm", ["rows", "table"], ["products"], transB=1),
        helper.make_node("Cast", ["products"], ["scores"], to=1),
        helper.make_node("Slice", ["scores", "first", "count", "one"], ["allowed"]),
        helper.make_node("TopK", ["allowed", "k"], ["bounds", "places"]),
        helper.make_node("Add", ["places", "first"], ["ids"]),
        helper.make_node("Unsqueeze", ["ids", "one"], ["candidates"]),
    ]


def _merge_nodes() -> list[onnx.NodeProto]:
    import onnx.helper as helper

    return [
        _constant("one", [1]),
        helper.make_node("Squeeze", ["candidates", "one"], ["items"]),
        helper.make_node("Identity", ["bounds"], ["scores"]),
        helper.make_node("Identity", ["candidates"], ["merged"]),
    ]


def _constant(name: str, values: list[int]) -> onnx.NodeProto:
    import onnx

    tensor = onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [len(values)], values)
    return onnx.helper.make_node("Constant", [], [name], value=tensor)


def _denoise_nodes(attributes: dict[str, Any], dtypes: Sequence[str]) -> list[onnx.NodeProto]:
    """Nodes of `DenoiseBody`, traced; its parameters stay inputs, and what else is constant becomes a node."""
    import onnx
    import onnx_ir

    body = DenoiseBody(attributes).eval()
    inputs, shapes = body.example([getattr(torch, _TORCH[name]) for name in dtypes])
    program = torch.onnx.export(
        body, inputs, dynamo=True, opset_version=OPSET, dynamic_shapes=(shapes,), verbose=False,
        input_names=list(DENOISE_INPUTS), output_names=list(OPERATORS["denoise_last"].outputs),
    )  # fmt: skip
    assert program is not None
    model = onnx_ir.serde.serialize_model(program.model)
    constants = [
        onnx.helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer
    ]
    nodes = [*constants, *model.graph.node]
    for node in nodes:
        del node.metadata_props[:]
        node.doc_string = ""
    return nodes


_TORCH = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "INT64": "int64"}


class DenoiseBody(nn.Module):
    """`kernels.denoise_last` with given noise in pure torch, without a size that depends on values; float32 inside."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        super().__init__()
        self.attributes = attributes

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given, own = dict(zip(DENOISE_INPUTS, tensors, strict=True)), self.attributes
        weights = BlockWeights(*(given[name] for name in WEIGHTS))
        condition, keys_values, offsets = given["condition"].float(), given["keys_values"], given["offsets"]
        users, columns = keys_values.shape[3], keys_values.shape[4]
        lengths = offsets[1:] - offsets[:-1]
        place = torch.arange(columns - 1)
        visible = place < lengths[:, None] - 1
        tokens = torch.where(visible, offsets[:-1, None] + place, 0)
        seen = keys_values.flatten(3, 4)[:, :, :, tokens].float()
        # The last column is the new token itself.
        bias = torch.cat([torch.where(visible, 0.0, MASKED), torch.zeros(users, 1)], 1)
        if own["pad_rows"]:
            pads = given["pads"].float()[:, :, :, None].expand(-1, -1, -1, users, -1, -1)
            seen = torch.cat([pads, seen], 4)
            bias = torch.cat([pad_weights(lengths, own["pad_rows"], own["max_length"]), bias], 1)
        heads = own["heads"]
        seen = seen.unflatten(-1, (heads, own["width"] // heads))

        def denoise(mixed: Tensor, branch: int) -> Tensor:
            rows = mixed + condition if branch == 0 else mixed
            for block in range(own["blocks"]):
                query, *new = split_qkv(weights, block, rows, heads)
                key, value = (
                    torch.cat([old, each[:, None]], 1) for old, each in zip(seen[branch, block], new, strict=True)
                )
                scores = (query[:, None] * key).sum(-1) * (own["width"] // heads) ** -0.5 + bias[:, :, None]
                mixed_values = (scores.softmax(1)[..., None] * value).sum(1)
                rows = finish_block(weights, block, rows, mixed_values.flatten(1))
            return rows

        x0 = reverse_steps(
            denoise,
            users,
            given["times"],
            given["coefficients"],
            torch.float32,
            seed=0,
            row_keys=None,
            noise=given["noise"],
            mix_weight=own["mix_weight"],
            guidance_scale=own["guidance_scale"],
            geodesic=bool(own["geodesic"]),
        )
        # Scratch is the plugin's; nobody reads it here.
        return x0, x0[:1, 0], x0[:1, 0].to(weights.qkv.dtype)

    def example(self, dtypes: Sequence[torch.dtype]) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
        """Inputs to trace with, and their named sizes: users and columns."""
        own = self.attributes
        n, D, S = own["blocks"], own["width"], own["steps"]
        branches, pads = 1 if own["guidance_scale"] == 1.0 else 2, max(1, own["pad_rows"])
        users, columns = 3, 5
        sizes = {
            "condition": (users, D), "qkv": (n, 3 * D, D), "qkv_bias": (n, 3 * D), "out_weight": (n, D, D),
            "out_bias": (n, D), "attention_norm": (n, 2, D), "up": (n, 4 * D, D), "up_bias": (n, 4 * D),
            "down": (n, D, 4 * D), "down_bias": (n, D), "feed_forward_norm": (n, 2, D),
            "keys_values": (branches, n, 2, users, columns, D), "pads": (branches, n, 2, pads, D),
            "offsets": (users + 1,), "times": (S, D), "coefficients": (S, 3), "noise": (S + 1, users, D),
        }  # fmt: skip
        batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
        dynamic: dict[str, dict[int, Any]] = {
            "condition": {0: batch}, "keys_values": {3: batch, 4: length}, "offsets": {0: batch + 1},
            "noise": {1: batch},
        }  # fmt: skip
        made = [torch.zeros(sizes[name], dtype=dtype) for name, dtype in zip(DENOISE_INPUTS, dtypes, strict=True)]
        made[DENOISE_INPUTS.index("offsets")] = torch.arange(users + 1)
        return tuple(made), tuple(dynamic.get(name, {}) for name in DENOISE_INPUTS)
