"""What the users of exports share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.exports.serving import Server, serving


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """The program under test, with an NBD server on a UNIX socket and no export."""
    with serving(tmp_path) as server:
        yield server


@pytest.fixture(params=["unix", "tcp"])
def anywhere(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """The same, on a UNIX socket and on a port."""
    with serving(tmp_path, tcp=request.param == "tcp") as server:
        yield server
