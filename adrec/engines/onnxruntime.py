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
    of its own, or all in one where the catalogue is large (None: torch's number). Raises NotSupportedError without
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
        within = self.threads if self.concurrent == 1 else 1
        return make_session(self.runtime, path, self.provider, within, self.provider_options)

    def run(
        self, graph: GraphFile, session: Any, inputs: dict[str, np.ndarray], outputs: tuple[str, ...]
    ) -> dict[str, Tensor]:
        if self.provider == PROVIDERS["cpu"]:
            # Nothing is copied between devices, and binding a single user's inputs costs a tenth of the request.
            found = session.run(list(outputs), inputs, self.run_options)
        else:
            binding = session.io_binding()
            for name, value in inputs.items():
                binding.bind_cpu_input(name, value)
            for name in outputs:
                binding.bind_output(name)
            session.run_with_iobinding(binding, self.run_options)
            found = binding.copy_outputs_to_cpu()
        return {name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)}


class OnnxRuntimeInt8Engine(OnnxRuntimeEngine):
    """`OnnxRuntimeEngine` with int8 linear layers and item table, activations quantised at run time; for CPUs.

    `represent` returns what its graph computes; scores of representations elsewhere are those of the float table.
    """

    name = "onnxruntime-int8"
    precision: ClassVar[Precision] = "int8-dynamic"
    dtype = torch.int8
    loops = False


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
