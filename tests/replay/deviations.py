"""The published list of deliberate differences from the peer, as the replays use it.

``docs/deviations.toml`` is what users read; here it decides which recordings need not be reproduced. An entry is a
promise in both directions: a listed case that does reproduce fails the suite (strict xfail), so the list cannot rot.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import PEER, under_test

FILE = Path(__file__).parents[2] / "docs" / "deviations.toml"


class MismatchError(AssertionError):
    """The program answered, but not what was recorded. Anything else that goes wrong is a fault of the harness."""


@dataclass(frozen=True)
class Deviation:
    """One entry: which recordings of an area differ, in what way, and why."""

    area: str
    cases: tuple[str, ...]
    peer: str
    qmpd: str
    reason: str
    extra: dict[str, Any]  # machine-readable details of the few entries that have them


@cache
def entries() -> tuple[Deviation, ...]:
    """All entries of the file, in its order."""
    if not FILE.exists():
        return ()
    known = ("area", "cases", "peer", "qmpd", "reason")
    return tuple(
        Deviation(
            entry["area"],
            tuple(entry.get("cases", ())),
            entry["peer"],
            entry["qmpd"],
            entry["reason"],
            {key: value for key, value in entry.items() if key not in known},
        )
        for entry in tomllib.loads(FILE.read_text())["deviation"]
    )


def lookup(area: str) -> dict[str, Deviation]:
    """Case name -> entry, for one area."""
    return {case: entry for entry in entries() if entry.area == area for case in entry.cases}


def parametrize(area: str, cases: list[dict[str, Any]]) -> list[Any]:
    """Recorded cases as pytest parameters, the listed ones marked as strict expected failures."""
    listed = {} if under_test() == PEER else lookup(area)
    unknown = set(listed) - {case["case"] for case in cases}
    assert not unknown, f"{FILE.name} lists {area} cases that were never recorded: {sorted(unknown)}"
    return [
        pytest.param(
            case,
            id=case["case"],
            marks=[pytest.mark.xfail(strict=True, raises=MismatchError, reason=listed[case["case"]].reason)]
            if case["case"] in listed
            else [],
        )
        for case in cases
    ]


def commands(which: str) -> set[str]:
    """Names of the commands that qmpd lacks (``missing``) or has in addition (``added``)."""
    if under_test() == PEER:
        return set()
    return {name for entry in entries() for name in entry.extra.get(f"commands-{which}", ())}
