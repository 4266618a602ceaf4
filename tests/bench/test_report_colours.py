"""Colours of the report: contrast on both themes, and lines that no kind of colour blindness makes one."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bench import html_page
from bench.chart import FRONT_STYLE
from bench.pictures import COLOURS

# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency" (2009),
# severity 1, of linear sRGB.
SIGHT = {
    "full": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
WHITE = (0.95047, 1.0, 1.08883)


def linear(colour: str) -> NDArray[np.float64]:
    parts = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(np.dot((0.2126, 0.7152, 0.0722), linear(colour)))


def lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE L*a*b* of linear sRGB."""
    ratio = np.array(TO_XYZ) @ np.clip(rgb, 0, 1) / WHITE
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: 4.5 is asked of text, 3 of lines and controls."""
    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def _palettes() -> dict[str, dict[str, str]]:
    """Colours of the page by theme: its custom properties, and ``0`` to ``6`` of charts."""
    template = Path(html_page.__file__).with_name("report_template.html").read_text(encoding="utf-8")
    light, dark = re.findall(r"(--page:[^}]*)}", template)
    found = {}
    for name, properties in (("light", light), ("dark", dark)):
        line = re.search(rf"{name}: \[(.*?)\]", template)
        assert line is not None
        charts = {str(place): colour for place, colour in enumerate(re.findall(r"#\w{6}", line.group(1)))}
        found[name] = {**dict(re.findall(r"--(\w+): (#\w{6})", properties)), **charts}
    return found


def test_contrast_function_is_that_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    # The grey that just passes on white, and the one that just does not.
    assert contrast("#767676", "#ffffff") >= 4.5 > contrast("#777777", "#ffffff")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_lines_have_contrast(theme: str) -> None:
    colours = _palettes()[theme]
    assert len([name for name in colours if name.isdigit()]) == 7
    for ground in ("page", "card"):
        for name in ("text", "soft", "accent", "bad"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        assert contrast(colours["edge"], colours[ground]) >= 3.0
    for style in range(7):
        # Step counts beside the markers have the colour of their line; the Pareto line has no label.
        least = 3.0 if style == FRONT_STYLE else 4.5
        assert contrast(colours[str(style)], colours["card"]) >= least, style


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_two_lines_look_alike(theme: str, sight: str) -> None:
    """By the CIE 1976 difference, of which 2.3 is just noticed; markers and dashes tell lines apart besides."""
    colours = [colour for name, colour in _palettes()[theme].items() if name.isdigit()]
    seen = {colour: lab(np.array(SIGHT[sight]) @ linear(colour)) for colour in colours}
    for one, other in combinations(colours, 2):
        assert np.linalg.norm(seen[one] - seen[other]) >= 9.0, (one, other)


def test_pictures_have_the_colours_of_the_light_page() -> None:
    assert [colour for name, colour in _palettes()["light"].items() if name.isdigit()] == list(COLOURS)


def test_the_difference_is_that_of_known_colours() -> None:
    white, red = lab(linear("#ffffff")), lab(linear("#ff0000"))
    assert white == pytest.approx([100, 0, 0], abs=0.02)
    assert red == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    blind = [lab(np.array(SIGHT["deuteranopia"]) @ linear(colour)) for colour in ("#8A6100", "#BC4A00")]
    assert np.linalg.norm(blind[0] - blind[1]) < 9.0
