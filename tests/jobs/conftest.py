"""Fixtures of the job tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio.testing

from tests.jobs.rig import Rig, running, shell


@pytest.fixture
async def rig(tmp_path: Path, mock_clock: trio.testing.MockClock) -> AsyncIterator[Rig]:
    """A rig in an empty directory, under a clock that stands still."""
    async with running(tmp_path) as made:
        yield made


@pytest.fixture
def chain(tmp_path: Path) -> None:
    """base <- mid <- top of 4 MiB: 0x11 everywhere, 0x22 in the first half, 0x33 in the first cluster."""
    shell(
        "qemu-img create -q -f qcow2 base.qcow2 4M",
        "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2",
        "qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2",
        "qemu-io -f qcow2 -c 'write -P 0x11 0 4M' base.qcow2",
        "qemu-io -f qcow2 -c 'write -P 0x22 0 2M' mid.qcow2",
        "qemu-io -f qcow2 -c 'write -P 0x33 0 64k' top.qcow2",
        cwd=tmp_path,
    )
