"""240 recorded exchanges with an NBD server, byte by byte, against a running daemon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import PEER, under_test
from tests.replay import deviations, handshakes
from tests.replay.handshakes import Images

DEPENDS_ON_THE_FILE_SYSTEM = {"bs-qcow2-after-write-and-zero"}

AREA = "nbd-handshake"
RECORDINGS = Path(__file__).parents[1] / "data" / "nbd-handshake.jsonl"


def recordings() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDINGS.read_text().splitlines()]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Images are made once and copied."""
    return Images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("case", deviations.parametrize(AREA, recordings()))
def test_answers_as_recorded(case: dict[str, Any], images: Images, tmp_path: Path) -> None:
    """Every byte of every answer, and who closes the connection."""
    if under_test() == PEER and case["case"] in DEPENDS_ON_THE_FILE_SYSTEM:
        pytest.skip("the map of a file depends on its file system")
    handshakes.replay(case, images, tmp_path)
