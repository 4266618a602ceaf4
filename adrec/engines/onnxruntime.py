"""ONNX Runtime as an engine.

Providers are asked for by name, must be there, and must run every node but those on sizes: ONNX Runtime's own way is to
take the next one without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from adrec.engines.exported import ExportError, GraphFile, GraphFormat, Precision
from adrec.engines.exported_engine import ExportedEngine
from adrec.engines.onnx_placement import RECORD, check_placement
from adrec.environment import processor_instructions
from adrec.errors import ConfigError, NotSupportedError, nearest
from adrec.models.base import SequenceModel

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
SHARED_TABLE = 2**23
"""Elements of an item table from which the threads of a CPU share one run instead of taking one each."""


class OnnxRuntimeEngine(ExportedEngine):
    """Runs ONNX graphs of a folder, or of its own export; see `ExportedEngine`.

    provider: ``cpu``, ``cuda`` or ``tensorrt``; None is that of the model's device. threads: of a CPU, each with a run
    of its own, or all in one where the catalogue is large (None: torch's number). provider_options: as ONNX Runtime
    names them; ``device_id`` is that of the model's GPU where it is not among them. Raises NotSupportedError without
    onnxruntime or the provider.
    """

    name = "onnxruntime"
    format: ClassVar[GraphFormat] = "onnx"
    loops = True

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        """Whether ONNX Runtime is installed with the provider of a device."""
        try:
            return PROVIDERS.get(device.type) in load_onnxruntime().get_available_providers()
        except NotSupportedError:
            return False

    def __init__(
        self,
        model: SequenceModel,
        *,
        folder: Path | None = None,
        only: str | None = None,
        provider: str | None = None,
        threads: int | None = None,
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        self.runtime = load_onnxruntime()
        super().__init__(model, folder=folder, only=only)
        self.provider = check_provider(self.runtime, provider or self.device.type)
        self.provider_options = dict(provider_options or {})
        # On a CPU nothing is copied between devices, and binding a single user's inputs costs a tenth of the request.
        self.bound = self.provider != PROVIDERS["cpu"]
        self.place = self._place()
        self.run_options = self.runtime.RunOptions()
        # Without scoring where only representations are asked for.
        self.run_options.only_execute_path_to_fetches = True
        self.threads = torch.get_num_threads() if threads is None else threads
        if self.threads < 1:
            raise ConfigError(f"threads is {threads}; allowed: 1 or more")
        # Threads share a large catalogue's scores well. Where the network is most of the work they hardly do: its
        # products are small, and each takes a run of its own instead.
        if self.provider == PROVIDERS["cpu"] and model.config.items * model.config.width < SHARED_TABLE:
            self.concurrent = self.threads

    def open(self, path: Path) -> Any:
        if self.precision == "int8-dynamic":
            check_integer_products(self.runtime)
        within = self.threads if self.concurrent == 1 else 1
        return make_session(self.runtime, path, self.provider, within, self.provider_options)

    def run(
        self, graph: GraphFile, session: Any, inputs: dict[str, np.ndarray], outputs: tuple[str, ...]
    ) -> dict[str, Tensor]:
        if not self.bound:
            found = session.run(list(outputs), inputs, self.run_options)
            return {name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)}
        given = {name: torch.from_numpy(value).to(self.place).contiguous() for name, value in inputs.items()}
        filled = self._outputs(graph, given, outputs)
        run_bound(session, given, filled, self.run_options)
        return {name: tensor.cpu() for name, tensor in filled.items()}

    def _outputs(self, graph: GraphFile, given: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
        """Memory for outputs, where the session computes."""
        sizes: dict[int | str, int] = {}
        for spec in graph.inputs:
            sizes.update(zip(spec.shape, given[spec.name].shape, strict=True))
        specs = {spec.name: spec for spec in graph.outputs}
        return {
            name: torch.empty(
                [size if isinstance(size, int) else sizes[size] for size in specs[name].shape],
                dtype=getattr(torch, specs[name].dtype),
                device=self.place,
            )
            for name in names
        }

    def _place(self) -> torch.device:
        """Where inputs and outputs are: on the GPU of the session, or on the CPU where torch sees none."""
        if not self.bound or not torch.cuda.is_available():
            return torch.device("cpu")
        own = self.device.index if self.device.type == "cuda" else None
        return torch.device("cuda", int(self.provider_options.setdefault("device_id", str(own or 0))))


class OnnxRuntimeInt8Engine(OnnxRuntimeEngine):
    """`OnnxRuntimeEngine` with the layers of items in int8, activations quantised at run time; for CPUs.

    Scores are rounded to choose candidates, which are ranked by those of the float table.
    """

    name = "onnxruntime-int8"
    precision: ClassVar[Precision] = "int8-dynamic"
    dtype = torch.int8


def run_bound(session: Any, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], run_options: Any) -> None:
    """Run a session on torch's tensors by address: it reads ``inputs`` and fills ``outputs`` where they are.

    Both by name, contiguous, of the graph's shapes and dtypes, on the session's device or on the CPU; what torch's
    current streams do with them is waited for. The outputs are complete on return. Raises ValueError for a tensor with
    gaps, ONNX Runtime's errors for what does not fit the graph.
    """
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, tensor in tensors.items():
            if not tensor.is_contiguous():
                raise ValueError(f"'{name}' has strides {tensor.stride()}; ONNX Runtime reads and writes without gaps")
            element = np.dtype(str(tensor.dtype).removeprefix("torch.")).type
            place = tensor.device
            bind(name, place.type, place.index or 0, element, tuple(tensor.shape), tensor.data_ptr())
    for place in {tensor.device for tensor in (*inputs.values(), *outputs.values())}:
        if place.type == "cuda":
            # ONNX Runtime computes on a stream of its own, which does not wait for torch's.
            torch.cuda.current_stream(place).synchronize()
    binding.synchronize_inputs()
    session.run_with_iobinding(binding, run_options)
    binding.synchronize_outputs()


def load_onnxruntime() -> ModuleType:
    """The onnxruntime package; raises NotSupportedError where it is missing."""
    try:
        import onnxruntime
    except ImportError:
        raise NotSupportedError("ONNX Runtime is not installed: pip install 'adrec[onnx]'") from None
    return onnxruntime


def check_provider(runtime: ModuleType, name: str) -> str:
    """ONNX Runtime's name of a provider; raises ConfigError for an unknown one, NotSupportedError for a missing one."""
    if name not in PROVIDERS:
        raise ConfigError(f"provider is '{name}'{nearest(name, PROVIDERS)}; allowed: {', '.join(PROVIDERS)}")
    available = runtime.get_available_providers()
    if PROVIDERS[name] not in available:
        raise NotSupportedError(
            f"this ONNX Runtime has no {PROVIDERS[name]}, only {', '.join(available)};"
            " pip install onnxruntime-gpu for CUDA and TensorRT, or use provider 'cpu'"
        )
    return PROVIDERS[name]


def check_integer_products(runtime: ModuleType) -> None:
    """Raise NotSupportedError where ONNX Runtime multiplies integers wrongly.

    Before 1.25 it chose the wrong kernels on processors with AVX-VNNI or AMX (onnxruntime pull request 27671).
    """
    version = tuple(int(part) for part in runtime.__version__.split(".")[:2])
    found = {"avx_vnni", "amx_int8"} & set((processor_instructions() or "").split())
    if version < (1, 25) and found:
        raise NotSupportedError(
            f"ONNX Runtime {runtime.__version__} multiplies integers wrongly on processors with"
            f" {', '.join(sorted(found))}; use 1.25 or newer (Python 3.11 or newer), or engine 'onnxruntime'"
        )


def make_session(
    runtime: ModuleType, path: Path, provider: str, threads: int, provider_options: Mapping[str, str] | None = None
) -> Any:
    """A session of one provider.

    Raises ExportError for a file it cannot read, or where it took another provider, be it for some nodes.
    """
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that wait for work by spinning keep the cores from torch's, and from those of other sessions: on two cores
    # a batch of 512 took two to three times as long.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if provider != PROVIDERS["cpu"]:
        options.add_session_config_entry(RECORD, "1")
    try:
        session = runtime.InferenceSession(str(path), options, providers=[(provider, dict(provider_options or {}))])
    except Exception as error:
        raise ExportError(f"{path}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}") from None
    if session.get_providers()[0] != provider:
        raise ExportError(f"{path}: ONNX Runtime runs it with {session.get_providers()[0]}, not with {provider}")
    if provider != PROVIDERS["cpu"]:
        check_placement(session, path, provider)
    return session
