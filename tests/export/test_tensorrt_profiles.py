"""Optimisation profiles: what is read, what is refused, what is left uncovered, and which one serves a request."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adrec.engines.tensorrt.profiles import (
    Profile,
    Range,
    check_profiles,
    choose_profile,
    padded_size,
    parse_profile,
    uncovered,
)
from adrec.errors import ConfigError

sizes = st.integers(1, 12)
ranges = st.tuples(sizes, sizes, sizes).map(sorted).map(lambda each: Range(min=each[0], opt=each[1], max=each[2]))
boxes = st.lists(
    st.tuples(ranges, ranges).map(lambda pair: Profile(ranges={"batch": pair[0], "length": pair[1]})),
    min_size=1,
    max_size=4,
)


def test_a_profile_is_read_in_order_and_prints_as_it_was_given() -> None:
    profile = parse_profile(" batch=2:64:512, length=1:8:50")
    assert list(profile.ranges) == ["batch", "length"]
    assert profile.ranges["batch"] == Range(min=2, opt=64, max=512)
    assert str(profile) == "batch=2:64:512,length=1:8:50"
    assert parse_profile(str(profile)) == profile
    assert profile.shape(("batch", "length", 16), "opt") == (64, 8, 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch=1:2", "has 'batch=1:2'; expected DIM=MIN:OPT:MAX"),
        ("batch=1:1:1;length=1:2:3", "expected DIM=MIN:OPT:MAX"),
        ("", "has ''; expected"),
        ("batch=4:2:8", "has 'batch=4:2:8'; allowed: 1 <= min <= opt <= max"),
        ("batch=1:9:8", "has 'batch=1:9:8'; allowed: 1 <= min <= opt <= max"),
        ("batch=0:1:8", "allowed: 1 <= min"),
        ("batch=1:1:1,batch=1:1:2", "names 'batch' twice"),
    ],
)
def test_what_is_no_profile_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_profile(text)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no --profile was given, and the graph has dynamic dimensions: batch, length"),
        (["batch=1:1:1,lenght=1:8:50"], r"'lenght' \(did you mean 'length'\?\); allowed: batch, length"),
        (["batch=1:1:1"], "leaves out length; give every dimension a range"),
        (["batch=1:1:1,length=1:8:50"] * 2, "was given twice"),
    ],
)  # fmt: skip
def test_profiles_must_fit_the_graph(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_profiles([parse_profile(text) for text in texts], ["batch", "length"])


def test_a_graph_of_fixed_shapes_takes_no_profile() -> None:
    check_profiles([], [])
    with pytest.raises(ConfigError, match="none, the graph has fixed shapes"):
        check_profiles([parse_profile("batch=1:1:1")], [])


def test_gaps_are_reported() -> None:
    profiles = [parse_profile("batch=1:1:1,length=1:8:50"), parse_profile("batch=4:8:16,length=1:8:40")]
    assert uncovered(profiles) == ["batch 2 to 3, length 1 to 50", "batch 4 to 16, length 41 to 50"]
    assert uncovered(profiles[:1], {"length": (1, 60)}) == ["batch 1 to 1, length 51 to 60"]
    assert uncovered(profiles[:1]) == []


@given(boxes)
def test_every_size_is_covered_or_reported(profiles: list[Profile]) -> None:
    reported = [
        {name: tuple(map(int, span.split(" to "))) for name, span in (part.split(" ", 1) for part in gap.split(", "))}
        for gap in uncovered(profiles)
    ]
    names = ("batch", "length")
    spans = [
        range(min(p.ranges[name].min for p in profiles), max(p.ranges[name].max for p in profiles) + 1)
        for name in names
    ]
    for size in itertools.product(*spans):
        asked = dict(zip(names, size, strict=True))
        inside = [all(gap[name][0] <= asked[name] <= gap[name][1] for name in names) for gap in reported]
        assert sum(inside) == (0 if any(profile.covers(asked) for profile in profiles) else 1)


def test_the_profile_with_the_nearest_opt_serves_a_request() -> None:
    profiles = [parse_profile(text) for text in ("batch=1:1:32", "batch=2:16:64", "batch=1:400:512")]
    assert [choose_profile(profiles, {"batch": size}) for size in (1, 3, 20, 64, 65, 512)] == [0, 0, 1, 1, 2, 2]


def test_a_request_that_no_profile_covers_names_the_nearest() -> None:
    profiles = [parse_profile("batch=1:1:1,length=1:8:50"), parse_profile("batch=2:64:512,length=1:16:40")]
    with pytest.raises(ConfigError, match=r"of batch 33, length 41; the nearest is 'batch=2:64:512,length=1:16:40'"):
        choose_profile(profiles, {"batch": 33, "length": 41})
    with pytest.raises(ConfigError, match=r"40' \(others: 'batch=1:1:1,length=1:8:50'\)\. Split the request"):
        choose_profile(profiles, {"batch": 33, "length": 41})
    with pytest.raises(ConfigError, match="the nearest is 'batch=1:1:1,length=1:8:50'"):
        choose_profile(profiles, {"batch": 1, "length": 51})


@given(boxes, sizes, sizes, st.integers(0, 6))
def test_a_length_is_padded_to_the_nearest_that_is_covered(
    profiles: list[Profile], batch: int, length: int, more: int
) -> None:
    wanted = length + more
    covered = [
        width
        for width in range(length, 20)
        if any(profile.covers({"batch": batch, "length": width}) for profile in profiles)
    ]
    asked = {"batch": batch, "length": length}
    if not covered:
        with pytest.raises(ConfigError, match=f"no profile covers a request of batch {batch}, length {length}; the"):
            padded_size(profiles, asked, "length", wanted)
        return
    width = padded_size(profiles, asked, "length", wanted)
    assert width in covered
    assert abs(width - wanted) == min(abs(each - wanted) for each in covered)


def test_without_a_profile_nothing_is_covered() -> None:
    with pytest.raises(ConfigError, match="the engine has no profile, and the request has batch 2, length 3"):
        padded_size([], {"batch": 2, "length": 3}, "length", 8)
