"""The graphs that a request is exported as: their inputs, outputs and named sizes, and the modules that compute them.

=========  =========================================================================================================
kind       computes
=========  =========================================================================================================
request    histories to items, scores and representations: all of it
represent  histories to representations, where the item table is elsewhere
encode     histories to what the steps attend to
denoise    that to representations
score      representations to items and scores
=========  =========================================================================================================

encode, denoise and score are the request cut in three, for catalogues whose table is shared, sharded or searched by
something else. The step count is fixed (unrolled) or that of an input (loop).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adrec.engines.exported import Catalogue, GraphKind, TensorSpec
from adrec.errors import ConfigError, NotSupportedError
from adrec.models.adrec import ADRec
from adrec.models.base import SequenceModel
from adrec.schedule import DiffusionTable
from compress.export.request import Encoded, Prefix, RequestGraph

DTYPES = {"float32": torch.float32, "float16": torch.float16, "int64": torch.int64}
# Sizes an example has: all different, so that no size is taken for another one.
_EXAMPLE = {"batch": 3, "length": 5, "steps": 4, "draws": 5, "seen": 6}


@dataclass(frozen=True)
class GraphPlan:
    """Which graph to make. table: coefficients of the unrolled steps; None for a loop or a model without steps.

    loop: the step count is an input. k: length of the lists. catalogue: where the item table is.
    """

    kind: GraphKind
    table: DiffusionTable | None = None
    loop: bool = False
    k: int = 20
    catalogue: Catalogue = "inside"


class Graph(nn.Module):
    """A `GraphPlan` of a model as one module, called with the tensors of ``inputs`` in that order.

    Raises ConfigError for a k outside 1..N, NotSupportedError for a plan that no graph computes.
    """

    def __init__(self, core: RequestGraph, plan: GraphPlan, source: SequenceModel) -> None:
        super().__init__()
        self.core, self.plan = core, plan
        self.diffusion = isinstance(source, ADRec)
        config = core.config
        if not 1 <= plan.k <= config.items:
            raise ConfigError(f"k is {plan.k}; allowed: 1 to {config.items}, the size of the catalogue")
        check_plan(plan, self.diffusion)
        if isinstance(source, ADRec) and plan.table is not None and plan.kind in ("request", "represent", "denoise"):
            times = plan.table.time.to(source.table.device)
            # The model may be on a GPU; what is traced is on the CPU.
            self.register_buffer("step_times", core.embedded_times(source, times).cpu())
        self.inputs = self._inputs()
        self.outputs = self._outputs()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        core, given = self.core, {spec.name: tensor for spec, tensor in zip(self.inputs, tensors, strict=True)}
        if self.plan.kind == "score":
            return core.score(given["rows"], self.plan.k, given.get("table"))
        if self.plan.kind == "denoise":
            return (self._sample(_unpacked(given), given),)
        embedded = given["embedded"] if "embedded" in given else core.embed(given["histories"], given.get("table"))
        encoded = core.encode(embedded, given["lengths"])
        if self.plan.kind == "encode":
            return tuple(_packed(encoded).values())
        rows = self._sample(encoded, given) if self.diffusion else core.represent_plain(encoded)
        if self.plan.kind == "represent":
            return (rows.float(),)
        return *core.score(rows, self.plan.k, given.get("table")), rows.float()

    def _sample(self, encoded: Encoded, given: dict[str, Tensor]) -> Tensor:
        if self.plan.loop:
            return self.core.reverse_loop(encoded, given["noise"], given["times"], given["coefficients"])
        assert self.plan.table is not None
        return self.core.reverse(encoded, given["noise"], self.get_buffer("step_times"), self.plan.table)

    def _inputs(self) -> list[TensorSpec]:
        config, plan, dtype = self.core.config, self.plan, str(self.core.dtype).removeprefix("torch.")
        found: list[TensorSpec] = []
        if plan.kind == "score":
            found.append(TensorSpec(name="rows", dtype=dtype, shape=("batch", config.width)))
        elif plan.kind == "denoise":
            found += self._encoded_specs()
        else:
            if plan.catalogue == "outside":
                found.append(TensorSpec(name="embedded", dtype=dtype, shape=("batch", "length", config.width)))
            else:
                found.append(TensorSpec(name="histories", dtype="int64", shape=("batch", "length")))
            found.append(TensorSpec(name="lengths", dtype="int64", shape=("batch",)))
        if self.diffusion and plan.kind in ("request", "represent", "denoise"):
            draws: int | str = "draws" if plan.table is None else plan.table.steps + 1
            found.append(TensorSpec(name="noise", dtype="float32", shape=(draws, "batch", config.width)))
            if plan.loop:
                found.append(TensorSpec(name="times", dtype="int64", shape=("steps",)))
                found.append(TensorSpec(name="coefficients", dtype="float32", shape=("steps", 3)))
        if plan.catalogue == "input" and plan.kind in ("request", "encode", "score"):
            found.append(TensorSpec(name="table", dtype=dtype, shape=("items", config.width)))
        return found

    def _outputs(self) -> list[TensorSpec]:
        config, kind = self.core.config, self.plan.kind
        dtype = str(self.core.dtype).removeprefix("torch.")
        if kind == "encode":
            return self._encoded_specs()
        rows = TensorSpec(name="rows", dtype="float32" if kind != "denoise" else dtype, shape=("batch", config.width))
        if kind in ("represent", "denoise"):
            return [rows]
        lists = [
            TensorSpec(name="items", dtype="int64", shape=("batch", self.plan.k)),
            TensorSpec(name="scores", dtype="float32", shape=("batch", self.plan.k)),
        ]
        return lists if kind == "score" else [*lists, rows]

    def _encoded_specs(self) -> list[TensorSpec]:
        config, dtype = self.core.config, str(self.core.dtype).removeprefix("torch.")
        last = TensorSpec(name="last", dtype=dtype, shape=("batch", config.width))
        if config.denoiser == "mlp":
            return [last]
        caches = config.denoiser_blocks * (2 if self.core.guided else 1)
        head = config.width // config.heads
        return [
            last,
            TensorSpec(name="keys", dtype=dtype, shape=(caches, "batch", config.heads, head, "seen")),
            TensorSpec(name="values", dtype=dtype, shape=(caches, "batch", config.heads, "seen", head)),
            TensorSpec(name="mask", dtype=dtype, shape=("batch", 1, 1, "seen")),
        ]

    def example(self) -> tuple[Tensor, ...]:
        """Inputs to trace with: small, valid, no two sizes alike."""
        generator = torch.Generator().manual_seed(0)
        longest = min(_EXAMPLE["length"], max(2, self.core.config.max_length))
        made = []
        for spec in self.inputs:
            sizes = {**_EXAMPLE, "items": self.plan.k + 7}
            shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
            if "length" in spec.shape:
                shape[spec.shape.index("length")] = longest
            if spec.name == "lengths":
                made.append(torch.arange(1, shape[0] + 1).clamp(max=longest))
            elif spec.name == "histories":
                made.append(torch.randint(1, self.core.config.items + 1, shape, generator=generator))
            elif spec.name == "times":
                made.append(torch.arange(shape[0]).clamp(max=self.core.config.timesteps - 1))
            else:
                made.append(torch.randn(shape, generator=generator).to(DTYPES[spec.dtype]))
        return tuple(made)

    def dynamic_shapes(self, batch: int = 3) -> tuple[tuple[dict[int, Any], ...]]:
        """`torch.export`'s description of the named sizes, for one variadic argument. batch: its smallest size."""
        dims: dict[str, Any] = {}

        def dim(name: str) -> Any:
            if name not in dims:
                # The tracer takes sizes below 2 for constants, and a prefix is one shorter. The file has no bounds.
                smallest = {"batch": batch, "items": self.plan.k + 1}
                dims[name] = torch.export.Dim(name, min=smallest.get(name, 3))
            return dims[name]

        return (
            tuple(
                {axis: dim(size) for axis, size in enumerate(spec.shape) if isinstance(size, str)}
                for spec in self.inputs
            ),
        )


