"""Every chart of a report and of a profile as a PNG with content, of the right size, and its numbers as Markdown."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.image import imread

from adrec.errors import NotSupportedError
from bench.chart import Chart, Line
from bench.charts import charts_of
from bench.kernels.measure import Timer
from bench.picture_files import chart_markdown, charts_folder, names_of, write_charts
from bench.pictures import DOTS_PER_INCH, HEIGHT, WIDTH, png_of
from bench.recommendation import batch_sizes
from bench.record import TradeoffRecord
from bench.report import write_report
from bench.scaling.measure import Fixed, ScalingBench
from bench.timing import Clock, TimingProtocol

LINE = Line(
    "cached", [1.0, 2.0, 4.0], [8.0, 8.25, 8.5], 0, low=[7.5, 8.0, 8.25], high=[8.5, 8.5, 9.0], labels=["1", "2", "4"]
)
CHART = Chart("accuracy-steps", "Accuracy | steps", "A note.", "steps", "NDCG@20 (%)", [LINE], x_ticks=[1.0, 2.0, 4.0])


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height that the header of a PNG states."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def inked(path: Path) -> float:
    """Share of the pixels that are not white."""
    return float((imread(path)[..., :3] < 0.99).any(axis=-1).mean())


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (7, 2, 4)])
def test_a_sheet_has_the_size_of_its_charts(count: int, columns: int, rows: int) -> None:
    width, height = size_of(png_of([CHART] * count, "title"))
    assert width == pytest.approx(WIDTH * columns * DOTS_PER_INCH, abs=1)
    assert height == pytest.approx((HEIGHT * rows + 0.4) * DOTS_PER_INCH, abs=1)


def test_what_is_drawn_is_what_the_chart_holds(tmp_path: Path) -> None:
    pictures = {}
    for name, lines in {
        "none": [Line("cached", [1.0, 4.0], [8.0, 8.5], 0, markers=False, connected=False)],
        "one": [LINE],
        "two": [LINE, Line("reference", [1.0, 4.0], [7.0, 8.0], 1)],
    }.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(png_of([Chart("k", "t", "", "x", "y", lines)], "title"))
        pictures[name] = imread(path)[..., :3]
    # The first style's blue, the second's orange, where there are such lines and nowhere else.
    blue, orange = np.array([0.0, 0x72, 0xB2]) / 255, np.array([0xBC, 0x4A, 0.0]) / 255
    amounts = {
        name: tuple(int((np.abs(picture - colour).max(axis=-1) < 0.02).sum()) for colour in (blue, orange))
        for name, picture in pictures.items()
    }
    assert amounts["one"][0] > amounts["none"][0]
    assert amounts["one"][1] == 0
    assert amounts["two"][1] > 100


def test_every_chart_of_every_study_and_batch_size_is_written(
    tiny_records: list[TradeoffRecord], tmp_path: Path
) -> None:
    other = [each.model_copy(update={"split": "validation"}) for each in tiny_records]
    page = write_report([*tiny_records, *other], tmp_path / "out.html")
    folder = charts_folder(page)
    drawn = {path.stem for path in folder.glob("*.png")}
    expected = set()
    for number in (1, 2):
        charts = {size: charts_of(tiny_records, size) for size in batch_sizes(tiny_records)}
        for chart in charts[1]:
            alike = [each for each in charts[8] if each.key == chart.key]
            names = [chart.key] if alike == [chart] else [f"{chart.key}-batch-1", f"{chart.key}-batch-8"]
            expected |= {f"{number}-{name}" for name in names if any(line.x for line in chart.lines)}
    assert drawn == expected
    assert {"1-accuracy-latency-batch-1", "2-accuracy-latency-batch-8", "1-throughput-batch"} <= drawn
    for path in folder.glob("*.png"):
        width, height = size_of(path.read_bytes())
        assert (width, height) == (round(WIDTH * DOTS_PER_INCH), round((HEIGHT + 0.4) * DOTS_PER_INCH))
        assert 0.01 < inked(path) < 0.6, path.name
        assert path.with_suffix(".md").read_text().count("\n| ") >= 3
    markdown = page.with_suffix(".md").read_text()
    for path in folder.glob("*.png"):
        assert f"(<out-charts/{path.name}>), [numbers](<out-charts/{path.stem}.md>)" in markdown


def test_charts_of_other_kinds_are_written_too(
    tiny_protocol: TimingProtocol, counting_clock: Clock, tmp_path: Path
) -> None:
    timer = Timer(torch.device("cpu"), tiny_protocol, counting_clock, "adrec bench")
    bench = ScalingBench(timer, ("cached",), Fixed(items=30, batch=2, steps=1, width=16))
    grown = list(bench.records("batch", [1, 2, 4], lambda done, expected: None))
    page = write_report(grown, tmp_path / "out.html")
    assert sorted(path.name for path in charts_folder(page).iterdir()) == ["1-growth-batch.md", "1-growth-batch.png"]
    assert inked(charts_folder(page) / "1-growth-batch.png") > 0.01
    assert inked(page.with_suffix(".png")) > 0.01
    text = page.with_suffix(".md").read_text()
    assert "- [1-growth-batch](<out-charts/1-growth-batch.png>), [numbers](<out-charts/1-growth-batch.md>)" in text
    # The counting clock says that every call takes a millisecond.
    numbers = charts_folder(page).joinpath("1-growth-batch.md").read_text()
    assert [line.split(" | ")[1:] for line in numbers.splitlines() if line.startswith("| cached")] == [
        ["1", "1 |"], ["2", "1 |"], ["4", "1 |"]
    ]  # fmt: skip


def test_charts_of_earlier_records_do_not_stay(tiny_records: list[TradeoffRecord], tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    folder = charts_folder(page)
    write_charts(page, [("first", {"old": CHART}), ("second", {"old": CHART})])
    (folder / "mine.png").write_text("mine")
    ((path,),) = write_charts(page, [("first", {"new": CHART, "empty": Chart("e", "e", "", "x", "y", [])})])
    assert path == folder / "1-new.png"
    assert sorted(each.name for each in folder.iterdir()) == ["1-new.md", "1-new.png", "mine.png"]


def test_without_matplotlib_no_picture_of_earlier_records_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "out.html"
    write_charts(page, [("first", {"old": CHART})])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(NotSupportedError, match=r"adrec\[png\]"):
        write_charts(page, [("first", {"old": CHART})])
    assert list(charts_folder(page).iterdir()) == []


def test_names_say_the_batch_size_only_where_charts_differ() -> None:
    other = Chart("latency-steps", "t", "", "x", "y", [LINE])
    changed = Chart("latency-steps", "t", "", "x", "y", [Line("cached", [1.0], [2.0], 0)])
    found = names_of({1: [CHART, other], 32: [CHART, changed]})
    assert found == {"accuracy-steps": CHART, "latency-steps-batch-1": other, "latency-steps-batch-32": changed}
    assert names_of({}) == {}


def test_numbers_of_a_chart_are_a_table() -> None:
    level = Line("popularity", [1.0], [0.7], 5, level=True)
    text = chart_markdown(
        Chart("k", "Accuracy | steps", "A note.", "steps", "NDCG@20 (%)", [LINE, level]), "beauty", "1-k.png"
    )
    assert text.splitlines() == [
        "# Accuracy \\| steps", "", "![Accuracy \\| steps](<1-k.png>)", "", "beauty", "", "A note.", "",
        "| series | label | steps | NDCG@20 (%) | from | to |",
        "| --- | --- | --- | --- | --- | --- |",
        "| cached | 1 | 1 | 8 | 7.5 | 8.5 |",
        "| cached | 2 | 2 | 8.25 | 8 | 8.5 |",
        "| cached | 4 | 4 | 8.5 | 8.25 | 9 |",
        "| popularity |  | all | 0.7 |  |  |",
    ]  # fmt: skip
    named = Chart("k", "t", "", "stage", "ms", [Line("median", [1.0], [2.0], 0)], x_ticks=[1.0], x_names=["encode"])
    assert "| median | encode | 2 |" in chart_markdown(named, "", "k.png")
