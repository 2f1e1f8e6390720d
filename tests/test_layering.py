"""The house rules about imports, executed: who may know whom, and which libraries live where.

The table below is the rule. A room may import itself, the rooms listed for it, the standard library and the third-party
packages listed for it; nothing else, not inside functions and not for type checking alone, because a type is knowledge
too. A module that fits no room fails the test, so that a new room has to be given its place here first.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "qmpd"

GROUND = frozenset({"qmpd", "errors", "units", "steps", "meter"})


@dataclass(frozen=True)
class Room:
    """One row of the table: the level, the rooms below that may be used beside the ground floor, the libraries."""

    level: int
    uses: frozenset[str] = frozenset()
    libraries: frozenset[str] = frozenset()


def room(level: int, uses: str = "", libraries: str = "") -> Room:
    """A row, written with blanks between the names."""
    return Room(level, frozenset(uses.split()), frozenset(libraries.split()))


BELOW_CONTROL = "wire nbd block state graph jobs export"

ROOMS: dict[str, Room] = {
    "qmpd": room(0),
    "errors": room(0),
    "units": room(0),
    "steps": room(0),
    "meter": room(0),
    "wire": room(1, libraries="orjson"),
    "nbd": room(1),
    "block": room(1, libraries="numpy zstandard"),
    "state": room(1),
    "graph": room(2, "block"),
    "jobs": room(3, "graph block", "numpy"),
    "export": room(3, "graph block nbd", "numpy"),
    "control": room(4, BELOW_CONTROL, "trio pydantic pydantic_core outcome"),
    "commands": room(5, BELOW_CONTROL + " control", "trio pydantic pydantic_core"),
    "options": room(6, BELOW_CONTROL + " control commands", "pydantic pydantic_core"),
    "daemon": room(6, BELOW_CONTROL + " control commands options", "trio pydantic"),
    "__main__": room(6, BELOW_CONTROL + " control commands options daemon"),
    "ctl": room(6, "wire", "trio rich"),
}

#: Rooms that may know the event loop; everything else must run without one.
TRIO_ROOMS = {"control", "commands", "daemon", "ctl"}

#: A protocol without I/O touches neither the world nor the clock.
WORLDLY = frozenset(
    {"socket", "os", "threading", "time", "select", "selectors", "ssl", "asyncio"}
    | {"subprocess", "multiprocessing", "concurrent", "signal"}
)
FORBIDDEN_STDLIB: dict[str, frozenset[str]] = {
    "wire": WORLDLY,
    "nbd": WORLDLY,
    "jobs": frozenset({"socket", "asyncio"}),
}


def room_of(module: str) -> str:
    """``qmpd.block.api`` lives in ``block``; ``qmpd`` itself is a room of the ground floor."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def module_name(path: Path) -> str:
    """The dotted name of a file below the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything ``source`` imports, at any depth, relative forms resolved."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=target, names=names, level=level):
                origin = _absolute(module, target, level, is_package)
                yield from ((node.lineno, name) for name in _from(origin, [alias.name for alias in names]))
            case ast.Call(func=ast.Name(id="__import__") | ast.Attribute(attr="import_module"), args=[first, *_]):
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    yield node.lineno, first.value


def _absolute(module: str, target: str | None, level: int, is_package: bool) -> str:
    if level == 0:
        return target or ""
    parts = module.split(".")
    base = parts[: len(parts) - level + is_package]
    return ".".join([*base, *([target] if target else [])])


def _from(origin: str, names: list[str]) -> list[str]:
    """``from qmpd import errors`` names rooms where it can; any other origin is the module itself."""
    if origin != "qmpd":
        return [origin]
    return [f"qmpd.{name}" if name in ROOMS else "qmpd" for name in names]


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Every rule that the text of ``module`` breaks, as sentences."""
    home = room_of(module)
    if home not in ROOMS:
        return [f"{module}: '{home}' has no place in the table of rooms"]
    found = (
        (line, name, complaint)
        for line, name in imported(source, module, is_package=is_package)
        if (complaint := _complaint(home, name)) is not None
    )
    return [f"{module}:{line}: imports {name}: {complaint}" for line, name, complaint in sorted(found)]


def _complaint(home: str, name: str) -> str | None:
    top = name.split(".")[0]
    if top == "qmpd":
        target = room_of(name)
        allowed = {home} | GROUND | ROOMS[home].uses
        return None if target in allowed else f"'{home}' may not know '{target}'"
    if top in sys.stdlib_module_names:
        return f"'{home}' does no I/O" if top in FORBIDDEN_STDLIB.get(home, ()) else None
    return None if top in ROOMS[home].libraries else f"'{home}' may not use this library"


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=[module_name(path) for path in MODULES])
def test_a_module_imports_only_what_its_room_may(path: Path) -> None:
    """Every module keeps to the table."""
    source = path.read_text(encoding="utf-8")

    assert violations(source, module_name(path), is_package=path.name == "__init__.py") == []


def test_the_table_points_downward_only() -> None:
    """A room uses rooms of lower levels; the one step sideways is between the halves of the composition root."""
    sideways = {("daemon", "options"), ("__main__", "options"), ("__main__", "daemon")}

    upward = {
        (name, used)
        for name, row in ROOMS.items()
        for used in row.uses
        if ROOMS[used].level >= row.level and (name, used) not in sideways
    }

    assert upward == set()


def test_trio_lives_in_its_rooms_only() -> None:
    """The libraries of the table agree with the list of rooms that know the event loop."""
    assert {name for name, row in ROOMS.items() if "trio" in row.libraries} == TRIO_ROOMS


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qmpd.block.api", "from qmpd.graph.node import Node"),
        ("qmpd.block.api", "def late():\n    import qmpd.graph"),
        ("qmpd.block.api", "from ..graph import node"),
        ("qmpd.block.api", "from qmpd import graph"),
        ("qmpd.wire.session", "import socket"),
        ("qmpd.wire.session", "from time import monotonic"),
        ("qmpd.wire.session", "from os import path"),
        ("qmpd.wire.session", "import threading"),
        ("qmpd.wire.session", "from qmpd.block import api"),
        ("qmpd.graph.edit", "import trio"),
        ("qmpd.jobs.cell", "if TYPE_CHECKING:\n    from qmpd.control.manager import Manager"),
        ("qmpd.jobs.commit", "from qmpd.export import gate"),
        ("qmpd.control.registry", "from qmpd.commands import block"),
        ("qmpd.ctl.client", "from qmpd.graph import node"),
        ("qmpd.ctl.client", "importlib.import_module('qmpd.block')"),
        ("qmpd.units", "import numpy"),
        ("qmpd.attic.junk", ""),
    ],
)
def test_a_violation_is_caught(module: str, source: str) -> None:
    """The walker sees each form of a forbidden import; a rule that nothing can break proves nothing."""
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qmpd.block.copy", "import os, threading, numpy\nfrom qmpd.errors import QmpdError\nfrom . import api"),
        ("qmpd.ctl.client", "import trio, time\nfrom qmpd.wire.stream import Framer\nfrom qmpd import __version__"),
        ("qmpd.commands.block", "from qmpd.control.registry import command\nfrom qmpd.jobs.commit import CommitJob"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    """The walker does not cry wolf."""
    assert violations(source, module) == []
