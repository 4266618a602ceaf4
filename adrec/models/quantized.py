"""Numbers stored in fewer bits: the formats, and the linear layer that is stored in one of them.

A stored matrix is a tensor of integers or small floats and a scale for each row, or for each group of a row:
``value = stored * scale``, symmetric around zero, so zero stays exactly zero.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adrec.config import LayerFormat, QuantizationConfig
from adrec.errors import ConfigError, NotSupportedError

FLOAT8 = torch.float8_e4m3fn
STORED_DTYPES = {"int8": torch.int8, "int4": torch.uint8, "fp8": FLOAT8, "bf16": torch.bfloat16}
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
# Rows that a layer takes at a time where it rounds them: what it computes on the way stays in the cache.
_ROWS_AT_A_TIME = 512
# torch multiplies int8 matrices of more than 16 rows, and of sizes that 8 divides, on CUDA devices.
_CUDA_ROWS, _CUDA_MULTIPLE = 17, 8
# It multiplies fp8 matrices of sizes that 16 divides, on those of compute capability 8.9 or newer.
_FP8_MULTIPLE, FP8_CAPABILITY = 16, (8, 9)
# What a row of zeros is divided by.
_SMALLEST_PEAK = 1e-30


class Packed(NamedTuple):
    """A matrix `[R, C]` as stored.

    values: `[R, C]` int8, float8_e4m3fn or bfloat16, or `[R, C / 2]` uint8 (two int4 a byte, the even column in the low
    half). scale: `[R]` float32, `[R, C / group]` for int4, None for bfloat16.
    """

    values: Tensor
    scale: Tensor | None


def storage(name: str) -> str:
    """What a layer format stores: int8-dynamic stores int8, fp8-dynamic fp8."""
    return name.removesuffix("-dynamic")


def pack(matrix: Tensor, name: str, group_size: int | None = None) -> Packed:
    """Round a matrix `[R, C]` to a format; a scale is the largest magnitude of its row or group over 127, 7 or 448.

    Rows and groups of zeros have scale 1. Raises ConfigError for numbers that are not finite, and for a group size that
    does not divide C.
    """
    matrix = matrix.detach().float()
    if not bool(matrix.isfinite().all()):
        raise ConfigError("the matrix holds numbers that are not finite; such a model cannot be quantised")
    name = storage(name)
    if name == "bf16":
        return Packed(matrix.to(torch.bfloat16), None)
    grouped = matrix.unflatten(1, (-1, _group(name, matrix.shape[1], group_size)))
    scale = grouped.abs().amax(2) / LARGEST[name]
    scale = scale.masked_fill(scale == 0.0, 1.0)
    values = grouped / scale[..., None]
    if name == "fp8":
        return Packed(values.flatten(1).to(FLOAT8), scale.squeeze(1))
    whole = values.round().clamp(-LARGEST[name], LARGEST[name]).to(torch.int8).flatten(1)
    return Packed(whole, scale.squeeze(1)) if name == "int8" else Packed(pack_int4(whole), scale)


def unpack(packed: Packed, name: str) -> Tensor:
    """The float32 numbers that a stored matrix stands for, `[R, C]`."""
    values, scale = packed
    if scale is None:
        return values.float()
    if storage(name) != "int4":
        return values.float() * scale[:, None]
    whole = unpack_int4(values).float()
    return (whole.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)


def empty_packed(rows: int, columns: int, name: str, group_size: int | None) -> Packed:
    """Zeros in the shapes and dtypes of a format, to load stored numbers into; raises ConfigError as `pack` does."""
    name = storage(name)
    group = _group(name, columns, group_size)
    values = torch.zeros(rows, columns // 2 if name == "int4" else columns, dtype=STORED_DTYPES[name])
    if name == "bf16":
        return Packed(values, None)
    return Packed(values, torch.ones(rows, columns // group) if name == "int4" else torch.ones(rows))


def _group(name: str, columns: int, group_size: int | None) -> int:
    if name != "int4":
        return columns
    group = columns if group_size is None else group_size
    if group < 1 or columns % group or columns % 2:
        raise ConfigError(f"group_size is {group}; allowed: what divides {columns}, an even number of columns")
    return group


def pack_int4(values: Tensor) -> Tensor:
    """Whole numbers -8..7 `[R, C]` int8 as `[R, C / 2]` uint8, the even column in the low half."""
    halves = values.view(torch.uint8) & 0xF
    return halves[:, 0::2] | (halves[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of `pack_int4`."""
    halves = torch.stack([packed & 0xF, packed >> 4], -1).flatten(1)
    return (halves ^ 8).view(torch.int8) - 8


