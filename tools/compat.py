#!/usr/bin/env python3
"""Write docs/compatibility.md from docs/deviations.toml (standard library only).

``compat.py`` writes the page, ``compat.py --check`` says by its exit status whether the page is up to date.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
SOURCE = DOCS / "deviations.toml"
PAGE = DOCS / "compatibility.md"

HEAD = """\
<!-- Written by tools/compat.py from deviations.toml; edit that file, then run `make docs`. -->
# Compatibility with qemu-storage-daemon

qmpd takes the command line and the QMP commands of qemu-storage-daemon 10.0. Replies, error classes and texts, events
and the order of both are compared in the test suite with recordings of qemu-storage-daemon 10.0.2, exchange by
exchange. What follows is the complete list of deliberate differences. A difference that is not listed here is a bug;
please report it.

In general: the greeting's `version.qemu` is the QMP level spoken, `package` names qmpd and its version. Commands and
members that are qmpd's own are called `x-qmpd-...` and reach only clients that ask for them. Members of JSON objects
have no promised order.
"""

#: Headings of the areas, in the order of the page; an area that is not listed here comes last under its own name.
AREAS = {
    "connections": "Connections",
    "protocol": "The protocol",
    "commands": "Commands",
    "command-line": "The command line",
    "graph": "Nodes and permissions",
    "jobs": "Jobs and block commit",
    "images": "Image formats",
    "toolbox": "Other block commands",
    "exports": "NBD exports",
}

#: Fields that hold names, with their labels on the page.
LISTS = {"commands-missing": "Not available", "commands-added": "Additional", "cases": "Recordings"}


def page(deviations: list[dict[str, Any]]) -> str:
    """The whole text of the page."""
    areas = [*AREAS, *dict.fromkeys(entry["area"] for entry in deviations if entry["area"] not in AREAS)]
    sections = (section(area, [entry for entry in deviations if entry["area"] == area]) for area in areas)
    return "\n".join([HEAD, *filter(None, sections)])


def section(area: str, entries: list[dict[str, Any]]) -> str:
    """One area, or nothing when it has no entries."""
    if not entries:
        return ""
    return "\n".join([f"## {AREAS.get(area, area)}\n", *map(paragraph, entries)])


def paragraph(entry: dict[str, Any]) -> str:
    """One difference."""
    lines = [
        f"### {entry['title']}\n",
        f"- **qemu-storage-daemon**: {entry['peer']}",
        f"- **qmpd**: {entry['qmpd']}",
        f"- **Why**: {entry['reason']}",
    ]
    for key, label in (
        ("commands-missing", "Not available"),
        ("commands-added", "Additional"),
        ("cases", "Recordings"),
    ):
        if entry.get(key):
            lines.append(f"- **{label}**: " + ", ".join(f"`{name}`" for name in entry[key]))
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Write or check. Returns the exit status."""
    text = page(tomllib.loads(SOURCE.read_text(encoding="utf-8"))["deviation"])
    if arguments == ["--check"]:
        current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        if current != text:
            print(f"{PAGE.name} is out of date: run `make docs`", file=sys.stderr)
        return int(current != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
