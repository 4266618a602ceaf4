"""The one exception family that users meet: each message names the value, the allowed range and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdrecError(Exception):
    """Base of every error raised for bad input; the command line prints it without a traceback and exits with 2."""

    exit_code = 2


class ConfigError(AdrecError):
    """A configuration value or key is not allowed."""


class DataError(AdrecError):
    """An input file or a prepared data set cannot be used as it is."""


class RunError(AdrecError):
    """A run folder is missing, incomplete or from an incompatible version."""


class NotSupportedError(AdrecError):
    """What was asked for is not built yet, or cannot be done with the options given."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest allowed name, or an empty string.

    A name that resembles one part of a longer name also counts: ``lamda`` finds ``lambda_uncertainty``.
    """
    names = list(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close:
        parts = {part: whole for whole in reversed(names) for part in whole.split("_")}
        close = [parts[part] for part in difflib.get_close_matches(name, list(parts), n=1, cutoff=0.7)]
    return f" (did you mean '{close[0]}'?)" if close else ""
