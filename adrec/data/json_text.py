"""JSON from a user's file, where anything unreadable is an error in words."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str, constants: bool = True) -> Any:
    """Parse one JSON value.

    constants: whether NaN and Infinity, which Python writes and JSON does not know, are numbers. Raises ValueError, of
    one line, also for what goes beyond Python's own limits, and for an escape that is half of a surrogate pair.
    """
    try:
        value = json.loads(text) if constants else json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, column {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{half} is half of a surrogate pair, so no text; remove it") from None
    except _ConstantError as error:
        raise ValueError(f"{error} is not JSON; write null") from None
    except ValueError:
        raise ValueError("an integer has thousands of digits; write it as text") from None


class _ConstantError(Exception):
    """A constant that Python reads and JSON does not know."""


def _refuse_constant(name: str) -> Any:
    raise _ConstantError(name)
