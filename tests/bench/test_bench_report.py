"""The report: self-contained, escaped, complete, and honest in words."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects
import pytest

from adrec.errors import AdrecError, DataError
from bench.charts import charts_of
from bench.plotly_figures import plotly_figure
from bench.recommendation import recommendation, share
from bench.record import Estimate, TradeoffRecord
from bench.report import group_studies, write_report

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
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.md", "report.png"]
    parsed = _parsed(page)
    assert parsed.addresses == ["data:,"]
    assert parsed.names.count("figure") == 4
    # Two header rows and one of budgets, then a row a record, a budget row a batch, and the nine metrics.
    assert parsed.names.count("tr") == 3 + len(tiny_records) + 2 + 4
    assert (page.with_suffix(".png")).read_bytes().startswith(b"\x89PNG")
    markdown = page.with_suffix(".md").read_text()
    assert "adrec bench report rows.jsonl" in markdown
    assert "| popularity |" in markdown


def test_everything_from_records_is_escaped(tiny_records: list[TradeoffRecord], tmp_path: Path) -> None:
    plain = _parsed(write_report(tiny_records, tmp_path / "plain.html"))
    evil = [each.model_copy(update={"dataset_name": EVIL, "command": EVIL}) for each in tiny_records]
    evil[1] = evil[1].model_copy(update={"error": EVIL, "engine": EVIL})
    path = write_report(evil, tmp_path / "evil.html")
    parsed = _parsed(path)
    assert "img" not in parsed.names
    assert parsed.names.count("script") == plain.names.count("script")
    assert "{{plotly}}" in path.read_text()
    markdown = path.with_suffix(".md").read_text()
    # Outside the fenced command, which shows everything as it is, each "<" is escaped.
    assert re.search(r"(?<!\\)<(?!evil\.png>)", re.sub(r"(?s)(`{3,}).*?\n\1", "", markdown)) is None


def test_figures_are_valid_plotly(tiny_records: list[TradeoffRecord]) -> None:
    for chart in charts_of(tiny_records, 1):
        figure = plotly_figure(chart)
        plotly.graph_objects.Figure(figure)
        json.dumps(figure, allow_nan=False)
        assert figure["data"]


def test_figure_data_of_the_page_is_for_every_batch_size(tiny_records: list[TradeoffRecord], tmp_path: Path) -> None:
    text = write_report(tiny_records, tmp_path / "page.html").read_text()
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    figures = json.loads(found.group(1))
    assert [sorted(study) for study in figures] == [["1", "8"]]
    assert [len(charts) for charts in figures[0].values()] == [4, 4]


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
