"""What the tests with real programs share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemons import Daemon, under_test
from tests.interop.chain import Chain
from tests.tools import need


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """Fresh images."""
    need("qemu-img", "qemu-io")
    return Chain.make(tmp_path)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """The program under test as a process, in the directory of the images."""
    need(under_test().argv[0])
    with under_test().start(tmp_path) as daemon:
        yield daemon
