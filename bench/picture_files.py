"""Every chart of a page as a PNG for papers and a Markdown table of its numbers, in a folder beside the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from adrec.files import write_bytes, write_text
from bench.chart import Chart
from bench.markdown import escaped
from bench.pictures import png_of

OURS = re.compile(r"\d+-[a-z0-9-]+\.(png|md)")


def charts_folder(page: Path) -> Path:
    """The folder of a page's charts: ``report-charts`` beside ``report.html``."""
    return page.with_name(f"{page.stem}-charts")


def write_charts(page: Path, studies: Sequence[tuple[str, Mapping[str, Chart]]]) -> list[list[Path]]:
    """Write each chart that has lines, by study (its title, its charts by name), and remove those of earlier records.

    Returns the PNG files of each study; beside each lies a ``.md`` of the same name. Raises NotSupportedError without
    matplotlib, when no picture of earlier records is left either.
    """
    folder = charts_folder(page)
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if OURS.fullmatch(path.name):
                path.unlink()
    found: list[list[Path]] = []
    for number, (title, charts) in enumerate(studies, 1):
        found.append([])
        for name, chart in charts.items():
            if not any(line.x for line in chart.lines):
                continue
            content = png_of([chart], title)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{number}-{name}.png"
            write_bytes(path, content)
            write_text(path.with_suffix(".md"), chart_markdown(chart, title, path.name))
            found[-1].append(path)
    return found


def names_of(charts: Mapping[int, Sequence[Chart]]) -> dict[str, Chart]:
    """Charts of all batch sizes by name; one that is equal at every size appears once, without a size."""
    found: dict[str, Chart] = {}
    for chart in next(iter(charts.values()), []):
        alike = [other for others in charts.values() for other in others if other.key == chart.key]
        if all(other == chart for other in alike):
            found[chart.key] = chart
        else:
            found |= {f"{chart.key}-batch-{size}": other for size, other in zip(charts, alike, strict=True)}
    return found


def chart_markdown(chart: Chart, title: str, picture: str) -> str:
    """One chart as Markdown: the picture, what to know, and a table with a row a point."""
    ends = any(line.low is not None for line in chart.lines)
    said = any(any(line.labels) for line in chart.lines)
    heads = ["series", *(["label"] if said else []), chart.x_title or "x", chart.y_title or "y"]
    heads += ["from", "to"] if ends else []
    names = dict(zip(chart.x_ticks or [], chart.x_names or [], strict=False))
    rows = []
    for line in chart.lines:
        for place, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
            cells = [line.name, *([line.labels[place] if line.labels else ""] if said else [])]
            cells += ["all" if line.level else names.get(x, f"{x:.6g}"), f"{y:.6g}"]
            for end in (line.low, line.high) if ends else ():
                cells.append("" if end is None else f"{end[place]:.6g}")
            rows.append(cells)
    lines = [heads, ["---"] * len(heads), *rows]
    table = "\n".join(
        "| " + " | ".join(cells if index == 1 else map(escaped, cells)) + " |" for index, cells in enumerate(lines)
    )
    parts = [
        f"# {escaped(chart.title)}",
        f"![{escaped(chart.title)}](<{picture}>)",
        escaped(title),
        escaped(chart.note),
    ]
    return "\n\n".join([part for part in parts if part] + [table]) + "\n"
