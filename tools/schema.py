#!/usr/bin/env python3
"""Write schema/, the published contract, from the command registry.

``schema.py`` writes the files, ``schema.py --check`` says by its exit status whether they are up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

import qmpd.commands  # noqa: F401  fills the registry
from qmpd.control import schema

FOLDER = Path(__file__).resolve().parent.parent / "schema"


def main(arguments: list[str]) -> int:
    """Write or check. Returns the exit status."""
    if arguments == ["--check"]:
        stale = schema.stale(FOLDER)
        for name in stale:
            print(f"schema/{name} is out of date: run `make schema`", file=sys.stderr)
        return int(bool(stale))
    schema.write(FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