def check_plan(plan: GraphPlan, diffusion: bool) -> None:
    """Raise NotSupportedError for a plan that no graph computes."""
    if plan.kind == "denoise" and not diffusion:
        raise NotSupportedError("a 'sasrec' model has no reverse steps to export; its graphs are request and represent")
    if plan.kind == "encode" and not diffusion:
        raise NotSupportedError("a 'sasrec' model is not split before its last step; export represent and score")
    if plan.kind in ("request", "score") and plan.catalogue == "outside":
        raise NotSupportedError(f"a {plan.kind} graph scores the catalogue, so its table cannot be outside")
    if plan.loop and not diffusion:
        raise NotSupportedError("a 'sasrec' model has no reverse steps, so there is no loop to export")
    if plan.loop and plan.table is not None:
        raise NotSupportedError("a loop reads its coefficients from inputs; leave the table out")


def _packed(encoded: Encoded) -> dict[str, Tensor]:
    if encoded.mask is None:
        return {"last": encoded.last}
    keys = torch.stack([prefix.keys for prefix in encoded.prefixes])
    values = torch.stack([prefix.values for prefix in encoded.prefixes])
    return {"last": encoded.last, "keys": keys, "values": values, "mask": encoded.mask}


def _unpacked(given: dict[str, Tensor]) -> Encoded:
    if "mask" not in given:
        return Encoded(given["last"], (), None)
    # Copies: what a loop reads must not be views of one tensor. In the file they are views again.
    prefixes = (Prefix(key.clone(), value.clone()) for key, value in zip(given["keys"], given["values"], strict=True))
    return Encoded(given["last"], tuple(prefixes), given["mask"])
