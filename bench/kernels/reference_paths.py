"""Rivals of the `cached` engine that keep the baseline's arithmetic: `reference` under torch.compile and ONNX Runtime.

Both draw their noise and update x_t between the steps as `reference` does; encoder, reverse step and scoring, which are
all but a few percent of its time, are what is compiled or exported.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adrec.data.jagged import Jagged
from adrec.engines import ReferenceEngine
from adrec.engines.base import Engine, TopK
from adrec.engines.onnxruntime import PROVIDERS, check_provider, load_onnxruntime, make_session
from adrec.errors import NotSupportedError
from adrec.models.base import SequenceModel
from compress.export.onnx_export import OPSET, quiet_exporter, require_onnx

Part = Callable[..., "Tensor | tuple[Tensor, ...]"]
# No padding is recommended: below the score of any item.
UNLISTED = -1e9


class CompiledReferenceEngine(ReferenceEngine):
    """`ReferenceEngine` whose encoder, reverse step and scoring run under `torch.compile`; ``options``: its own."""

    def __init__(self, model: SequenceModel, options: dict[str, Any]) -> None:
        super().__init__(model)
        self.condition = torch.compile(self.condition, **options)  # type: ignore[method-assign]
        self.step = torch.compile(self.step, **options)  # type: ignore[method-assign]
        # Unwrapped, because the compiler cannot slice a parameter in inference mode.
        score = partial(inspect.unwrap(Engine.top_k), self)
        self.top_k = torch.no_grad()(torch.compile(score, **options))  # type: ignore[method-assign]


class OnnxReferenceEngine(ReferenceEngine):
    """`ReferenceEngine` whose encoder, reverse step and scoring are ONNX graphs, with torch's number of threads; CPU.

    Three graphs and not one: unrolling the steps into it took four minutes for 32. Raises NotSupportedError without
    ONNX Runtime, without what writes ONNX files, or for a model elsewhere.
    """

    def __init__(self, model: SequenceModel) -> None:
        super().__init__(model)
        require_onnx()
        if self.device.type != "cpu":
            raise NotSupportedError(
                f"the model is on {self.device}; `reference` in ONNX Runtime is measured on cpu only"
            )
        self._runtime = load_onnxruntime()
        self._provider = check_provider(self._runtime, "cpu")
        self._sessions: dict[object, Any] = {}

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        """Whether ONNX files can be written here, and ONNX Runtime runs them on the device."""
        try:
            require_onnx()
            return device.type == "cpu" and PROVIDERS["cpu"] in load_onnxruntime().get_available_providers()
        except NotSupportedError:
            return False

    def condition(self, padded: Tensor) -> Tensor:
        return self._run("encode", super().condition, padded)[0]

    def step(self, padded: Tensor, condition: Tensor, clean: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        # A batch of its own shape in each input: sizes that are equal by chance would count as one.
        times = time.expand(padded.shape[0])

        def step(padded: Tensor, condition: Tensor, clean: Tensor, x_t: Tensor, times: Tensor) -> Tensor:
            return ReferenceEngine.step(self, padded, condition, clean, x_t, times)

        return self._run("step", step, padded, condition, clean, x_t, times)[0]

    def top_k(self, rows: Tensor, k: int, exclude: Jagged | None = None) -> TopK:
        """Best k items of each representation `[B, D]`; nothing can be excluded."""
        self._check_top_k(rows, k, exclude)
        if exclude is not None:
            raise NotSupportedError("`reference` in ONNX Runtime excludes no items; leave exclude out")

        def score(rows: Tensor) -> tuple[Tensor, Tensor]:
            scores = rows @ self.model.table.T
            padding = torch.zeros_like(scores[:1])
            padding[:, 0] = UNLISTED
            best = torch.topk(scores + padding, k)
            return best.indices, best.values

        return TopK(*self._run(k, score, rows))

    def _run(self, name: object, part: Part, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run a part of a request in the session of its graph, which is exported when it is asked for first."""
        if name not in self._sessions:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "part.onnx"
                export(self.model, part, inputs, path)
                self._sessions[name] = make_session(self._runtime, path, self._provider, torch.get_num_threads())
        session = self._sessions[name]
        names = [each.name for each in session.get_inputs()]
        found = session.run(None, {name: each.numpy() for name, each in zip(names, inputs, strict=True)})
        return tuple(map(torch.from_numpy, found))


class _Part(nn.Module):
    """A function of tensors as a module that holds the weights it reads."""

    def __init__(self, model: SequenceModel, part: Part) -> None:
        super().__init__()
        self.model, self.part = model, part

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.part(*inputs)


@torch.inference_mode(False)
@torch.no_grad()
def export(model: SequenceModel, part: Part, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Write a function of tensors `[B, ...]` as an ONNX graph of any batch size."""
    batch = torch.export.Dim("batch", min=1)
    with quiet_exporter():
        program = torch.onnx.export(
            _Part(model, part).eval(),
            # Copies of two rows: a batch of one would be taken for a constant, and what inference made not traced.
            tuple(torch.cat([each[:1], each[:1]]) for each in inputs),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=(tuple({0: batch} for _ in inputs),),
            verbose=False,
        )
    assert program is not None
    # Weights beside the graph, since a file of the format itself ends at 2 GiB.
    program.save(path, external_data=True)