def sqnr_db(exact: Tensor, found: Tensor) -> float:
    """Signal to quantisation noise, ``10 log10(sum exact^2 / sum (exact - found)^2)``, in decibel; inf if equal."""
    exact, found = exact.detach().double(), found.detach().double()
    noise = (exact - found).square().sum()
    if float(noise) == 0.0:
        return math.inf
    return float(10.0 * torch.log10(exact.square().sum() / noise))


def round_rows(rows: Tensor, name: str = "int8") -> tuple[Tensor, Tensor]:
    """Round each row `[M, K]` to int8 or fp8 with scale ``max|row| / 127`` or ``/ 448``; the rows and scale `[M, 1]`.

    What a row becomes depends on nothing but the row.
    """
    scale = rows.abs().amax(1, keepdim=True).clamp_min_(_SMALLEST_PEAK).div_(LARGEST[name])
    values = rows / scale
    return (values.round_().to(torch.int8) if name == "int8" else values.to(FLOAT8)), scale


def int8_matmul(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows @ matrix.T`` of int8 `[M, K]` and `[N, K]`, exact in int32 (VNNI instructions on a CPU that has them)."""
    if rows.shape[1] == 1:
        # torch 2.13 returns other numbers for one column on a CPU.
        return rows.int() * matrix.int().T
    if rows.device.type != "cuda":
        return torch._int_mm(rows, matrix.T)
    if matrix.shape[0] % _CUDA_MULTIPLE or matrix.shape[1] % _CUDA_MULTIPLE:
        raise NotSupportedError(
            f"a product with an int8 matrix of {matrix.shape[0]} x {matrix.shape[1]} on a CUDA device; allowed:"
            f" multiples of {_CUDA_MULTIPLE}. Quantise this run with 'int8' instead of 'int8-dynamic'"
        )
    missing = max(0, _CUDA_ROWS - rows.shape[0])
    return torch._int_mm(F.pad(rows, (0, 0, 0, missing)), matrix.T)[: rows.shape[0]]


def fp8_matmul(rows: Tensor, matrix: Tensor) -> Tensor:
    """``rows @ matrix.T`` of fp8 `[M, K]` and `[N, K]` in float32; on CUDA devices with their fp8 product.

    Elsewhere the numbers are multiplied in float32, which is the same up to the order of the sum. Raises
    NotSupportedError for a CUDA device without fp8, and for sizes it cannot multiply.
    """
    if rows.device.type != "cuda":
        return rows.float() @ matrix.float().T
    able = torch.cuda.get_device_capability(rows.device)
    if able < FP8_CAPABILITY:
        raise NotSupportedError(
            f"fp8 products need compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]}, this device has"
            f" {able[0]}.{able[1]}. Quantise this run with 'fp8' instead of 'fp8-dynamic', or serve it on a CPU"
        )
    if matrix.shape[0] % _FP8_MULTIPLE or matrix.shape[1] % _FP8_MULTIPLE:
        raise NotSupportedError(
            f"a product with an fp8 matrix of {matrix.shape[0]} x {matrix.shape[1]} on a CUDA device; allowed:"
            f" multiples of {_FP8_MULTIPLE}. Quantise this run with 'fp8' instead of 'fp8-dynamic'"
        )
    # Scales of rows are multiplied afterwards: with them the product itself gives no float32.
    one = rows.new_ones((), dtype=torch.float32)
    return torch._scaled_mm(rows, matrix.T, scale_a=one, scale_b=one, out_dtype=torch.float32)


class QuantizedLinear(nn.Module):
    """``x W^T + b`` with W stored in a `LayerFormat`.

    ``weight`` is what the stored numbers stand for, in float32: whatever reads weights instead of calling the layer
    (kernels, exporters) computes with those, without the rounding of inputs that dynamic formats and bfloat16 add. Not
    for training.
    """

    values: Tensor
    scale: Tensor | None
    bias: Tensor
    dense: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor, layer_format: LayerFormat) -> None:
        super().__init__()
        self.format = layer_format
        self.out_features = packed.values.shape[0]
        self.in_features = packed.values.shape[1] * (2 if layer_format.format == "int4" else 1)
        self.register_buffer("values", packed.values)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("bias", bias.detach().float())
        self.register_buffer("dense", None, persistent=False)
        self._unpack()

    @classmethod
    def empty(cls, inputs: int, outputs: int, layer_format: LayerFormat) -> QuantizedLinear:
        """A layer of zeros, to load a state into; raises ConfigError for a group size that does not divide inputs."""
        packed = empty_packed(outputs, inputs, layer_format.format, layer_format.group_size)
        return cls(packed, torch.zeros(outputs), layer_format)

    @property
    def dynamic(self) -> bool:
        """Whether inputs are rounded to what the weights are stored in."""
        return self.format.format.endswith("-dynamic")

    @property
    def weight(self) -> Tensor:
        """W `[out, in]` in float32; unpacked anew at each use where the layer does not compute in float32."""
        if self.dense is not None and self.dense.dtype == torch.float32:
            return self.dense
        return unpack(Packed(self.values, self.scale), self.format.format)

    def forward(self, rows: Tensor, first: int = 0) -> Tensor:
        """`[..., in]` -> `[..., out - first]`, the outputs from ``first`` on."""
        if self.dense is not None and self.dense.dtype == torch.float32:
            return F.linear(rows, self.dense[first:], self.bias[first:])
        flat = rows.reshape(-1, self.in_features)
        if flat.shape[0] <= _ROWS_AT_A_TIME:
            found = self._multiply(flat, first)
        else:
            found = flat.new_empty(flat.shape[0], self.out_features - first)
            for into, part in zip(found.split(_ROWS_AT_A_TIME), flat.split(_ROWS_AT_A_TIME), strict=True):
                into.copy_(self._multiply(part, first))
        return found.view(*rows.shape[:-1], self.out_features - first)

    def _multiply(self, rows: Tensor, first: int) -> Tensor:
        if self.dense is not None:
            # Adding the float32 bias lifts the product to float32.
            return F.linear(rows.to(self.dense.dtype), self.dense[first:]) + self.bias[first:]
        assert self.scale is not None
        name = storage(self.format.format)
        rounded, row_scale = round_rows(rows, name)
        multiply = int8_matmul if name == "int8" else fp8_matmul
        product = torch.mul(multiply(rounded, self.values[first:]), row_scale)
        return torch.addcmul(self.bias[first:], product, self.scale[first:])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format.format}"

    def _unpack(self) -> None:
        if not self.dynamic:
            # A normal tensor, though loading may run in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                dense = unpack(Packed(self.values, self.scale), self.format.format)
                self.dense = dense.to(getattr(torch, self.format.compute))

    def _load_from_state_dict(self, *arguments: object) -> None:
        super()._load_from_state_dict(*arguments)
        self._unpack()


def outputs_from(layer: nn.Module, rows: Tensor, first: int) -> Tensor:
    """The outputs of a linear layer from ``first`` on, without the others where that saves work."""
    if isinstance(layer, QuantizedLinear):
        return layer(rows, first)
    if type(layer) is nn.Linear:
        return F.linear(rows, layer.weight[first:], layer.bias[first:])
    # A layer of training that stands for a linear one, whose weight is not what it multiplies by.
    return layer(rows)[..., first:]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a model that are not quantised, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def give_layer_formats(model: nn.Module, quantization: QuantizationConfig) -> None:
    """Replace the named linear layers by empty ones in their formats; ConfigError names a layer that is none."""
    layers = linear_layers(model)
    for name, layer_format in quantization.layers.items():
        if name not in layers:
            raise ConfigError(f"quantization.layers names {name!r}; the model's linear layers are {', '.join(layers)}")
        layer = layers[name]
        try:
            empty = QuantizedLinear.empty(layer.in_features, layer.out_features, layer_format)
        except ConfigError as error:
            raise ConfigError(f"quantization.layers.{name}: {error}") from None
        model.set_submodule(name, empty)
