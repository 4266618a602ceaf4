"""What a file is that was given for records and holds none, in words with the way out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adrec.data.json_text import parse_json

SHOWN = 5


def foreign(text: str) -> str | None:
    """Say what a text is instead of records; None where its lines must be judged one by one."""
    lines = text.strip().split("\n", 1)
    first = lines[0].strip()
    if not first:
        return None
    if first.startswith("<"):
        return "an HTML or XML page; give the .jsonl file of records that it was drawn from"
    if first[0] not in "{[":
        return f"not JSON: it starts with {first[:40]!r}; give a .jsonl file of records"
    if len(lines) == 1 and text.endswith("\n"):
        return None
    try:
        content = parse_json(text)
    except ValueError:
        if first in ("{", "["):
            return "a JSON document over several lines, damaged or cut short; records are one JSON object a line"
        return None
    if isinstance(content, dict) and isinstance(content.get("benchmarks"), list):
        return "a file of pytest-benchmark; `adrec bench convert FILE.json FILE.jsonl` makes records of it"
    if len(lines) == 1 and isinstance(content, dict) and "schema_version" in content:
        return None
    return f"{described(content)}; records are JSON lines, one object with schema_version and kind a line"


def described(content: object) -> str:
    """A JSON value in words."""
    if not isinstance(content, Mapping):
        return f"one JSON {type(content).__name__}"
    names = list(map(str, content))
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"one JSON object with the keys {shown}" if names else "an empty JSON object"


def folder_in_words(path: Path) -> str:
    """What to give instead of a folder."""
    inside = sorted(each.name for each in path.glob("*.jsonl") if each.name != "journal.jsonl")
    found = f"give a file in it: {', '.join(inside[:SHOWN])}" if inside else "it holds no .jsonl file of records"
    return f"a folder; {found}"
