"""The profile: stages add up on a clock of the test's own, results stay as they are, floors and traces hold."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest
import torch
import typer
from typer.testing import CliRunner

from adrec.config import ModelConfig, ServingConfig
from adrec.engines import make_engine
from adrec.errors import AdrecError, DataError
from bench.archive import read_any
from bench.cli import register
from bench.kernels.catalogues import random_histories, random_model
from bench.kernels.engine_sweep import request_cost
from bench.profiling.floors import Rates, measure_rates, stage_costs
from bench.profiling.page import page_of, sentences
from bench.profiling.profile import Profiler, summarise
from bench.profiling.record import ProfileRecord
from bench.profiling.stages import StageClock, probed, stage_times, step_name, timed_request
from bench.profiling.steps import advice, steps_table
from bench.profiling.trace import check_trace, clean_trace, record_trace
from bench.recommendation import budget_table
from bench.record import Estimate, TradeoffRecord
from bench.subject import load_subject
from bench.timing import Clock, TimingProtocol
from kernels.inventory import Cost

CPU = torch.device("cpu")
RATES = Rates(gflops=100.0, gigabytes_per_second=10.0, dtype="float32")
STEPS = 4


def ticking_clock() -> StageClock:
    """A clock that is a millisecond later each time it is looked at."""
    times = count()
    return StageClock(CPU, lambda: float(next(times)))


def test_stages_of_a_request_are_disjoint_and_add_up() -> None:
    clock = ticking_clock()
    engine = make_engine("cached", random_model(40, 16, STEPS, CPU))
    timed_request(engine, clock, random_histories(3, 40), 5, STEPS, 0)
    # Every stage looks twice at the clock, so a stage that holds n others takes 2 n + 1 ms.
    assert clock.spent_ms["sample"] == 2 * STEPS + 1
    assert clock.spent_ms["represent"] == 2 * (STEPS + 2) + 1
    found = stage_times(clock.spent_ms, STEPS)
    assert list(found) == [
        "copy in", "checks and row keys", "encode",
        *(step_name(row) for row in (3, 2, 1, 0)),
        "noise and update", "score", "top-k", "copy out",
    ]  # fmt: skip
    assert {name: value for name, value in found.items() if value != 1.0} == {
        "checks and row keys": 2 * (STEPS + 2) + 1 - 1 - (2 * STEPS + 1),
        "noise and update": STEPS + 1.0,
        "top-k": 0.0,
    }


@pytest.mark.parametrize("name", ["cached", "reference"])
@pytest.mark.parametrize("overrides", [{}, {"denoiser": "mlp"}, {"condition_dropout": 0.1, "guidance_scale": 2.0}])
def test_a_probed_request_returns_what_an_engine_recommends(
    tiny_model: Any, name: str, overrides: dict[str, Any]
) -> None:
    engine = make_engine(name, tiny_model(timesteps=STEPS, **overrides))
    histories = random_histories(5, 40)
    clock = ticking_clock()
    found = timed_request(engine, clock, histories, 7, 3, 1)
    expected = engine.recommend(histories, 7, steps=3, seed=1)
    assert torch.equal(found.items, expected.items)
    assert torch.equal(found.scores, expected.scores)
    assert not {"encode", "sample", "_denoiser"} & set(vars(engine))
    # With guidance a step calls the denoiser twice.
    calls = 2 if overrides.get("guidance_scale") else 1
    assert [clock.spent_ms[step_name(row)] for row in range(4)] == [calls, calls, calls, 0]


def test_probes_are_removed_after_an_error() -> None:
    engine = make_engine("cached", random_model(40, 16, STEPS, CPU))
    with pytest.raises(RuntimeError, match="halfway"), probed(engine, ticking_clock()):
        raise RuntimeError("halfway")
    assert "encode" not in vars(engine)


def test_an_engine_of_fused_steps_is_one_stage() -> None:
    spent = {"copy in": 1.0, "represent": 9.0, "encode": 3.0, "sample": 5.0, "score": 4.0, "score and top-k": 3.0}
    found = stage_times({**spent, "copy out": 1.0}, STEPS)
    assert found["denoise, all steps"] == 5.0
    # The scores alone may take longer than with the top k, by chance; no stage is negative.
    assert (found["score"], found["top-k"], found["checks and row keys"]) == (3.0, 0.0, 1.0)
    stages = summarise([found], STEPS, {"denoise step": Cost(bytes=0, flops=10**8)}, RATES)
    denoise = next(stage for stage in stages if stage.name == "denoise, all steps")
    # 0.1 GFLOP at 100 GFLOP/s is 1 ms a step.
    assert (denoise.calls, denoise.floor_ms, denoise.floor_bound) == (STEPS, pytest.approx(4.0), "compute")
    assert denoise.floor_fraction == pytest.approx(0.8)
    assert sum(stage.share for stage in stages) == pytest.approx(1.0)


@pytest.mark.parametrize(("tokens", "users", "steps", "items"), [(3, 3, 1, 7), (4100, 512, 32, 12_000)])
def test_costs_of_stages_are_those_of_the_request(tokens: int, users: int, steps: int, items: int) -> None:
    config = ModelConfig(items=items, width=128)
    costs = stage_costs(config, tokens, users, 4)
    whole = request_cost(tokens, users, steps, items, 128, torch.float32)
    assert costs["encode"].flops + steps * costs["denoise step"].flops + costs["score"].flops == whole.flops
    assert costs["encode"].bytes + costs["score"].bytes == whole.bytes
    assert stage_costs(ModelConfig(items=items, denoiser="mlp"), tokens, users, 4) == {}


def test_floors_follow_from_rates() -> None:
    assert RATES.floor_ms(Cost(bytes=10**7, flops=10**6)) == (pytest.approx(1.0), "memory")
    assert RATES.floor_ms(Cost(bytes=1, flops=2 * 10**8)) == (pytest.approx(2.0), "compute")


def test_rates_are_work_over_time(monkeypatch: pytest.MonkeyPatch, counting_clock: Clock) -> None:
    monkeypatch.setattr("bench.profiling.floors.PRODUCT_SIZE", 8)
    monkeypatch.setattr("bench.profiling.floors.COPY_BYTES", 4096)
    protocol = TimingProtocol(seconds=1e-6, rounds=2, rounds_slow=2, rounds_most=2, warmup_calls=1)
    found = measure_rates(CPU, torch.float32, counting_clock, protocol)
    # The clock counts a millisecond a call.
    assert found.gflops == pytest.approx(2 * 8**3 / 1e6)
    assert found.gigabytes_per_second == pytest.approx(4096 / 1e6)


def test_trace_opens_and_names_no_place(tmp_path: Path) -> None:
    engine = make_engine("cached", random_model(40, 16, STEPS, CPU))
    histories, clock = random_histories(3, 40), StageClock(CPU)
    path = tmp_path / "trace.json"
    events = record_trace(lambda: timed_request(engine, clock, histories, 5, STEPS, 0), path, CPU)
    text = path.read_text()
    assert str(tmp_path) not in text
    content = json.loads(text)
    check_trace(content)
    assert len(content["traceEvents"]) == events
    ranges = {each["name"]: each for each in content["traceEvents"] if each.get("cat") == "user_annotation"}
    assert {"encode", "sample", "score", "copy out", *(step_name(row) for row in range(STEPS))} <= set(ranges)
    sample = ranges["sample"]
    for row in range(STEPS):
        inner = ranges[step_name(row)]
        assert sample["ts"] <= inner["ts"]
        assert inner["ts"] + inner["dur"] <= sample["ts"] + sample["dur"] + 1e-3
    # Steps run from the last row of the table to the first.
    starts = [ranges[step_name(row)]["ts"] for row in reversed(range(STEPS))]
    assert starts == sorted(starts)
    assert sum(each["ph"] == "X" and each["name"].startswith("aten::") for each in content["traceEvents"]) > STEPS


def test_a_trace_is_cleaned_and_checked() -> None:
    event = {"ph": "X", "name": "aten::mm", "ts": 1.0, "dur": 2.0, "pid": 1, "tid": 1}
    process = {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/home/somebody/python"}}
    cleaned = clean_trace({"traceName": "/home/somebody/x.json", "traceEvents": [event, process]})
    assert cleaned == {"traceEvents": [event, {**process, "args": {"name": "adrec"}}]}
    for broken, message in (
        ({}, "no list of events"),
        ({"traceEvents": []}, "no list of events"),
        ({"traceEvents": [{"ph": "X", "name": "a", "ts": 1, "pid": 1}]}, "event 0 .* lacks dur, tid"),
        ({"traceEvents": [{**event, "dur": -1}]}, "negative time"),
        ({"traceEvents": [{"name": "a"}]}, "lacks ph"),
    ):
        with pytest.raises(DataError, match=message):
            check_trace(broken)


@pytest.fixture(scope="module")
def record(tiny_run: Path) -> ProfileRecord:
    subject = load_subject(tiny_run, None, "test", None)
    return Profiler(subject, "cached", None, 8, CPU, 1e-6, "adrec bench profile").measure(rates=RATES)[0]


def test_record_and_page(record: ProfileRecord) -> None:
    assert (record.steps, record.rounds, len(record.step_ms_p50)) == (4, 5, 4)
    denoise = next(stage for stage in record.stages if stage.name == "denoise, all steps")
    assert denoise.calls == 4
    assert all(stage.floor_fraction is None or stage.floor_fraction > 0 for stage in record.stages)
    page = page_of(record)
    assert re.findall(r'(?:src|href)="([^"]*)"', page.split("<script>")[0]) == [
        "data:,", "#study-1", "#study-1-charts", "#study-1-table", "#study-1-protocol",
        "#study-1", "#study-1-charts", "#study-1-stages", "#study-1-steps", "#study-1-roofline", "#study-1-table",
        "#study-1-protocol", "#again",
    ]  # fmt: skip
    figures = json.loads(page.split('id="figures">')[1].split("</script>")[0])
    assert [len(figure["data"]) for figure in figures[0]["all"]] == [2, 2, 3]
    assert figures[0]["all"][0]["data"][0]["y"][-1] == "copy in"
    for figure in figures[0]["all"]:
        # Plotly refuses a key that it does not know; the page takes an empty `line` for one to colour.
        traces = [{key: value for key, value in trace.items() if value != {}} for trace in figure["data"]]
        plotly.graph_objects.Figure(data=traces, layout=figure["layout"])
    assert page.count("<figure ") == 3
    assert page.count("<tr>") == 1 + len(record.stages)
    assert "Most is to be gained in" in " ".join(sentences(record))
    evil = record.model_copy(update={"dataset_name": "</script><b>"})
    assert "</script><b>" not in page_of(evil)


def test_a_run_is_profiled_as_it_is_served(tiny_run: Path) -> None:
    subject = load_subject(tiny_run, None, "test", None)
    plan = ServingConfig(sampler="ddim", times=(0, 3))
    subject.run = replace(subject.run, settings=subject.run.settings.model_copy(update={"serving": plan}))
    for asked, steps, sampler in ((None, 2, "ddim"), (3, 3, None)):
        found, _ = Profiler(subject, "cached", asked, 8, CPU, 1e-6, "adrec bench profile").measure(rates=RATES)
        assert (found.steps, found.sampler, len(found.step_ms_p50)) == (steps, sampler, steps)


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["bench", *arguments])


def test_command_line(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.profiling.profile.measure_rates", lambda *arguments: RATES)
    out = tmp_path / "deep" / "profile"
    done = invoke(
        "profile", str(tiny_run), "--batch", "4", "--steps", "2", "--seconds", "0.001", "--quiet", "--out", str(out)
    )
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == [
        "profile-charts", "profile.html", "profile.jsonl", "profile.md", "trace.json"
    ]  # fmt: skip
    (kept,) = read_any(out / "profile.jsonl")
    assert isinstance(kept, ProfileRecord)
    assert kept.steps == 2
    for arguments, message in (
        (["--steps", "5"], "--steps 5: allowed are 1 to 4"),
        (["--engine", "cachet"], "did you mean 'cached'"),
        (["--seconds", "nan"], "--seconds nan"),
    ):
        failed = invoke("profile", str(tiny_run), "--quiet", "--out", str(tmp_path / "none"), *arguments)
        with pytest.raises(AdrecError, match=message):
            raise failed.exception


def test_steps_in_one_command(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "steps"
    done = invoke(
        "profile-steps", str(tiny_run), "--batch", "4", "--steps", "1,2", "--seconds-per-cell", "0.000001", "--users",
        "9", "--quiet", "--out", str(out), "--budget-ms", "1e9",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Knee: cached" in done.output
    assert "Within 1e+09 ms: cached" in done.output
    assert {path.name for path in out.iterdir()} == {
        "tradeoff.jsonl", "report.html", "report.md", "report.png", "report-charts"
    }  # fmt: skip


def row(base: TradeoffRecord, steps: int, latency: float, ndcg: float, width: float) -> TradeoffRecord:
    assert base.timing is not None
    assert base.accuracy is not None
    estimate = Estimate(value=ndcg, low=ndcg - width, high=ndcg + width)
    metrics = {**base.accuracy.metrics_percent, "NDCG@20": estimate}
    return base.model_copy(
        update={
            "steps": steps,
            "timing": base.timing.model_copy(update={"latency_ms_p50": latency}),
            "accuracy": base.accuracy.model_copy(update={"metrics_percent": metrics}),
        }
    )


def test_advice_names_the_knee_and_says_when_it_is_noise(tiny_records: list[TradeoffRecord]) -> None:
    base = next(each for each in tiny_records if each.engine == "cached" and each.batch_size_users == 8)
    rows = [row(base, 1, 1.0, 5.0, 0.1), row(base, 2, 2.0, 9.0, 0.1), row(base, 4, 16.0, 10.0, 0.1)]
    found = " ".join(advice(rows, 3.0))
    assert "Knee: cached, 2 steps (2 ms, NDCG@20 9.00 %)" in found
    assert "Within 3 ms: cached, 2 steps" in found
    assert "within the noise" not in found
    wide = [row(base, steps, float(steps), 5.0 + steps / 100, 2.0) for steps in (1, 2, 4)]
    assert "the knee is within the noise" in " ".join(advice(wide))
    assert "Within 0.1 ms: none of 3 settings" in " ".join(advice(rows, 0.1))
    assert steps_table([*rows, tiny_records[0]]).row_count == 4
    assert len(advice([tiny_records[0]])) == 1


def test_advice_without_what_is_kept_names_no_knee(tiny_records: list[TradeoffRecord]) -> None:
    base = next(each for each in tiny_records if each.engine == "cached" and each.batch_size_users == 8)
    rows = [row(base, steps, float(steps), 0.0, 0.0) for steps in (1, 2, 4)]
    unknown = [
        each.model_copy(update={"accuracy": each.accuracy.model_copy(update={"ndcg20_kept_percent": None})})
        for each in rows
        if each.accuracy
    ]
    (sentence,) = advice(unknown, 3.0)
    assert sentence.startswith("No row says what it keeps of the exact step count's NDCG@20, which is 0 or was not")
    assert budget_table(unknown)[0][2] == "none"
    low = [
        each.model_copy(
            update={"accuracy": each.accuracy.model_copy(
                update={"ndcg20_kept_percent": Estimate(value=90.0, low=80.0, high=95.0)})}
        )
        for each in rows
        if each.accuracy
    ]  # fmt: skip
    assert advice(low)[0] == "No setting surely keeps 99 % of the exact step count's NDCG@20: nothing is chosen."
