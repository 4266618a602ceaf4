"""The pages in headless Chromium: drawn, filtered, sorted, downloaded, by keyboard, at two widths, offline."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chromium import Tab, find_chromium

from bench.archive import read_any
from bench.json_lines import json_line
from bench.kernels.records import EngineRecord
from bench.profiling.floors import Rates
from bench.profiling.page import page_of
from bench.profiling.profile import Profiler
from bench.record import Estimate, TradeoffRecord
from bench.report import write_report
from bench.subject import load_subject

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed (apt install chromium)")

COMPRESSED = Path(__file__).parents[2] / "bench" / "records" / "compress-ml-100k-cpu.jsonl"
TAB, ENTER, SPACE = ("Tab", 9), ("Enter", 13, "\r"), (" ", 32, " ")
ENGINES = Path(__file__).parents[2] / "bench" / "records" / "engines-beauty-cpu-avx2.jsonl"
VISIBLE = "[...document.querySelectorAll('.rows')[0].querySelectorAll('tbody tr')].filter((row) => !row.hidden)"
TRACES = "[...document.querySelectorAll('.plot')].map((plot) => (plot.data || []).map((trace) => trace.name))"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with Tab(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def report(tiny_records: list[TradeoffRecord], tmp_path_factory: pytest.TempPathFactory) -> Path:
    # An engine of another precision beside the two, and a value that CSV has to quote.
    half = [
        each.model_copy(update={"engine": 'half, "16"', "precision": "float16"})
        for each in tiny_records
        if each.engine == "cached" and each.steps is not None
    ]
    return write_report([*tiny_records, *half], tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def profile(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rates = Rates(gflops=100.0, gigabytes_per_second=10.0, dtype="float32")
    subject = load_subject(tiny_run, None, "test", None)
    record, _ = Profiler(subject, "cached", None, 8, torch.device("cpu"), 1e-6, "adrec bench profile").measure(
        rates=rates
    )
    path = tmp_path_factory.mktemp("profile") / "profile.html"
    path.write_text(page_of(record))
    path.with_suffix(".jsonl").write_text(json_line(record))
    return path


@pytest.fixture(scope="module")
def mixed(tiny_records: list[TradeoffRecord], profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies' worth of sections: trade-offs, a profile, and compressed models, whose table is wide."""
    found = [*tiny_records, *read_any(profile.with_suffix(".jsonl")), *read_any(COMPRESSED)]
    return write_report(found, tmp_path_factory.mktemp("mixed") / "report.html")


def click(tab: Tab, selector: str) -> None:
    tab.run(f"document.querySelector({json.dumps(selector)}).click()")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["report", "profile", "mixed"])
