"""Budgets of time: ``p99 <= 2 ms @ batch=1 and >= 5000 users/s @ batch=512``, read, printed and compared."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from adrec.config import StrictModel
from adrec.errors import ConfigError
from compress.technique import Reading

Quantity = Literal["p50", "p95", "p99", "throughput"]
_TERM = re.compile(
    r"(?:(?P<quantile>p50|p95|p99)\s*<=\s*(?P<time>[0-9.e+-]+)\s*(?P<unit>ms|us|µs)"
    r"|(?:throughput\s*)?>=\s*(?P<rate>[0-9.e+-]+)\s*users/s)"
    r"\s*@\s*batch\s*=\s*(?P<batch>\d+)",
    re.IGNORECASE,
)
_EXAMPLES = "p99<=2ms@batch=1, p50<=900us@batch=1, >=5000users/s@batch=512; several joined by 'and'"
MOST_USERS = 2**20


class Timing(StrictModel):
    """Latency of a batch of ``batch`` users in milliseconds; ratio: its time over that of a common partner."""

    batch: int = Field(ge=1)
    p50_ms: float = Field(gt=0)
    p95_ms: float = Field(gt=0)
    p99_ms: float = Field(gt=0)
    calls: int = Field(ge=1)
    ratio: Reading | None = None

    @property
    def users_per_second(self) -> float:
        """Users in a second at the median."""
        return 1e3 * self.batch / self.p50_ms


@dataclass(frozen=True)
class Term:
    """One bound: a quantile of the latency in ms, or a throughput in users/s, at a batch size."""

    quantity: Quantity
    limit: float
    batch: int

    def reached(self, timing: Timing) -> float:
        """What a timing has of this quantity, in the unit of the limit."""
        if self.quantity == "throughput":
            return timing.users_per_second
        return {"p50": timing.p50_ms, "p95": timing.p95_ms, "p99": timing.p99_ms}[self.quantity]

    def excess(self, timing: Timing) -> float:
        """How much too slow, as a share of the limit: 0.5 is half as slow again; 0 or less keeps it."""
        value = self.reached(timing)
        return (self.limit / value if self.quantity == "throughput" else value / self.limit) - 1.0

    def __str__(self) -> str:
        if self.quantity == "throughput":
            return f">={self.limit!r}users/s@batch={self.batch}"
        return f"{self.quantity}<={self.limit!r}ms@batch={self.batch}"


@dataclass(frozen=True)
class Budget:
    """Bounds that all must hold. The first one's batch size is where the cheapest candidate is looked for."""

    terms: tuple[Term, ...]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``p50|p95|p99 <= X ms|us @ batch=B`` and ``>= X users/s @ batch=B``, joined by ``and``.

        Raises ConfigError naming the part that is not one of them.
        """
        return cls(tuple(_term(part.strip(), text) for part in re.split(r"\band\b", text, flags=re.IGNORECASE)))

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes to measure, the deciding one first."""
        return tuple(dict.fromkeys(term.batch for term in self.terms))

    def worst(self, timings: Mapping[int, Timing]) -> tuple[Term, float]:
        """The term that is missed by most, and its excess."""
        return max(((term, term.excess(timings[term.batch])) for term in self.terms), key=lambda each: each[1])

    def met(self, timings: Mapping[int, Timing]) -> bool:
        """Whether every term holds."""
        return self.worst(timings)[1] <= 0.0

    def __str__(self) -> str:
        return " and ".join(map(str, self.terms))


def _term(part: str, text: str) -> Term:
    found = _TERM.fullmatch(part)
    if found is None:
        raise ConfigError(f"--budget '{text}': cannot read '{part}'; allowed: {_EXAMPLES}")
    batch = int(found["batch"])
    if not 1 <= batch <= MOST_USERS:
        raise ConfigError(f"--budget '{text}': batch is {batch}; allowed: 1 to {MOST_USERS}")
    try:
        limit = float(found["time"] or found["rate"])
    except ValueError:
        limit = math.nan
    if found["unit"] and found["unit"].lower() != "ms":
        limit /= 1e3
    if not 0.0 < limit < math.inf:
        raise ConfigError(f"--budget '{text}': '{part}' needs a number above 0; allowed: {_EXAMPLES}")
    quantile = found["quantile"]
    quantity: Quantity = "throughput"
    for name in ("p50", "p95", "p99"):
        if quantile and quantile.lower() == name:
            quantity = name
    return Term(quantity, limit, batch)
