"""The grammar of budgets, round trip and by hand, and what meets one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adrec.errors import ConfigError
from compress.budget import Budget, Term, Timing

TERMS = st.builds(
    Term,
    st.sampled_from(["p50", "p95", "p99", "throughput"]),
    st.floats(1e-9, 1e12, allow_nan=False),
    st.integers(1, 2**20),
)


def timing(batch: int, p50: float, p99: float | None = None) -> Timing:
    return Timing(batch=batch, p50_ms=p50, p95_ms=p50, p99_ms=p50 if p99 is None else p99, calls=3)


@given(st.lists(TERMS, min_size=1, max_size=4).map(tuple))
def test_what_is_printed_reads_back(terms: tuple[Term, ...]) -> None:
    assert Budget.parse(str(Budget(terms))) == Budget(terms)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("p99<=2ms@batch=1", [Term("p99", 2.0, 1)]),
        ("P50 <= 900 US @ BATCH = 16", [Term("p50", 0.9, 16)]),
        (" >= 5e3 users/s @ batch=512 ", [Term("throughput", 5000.0, 512)]),
        ("throughput>=10users/s@batch=2 AND p95<=.5ms@batch=1", [Term("throughput", 10, 2), Term("p95", 0.5, 1)]),
    ],
)
def test_the_grammar(text: str, terms: list[Term]) -> None:
    assert Budget.parse(text).terms == tuple(terms)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p98<=2ms@batch=1", "cannot read 'p98<=2ms@batch=1'; allowed: p99<=2ms@batch=1"),
        ("p99<=2ms", "cannot read 'p99<=2ms'"),
        ("p99<=2@batch=1", "cannot read"),
        ("p99>=2ms@batch=1", "cannot read"),
        ("p99<=2ms@batch=1 and", "cannot read ''"),
        ("", "cannot read ''"),
        ("p99<=0ms@batch=1", "needs a number above 0"),
        ("p99<=1e999ms@batch=1", "needs a number above 0"),
        ("p99<=2..5ms@batch=1", "needs a number above 0"),
        ("p99<=2ms@batch=0", "batch is 0; allowed: 1 to 1048576"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Budget.parse(text)
    assert message in str(caught.value)


def test_every_term_must_hold() -> None:
    budget = Budget.parse("p99<=2ms@batch=1 and >=1000users/s@batch=8")
    assert budget.batches == (1, 8)
    fast, slow = {1: timing(1, 1.0, 2.0), 8: timing(8, 8.0)}, {1: timing(1, 1.0, 2.0), 8: timing(8, 16.0)}
    assert budget.met(fast)
    assert not budget.met(slow)
    # 8 users in 16 ms are 500 users/s, half of what was asked for: 100 % too slow.
    assert budget.worst(slow) == (budget.terms[1], 1.0)
    assert budget.worst({1: timing(1, 1.0, 3.0), 8: timing(8, 8.0)}) == (budget.terms[0], 0.5)
