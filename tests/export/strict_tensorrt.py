"""A stand-in for `tensorrt` and `tensorrt.plugin` made from a surface file: it checks the SHAPE of calls and no more.

Unknown classes, members, methods, keywords, numbers and types of arguments raise, as does writing what is read-only.
Every accepted call and write is kept in ``log``. What a call returns is scripted, or made up from its signature.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).resolve().parent
VERSIONS = ("10_16", "11_1", "11_4")
Reply = Callable[..., Any]


class SurfaceError(AssertionError):
    """A call that the real module does not have."""


@dataclass(frozen=True)
class Signature:
    """One overload: (name, type, has a default) of each parameter but self, and the type returned."""

    parameters: tuple[tuple[str, str, bool], ...]
    returns: str

    @classmethod
    def parse(cls, line: str) -> Signature:
        match = re.fullmatch(r"\w+\((.*)\)(?: -> (.+))?", line)
        assert match, line
        parameters = []
        for part in _split(match[1]):
            declaration, equals, _ = part.partition(" = ")
            name, _, kind = declaration.partition(":")
            if name != "self":
                parameters.append((name.strip(), kind.strip(), bool(equals)))
        return cls(tuple(parameters), (match[2] or "None").strip())


def _split(text: str, separator: str = ",") -> list[str]:
    """Split at separators that are in no bracket."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "[(<") - (character in "])>")
        if character == separator and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


class StrictModule(ModuleType):
    """A module that has the names it was given."""

    def __init__(self, name: str, version: str) -> None:
        super().__init__(name)
        self.__version__ = version

    def __getattr__(self, name: str) -> Any:
        raise SurfaceError(f"{self.__name__} {self.__version__} has no '{name}' in the surface")


