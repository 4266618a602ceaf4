"""What torch itself would launch on a GPU, counted without one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class DeviceOperations(TorchDispatchMode):
    """Names of torch's operators that launch something on the meta device, which stands for a GPU.

    Kernels that are recorded run no operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        name = function.overloadpacket._qualified_op_name.removeprefix("aten::")
        if isinstance(result, Tensor) and result.device.type == "meta":
            same = name == "to" and (result.device, result.dtype) == (arguments[0].device, arguments[0].dtype)
            # Memory alone and views launch nothing.
            if not same and name not in ("empty", "new_empty", "empty_like", "reshape", "slice", "detach"):
                self.names.append(name)
        return result
