"""100 recorded scenarios of jobs: replies, the order of events, the graph, and the images afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qmpd.jobs.siblings import SiblingPolicy
from tests.replay import deviations, scenario
from tests.tools import need

AREA = "jobs"
RECORDINGS = Path(__file__).parents[1] / "data" / "jobs.jsonl"


def recordings() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDINGS.read_text().splitlines()]


@pytest.mark.parametrize("case", deviations.parametrize(AREA, recordings()))
def test_goes_as_recorded(case: dict[str, Any], tmp_path: Path) -> None:
    """Every reply, every event in its order, and every image afterwards is what was recorded."""
    need("qemu-img", "qemu-io")
    scenario.replay(case, tmp_path)


SIBLINGS = ("users-block-commit-start", "sibling-overlay-of-base", "sibling-overlay-of-base-exported")


@pytest.mark.parametrize("case", [case for case in recordings() if case["case"] in SIBLINGS], ids=SIBLINGS)
def test_where_siblings_are_allowed_it_goes_as_recorded(case: dict[str, Any], tmp_path: Path) -> None:
    """What the guard refuses is the only difference: without it, the images that it protects change as they did."""
    need("qemu-img", "qemu-io")
    scenario.replay(case, tmp_path, siblings=SiblingPolicy.ALLOW)