def test_pages_are_drawn_and_fit(
    tab: Tab, name: str, width: int, dark: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    page: Path = request.getfixturevalue(name)
    tab.requests.clear()
    tab.open(page, width, dark=dark)
    plots = tab.run("document.querySelectorAll('.plot').length")
    assert plots == {"report": 6, "profile": 3, "mixed": 11}[name]
    marks = tab.run(
        "[...document.querySelectorAll('.plot')].map((plot) => plot.querySelectorAll('.point, .js-line').length)"
    )
    assert all(count > 0 for count in marks), marks
    assert tab.run("document.querySelectorAll('.none:not([hidden])').length") == 0
    overflow = tab.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow == 0
    if width == 400:
        # The table is wider than the page, and scrolls in its box.
        assert tab.run("(() => { const box = document.querySelector('.rows .scroll');"
                       "return box.scrollWidth > box.clientWidth && box.clientWidth < 400; })()")  # fmt: skip
        assert tab.run("document.querySelectorAll('.main-svg').length") > 0
        widest = tab.run("Math.max(...[...document.querySelectorAll('.main-svg')].map((each) => each.clientWidth))")
        assert 0 < widest < 400
    background = tab.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
    assert set(tab.requests) == {page.as_uri()}
    assert tab.problems == []


def test_filters_hold_for_charts_and_table(tab: Tab, report: Path, tiny_records: list[TradeoffRecord]) -> None:
    tab.open(report)
    everything = tab.run(f"{VISIBLE}.length")
    assert everything == len(tiny_records) + 4
    before = tab.run(TRACES)
    # Accuracy against steps is of one engine.
    for chart in (*before[:2], *before[3:]):
        assert any(trace.startswith("reference") for trace in chart)
    click(tab, 'input[name="engine"][value="reference"]')
    after = tab.run(TRACES)
    assert not any(trace.startswith("reference") for chart in after for trace in chart)
    assert any(trace.startswith("cached") for trace in after[0])
    assert tab.run(f"{VISIBLE}.length") == everything - 6
    assert tab.run("document.querySelector('.count').textContent") == f"{everything - 6} of {everything} rows"
    click(tab, 'input[name="precision"][value="float16"]')
    assert not any("half" in trace for chart in tab.run(TRACES) for trace in chart)
    assert tab.run(f"{VISIBLE}.length") == everything - 10
    click(tab, 'input[name="every"]')
    assert tab.run(f"new Set({VISIBLE}.map((row) => row.dataset.batch)).size") == 2
    select = "document.querySelector('select[name=batch]')"
    tab.run(f"{select}.value = '8'; {select}.dispatchEvent(new Event('change', {{bubbles: true}}))")
    assert tab.run("document.querySelector('figure .title').textContent") == "Accuracy against latency, batch 8"
    assert sorted(tab.run(f"[...new Set({VISIBLE}.map((row) => row.dataset.batch))]")) == ["", "8"]
    for box in ('input[name="engine"][value="cached"]', 'input[name="precision"][value="float32"]'):
        click(tab, box)
    assert tab.run("document.querySelectorAll('.none:not([hidden])').length") > 0
    assert "leave nothing" in tab.run("document.querySelector('.none:not([hidden])').textContent")
    click(tab, ".reset")
    assert tab.run(f"{VISIBLE}.length") == everything
    assert tab.problems == []


def test_records_of_other_kinds_are_filtered_too(tab: Tab, tmp_path: Path) -> None:
    rows = [each for each in read_any(ENGINES) if isinstance(each, EngineRecord)]
    tab.open(write_report(rows, tmp_path / "report.html"))
    assert tab.run(f"{VISIBLE}.length") == len(rows)
    click(tab, 'input[name="engine"][value="cached"]')
    assert tab.run(f"{VISIBLE}.length") == len([row for row in rows if row.path != "cached"])
    assert tab.run(f"{VISIBLE}.some((row) => row.dataset.engine === 'cached')") is False
    traces = [trace for chart in tab.run(TRACES) for trace in chart]
    assert "cached" not in traces
    assert {"reference", "onnxruntime", "sasrec-cached"} <= set(traces)
    click(tab, 'input[name="precision"][value="int8"]')
    assert not any("int8" in trace for chart in tab.run(TRACES) for trace in chart)
    click(tab, 'input[name="batch"][value="512"]')
    left = [row for row in rows if row.path != "cached" and row.precision != "int8" and row.batch_size_users != 512]
    assert tab.run(f"{VISIBLE}.length") == len(left)
    # In the order of their sizes, not of their digits.
    sizes = tab.run("[...document.querySelectorAll('input[name=batch]')].map((box) => Number(box.value))")
    assert sizes == sorted({row.batch_size_users for row in rows})
    click(tab, ".reset")
    assert tab.run(f"{VISIBLE}.length") == len(rows)
    assert tab.problems == []


def test_the_pareto_line_is_of_what_is_shown(tab: Tab, report: Path) -> None:
    tab.open(report)
    traces = [
        {"name": "a", "mode": "lines+markers+text", "x": [1, 4], "y": [5, 9], "text": ["1", "4"]},
        {"name": "b", "mode": "lines+markers", "x": [2, 3], "y": [4, 7]},
        {"name": "level", "mode": "lines", "x": [0, 9], "y": [99, 99]},
    ]
    found = tab.run(f"paretoLine({json.dumps(traces)}).map((point) => point.text)")
    assert found == ["a, 1 step", "b", "a, 4 steps"]


def test_headings_sort_by_keyboard(tab: Tab, report: Path) -> None:
    tab.open(report)
    names = tab.run("[...document.querySelector('.rows table').tHead.rows[0].cells].map((head) => head.textContent)")
    place = names.index("p50 (ms)")
    tab.run(f"document.querySelectorAll('.rows th button')[{place - 1}].focus()")
    tab.press(*TAB)
    assert tab.run("document.activeElement.textContent") == "p50 (ms)"
    # The focus is drawn.
    assert tab.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert tab.run("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
    for state, key in (("ascending", ENTER), ("descending", SPACE)):
        tab.press(*key)
        sorts = "[...document.querySelectorAll('.rows')[0].querySelectorAll('th')].map((head) => head.ariaSort)"
        assert [each for each in tab.run(sorts) if each] == [state]
        values = tab.run(f"{VISIBLE}.map((row) => row.cells[{place}].dataset.sort)")
        numbers = [float(value) for value in values if value]
        assert numbers == sorted(numbers, reverse=state == "descending")
        # A row without a value stays at the end.
        assert values[-1] == ""
        assert "" not in values[: len(numbers)]
    assert tab.run("document.querySelector('.rows .scroll').tabIndex") == 0


def test_everything_is_reached_by_keyboard(tab: Tab, report: Path) -> None:
    tab.open(report)
    wanted = {"select", "input", "csv", "reset", "scroll", "summary", "a", "button"}
    seen: set[str] = set()
    for _ in range(120):
        tab.press(*TAB)
        name = tab.run("document.activeElement.className || document.activeElement.localName")
        outline = tab.run("getComputedStyle(document.activeElement).outlineStyle")
        assert name == "body" or outline != "none", name
        seen.add({"anchor": "a"}.get(name, name))
    assert wanted <= seen
    tab.run("document.querySelector('input[name=engine]').focus()")
    tab.press(*SPACE)
    assert tab.run("document.querySelector('input[name=engine]').checked") is False


def test_csv_holds_what_is_shown(tab: Tab, report: Path, tiny_records: list[TradeoffRecord]) -> None:
    tab.open(report)
    click(tab, 'input[name="engine"][value="reference"]')
    click(tab, ".csv")
    text = tab.downloaded("rows-1.csv")
    assert text.endswith("\r\n")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == len(tiny_records) + 4 - 6
    assert {row["engine"] for row in rows} == {"", "cached", 'half, "16"'}
    expected: dict[Any, TradeoffRecord] = {
        (each.engine, each.steps, each.batch_size_users): each for each in tiny_records if each.steps
    }
    checked = 0
    for row in rows:
        record = expected.get((row["engine"], int(row["steps"] or 0), int(row["batch (users)"] or 0)))
        if record is not None and record.timing and record.accuracy:
            metric = record.accuracy.metrics_percent["NDCG@20"]
            # All digits, and the ends of the interval in columns of their own.
            assert float(row["p50 (ms)"]) == record.timing.latency_ms_p50
            assert [float(row[f"NDCG@20 (%){end}"]) for end in ("", " low", " high")] == [
                metric.value, metric.low, metric.high,
            ]  # fmt: skip
            checked += 1
    assert checked == 4


def test_hovering_tells_all_of_a_point(tab: Tab, tiny_records: list[TradeoffRecord], tmp_path: Path) -> None:
    # Two points, both on the front, whose line runs through them and must not take the hover.
    points = [each for each in tiny_records if (each.engine, each.batch_size_users) == ("cached", 1) and each.steps]
    assert len(points) == 2
    spread = [
        each.model_copy(
            update={
                "timing": each.timing.model_copy(
                    update={"latency_ms_p50": slowness, "latency_ms_p95": slowness, "latency_ms_p99": slowness}
                ),
                "accuracy": each.accuracy.model_copy(
                    update={"metrics_percent": {"NDCG@20": Estimate(value=slowness, low=slowness, high=slowness)}}
                ),
            }
        )
        for slowness, each in zip((1.0, 10.0), points, strict=True)
        if each.timing and each.accuracy
    ]
    tab.open(write_report(spread, tmp_path / "report.html"))
    hidden = "document.querySelector('.plot')._fullData.filter((trace) => trace.hoverinfo === 'skip')"
    assert tab.run(f"{hidden}.map((trace) => trace.name)") == ["Pareto line"]
    tab.run("document.querySelector('figure').scrollIntoView()")
    place = tab.run(
        "(() => { const box = document.querySelector('.plot .point').getBoundingClientRect();"
        "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    tab.hover(*place)
    said = tab.run(
        "new Promise((done) => setTimeout(() => done(document.querySelector('.hoverlayer').textContent), 300))"
    )
    for part in ("p50", "p99", "users/s", "NDCG@20", "kept", "overlap", "float", "batch 1", "["):
        assert part in said, said


def test_links_lead_to_headings_and_charts(tab: Tab, report: Path) -> None:
    tab.open(report)
    broken = tab.run(
        "[...document.querySelectorAll('a')].map((link) => link.getAttribute('href'))"
        ".filter((target) => document.querySelectorAll(target).length !== 1)"
    )
    assert broken == []
    assert tab.run("document.querySelectorAll('figure[id] .anchor').length") == 6
    tab.run("location.hash = '#study-1-rows'")
    assert tab.run("new Promise((done) => requestAnimationFrame(() => done(scrollY)))") > 0
