"""125 recorded scenarios of the commands around a commit: snapshots, resizing, reopening, statistics, and so on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.replay import deviations, scenario
from tests.tools import need

AREA = "toolbox"
RECORDINGS = Path(__file__).parents[1] / "data" / "toolbox.jsonl"

#: Looks at images that were taken between two steps and are not what is there at the end.
ON_THE_WAY = {
    "change-backing-file-errors": "info top.qcow2",
    "internal-snapshot": "info a.qcow2",
    "resize-with-snapshots-and-bitmap": "info a.qcow2",
    "stream-manual": "info top.qcow2 while pending",
}


def recordings() -> list[dict[str, Any]]:
    cases = [json.loads(line) for line in RECORDINGS.read_text().splitlines()]
    for case in cases:
        case["after"].pop(ON_THE_WAY.get(case["case"]), None)
    return cases


@pytest.mark.parametrize("case", deviations.parametrize(AREA, recordings()))
def test_goes_as_recorded(case: dict[str, Any], tmp_path: Path) -> None:
    """Every reply, every event in its order, and every image afterwards is what was recorded."""
    need("qemu-img", "qemu-io")
    scenario.replay(case, tmp_path)
