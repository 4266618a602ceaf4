"""The report: self-contained, escaped, complete, and honest in words."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects
import pytest
import torch

from adrec.errors import AdrecError, DataError
from bench.charts import charts_of, latency_percentiles, roofline
from bench.json_lines import json_line
from bench.kernels.engine_sweep import request_cost
from bench.plotly_figures import log_ticks, plotly_figure
from bench.recommendation import recommendation, share
from bench.record import Estimate, RequestRoof, TradeoffRecord
from bench.report import group_studies, write_report
from bench.timing import percentiles_ms

EVIL = "</script><img src=x onerror=alert(1)>{{plotly}} `|*$x_1"


class _Page(HTMLParser):
    """Collects element names, outside addresses and table sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset")]


def _parsed(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text())
    return page


def _with(record: TradeoffRecord, kept: Estimate, latency: float, ratio: float) -> TradeoffRecord:
    assert record.timing is not None
    assert record.accuracy is not None
    timing = record.timing.model_copy(
        update={
            "latency_ms_p50": latency,
            "time_ratio_to_baseline": Estimate(value=ratio, low=ratio, high=ratio),
            "calls": 1000,
        }
    )
    accuracy = record.accuracy.model_copy(update={"ndcg20_kept_percent": kept})
    return record.model_copy(update={"timing": timing, "accuracy": accuracy})


def _rows(records: list[TradeoffRecord]) -> dict[tuple[str | None, int | None], TradeoffRecord]:
    return {(each.engine, each.steps): each for each in records if each.batch_size_users == 1}


def test_page_is_self_contained_and_complete(tiny_records: list[TradeoffRecord], tmp_path: Path) -> None:
    page = write_report(tiny_records, tmp_path / "out", command="adrec bench report rows.jsonl")
    assert page == tmp_path / "out" / "report.html"
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "report-charts",
        "report.html",
        "report.md",
        "report.png",
    ]
    parsed = _parsed(page)
    assert "data:," in parsed.addresses
    assert all(address == "data:," or address.startswith("#") for address in parsed.addresses)
    assert parsed.names.count("figure") == 6
    # Two header rows and one of budgets, then a row a record, a budget row a batch, and the nine metrics.
    assert parsed.names.count("tr") == 3 + len(tiny_records) + 2 + 4
    assert (page.with_suffix(".png")).read_bytes().startswith(b"\x89PNG")
    markdown = page.with_suffix(".md").read_text()
    assert "adrec bench report rows.jsonl" in markdown
    assert "| popularity |" in markdown


def test_everything_from_records_is_escaped(tiny_records: list[TradeoffRecord], tmp_path: Path) -> None:
    evil = [each.model_copy(update={"dataset_name": EVIL, "command": EVIL}) for each in tiny_records]
    evil[1] = evil[1].model_copy(update={"error": EVIL, "engine": EVIL})
    path = write_report(evil, tmp_path / "evil.html")
    parsed = _parsed(path)
    assert "img" not in parsed.names
    assert parsed.names.count("script") == 3
    assert "{{plotly}}" in path.read_text()
    markdown = path.with_suffix(".md").read_text()
    # Outside the fenced command, which shows everything as it is, each "<" is escaped.
    assert re.search(r"(?<!\\)<(?!evil[.-])", re.sub(r"(?s)(`{3,}).*?\n\1", "", markdown)) is None


def test_figures_are_valid_plotly(tiny_records: list[TradeoffRecord]) -> None:
    for chart in charts_of(tiny_records, 1):
        figure = plotly_figure(chart)
        plotly.graph_objects.Figure(data=figure["data"], layout=figure["layout"])
        json.dumps(figure, allow_nan=False)
        assert figure["data"]


def test_figure_data_of_the_page_is_for_every_batch_size(tiny_records: list[TradeoffRecord], tmp_path: Path) -> None:
    text = write_report(tiny_records, tmp_path / "page.html").read_text()
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    figures = json.loads(found.group(1))
    assert [sorted(study) for study in figures] == [["1", "8"]]
    assert [len(charts) for charts in figures[0].values()] == [6, 6]


