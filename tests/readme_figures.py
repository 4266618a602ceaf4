"""The figures of README and docs against the records of `bench/records`: each is one of a record, or listed here.

A table's row and a sentence choose a record by their words; the number printed must be its value, rounded as printed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from readme_records import NoSuchRecordError, Values
from readme_sentences import SENTENCES
from readme_tables import TABLES

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in (
    "steps", "compress", "export", "bench", "kernels", "accuracy")))  # fmt: skip
"""In the order in which a reader runs their commands."""
NUMBER = r"(?:1/)?(?:\d*\.)?\d+(?:e-\d+)?"
FENCE, CODE = re.compile(r"```.*?```", re.DOTALL), re.compile(r"`[^`]*`")

# Numbers that are no measurement of ours, with the words around them.
NOT_MEASURED = (
    # Names and versions.
    r"KDD 2025|\[arXiv 2505\.19544\]\(\S+\)|Python 3\.10|ML-100k|top-20|Apache-2\.0",
    r"stage 1|stage 2|10\.12 or newer|Python 3\.11 or older|TensorRT 10\.16, 11\.1 and 11\.4",
    # Settings of what is measured.
    r"of 32 DDPM steps|at lambda 1 one|as good as 32;|the run's 32 steps|at 32 steps,|the 32-step|batch 1 and",
    r"ms and 512 in|; at 32 steps|and 512 users|at 32 steps takes",
    r"seed 0, by|seeds 0, 1 and 2|batches of 512 test histories|batches of 128 users",
    # What the software accepts and gives.
    r"exit status 3|ends with status 3|\(1 to the number|the whole 99 % interval|of 3 to 5 rounds expect",
    r"sm_80, 90 and 100, the graphs|above 128 results|16-bit|rounding of 2\^-8 or 2\^-11|heads below 8 or above 128",
    r"widths above 256|\(to 1024; one launch up to 128\)|float32, 8 MiB, or one list a user",
    # Targets, which the page calls not measured.
    r"at least 100 times as|3 times as fast as the compiled|\(both at batch 512, 32 steps\)|at 70 % of the bandwidth",
    r"\(10 million items, bfloat16\)|within 4 times its floor",
)
# Measured, but of no record: nothing else may join them.
WITHOUT_RECORD = (r"\(19\.2 / 9\.40 against 18\.8 / 9\.45\)", r"\(family 26\)")


# What a rule raises for words that it does not know, and for a record without the value.
UNKNOWN = (NoSuchRecordError, LookupError, TypeError)


def pages() -> str:
    """All pages, one after the other."""
    return "\n".join(path.read_text(encoding="utf-8") for path in PAGES)


def shows(token: str, value: float) -> bool:
    """Whether a printed number is a value rounded to the digits printed; 1/x of a ratio below one."""
    if token.startswith("1/"):
        return value != 0 and shows(token[2:], 1 / value)
    mantissa, power, _ = token.partition("e")
    form = f".{len(mantissa.partition('.')[2])}{power or 'f'}"
    return f"{value:{form}}" == f"{float(token):{form}}"


@dataclass
class Checked:
    """What is wrong with a text, and where (start, end) the figures stand that are held to a record."""

    problems: list[str] = field(default_factory=list)
    figures: list[tuple[int, int]] = field(default_factory=list)
    explained: list[tuple[int, int]] = field(default_factory=list)


def check(text: str) -> Checked:
    """Hold every number of README and docs to the records."""
    done = Checked()
    prose = FENCE.sub(_blank, text)
    for start, end in _check_tables(prose, done):
        prose = prose[:start] + re.sub(r"[^\n]", " ", prose[start:end]) + prose[end:]
    for sentence, values in SENTENCES:
        form = rf"({NUMBER})".join(map(_spaced, sentence.split("{}")))
        found = list(re.finditer(form, prose))
        if len(found) != 1:
            done.problems.append(f"stands {len(found)} times instead of once: {sentence}")
            continue
        spans = [found[0].span(place) for place in range(1, found[0].re.groups + 1)]
        done.explained += spans
        try:
            _compare(text, spans, values(), sentence, done)
        except UNKNOWN as error:
            done.problems.append(f"{sentence}: {error!r}")
    prose = CODE.sub(_blank, prose)
    for pattern in (*NOT_MEASURED, *WITHOUT_RECORD):
        spans = [each.span() for part in pattern.split("|") for each in re.finditer(part.replace(" ", r"\s+"), prose)]
        done.explained += spans
        if not spans:
            done.problems.append(f"no page has anything of {pattern!r}: take it from the list")
    for number in re.finditer(rf"(?<![\w.@]){NUMBER}", prose):
        if not any(start <= number.start() and number.end() <= end for start, end in done.explained):
            near = " ".join(text[max(0, number.start() - 40) : number.end() + 30].split())
            done.problems.append(f"no record and no rule explains {number[0]!r} in: {near}")
    return done


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def _spaced(text: str) -> str:
    return r"\s+".join(map(re.escape, text.split(" ")))


def _compare(text: str, spans: list[tuple[int, int]], values: Values, where: str, done: Checked) -> None:
    tokens = [re.sub(r"(?<=\d) ", "", text[start:end]) for start, end in spans]
    # An interval may be left out.
    if len(tokens) == 1 and len(values) == 3:
        values = values[:1]
    if len(tokens) != len(values):
        done.problems.append(f"{where}: {len(tokens)} numbers; the record gives {len(values)}")
    for span, token, value in zip(spans, tokens, values, strict=False):
        done.figures.append(span)
        if not shows(token, value):
            done.problems.append(f"{where}: the page says {token}; the record says {value:.6g}")


def _check_tables(prose: str, done: Checked) -> Iterator[tuple[int, int]]:
    """Check the tables that hold figures; yields where they stand."""
    for table in re.finditer(r"(?:^\|.*\n)+", prose, re.MULTILINE):
        lines = list(re.finditer(r"^\|.*$", table[0], re.MULTILINE))
        head = [cell.strip() for cell in lines[0][0].strip("|").split("|")]
        rule = TABLES.get((head[0], head[1]))
        if rule is None:
            continue
        for line in lines[2:]:
            places = [each.span(1) for each in re.finditer(r"\|([^|]*)(?=\|)", line[0])]
            row = {name: line[0][start:end].strip() for name, (start, end) in zip(head, places, strict=True)}
            try:
                cells = rule(row)
            except UNKNOWN as error:
                done.problems.append(f"{line[0]}: {error!r}")
                continue
            for name, (start, end) in zip(head, places, strict=True):
                if name in cells and row[name]:
                    offset = table.start() + line.start() + start
                    text = CODE.sub(_blank, line[0][start:end])
                    digits = rf"\d{{1,3}}(?: \d{{3}})+|{NUMBER}"
                    spans = [(offset + each.start(), offset + each.end()) for each in re.finditer(digits, text)]
                    _compare(prose, spans, cells[name], f"{row[head[0]]}, {name}", done)
        yield table.span()
