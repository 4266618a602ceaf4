"""JSON from a user's file, where anything unreadable is an error in words."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str) -> Any:
    """Parse one JSON value; raises ValueError, of one line, also for what goes beyond Python's own limits."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, column {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    except ValueError:
        raise ValueError("an integer has thousands of digits; write it as text") from None
