"""What a sweep will measure: engines, step counts, batch sizes and seeds, checked against the run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from adrec.errors import ConfigError, nearest

DEFAULT_STEPS = (1, 2, 4, 8, 16, 32)
BASELINE_ENGINE = "reference"
ACCURACY_ENGINE = "cached"


@dataclass(frozen=True)
class Plan:
    """Checked axes of a sweep; ratios are to ``baseline_engine`` at ``baseline_steps``, which are among them."""

    engines: tuple[str, ...]
    steps: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    exact_steps: int
    accuracy_engine: str
    baseline_engine: str
    baseline_steps: int
    notices: tuple[str, ...] = ()


def make_plan(
    engines: Sequence[str],
    steps: Sequence[int] | None,
    batch_sizes: Sequence[int],
    seeds: Sequence[int],
    *,
    exact_steps: int,
    known_engines: Collection[str],
) -> Plan:
    """Check the axes; ConfigError names the value, the allowed range and the way out.

    ``steps`` `None` means 1, 2, 4, ... up to the model's own count. The baseline is the reference engine if
    it is among ``engines``, else the first of them.
    """
    for name in engines:
        if name not in known_engines:
            allowed = ", ".join(sorted(known_engines))
            raise ConfigError(f"--engines {name!r}: no such engine{nearest(name, known_engines)}; allowed: {allowed}")
    for axis, values in (("--engines", engines), ("--batch-sizes", batch_sizes), ("--seeds", seeds)):
        if not values:
            raise ConfigError(f"{axis}: the list is empty; give at least one value")
    wanted = [each for each in DEFAULT_STEPS if each <= exact_steps] if steps is None else list(steps)
    for count in wanted:
        if not 1 <= count <= exact_steps:
            raise ConfigError(
                f"--steps {count}: allowed are 1 to {exact_steps}, the number of steps that the run was "
                "trained with; choose values in that range"
            )
    for size in batch_sizes:
        if size < 1:
            raise ConfigError(f"--batch-sizes {size}: a batch has at least 1 user; choose values from 1 upwards")
    for seed in seeds:
        if seed < 0:
            raise ConfigError(f"--seeds {seed}: a seed is 0 or larger")
    notices = []
    if exact_steps not in wanted:
        notices.append(f"{exact_steps} steps are measured as well: every row is compared with the exact result")
        wanted.append(exact_steps)
    baseline = BASELINE_ENGINE if BASELINE_ENGINE in engines else engines[0]
    if baseline != BASELINE_ENGINE:
        notices.append(f"ratios are to {baseline!r} at {exact_steps} steps, as 'reference' is not measured")
    return Plan(
        engines=tuple(dict.fromkeys(engines)),
        steps=tuple(sorted(set(wanted))),
        batch_sizes=tuple(sorted(set(batch_sizes))),
        seeds=tuple(dict.fromkeys(seeds)),
        exact_steps=exact_steps,
        accuracy_engine=ACCURACY_ENGINE if ACCURACY_ENGINE in known_engines else engines[0],
        baseline_engine=baseline,
        baseline_steps=exact_steps,
        notices=tuple(notices),
    )
