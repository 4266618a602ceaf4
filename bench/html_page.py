"""A self-contained HTML page: its sections, Plotly, the data of its figures, and nothing from elsewhere."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def render_page(
    title: str, subtitle: str, sections: Sequence[str], figures: Sequence[Mapping[str, Any]], command: str
) -> str:
    """Return a self-contained page with Plotly inlined.

    sections: HTML, with places of `bench.page_parts.figure_place`. figures: for each study, Plotly figures by batch
    size, or by ``all`` where there is no choice of one.
    """
    from plotly.offline import get_plotlyjs

    parts = {
        "title": html.escape(title),
        "subtitle": html.escape(subtitle),
        "contents": _contents(sections),
        "studies": "\n".join(sections),
        "command": html.escape(command),
        "plotly": get_plotlyjs(),
        # "<" would let a value end the script element.
        "figures": json.dumps(figures, allow_nan=False).replace("<", "\\u003c"),
    }
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    # One pass: a value that looks like a placeholder is not replaced again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match.group(1)], template)


def _contents(sections: Sequence[str]) -> str:
    """Links to the headings of the sections; of several sections, to each section only."""
    levels = "23" if len(sections) == 1 else "2"
    found = re.findall(rf'<h[{levels}] id="([^"]+)"><span>(.*?)</span>', "".join(sections))
    return "".join(f'<li><a href="#{anchor}">{text}</a></li>' for anchor, text in found)
