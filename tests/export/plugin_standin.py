"""A stand-in for TensorRT that computes with plugins' sizes as it would, and keeps the hooks it is given."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from strict_tensorrt import StrictTensorRT, SurfaceError


class PluginStandIn(StrictTensorRT):
    """hooks: by ``register`` or ``aot_impl``, then by the plugin's identifier."""

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self.hooks: dict[str, dict[str, Callable[..., Any]]] = {"register": {}, "aot_impl": {}}
        self.replies.update(
            {
                "plugin.register": lambda **given: self._keeper("register", given["plugin_id"]),
                "plugin.aot_impl": lambda **given: self._keeper("aot_impl", given["plugin_id"]),
                "plugin.cdiv": lambda first, second: self._computed(lambda a, b: -(-a // b), first, second),
                "plugin.min": lambda first, second: self._computed(min, first, second),
                "plugin.max": lambda first, second: self._computed(max, first, second),
                "plugin.from_shape_expr": lambda shape_expr, dtype: self.descriptor(shape_expr, dtype),
                "ShapeExpr.__init__": lambda size, value=None: vars(size).update(value=value_of(value)),
                "ShapeExpr.__mul__": lambda size, other: self._computed(operator.mul, size, other),
                "ShapeExpr.__floordiv__": lambda size, other: self._computed(operator.floordiv, size, other),
                "ShapeExprs.__getitem__": lambda shape, index: vars(shape)["sizes"][index],
                "TensorDesc.shape_expr": lambda descriptor: vars(descriptor)["shape"],
                "TensorDesc.dtype": lambda descriptor: vars(descriptor)["type"],
                "SymInt32.__init__": lambda size, value=None: vars(size).update(value=value_of(value)),
                "SymIntExprs.__init__": lambda integers, length: vars(integers).update(items=[None] * length),
                "SymIntExprs.__setitem__": lambda integers, index, value: operator.setitem(
                    vars(integers)["items"], index, value
                ),
                # Its defaults.
                "KernelLaunchParams.__init__": lambda parameters, **given: vars(parameters).update(
                    {"grid_x": 1, "grid_y": 1, "block_x": 1, "shared_mem": 0} | given
                ),
            }
        )

    def size(self, value: int | None) -> Any:
        """A `ShapeExpr` as TensorRT gives it; None for one whose value is not known yet."""
        made = self.make("ShapeExpr")
        vars(made)["value"] = value
        return made

    def descriptor(self, shape: Any, dtype: Any) -> Any:
        """A `TensorDesc` of sizes, which may be integers, or of another's shape."""
        if isinstance(shape, tuple):
            sizes = [self.size(each) if isinstance(each, int) else each for each in shape]
            vars(shape := self.make("ShapeExprs"))["sizes"] = sizes
        made = self.make("TensorDesc")
        vars(made).update(shape=shape, type=dtype)
        return made

    def _keeper(self, kind: str, identifier: str) -> Callable[..., Any]:
        def keep(hook: Callable[..., Any]) -> Callable[..., Any]:
            # TensorRT refuses a second plugin of the same name, and a kernel for one that it does not know.
            if (identifier in self.hooks["register"]) == (kind == "register"):
                raise SurfaceError(f"plugin.{kind}: {identifier} is {'known' if kind == 'register' else 'unknown'}")
            self.hooks[kind][identifier] = hook
            return hook

        return keep

    def _computed(self, compute: Callable[[int, int], int], first: Any, second: Any) -> Any:
        if isinstance(first, int) and isinstance(second, int):
            raise SurfaceError("both arguments are integers, which TensorRT's functions refuse")
        values = value_of(first), value_of(second)
        return self.size(None if None in values else compute(*values))


def value_of(size: Any) -> Any:
    """The integer of a symbolic size; None for one that is not known."""
    return size if size is None or isinstance(size, int) else vars(size)["value"]


def values_of(shape: Any) -> list[Any]:
    """The integers of `ShapeExprs`."""
    return [value_of(each) for each in vars(shape)["sizes"]]
