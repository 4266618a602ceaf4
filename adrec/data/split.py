"""Which interactions are trained on and which are the targets of evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adrec.data.interactions import Interactions
from adrec.errors import DataError

BOUND_RULE = "must be a quantile strictly between 0 and 1, or an ISO date such as 2014-06-30"
TICKS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


class Split(str, Enum):
    """Evaluation protocols; the value is what ``--split`` takes."""

    LEAVE_ONE_OUT = "leave-one-out"
    TEMPORAL = "temporal"


@dataclass(frozen=True)
class SplitPositions:
    """Positions in each user's sequence, `[U]` int64 each; -1 where a user has no example.

    protocol: the options that made them, resolved, as stored in ``dataset.json``.
    """

    train_lengths: NDArray[np.int64]
    validation_positions: NDArray[np.int64]
    test_positions: NDArray[np.int64]
    protocol: dict[str, object]


def leave_one_out(lengths: NDArray[np.int64]) -> SplitPositions:
    """The last interaction is the test target, the one before it the validation target, the rest is training.

    A user with fewer than 3 interactions is kept for training only and is no evaluation example.
    """
    evaluated = lengths >= 3
    return SplitPositions(
        np.where(evaluated, lengths - 2, lengths),
        np.where(evaluated, lengths - 2, -1),
        np.where(evaluated, lengths - 1, -1),
        {
            "split": Split.LEAVE_ONE_OUT.value,
            "short_users": "fewer than 3 interactions: training only, no evaluation example",
        },
    )


def temporal(interactions: Interactions, unit: str, validation_from: str, test_from: str) -> SplitPositions:
    """Train before ``validation_from``; evaluate on the first interaction in each of the two later windows.

    Validation target: a user's first interaction at or after ``validation_from`` and before ``test_from``;
    test target: the first at or after ``test_from``; the history is everything of the user before the target.
    A target without any history is no example. Each bound is an ISO date (UTC), or a quantile of all
    interaction times: a number between 0 and 1, giving the smallest time with at least that share of the
    interactions at or before it. Raises: `DataError` for bounds that cannot be read or leave a part empty.
    """
    times = interactions.times
    starts = [_bound(name, text, times, unit) for name, text in (("validation", validation_from), ("test", test_from))]
    if not starts[0] < starts[1]:
        raise DataError(
            f"--validation-from {validation_from} is {show_time(starts[0], unit)} and --test-from "
            f"{test_from} is {show_time(starts[1], unit)}: validation must start before the test; "
            "choose bounds further apart"
        )
    offsets = interactions.offsets()
    # Times ascend within a user, so counting those before a bound gives the first position at or after it.
    before = [np.add.reduceat(times < start, offsets[:-1], dtype=np.int64) for start in starts]
    train_lengths, test = before
    validation = np.where((train_lengths < test) & (train_lengths > 0), train_lengths, -1)
    test = np.where((test < np.diff(offsets)) & (test > 0), test, -1)
    span = f"the data spans {show_time(times.min(), unit)} to {show_time(times.max(), unit)}"
    for part, count in (
        ("training interaction", train_lengths.sum()),
        ("validation example", (validation >= 0).sum()),
        ("test example", (test >= 0).sum()),
    ):
        if count == 0:
            raise DataError(
                f"no {part} with --validation-from {validation_from} ({show_time(starts[0], unit)}) and "
                f"--test-from {test_from} ({show_time(starts[1], unit)}); {span}: move the bounds"
            )
    protocol: dict[str, object] = {
        "split": Split.TEMPORAL.value,
        "validation_from": validation_from,
        "test_from": test_from,
        "validation_start": starts[0].item(),
        "test_start": starts[1].item(),
        "short_users": "a target without history is no example",
    }
    return SplitPositions(train_lengths, validation, test, protocol)


def _bound(name: str, text: str, times: NDArray[Any], unit: str) -> Any:
    try:
        quantile = float(text)
    except ValueError:
        return times.dtype.type(_date(name, text) * TICKS_PER_SECOND[unit])
    if not 0 < quantile < 1:
        raise DataError(f"--{name}-from {text}: {BOUND_RULE}")
    return np.quantile(times, quantile, method="inverted_cdf")


def _date(name: str, text: str) -> int:
    try:
        # Python 3.10 does not read the suffix Z.
        date = datetime.fromisoformat(text.removesuffix("Z"))
    except ValueError:
        raise DataError(f"--{name}-from {text!r}: {BOUND_RULE}") from None
    return int((date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp())


def show_time(time: Any, unit: str) -> str:
    """Return a time as an ISO date for messages, or the number where it is outside the calendar."""
    seconds = float(time) / TICKS_PER_SECOND[unit]
    try:
        return datetime.fromtimestamp(seconds, tz=timezone.utc).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return str(time)
