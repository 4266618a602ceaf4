"""Which kernels, shapes and dtypes a command works on, from the text of its options."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch

from adrec.errors import ConfigError, nearest
from kernels.inventory import Case, Entry, Shape, entries

ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn"}
CUSTOM, SMALL = "custom", "small"
MAY_BE_ZERO = frozenset({"bias", "denoiser_blocks", "dropout_percent", "pads"})
"""Sizes of what a kernel can go without; any other is 1 at least."""
SMALL_SIZES: Shape = {"users": 8, "tokens": 64, "items": 500, "steps": 2}


def choose_cases(
    kernel: str = "*", shape: str | None = None, dtype: str | None = None, known: Sequence[Entry] | None = None
) -> list[Case]:
    """Cases of the kernels that match a glob, in the order of the list; by default at every shape and dtype.

    shape: names of shapes, ``paper,wide``, or sizes that replace those of each kernel's first shape, ``users=512``.
    dtype: ``float32,bf16``. Raises ConfigError for what matches nothing, naming what there is.
    """
    chosen = choose_entries(kernel, known)
    dtypes = None if dtype is None else choose_dtypes(dtype, chosen)
    shapes = choose_shapes(shape, chosen)
    cases = [
        Case(entry, name, sizes, storage)
        for entry in chosen
        for name, sizes in shapes[entry.name].items()
        for storage in entry.dtypes
        if dtypes is None or storage in dtypes
    ]
    if not cases:
        raise ConfigError(f"no kernel matches --kernel {kernel}, --shape {shape} and --dtype {dtype} together")
    return cases


def choose_twins(
    kernel: str = "*", shape: str | None = None, dtype: str | None = None, *, small: bool = False
) -> list[Case]:
    """`choose_cases` for a CPU, where twins run in place of kernels: by default the paper's shape, in float32 only.

    small: a few users and items instead, for the least that exercises everything.
    """
    chosen = choose_cases(kernel, shape or "paper", dtype or "float32")
    if not small:
        return chosen
    return [replace(case, shape_name=SMALL, shape=_replaced(case.shape, SMALL_SIZES)) for case in chosen]


def choose_entries(kernel: str = "*", known: Sequence[Entry] | None = None) -> list[Entry]:
    """Entries whose name matches a glob; raises ConfigError with the nearest names when there is none."""
    everything = entries() if known is None else known
    chosen = [entry for entry in everything if fnmatchcase(entry.name, kernel)]
    if not chosen:
        names = [entry.name for entry in everything]
        close = difflib.get_close_matches(kernel.strip("*?"), names, n=3, cutoff=0.5)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise ConfigError(f"--kernel {kernel} matches no kernel{hint}; there are: {', '.join(names)}")
    return chosen


def choose_dtypes(text: str, chosen: Sequence[Entry]) -> list[torch.dtype]:
    """Parse storage dtypes; raises ConfigError for one that none of the kernels stores."""
    known = {dtype_name(dtype): dtype for entry in chosen for dtype in entry.dtypes}
    return [known[pick(ALIASES.get(name, name), known, "--dtype")] for name in _parts(text)]


def choose_shapes(text: str | None, chosen: Sequence[Entry]) -> dict[str, Mapping[str, Shape]]:
    """Shapes of each kernel, by its name; a kernel without a named shape has none of it."""
    if text is None:
        return {entry.name: entry.shapes for entry in chosen}
    if "=" in text:
        sizes = _sizes(text, chosen)
        custom = {entry.name: _replaced(next(iter(entry.shapes.values())), sizes) for entry in chosen}
        for name, shape in custom.items():
            _check_heads(text, name, shape)
        return {name: {CUSTOM: shape} for name, shape in custom.items()}
    known = {name for entry in chosen for name in entry.shapes}
    # The names of some shapes hold commas.
    names = [text] if text in known else pick_all(text, sorted(known), "--shape")
    return {entry.name: {name: entry.shapes[name] for name in names if name in entry.shapes} for entry in chosen}


def pick(name: str, known: Collection[str], option: str) -> str:
    """Return the name; raises ConfigError with the nearest and all of them when it is empty or not known."""
    # The names of some shapes hold commas.
    there_are = ("; " if any("," in each for each in known) else ", ").join(known)
    if not name:
        raise ConfigError(f"{option}: a name is empty; there are: {there_are}")
    if name not in known:
        raise ConfigError(f"{option} {name} is not known{nearest(name, known)}; there are: {there_are}")
    return name


def pick_all(text: str, known: Collection[str], option: str) -> list[str]:
    """Parse comma-separated names; see `pick`."""
    return [pick(name, known, option) for name in _parts(text)]


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``, without torch's prefix."""
    return str(dtype).removeprefix("torch.")


def sizes_text(shape: Shape) -> str:
    """``users=512 width=128``."""
    return " ".join(f"{name}={size}" for name, size in shape.items())


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def _sizes(text: str, chosen: Sequence[Entry]) -> dict[str, int]:
    known = sorted({size for entry in chosen for size in next(iter(entry.shapes.values()))})
    found: dict[str, int] = {}
    for part in _parts(text):
        name, _, value = part.partition("=")
        pick(name, known, "--shape: size")
        if not value.isdecimal():
            raise ConfigError(f"--shape {part}: expected a whole number, such as {name}=512")
        least = 0 if name in MAY_BE_ZERO else 1
        if int(value) < least:
            raise ConfigError(f"--shape {part}: allowed is {least} or more, such as {name}=512")
        if name in found:
            raise ConfigError(f"--shape {text}: {name} is given twice; give it once, and other sizes in another run")
        found[name] = int(value)
    return found


def _check_heads(text: str, kernel: str, shape: Shape) -> None:
    width, heads = shape.get("width", 0), shape.get("heads", 1)
    if width % heads:
        raise ConfigError(
            f"--shape {text}: {kernel} has {heads} heads, which do not divide its width of {width}; allowed are"
            f" multiples of {heads}, such as width={heads * 32}, or give heads= too"
        )


def _replaced(shape: Shape, sizes: Mapping[str, int]) -> Shape:
    return {name: sizes.get(name, size) for name, size in shape.items()}
