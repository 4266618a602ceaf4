"""Optimisation profiles: for which batch sizes and lengths an engine is built, and which profile serves a request."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from pydantic import model_validator

from adrec.config import StrictModel
from adrec.errors import ConfigError, nearest

FORM = 'DIM=MIN:OPT:MAX[,DIM=MIN:OPT:MAX...], such as "batch=2:64:512,length=1:8:50"'


class Range(StrictModel):
    """Allowed sizes of one dimension, and the one that kernels are chosen for (opt)."""

    min: int
    opt: int
    max: int

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"{self} is out of order; allowed: 1 <= min <= opt <= max")
        return self

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    def __contains__(self, size: int) -> bool:
        return self.min <= size <= self.max

    def distance(self, size: int) -> float:
        """How far a size is outside, as a ratio; 0 inside."""
        return max(0.0, math.log(self.min / max(size, 1)), math.log(max(size, 1) / self.max))


class Profile(StrictModel):
    """One range for every dynamic dimension of a graph, by name."""

    ranges: dict[str, Range]

    def __str__(self) -> str:
        return ",".join(f"{name}={sizes}" for name, sizes in self.ranges.items())

    def covers(self, sizes: Mapping[str, int]) -> bool:
        return all(size in self.ranges[name] for name, size in sizes.items())

    def shape(self, dimensions: Sequence[int | str], which: str) -> tuple[int, ...]:
        """A tensor's shape at ``which`` of min, opt and max; dimensions: integers, or names of this profile."""
        return tuple(each if isinstance(each, int) else getattr(self.ranges[each], which) for each in dimensions)


def parse_profile(text: str) -> Profile:
    """Read ``batch=1:1:1,length=1:8:50``. Raises ConfigError naming the part that is wrong."""
    ranges: dict[str, Range] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*(\d+):(\d+):(\d+)\s*", part)
        if match is None:
            raise ConfigError(f"--profile has '{part.strip()}'; expected {FORM}")
        name, *sizes = match.groups()
        if name in ranges:
            raise ConfigError(f"--profile names '{name}' twice in '{text}'; give each dimension once")
        low, opt, high = map(int, sizes)
        if not 1 <= low <= opt <= high:
            raise ConfigError(f"--profile has '{part.strip()}'; allowed: 1 <= min <= opt <= max (DIM=MIN:OPT:MAX)")
        ranges[name] = Range(min=low, opt=opt, max=high)
    return Profile(ranges=ranges)


def check_profiles(profiles: Sequence[Profile], dimensions: Iterable[str]) -> None:
    """Raise ConfigError unless every profile has exactly the dynamic dimensions of the graph, and none is there twice.

    dimensions: names of the graph's dynamic dimensions, in any order.
    """
    known = list(dict.fromkeys(dimensions))
    if not profiles and known:
        raise ConfigError(f"no --profile was given, and the graph has dynamic dimensions: {', '.join(known)}")
    for profile in profiles:
        for name in profile.ranges:
            if name not in known:
                allowed = ", ".join(known) or "none, the graph has fixed shapes"
                raise ConfigError(
                    f"--profile '{profile}' names the dimension '{name}'{nearest(name, known)}; allowed: {allowed}"
                )
        missing = [name for name in known if name not in profile.ranges]
        if missing:
            raise ConfigError(f"--profile '{profile}' leaves out {', '.join(missing)}; give every dimension a range")
    for first, second in itertools.combinations(profiles, 2):
        if first.ranges == second.ranges:
            raise ConfigError(f"--profile '{first}' was given twice; give each profile once")


def uncovered(profiles: Sequence[Profile], limits: Mapping[str, tuple[int, int]] | None = None) -> list[str]:
    """Sizes between the smallest and the largest that no profile covers, as text; empty when there is no gap.

    limits: smallest and largest size of a dimension that requests may have, where the profiles do not say it. Adjacent
    sizes are joined along the last dimension.
    """
    if not profiles:
        return []
    names = list(profiles[0].ranges)
    cells: list[list[tuple[int, int]]] = []
    for name in names:
        ranges = [profile.ranges[name] for profile in profiles]
        low, high = min(each.min for each in ranges), max(each.max for each in ranges)
        if limits and name in limits:
            low, high = min(low, limits[name][0]), max(high, limits[name][1])
        edges = sorted({low, high + 1, *(each.min for each in ranges), *(each.max + 1 for each in ranges)})
        cells.append([(first, last - 1) for first, last in itertools.pairwise(edges)])
    found: list[list[tuple[int, int]]] = []
    for cell in itertools.product(*cells):
        if any(profile.covers({name: part[0] for name, part in zip(names, cell, strict=True)}) for profile in profiles):
            continue
        if found and found[-1][:-1] == list(cell[:-1]) and found[-1][-1][1] + 1 == cell[-1][0]:
            found[-1][-1] = (found[-1][-1][0], cell[-1][1])
        else:
            found.append(list(cell))
    return [", ".join(f"{name} {low} to {high}" for name, (low, high) in zip(names, gap, strict=True)) for gap in found]


def size_range(profiles: Iterable[Profile]) -> dict[str, tuple[int, int]]:
    """Smallest and largest size of each dimension over all profiles."""
    found: dict[str, tuple[int, int]] = {}
    for profile in profiles:
        for name, sizes in profile.ranges.items():
            low, high = found.get(name, (sizes.min, sizes.max))
            found[name] = min(low, sizes.min), max(high, sizes.max)
    return found


def choose_profile(profiles: Sequence[Profile], sizes: Mapping[str, int]) -> int:
    """Index of the covering profile whose opt is nearest to a request; ConfigError names the nearest if none covers it.

    sizes: size of each dynamic dimension of the request.
    """

    def away(index: int) -> float:
        return sum(abs(math.log(size / profiles[index].ranges[name].opt)) for name, size in sizes.items())

    covering = [index for index, profile in enumerate(profiles) if profile.covers(sizes)]
    if not covering:
        raise _not_covered(profiles, sizes)
    return min(covering, key=away)


def padded_size(profiles: Sequence[Profile], sizes: Mapping[str, int], name: str, wanted: int) -> int:
    """The size that a dimension is padded to: what a profile covers, at least the request's, nearest to ``wanted``.

    sizes: of every dynamic dimension of the request. name: of the dimension that may be padded. Raises ConfigError, as
    `choose_profile`, where no profile covers the request however it is padded.
    """
    found = []
    for profile in profiles:
        allowed = profile.ranges[name]
        size = max(allowed.min, min(wanted, allowed.max))
        if size >= sizes[name] and profile.covers({**sizes, name: size}):
            found.append(size)
    if not found:
        raise _not_covered(profiles, sizes)
    return min(found, key=lambda size: abs(size - wanted))


def _not_covered(profiles: Sequence[Profile], sizes: Mapping[str, int]) -> ConfigError:
    asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if not profiles:
        return ConfigError(f"the engine has no profile, and the request has {asked}")
    best = min(profiles, key=lambda each: sum(each.ranges[name].distance(size) for name, size in sizes.items()))
    others = [f"'{each}'" for each in profiles if each is not best]
    beside = f" (others: {', '.join(others)})" if others else ""
    return ConfigError(
        f"no profile covers a request of {asked}; the nearest is '{best}'{beside}. Split the request, or export the"
        " engine again with a --profile for it"
    )
