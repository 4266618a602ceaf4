"""The search against brute force on made-up costs, resumption after an interrupt anywhere, and budgets nobody meets."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_techniques import ForgetConfig, IdleConfig, ScaleConfig, ServeConfig

from adrec.config import ModelConfig
from adrec.errors import ConfigError, DataError, NotSupportedError
from compress.budget import Budget, Timing
from compress.candidates import Candidate, CandidateBook, CandidateRecord, Option, Space, fingerprint_of
from compress.search import Assessment, Search
from compress.technique import Accuracy, CompressionError, Reading, Receipt
from compress.workshop import PRECISIONS, space_of

SPACE = Space(
    students=(Option("teacher"), Option("student", (ForgetConfig(keep=9),), frozenset({"teacher"}))),
    precisions=(
        Option("float32"),
        Option("weights", (ScaleConfig(),), frozenset({"float32"})),
        Option("table", (IdleConfig(),), frozenset({"float32"})),
        Option("both", (ScaleConfig(), IdleConfig()), frozenset({"float32", "weights", "table"})),
    ),
    step_stages={steps: (ServeConfig(times=tuple(range(steps))),) for steps in (1, 2, 4)},
    engines=("slow", "fast"),
)
CANDIDATES = list(SPACE.candidates())
BUDGET = Budget.parse("p99<=10ms@batch=1")


@pytest.fixture(scope="module", autouse=True)
def unsynchronised() -> Iterator[None]:
    """Thousands of records are written here, and a busy disk takes its time for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@dataclass
class World:
    """Losses that add up along the axes, and times that fall with the steps: what the search assumes.

    interval: half the width of a loss's interval. asked: what was assessed and measured, in order.
    """

    student: float = 0.0
    precision: dict[str, float] = field(default_factory=dict)
    steps: dict[int, float] = field(default_factory=dict)
    interval: float = 0.0
    speed: dict[tuple[str, str, str], float] = field(default_factory=dict)
    per_step: float = 1.0
    asked: list[tuple[str, str]] = field(default_factory=list)
    interrupt_after: int | None = None

    def loss(self, candidate: Candidate) -> float:
        own = self.precision.get(candidate.precision, 0.0)
        if candidate.precision == "both":
            own += max(self.precision.get("weights", 0.0), self.precision.get("table", 0.0))
        return own + self.steps.get(candidate.steps, 0.0) + (self.student if candidate.student == "student" else 0.0)

    def milliseconds(self, candidate: Candidate) -> float:
        base = self.speed.get((candidate.student, candidate.precision, candidate.engine), 1.0)
        return base + self.per_step * candidate.steps

    def assess(self, candidate: Candidate) -> Assessment:
        self._ask("assess", candidate)
        kept = 100.0 - self.loss(candidate)
        reading = Reading(value=kept, low=kept - self.interval, high=kept + self.interval)
        accuracy = Accuracy(users=9, metrics={"NDCG@20": reading}, kept=reading)
        receipt = Receipt(
            settings={"technique": "toy"}, bytes_before=9, bytes_after=3, accuracy=accuracy,
            parameters_before=9, parameters_after=9,
        )  # fmt: skip
        return Assessment((receipt,), 3, 9)

    def measure(self, candidate: Candidate, batches: Sequence[int]) -> dict[int, Timing]:
        self._ask("measure", candidate)
        time = self.milliseconds(candidate)
        return {
            batch: Timing(batch=batch, p50_ms=time * batch, p95_ms=time * batch, p99_ms=time * batch, calls=3)
            for batch in batches
        }

    def _ask(self, what: str, candidate: Candidate) -> None:
        if self.interrupt_after is not None and len(self.asked) >= self.interrupt_after:
            raise KeyboardInterrupt
        self.asked.append((what, str(candidate)))


