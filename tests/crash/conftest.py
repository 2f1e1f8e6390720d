"""Fixtures of the crash tests, and the counts that a run prints at its end."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash.instrument import Orders
from tests.crash.powercut import load
from tests.crash.recording import Recording
from tests.crash.scenarios import Scenario, copy_images, prepare
from tests.crash.server import Server
from tests.tools import need

#: What random choices follow from; a run that found something is repeated with its seed.
SEED = int(os.environ.get("CRASH_SEED", "1"))

Count = Callable[[str, int], None]


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The forking process."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def recorded(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recording]:
    """Images of a scenario and the recording of its commit; made once, however often it is asked for."""
    known: dict[tuple[str, str | None], Recording] = {}

    def get(scenario: Scenario, sabotage: str | None = None) -> Recording:
        need("qemu-img", "qemu-io")
        key = (scenario.name, sabotage)
        if key not in known:
            known[key] = _record(server, scenario, sabotage, tmp_path_factory.mktemp("r"))
        return known[key]

    return get


def _record(server: Server, scenario: Scenario, sabotage: str | None, directory: Path) -> Recording:
    from tests.crash.commit import commit

    prepared = prepare(scenario, directory)
    ran = directory / "ran"
    copy_images(directory, ran, scenario.files)
    orders = Orders(record=str(directory / "trace"), reflink=scenario.reflink, sabotage=sabotage)
    commit(server, scenario, ran, orders)
    return Recording(prepared, load(directory / "trace"), directory)


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Count:
    """Have a number added to the totals that the run prints."""

    def add(what: str, number: int) -> None:
        record_property(f"crash: {what}", number)

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    totals: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name.startswith("crash: ") and getattr(report, "when", "") == "call":
                    totals[name.removeprefix("crash: ")] += value
    if totals:
        terminalreporter.section("crash tests")
        terminalreporter.write_line(f"seed {SEED} (CRASH_SEED chooses another)")
        for name, value in sorted(totals.items()):
            terminalreporter.write_line(f"{value:7} {name}")
