"""Build the plans of an export folder: ``python -m compress.export.tensorrt FOLDER``, as its build.sh does."""

from __future__ import annotations

import sys
from pathlib import Path

from adrec.errors import AdrecError
from compress.export.tensorrt.build import export_tensorrt, read_request


def main(arguments: list[str]) -> int:
    """Exit status: 0 built, 2 bad input, 3 where TensorRT or a GPU is missing."""
    if len(arguments) != 1:
        print("usage: python -m compress.export.tensorrt FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    try:
        request = read_request(folder)
        exported = export_tensorrt(
            [folder / name for name in request.graphs],
            request.profiles,
            request.options,
            report=lambda line: print(line, flush=True),
        )
        for note in exported.notes:
            print(f"note: {note}")
        for plan in exported.require_plans().values():
            print(f"wrote {plan}")
    except AdrecError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
