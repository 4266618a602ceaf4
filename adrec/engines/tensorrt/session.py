"""One execution context: shapes, profile and addresses of a request, then the launch. It touches no CUDA API itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adrec.engines.tensorrt.library import TensorRTError, last_messages
from adrec.engines.tensorrt.plan import PlanRecord, TensorInfo
from adrec.engines.tensorrt.profiles import choose_profile
from adrec.errors import ConfigError, nearest

# Member of `tensorrt.DataType` by the name of torch's dtype.
DATA_TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "float8_e4m3fn": "FP8",
    "int8": "INT8",
    "uint8": "UINT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]


def allocate_like(inputs: Mapping[str, Tensor]) -> Allocate:
    """Outputs on the device of the inputs."""
    device = next(iter(inputs.values())).device
    return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device)


def dimension_sizes(record: PlanRecord, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Size of each dynamic dimension of a request. Raises ConfigError for inputs that do not fit the plan's."""
    expected = {each.name: each for each in record.inputs}
    for name in inputs:
        if name not in expected:
            raise ConfigError(
                f"the engine has no input '{name}'{nearest(name, expected)}; inputs: {', '.join(expected)}"
            )
    if missing := [name for name in expected if name not in inputs]:
        raise ConfigError(f"the engine also needs the input {', '.join(missing)}")
    sizes: dict[str, int] = {}
    for name, info in expected.items():
        tensor = inputs[name]
        found = f"input '{name}' is {dtype_name(tensor.dtype)} {list(tensor.shape)}"
        wanted = f"expected {info.dtype} [{', '.join(map(str, info.shape))}]"
        if dtype_name(tensor.dtype) != info.dtype or tensor.dim() != len(info.shape):
            raise ConfigError(f"{found}; {wanted}")
        if not tensor.is_contiguous():
            raise ConfigError(f"{found} with strides {tensor.stride()}; the engine reads contiguous tensors")
        for dimension, size in zip(info.shape, tensor.shape, strict=True):
            if isinstance(dimension, int) and dimension != size:
                raise ConfigError(f"{found}; {wanted}")
            if isinstance(dimension, str) and sizes.setdefault(dimension, size) != size:
                raise ConfigError(f"{found}; {wanted}, and {dimension} is {sizes[dimension]} in another input")
    return sizes


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensors(trt: ModuleType, engine: Any, record: PlanRecord) -> None:
    """Raise TensorRTError unless an engine has the inputs and outputs of its record, with their dtypes."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    for infos, mode in ((record.inputs, trt.TensorIOMode.INPUT), (record.outputs, trt.TensorIOMode.OUTPUT)):
        found = [name for name in names if engine.get_tensor_mode(name) == mode]
        wanted = [info.name for info in infos]
        if sorted(found) != sorted(wanted):
            kind = mode.name.lower()
            raise TensorRTError(f"the engine's {kind} tensors are {found}, and its record says {wanted}")
        for info in infos:
            dtype = engine.get_tensor_dtype(info.name)
            if dtype != data_type(trt, info):
                raise TensorRTError(f"the engine's tensor '{info.name}' is {dtype.name}, and its record: {info.dtype}")


def data_type(trt: ModuleType, info: TensorInfo) -> Any:
    """The `tensorrt.DataType` of a tensor."""
    if info.dtype not in DATA_TYPES:
        raise TensorRTError(f"'{info.name}' is {info.dtype}; TensorRT takes {', '.join(DATA_TYPES)}")
    return getattr(trt.DataType, DATA_TYPES[info.dtype])


class Session:
    """An execution context with what it was last told. For one stream only: a context must not serve two at once."""

    def __init__(self, engine: Any, record: PlanRecord, logger: Any) -> None:
        self.record = record
        self.logger = logger
        self.context = engine.create_execution_context()
        if self.context is None:
            raise TensorRTError(f"TensorRT made no execution context: {last_messages(logger)}")
        self.profile: int | None = None

    def bind(self, inputs: Mapping[str, Tensor], allocate: Allocate, stream: int) -> dict[str, Tensor]:
        """Give the context a request's shapes and addresses; returns the outputs that `enqueue` will fill.

        inputs: contiguous, and alive until the stream has passed the launch. allocate: makes an output. stream: handle
        of a CUDA stream. Raises ConfigError before anything runs where no profile covers the request.
        """
        sizes = dimension_sizes(self.record, inputs)
        profile = choose_profile(self.record.key.profiles, sizes) if sizes else 0
        if profile != self.profile:
            self._require(self.context.set_optimization_profile_async(profile, stream), f"profile {profile}")
            self.profile = profile
        for name, tensor in inputs.items():
            self._require(self.context.set_input_shape(name, tuple(tensor.shape)), f"shape of '{name}'")
            self._address(name, tensor)
        if missing := self.context.infer_shapes():
            raise TensorRTError(f"shapes cannot be inferred: TensorRT misses {', '.join(missing)}")
        outputs = {}
        for info in self.record.outputs:
            shape = tuple(self.context.get_tensor_shape(info.name))
            outputs[info.name] = allocate(shape, getattr(torch, info.dtype))
            self._address(info.name, outputs[info.name])
        return outputs

    def enqueue(self, stream: int) -> None:
        """Launch the bound request on a stream, which must not be the default one: that would wait for all others."""
        self._require(self.context.execute_async_v3(stream), "launch")

    def _address(self, name: str, tensor: Tensor) -> None:
        self._require(self.context.set_tensor_address(name, tensor.data_ptr()), f"address of '{name}'")

    def _require(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise TensorRTError(f"TensorRT refused the {what}: {last_messages(self.logger)}")