def search_of(world: World, *, max_loss: float = 1.0, budget: Budget = BUDGET, **more: object) -> Search:
    def fingerprint(candidate: Candidate) -> str:
        return fingerprint_of({"run": "toy"}, SPACE.stages(candidate), candidate.engine)

    return Search(SPACE, budget, max_loss, world.assess, world.measure, fingerprint, **more)


LOSS = st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.5, 4.0])
TIME = st.floats(0.1, 20.0)
WORLDS = st.builds(
    World,
    student=LOSS,
    precision=st.fixed_dictionaries(dict.fromkeys(("float32", "weights", "table", "both"), LOSS)).map(
        # What reduces more loses no less.
        lambda losses: losses | {name: losses[name] + losses["float32"] for name in ("weights", "table")}
    ),
    steps=st.tuples(LOSS, LOSS, LOSS).map(lambda each: dict(zip((1, 2, 4), sorted(each, reverse=True), strict=True))),
    interval=st.sampled_from([0.0, 0.3, 1.0]),
    speed=st.fixed_dictionaries(
        dict.fromkeys(
            itertools.product(("teacher", "student"), ("float32", "weights", "table", "both"), ("slow", "fast")), TIME
        )
    ),
    per_step=st.sampled_from([0.0, 0.01, 2.0]),
)


@settings(max_examples=100, deadline=None)
@given(world=WORLDS, limit=st.floats(0.5, 20.0))
def test_pruning_never_loses_the_optimum_under_its_assumptions(
    tmp_path_factory: pytest.TempPathFactory, world: World, limit: float
) -> None:
    budget = Budget.parse(f"p99<={limit!r}ms@batch=1")
    search = search_of(world, budget=budget)
    feasible = [each for each in CANDIDATES if world.loss(each) <= 1.0 and world.milliseconds(each) <= limit]
    records = search.run(CandidateBook(tmp_path_factory.mktemp("search") / "candidates.jsonl"))
    assert len(records) == len(CANDIDATES)
    if not feasible:
        with pytest.raises(CompressionError, match="nearest is"):
            search.choose(records)
        return
    chosen = search.choose(records).candidate
    assert chosen in feasible
    assert world.milliseconds(chosen) == min(map(world.milliseconds, feasible))


def test_a_loss_is_not_combined_further(tmp_path: Path) -> None:
    world = World(precision={"weights": 5.0}, steps={1: 0.0, 2: 0.0, 4: 0.0})
    records = search_of(world).run(CandidateBook(tmp_path / "candidates.jsonl"))
    assert not any("both" in name for _, name in world.asked)
    both = [record for record in records if record.candidate.precision == "both"]
    assert {record.status for record in both} == {"pruned"}
    assert both[0].detail == "teacher, 1 step, weights, slow already loses 5.00 %"
    # One step keeps the accuracy elsewhere, so that two and four are not looked at.
    assert all(", 1 step," in name for _, name in world.asked if "weights" not in name)
    assert len(world.asked) < 2 * len(CANDIDATES) / 2


def test_a_loss_that_may_be_chance_prunes_nothing(tmp_path: Path) -> None:
    world = World(precision={"weights": 1.2}, interval=0.3)
    search_of(world).run(CandidateBook(tmp_path / "candidates.jsonl"))
    assert any("both" in name for _, name in world.asked)


def test_without_pruning_everything_is_measured(tmp_path: Path) -> None:
    world = World(student=50.0)
    records = search_of(world, prune=False).run(CandidateBook(tmp_path / "candidates.jsonl"))
    assert {record.status for record in records} == {"measured"}
    assert len(world.asked) == 2 * len(CANDIDATES)