class StrictTensorRT(StrictModule):
    """The module, with `plugin`.

    replies: by ``Class.method`` or ``Class.property``, called with the object and the arguments by name; functions of
    `plugin` by ``plugin.function``.
    """

    def __init__(self, version: str, replies: Mapping[str, Reply] | None = None) -> None:
        surface = json.loads((FOLDER / f"tensorrt_surface_{version}.json").read_text(encoding="utf-8"))
        super().__init__("tensorrt", surface["version"])
        self.log: list[tuple[str, tuple[Any, ...]]] = []
        self.replies = dict(replies or {})
        self.kinds: dict[str, type] = {}
        self.enums: dict[str, type[enum.Enum]] = {
            name: enum.IntEnum(name.split(".")[-1], members) for name, members in surface["enums"].items()
        }
        plugin, self.plugin = surface["plugin"], StrictModule("tensorrt.plugin", surface["version"])
        self.kinds |= {name: type(name, (), {}) for name in plugin["private"]}
        for module, classes in ((self, surface["classes"]), (self.plugin, plugin["classes"])):
            for name, described in classes.items():
                self.kinds[name] = self._make_class(name, described)
                setattr(module, name, self.kinds[name])
        for name, lines in plugin["functions"].items():
            setattr(self.plugin, name, self._make_function(f"plugin.{name}", lines))
        for name, kind in self.enums.items():
            owner, _, last = name.rpartition(".")
            setattr(self.kinds[owner] if owner else self, last, kind)

    def calls(self, name: str) -> list[tuple[Any, ...]]:
        """Arguments of all calls of a method, or values written to a property (``Class.property=``)."""
        return [arguments for called, arguments in self.log if called == name]

    def make(self, name: str) -> Any:
        """An object of a class as TensorRT would return it, without calling its constructor."""
        return self.kinds[name].__new__(self.kinds[name])

    def _make_class(self, name: str, described: Mapping[str, Any]) -> type:
        properties: Mapping[str, Mapping[str, bool]] = described["properties"]
        module = self

        def read(instance: Any, member: str) -> Any:
            if member not in properties:
                raise SurfaceError(f"{name} has no '{member}'")
            if f"{name}.{member}" in module.replies:
                return module.replies[f"{name}.{member}"](instance)
            return instance.__dict__.get(member, 0)

        def write(instance: Any, member: str, value: Any) -> None:
            if type(instance) is not kind:
                # A subclass of ours, such as a logger, has attributes of its own.
                object.__setattr__(instance, member, value)
                return
            if member not in properties:
                raise SurfaceError(f"{name} has no '{member}' to write")
            if not properties[member]["writable"]:
                raise SurfaceError(f"{name}.{member} is read-only")
            module.log.append((f"{name}.{member}=", (value,)))
            instance.__dict__[member] = value

        methods = {
            method: self._make_function(f"{name}.{method}", lines) for method, lines in described["methods"].items()
        }
        if "__init__" not in methods:

            def refuse(instance: Any, *arguments: Any) -> None:
                raise SurfaceError(f"{name} cannot be constructed")

            methods["__init__"] = refuse
        if name == "IHostMemory":
            methods["__bytes__"] = lambda instance: module.replies["bytes"](instance)
        bases = tuple(self.kinds[base] for base in described.get("bases", ()))
        kind = type(name, bases, {**methods, "__getattr__": read, "__setattr__": write})
        return kind

    def _make_function(self, name: str, lines: Sequence[str]) -> Callable[..., Any]:
        """A function, or a method where the signatures begin with self."""
        overloads = [Signature.parse(line) for line in lines]
        assert overloads, f"{name} has no signature"
        bound = "(self" in lines[0]

        def call(*given: Any, **keywords: Any) -> Any:
            instance, arguments = (given[:1], given[1:]) if bound else ((), given)
            reasons = []
            for signature in overloads:
                try:
                    values = self._bind(signature, arguments, keywords)
                except SurfaceError as error:
                    reasons.append(str(error))
                    continue
                self.log.append((name, tuple(values.values())))
                reply = self.replies.get(name)
                return reply(*instance, **values) if reply else self._made_up(signature.returns)
            raise SurfaceError(f"{name}{arguments}{keywords or ''}: {'; '.join(reasons)}")

        return call

    def _bind(self, signature: Signature, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
        names = [name for name, _, _ in signature.parameters]
        if len(arguments) > len(names):
            raise SurfaceError(f"takes {len(names)} arguments")
        values = dict(zip(names, arguments, strict=False))
        for name, value in keywords.items():
            if name not in names or name in values:
                raise SurfaceError(f"unexpected keyword '{name}'")
            values[name] = value
        for name, kind, optional in signature.parameters:
            if name not in values:
                if not optional:
                    raise SurfaceError(f"'{name}' is missing")
            elif not self._fits(values[name], kind):
                raise SurfaceError(f"'{name}' is a {type(values[name]).__name__}, not {kind}")
        return values

    def _fits(self, value: Any, kind: str) -> bool:
        if " | " in kind and len(choices := _split(kind, "|")) > 1:
            return any(self._fits(value, choice) for choice in choices)
        if kind.startswith("tuple["):
            return isinstance(value, tuple) and all(self._fits(each, kind[6:-1]) for each in value)
        if kind == "object":
            return True
        if kind in self.enums:
            return type(value) is self.enums[kind]
        whole = isinstance(value, int) and not isinstance(value, bool | enum.Enum)
        if kind in ("typing.SupportsInt", "int"):
            return whole
        if kind in ("str", "bool", "tuple", "list"):
            return type(value).__name__ == kind
        if kind == "typing_extensions.Buffer":
            return isinstance(value, bytes | bytearray | memoryview)
        if kind == "Dims":
            return isinstance(value, tuple | list) and all(type(size) is int for size in value)
        if kind in self.kinds:
            return isinstance(value, self.kinds[kind])
        raise SurfaceError(f"the stand-in does not know the type {kind}")

    def _made_up(self, kind: str) -> Any:
        if kind in self.kinds:
            return self.make(kind)
        if kind in self.enums:
            return next(iter(self.enums[kind]))
        return {"bool": True, "int": 0, "str": "", "None": None}.get(kind, [] if kind.startswith("list") else None)