def test_without_matplotlib_the_page_is_still_written(
    tiny_records: list[TradeoffRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    messages: list[str] = []
    page = write_report(tiny_records, tmp_path / "page.html", notify=messages.append)
    assert page.is_file()
    assert "adrec[png]" in messages[0]
    assert not page.with_suffix(".png").exists()
    assert "![" not in page.with_suffix(".md").read_text()


def test_rows_without_timing_or_accuracy_do_not_break_the_page(
    tiny_records: list[TradeoffRecord], tmp_path: Path
) -> None:
    broken = [each.model_copy(update={"timing": None, "error": "RuntimeError: no"}) for each in tiny_records]
    assert write_report(broken, tmp_path / "timing.html").is_file()
    broken = [each.model_copy(update={"accuracy": None, "error": "RuntimeError: no"}) for each in tiny_records]
    assert write_report(broken, tmp_path / "accuracy.html").is_file()
    with pytest.raises(DataError, match="no records"):
        write_report([], tmp_path)


def test_machines_are_not_compared_with_each_other(tiny_records: list[TradeoffRecord], tmp_path: Path) -> None:
    row = tiny_records[1]
    machine = row.environment.machine.model_copy(update={"processor": "another"})
    other = row.model_copy(update={"environment": row.environment.model_copy(update={"machine": machine})})
    assert [len(study) for study in group_studies([*tiny_records, other])] == [len(tiny_records), 1]


def test_recommendation_names_share_interval_and_choice(tiny_records: list[TradeoffRecord]) -> None:
    rows = _rows(tiny_records)
    exact = Estimate(value=100.0, low=100.0, high=100.0)
    kept = Estimate(value=99.9, low=99.5, high=100.2)
    few = [
        _with(rows["cached", 1], kept, 2.0, 1 / 57),
        _with(rows["cached", 4], exact, 9.0, 0.5),
        _with(rows["reference", 4], exact, 114.0, 1.0),
    ]
    assert recommendation(few)[0] == (
        "Batch of 1 user: 1 step keeps 99.9 [99.5, 100.2] % of the 4-step NDCG@20 at 1/57 [1/57, 1/57] of "
        "the time of reference at 4 steps, 2 ms; choose 1 step with the cached engine."
    )


def test_recommendation_keeps_the_steps_when_fewer_lose_too_much(tiny_records: list[TradeoffRecord]) -> None:
    rows = _rows(tiny_records)
    exact = Estimate(value=100.0, low=100.0, high=100.0)
    uncertain = Estimate(value=99.9, low=98.0, high=101.0)
    few = [_with(rows["cached", 1], uncertain, 2.0, 0.1), _with(rows["cached", 4], exact, 9.0, 0.5)]
    twin = _with(rows["reference", 4], exact, 9.3, 0.5)
    assert recommendation([*few, twin])[0].endswith("As fast within 5 %: reference, 4 steps.")
    assert recommendation(few)[0].startswith("Batch of 1 user: keep 4 steps with the cached engine")


def _timed(record: TradeoffRecord, **update: object) -> TradeoffRecord:
    assert record.timing is not None
    return record.model_copy(update={"timing": record.timing.model_copy(update=update)})


def test_recommendation_is_withheld_where_timings_are_too_few_or_uncertain(tiny_records: list[TradeoffRecord]) -> None:
    rows = _rows(tiny_records)
    exact = Estimate(value=100.0, low=100.0, high=100.0)
    choice, baseline = _with(rows["cached", 1], exact, 2.0, 0.1), _with(rows["reference", 4], exact, 9.0, 1.0)
    assert "choose 1 step" in recommendation([choice, baseline])[0]
    for few in ([_timed(choice, calls=2), baseline], [choice, _timed(baseline, calls=2)]):
        assert re.search("Batch of 1 user: no choice, because .* in 2 calls only", recommendation(few)[0])
    wide = _timed(choice, time_ratio_to_baseline=Estimate(value=0.1, low=0.07, high=0.15))
    words = recommendation([wide, baseline])
    assert words[0].startswith("Batch of 1 user: no choice, because the time ratio of the fastest setting")
    assert not any("choose" in sentence for sentence in words)


def test_places_that_cannot_be_written_are_refused(tiny_records: list[TradeoffRecord], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AdrecError, match=r"notes\.txt is a file, not a folder"):
        write_report(tiny_records, tmp_path / "notes.txt")
    (tmp_path / "page.md").mkdir()
    with pytest.raises(AdrecError, match=r"page\.md: a folder"):
        write_report(tiny_records, tmp_path / "page.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "page.md"]


def test_recommendation_warns_of_failures_and_compares_with_the_baselines(
    tiny_records: list[TradeoffRecord],
) -> None:
    failed = tiny_records[1].model_copy(update={"timing": None, "error": "RuntimeError: no"})
    words = " ".join(recommendation([tiny_records[0], failed, *tiny_records[2:]]))
    assert "1 row failed" in words
    assert "popularity reaches NDCG@20" in words
    assert "sasrec+ reaches NDCG@20" in words
    assert "fewer than 100 calls" in words


@pytest.mark.parametrize(("ratio", "words"), [(1 / 57, "1/57"), (0.25, "1/4.0"), (1.0, "1 times"), (1.34, "1.3 times")])
def test_share(ratio: float, words: str) -> None:
    assert share(ratio) == words


def test_charts_without_data_say_why(tiny_records: list[TradeoffRecord], tmp_path: Path) -> None:
    untimed = [each.model_copy(update={"timing": None, "roof": None, "error": "no"}) for each in tiny_records]
    for chart in charts_of(untimed, 1):
        if chart.key == "accuracy-steps":
            assert chart.lines
        else:
            assert not chart.lines, chart.key
            assert "No row of this batch size" in chart.empty or "No row has a latency" in chart.empty
    unknown = [each.model_copy(update={"accuracy": None, "error": "no"}) for each in tiny_records]
    empty = {chart.key for chart in charts_of(unknown, 1) if not chart.lines}
    assert "accuracy-steps" in empty
    text = write_report(untimed, tmp_path / "page.html").read_text()
    assert "No row of this batch size has a latency; the table names the errors." in text


def test_percentiles_are_of_the_calls(tiny_records: list[TradeoffRecord]) -> None:
    row = _timed(_rows(tiny_records)["cached", 4], latency_ms_percentiles={50.0: 2.0, 90.0: 3.0})
    (line,) = latency_percentiles([row], 1).lines
    # Half of the calls are slower than p50, one in ten than p90.
    assert line.x == pytest.approx([2.0, 10.0])
    assert line.y == [2.0, 3.0]
    older = _timed(row, latency_ms_percentiles=None, latency_ms_p50=1.0, latency_ms_p95=2.0, latency_ms_p99=4.0)
    (line,) = latency_percentiles([older], 1).lines
    assert line.x == pytest.approx([2.0, 20.0, 100.0])
    assert line.y == [1.0, 2.0, 4.0]


def test_few_calls_reach_few_percentiles() -> None:
    found = percentiles_ms(np.arange(1.0, 11.0))
    assert list(found) == [1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0]
    assert found[50.0] == 5.5
    assert 99.0 in percentiles_ms(np.arange(100.0))
    assert 99.9 in percentiles_ms(np.arange(1000.0))
    # Two samples have a median and nothing above.
    assert max(percentiles_ms(np.arange(2.0))) == 50.0


def test_roofline_is_work_over_time_under_the_measured_roof(tiny_records: list[TradeoffRecord]) -> None:
    roof = RequestRoof(least_flops=8 * 10**9, least_bytes=10**9, gflops=100.0, gigabytes_per_second=10.0)
    row = _timed(_rows(tiny_records)["cached", 4], latency_ms_p50=200.0).model_copy(update={"roof": roof})
    points, ceiling = roofline([row], 1).lines
    # 8 GFLOP in 0.2 s; memory takes 0.1 s of them, which is the floor.
    assert (points.x, points.y) == ([8.0], [pytest.approx(40.0)])
    assert points.details == ["floor 100 ms, 50.0% of the 200 ms it took"]
    assert ceiling.x[1] == 10.0
    assert ceiling.y == [10.0 * ceiling.x[0], 100.0, 100.0]


def test_sweeps_note_the_least_work_of_requests(tiny_records: list[TradeoffRecord]) -> None:
    rows = _rows(tiny_records)
    one, four = rows["cached", 1], rows["reference", 4]
    assert one.roof is not None
    assert four.roof is not None
    assert four.timing is not None
    tokens = round(four.timing.history_tokens_per_batch_mean)
    expected = request_cost(tokens, 1, 4, one.dataset_items, 16, torch.float32)
    assert (four.roof.least_flops, four.roof.least_bytes) == (expected.flops, expected.bytes)
    # A step more is two denoiser blocks on every user's last token.
    assert four.roof.least_flops - one.roof.least_flops == 3 * 2 * 2 * 12 * 16**2
    assert one.roof.gflops == four.roof.gflops > 0
    assert all(each.roof is None for each in tiny_records if each.steps is None)
    restored = TradeoffRecord.model_validate(json.loads(json_line(four)))
    assert restored == four


def test_lines_are_told_apart_without_colour(tiny_records: list[TradeoffRecord]) -> None:
    base = _rows(tiny_records)["cached", 4]
    many = [base.model_copy(update={"engine": f"engine {number}"}) for number in range(8)]
    for chart in charts_of([*tiny_records, *many], 1):
        looks = [
            (trace["line"]["dash"], trace["marker"]["symbol"] if "markers" in trace["mode"] else "")
            for trace in plotly_figure(chart)["data"]
        ]
        if chart.key in ("accuracy-latency", "latency-steps"):
            assert len(looks) > 8
    few = [*tiny_records, *many[:5]]
    for chart in charts_of(few, 1)[:2]:
        looks = [
            (trace["line"]["dash"], trace["marker"]["symbol"] if "markers" in trace["mode"] else "")
            for trace in plotly_figure(chart)["data"]
        ]
        assert len(looks) == len(set(looks)), (chart.key, looks)


def test_a_level_far_away_is_left_to_the_legend(tiny_records: list[TradeoffRecord]) -> None:
    row = _rows(tiny_records)["cached", 4]
    assert row.accuracy is not None

    def at(record: TradeoffRecord, value: float) -> TradeoffRecord:
        assert record.accuracy is not None
        metrics = {**record.accuracy.metrics_percent, "NDCG@20": Estimate(value=value, low=value - 1, high=value + 1)}
        return record.model_copy(update={"accuracy": record.accuracy.model_copy(update={"metrics_percent": metrics})})

    popularity = next(each for each in tiny_records if each.model == "popularity")
    for level, folded in ((30.0, True), (48.0, False)):
        lines = {line.name: line for line in charts_of([at(popularity, level), at(row, 50.0)], 1)[0].lines}
        assert lines["popularity"].folded is folded


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (8.0, 70.0, [10, 20, 30, 50, 70]),
        (0.5, 16.0, [0.5, 1, 2, 5, 10]),
        (25.0, 10_500.0, [30, 100, 300, 1000, 3000, 10_000]),
        (60.0, 66.0, [60, 66]),
        (1e-3, 1e7, [1e-3, 1e-1, 1e1, 1e3, 1e5, 1e7]),
    ],
)
def test_logarithmic_axes_have_few_round_ticks(low: float, high: float, expected: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(expected)


def test_plotly_takes_nothing_of_a_record_for_markup(tiny_records: list[TradeoffRecord]) -> None:
    row = _rows(tiny_records)["cached", 4].model_copy(update={"engine": "<a href='x'>e</a>"})
    for chart in charts_of([row], 1):
        for trace in plotly_figure(chart)["data"]:
            # What the filters know a line by is never drawn.
            del trace["meta"]
            assert "<a" not in json.dumps(trace)
