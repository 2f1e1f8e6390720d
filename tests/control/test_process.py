"""The pid file (spec/qmp-protocol.md section 15)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qmpd.control.process import PidFile
from qmpd.errors import QmpdError


def test_the_pid_file_holds_the_pid_and_goes_away(tmp_path: Path) -> None:
    """Mode 0600."""
    path = tmp_path / "pid"
    held = PidFile(str(path))

    assert path.read_text() == f"{os.getpid()}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    held.remove()
    assert not path.exists()


def test_old_content_is_replaced(tmp_path: Path) -> None:
    """A file that a killed daemon left behind."""
    path = tmp_path / "pid"
    path.write_text("a longer old content\n")
    held = PidFile(str(path))

    assert path.read_text() == f"{os.getpid()}\n"
    held.remove()


def test_two_daemons_cannot_hold_one_file(tmp_path: Path) -> None:
    """Another process is refused, with the file untouched; after that one is gone it succeeds."""
    path = tmp_path / "pid"
    held = PidFile(str(path))
    other = f"from qmpd.control.process import PidFile; PidFile({str(path)!r})"
    refused = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)

    assert refused.stderr.splitlines()[-1].endswith(
        "cannot create PID file: Cannot lock pid file: Resource temporarily unavailable"
    )
    assert path.read_text() == f"{os.getpid()}\n"
    held.remove()
    assert subprocess.run([sys.executable, "-c", other]).returncode == 0


def test_a_file_that_cannot_be_made(tmp_path: Path) -> None:
    """The reason is the system's."""
    path = tmp_path / "nope" / "pid"
    with pytest.raises(QmpdError) as caught:
        PidFile(str(path))

    assert caught.value.desc == f"cannot create PID file: Could not create '{path}': No such file or directory"


def test_a_file_that_is_no_longer_ours_is_left(tmp_path: Path) -> None:
    """Somebody has put another one in its place."""
    path = tmp_path / "pid"
    held = PidFile(str(path))
    path.unlink()
    path.write_text("1\n")
    held.remove()

    assert path.read_text() == "1\n"