def test_a_search_resumes_after_an_interrupt_at_every_point(tmp_path: Path) -> None:
    whole = World(student=0.4, precision={"table": 0.5}, steps={1: 0.7, 2: 0.3, 4: 0.0})
    uninterrupted = search_of(whole).run(CandidateBook(tmp_path / "whole.jsonl"))
    assert len(whole.asked) > 20
    for place in range(len(whole.asked)):
        path = tmp_path / f"{place}.jsonl"
        first = replace(whole, asked=[], interrupt_after=place)
        with pytest.raises(KeyboardInterrupt):
            search_of(first).run(CandidateBook(path))
        second = replace(whole, asked=[])
        assert search_of(second).run(CandidateBook(path)) == uninterrupted
        measured = {name for what, name in first.asked if what == "measure"}
        assert not measured & {name for _, name in second.asked}, "nothing is measured twice"
        third = replace(whole, asked=[])
        before = path.read_bytes()
        assert search_of(third).run(CandidateBook(path)) == uninterrupted
        assert (third.asked, path.read_bytes()) == ([], before)


def test_another_budget_measures_only_what_is_missing(tmp_path: Path) -> None:
    world, path = World(), tmp_path / "candidates.jsonl"
    first = search_of(world).run(CandidateBook(path))
    world.asked.clear()
    wider = Budget.parse("p50<=9ms@batch=1 and >=1users/s@batch=8")
    second = search_of(world, budget=wider).run(CandidateBook(path))
    assert {what for what, _ in world.asked} == {"measure"}
    assert len(world.asked) == sum(record.status == "measured" for record in first)
    assert set(second[0].timings) == {1, 8}


def test_a_candidate_pruned_later_keeps_its_measurement(tmp_path: Path) -> None:
    world, path = World(student=2.0), tmp_path / "candidates.jsonl"
    search_of(world, max_loss=3.0, prune=False).run(CandidateBook(path))
    world.asked.clear()
    search_of(world, max_loss=0.0).run(CandidateBook(path))
    search_of(world, max_loss=3.0).run(CandidateBook(path))
    assert world.asked == []


def test_records_of_something_else_are_not_used(tmp_path: Path) -> None:
    world, path = World(), tmp_path / "candidates.jsonl"
    search_of(world).run(CandidateBook(path))
    asked = len(world.asked)
    other = replace(search_of(world), fingerprint=lambda candidate: f"another run, {candidate}")
    other.run(CandidateBook(path))
    assert len(world.asked) == 2 * asked


