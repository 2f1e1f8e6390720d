"""The control plane: round trips, pipelined commands, what an idle daemon costs and how soon it serves."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.runner import SCALE, Row, Times, Topic, alternate
from tests.daemons import Program

_COMMAND = b'{"execute": "query-block-jobs", "id": 1}'
_ROUND_TRIPS = max(200, round(5000 * SCALE))
_PIPELINED = max(500, round(20000 * SCALE))
_BURST = 500  # commands sent at once; their replies fit in a socket's buffer, so that nobody waits for the harness


def monitor(directory: Path) -> Iterator[Row]:
    rows = {
        "trip": Row("one command and its reply", 1.0, unit="us"),
        "pipelined": Row("pipelined commands", 5.0, unit="/s", more_is_better=True),
        "ready": Row("start until it serves", 0.5, limit=True),
        "memory": Row("resident memory, idle", 80, limit=True, unit="MiB"),
    }
    alternate(rows, lambda program: one_run(program, directory))
    yield from rows.values()


def one_run(program: Program, directory: Path) -> Times:
    """All four numbers from one fresh daemon."""
    started = time.perf_counter()
    with program.start(directory) as daemon:
        ready = time.perf_counter() - started
        with daemon.client() as client:
            memory = resident(daemon.process.pid)
            trips = []
            for _ in range(_ROUND_TRIPS):
                before = time.perf_counter()
                client.send(_COMMAND)
                client.line()
                trips.append(time.perf_counter() - before)
            before = time.perf_counter()
            for _ in range(_PIPELINED // _BURST):
                client.send(_COMMAND * _BURST)
                for _ in range(_BURST):
                    client.line()
            rate = _PIPELINED // _BURST * _BURST / (time.perf_counter() - before)
    return {"trip": statistics.median(trips) * 1e6, "pipelined": rate, "ready": ready, "memory": memory}


def resident(pid: int) -> float:
    """Resident memory of a process in MiB."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


TOPICS = [Topic("monitor", monitor)]
