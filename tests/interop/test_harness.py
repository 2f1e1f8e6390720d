"""A test that the recorded program does not pass says nothing: the peer goes through the harnesses too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemons import PEER
from tests.tools import need

ROOT = Path(__file__).parents[2]
HARNESSES = ["tests/replay/test_protocol.py", "tests/replay/test_jobs.py", "tests/interop", "tests/chains"]


@pytest.mark.long
@pytest.mark.parametrize("harness", HARNESSES)
def test_the_peer_passes(harness: str) -> None:
    """Every recording, every mistake and every chain gives with the peer what the tests ask of qmpd."""
    need(PEER.argv[0])
    argv = [sys.executable, "-m", "pytest", "-q", "-m", "not long", harness]
    environment = os.environ | {"QMPD_TEST_PROGRAM": PEER.name}
    run = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-4000:]