def test_a_half_written_last_line_is_dropped_with_a_note(tmp_path: Path) -> None:
    world, path = World(), tmp_path / "candidates.jsonl"
    records = search_of(world).run(CandidateBook(path))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    book = CandidateBook(path)
    assert book.notes == [f"{path}: a half-written last line (40 bytes) was dropped"]
    assert path.read_bytes() == b"".join(lines[:-1])
    assert search_of(world).run(book) == records


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: schema version None, this adrec reads 1"),
        ('{"schema_version": 2}', "line 2: schema version 2, this adrec reads 1; delete the line"),
        ('{"schema_version": 1, "kind": "candidate"}', "line 2: fingerprint is missing; delete the line"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "candidates.jsonl"
    record = CandidateRecord(fingerprint="f", candidate=CANDIDATES[0], status="pruned")
    CandidateBook(path).write(record)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        CandidateBook(path)


def test_a_candidate_that_fails_is_a_record_and_is_tried_again(tmp_path: Path) -> None:
    class Unsupported(World):
        def measure(self, candidate: Candidate, batches: Sequence[int]) -> dict[int, Timing]:
            if candidate.engine == "fast":
                raise NotSupportedError("the engine is not installed; pip install 'adrec[fast]'")
            return super().measure(candidate, batches)

    path = tmp_path / "candidates.jsonl"
    search = search_of(Unsupported())
    records = search.run(CandidateBook(path))
    failed = [record for record in records if record.status == "failed"]
    assert {record.candidate.engine for record in failed} == {"fast"}
    assert "pip install" in failed[0].detail
    assert search.choose(records).candidate.engine == "slow"
    assert {record.status for record in search_of(World()).run(CandidateBook(path))} == {"measured", "pruned"}
    with pytest.raises(CompressionError, match=r"no candidate could be measured; .*teacher, 1 step, float32, fast"):
        search.choose(failed)


def test_no_budget_met_names_the_nearest_and_by_how_much(tmp_path: Path) -> None:
    world = World(speed={("student", "table", "fast"): 0.5})
    search = search_of(world, budget=Budget.parse("p99<=1.2ms@batch=1 and >=1users/s@batch=1"))
    records = search.run(CandidateBook(tmp_path / "candidates.jsonl"))
    message = r"nearest is student, 1 step, table, fast with p99 1\.5 ms at batch 1, 25 % beyond p99<=1\.2ms@batch=1"
    with pytest.raises(CompressionError, match=message):
        search.choose(records)


def test_no_accuracy_kept_names_the_nearest(tmp_path: Path) -> None:
    world = World(precision={"float32": 2.5, "weights": 9.0, "table": 9.0})
    search = search_of(world)
    records = search.run(CandidateBook(tmp_path / "candidates.jsonl"))
    with pytest.raises(CompressionError, match=r"at most 1 % .*nearest is teacher, 1 step, float32, slow, .* 2\.50 %"):
        search.choose(records)


def test_candidates_that_may_be_equally_fast_are_told_apart_by_size(tmp_path: Path) -> None:
    search = search_of(World())
    records = search.run(CandidateBook(tmp_path / "candidates.jsonl"))[:3]

    def timed(place: int, size: int, value: float, low: float, high: float) -> CandidateRecord:
        ratio = Reading(value=value, low=low, high=high)
        timing = Timing(batch=1, p50_ms=2, p95_ms=2, p99_ms=2, calls=3, ratio=ratio)
        return records[0].model_copy(update={"timings": {1: timing}, "bytes": size, "detail": str(place)})

    fast, equal, slower = timed(0, 9, 1.0, 0.98, 1.02), timed(1, 3, 1.03, 1.01, 1.05), timed(2, 1, 1.1, 1.05, 1.2)
    assert search.choose([fast, equal, slower]) == equal
    assert search.choose([fast, slower]) == fast


def test_a_wide_interval_lets_nothing_in_that_is_surely_slower_than_float32(tmp_path: Path) -> None:
    """The fastest was timed badly; what takes twice as long as the plain model is not its equal for that."""
    search = search_of(World())
    records = search.run(CandidateBook(tmp_path / "candidates.jsonl"))[:3]

    def timed(precision: str, size: int, value: float, low: float, high: float) -> CandidateRecord:
        timing = Timing(batch=1, p50_ms=2, p95_ms=2, p99_ms=2, calls=3, ratio=Reading(value=value, low=low, high=high))
        candidate = records[0].candidate.model_copy(update={"precision": precision})
        return records[0].model_copy(update={"candidate": candidate, "timings": {1: timing}, "bytes": size})

    noisy, plain, small = (
        timed("weights", 4, 0.9, 0.5, 3.0),
        timed("float32", 8, 1.0, 0.99, 1.01),
        timed("table", 2, 2.0, 1.9, 2.1),
    )
    chosen = search.choose([noisy, plain, small])
    assert chosen == noisy
    verdicts = {record.candidate.precision: record.detail for record in search.judge([noisy, plain, small], chosen)}
    assert verdicts == {
        "weights": "chosen",
        "float32": "not surely faster than the choice at batch 1, and 2.00 times as large",
        "table": "another that keeps the accuracy is surely faster at batch 1",
    }
    assert search.choose([plain, small]) == plain
    assert search.judge([plain, small], plain)[1].detail == "takes 2.00 times as long as the choice at batch 1"


def test_every_record_says_why_it_was_not_chosen(tmp_path: Path) -> None:
    world = World(
        precision={"float32": 0.0, "weights": 1.2, "table": 0.0},
        interval=0.5,
        speed={("teacher", "float32", "fast"): 0.5, ("teacher", "table", "fast"): 40.0},
    )
    search = search_of(world)
    records = search.run(CandidateBook(tmp_path / "candidates.jsonl"))
    chosen = search.choose(records)
    judged = {str(record.candidate): record.detail for record in search.judge(records, chosen)}
    assert judged["teacher, 1 step, float32, fast"] == "chosen"
    assert judged["teacher, 1 step, float32, slow"] == "takes 1.33 times as long as the choice at batch 1"
    assert judged["teacher, 1 step, weights, fast"] == "loses 1.20 % of the validation NDCG@20; allowed: 1 %"
    assert judged["teacher, 1 step, table, fast"] == "p99 41 ms at batch 1, 310 % beyond p99<=10.0ms@batch=1"
    assert judged["teacher, 2 steps, float32, fast"] == "1 step keeps the accuracy"
    assert all(judged.values())


def test_auto_holds_every_precision_against_float32_and_bf16() -> None:
    model = ModelConfig(items=9, width=8, heads=2, timesteps=4, schedule="cosine")
    space = space_of(model, ["teacher"], ["auto"], [1], ["cached"])
    assert {option.label for option in space.precisions} == set(PRECISIONS)
    assert space.precisions[0].label == "float32"
    less = {option.label: set(option.less) for option in space.precisions}
    assert less["bf16"] == {"float32", "bf16 table"}
    assert less["int8"] == {"float32", "int8 table", "int8 weights"}
    assert less["int4"] == {"float32", "int8 table"}
    some = space_of(model, ["teacher"], ["int4", "float32"], [1], ["cached"])
    assert [option.label for option in some.precisions] == ["float32", "int4"]
    (layers, table) = some.precisions[1].stages
    assert layers.model_dump(include={"format", "fallback"}) == {"format": "int4", "fallback": "int8"}
    assert table.model_dump(include={"format"}) == {"format": "int8"}
    with pytest.raises(ConfigError, match=r"holds 'aut' \(did you mean 'auto'\?\); allowed: auto, float32, bf16 table"):
        space_of(model, ["teacher"], ["aut"], [1], ["cached"])


def test_the_front_has_no_dominated_record(tmp_path: Path) -> None:
    world = World(student=0.6, precision={"table": 0.2}, speed={("student", "float32", "fast"): 0.1})
    search = search_of(world, prune=False)
    records = search.run(CandidateBook(tmp_path / "candidates.jsonl"))
    front = search.front(records)
    points = [(search.time(record)[0], record.loss) for record in front]
    assert points == sorted(points)
    assert [loss for _, loss in points] == sorted((loss for _, loss in points), reverse=True)
    for record in records:
        assert any(cost <= search.time(record)[0] and loss <= record.loss for cost, loss in points)


def test_stages_come_in_the_order_student_steps_precision() -> None:
    candidate = Candidate(student="student", precision="both", steps=2, engine="fast")
    assert SPACE.stages(candidate) == (ForgetConfig(keep=9), ServeConfig(times=(0, 1)), ScaleConfig(), IdleConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"students": (Option("a"), Option("a"))}, "students: 'a' is there twice"),
        ({"precisions": (Option("b", less=frozenset({"a"})), Option("a"))}, "'b' must come after a"),
        ({"engines": ()}, r"engines are \[\]; name one or more"),
        ({"engines": ("fast", "fast")}, "each once"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SPACE, **change)


def test_a_student_that_fixes_its_steps_has_one_candidate_a_precision() -> None:
    space = replace(SPACE, students=(Option("teacher"), Option("flat", (ForgetConfig(),), frozenset({"teacher"}), 0)))
    flat = [candidate for candidate in space.candidates() if candidate.student == "flat"]
    assert [(each.precision, each.steps) for each in flat if each.engine == "fast"] == [
        ("float32", 0), ("weights", 0), ("table", 0), ("both", 0)
    ]  # fmt: skip
    assert space.stages(flat[0]) == (ForgetConfig(),)
    assert space.reduces_as_much(flat[0], CANDIDATES[0])
    assert str(flat[0]) == "flat, float32, slow"
