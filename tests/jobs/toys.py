"""Jobs made of memory, for tests of what runs them."""

from __future__ import annotations

import threading

from qmpd.errors import Kind, QmpdError
from qmpd.jobs.cell import Cell, Rest
from qmpd.jobs.job import Action, Body, Failure, Job, Ready
from qmpd.steps import Steps

CHUNK = 10


class Memory(Job):
    """Copies nothing, chunk by chunk. ``faults`` are errors that chunks meet before they succeed, by chunk number."""

    job_type = "commit"

    def __init__(self, job_id: str, chunks: int = 4, speed: int = 0, **flags: bool) -> None:
        super().__init__(job_id, **flags)
        self.chunks = chunks
        self.speed = speed
        self.faults: dict[int, list[tuple[Action, int]]] = {}
        self.gate: threading.Event | None = None  # holds a worker inside a chunk
        self.inside = threading.Event()
        self.phases: list[str] = []
        self.failing: dict[str, Exception] = {}

    def start(self, cell: Cell) -> Steps[None]:
        cell.set_speed(self.speed)
        cell.set_total(self.chunks * CHUNK)
        yield from self._phase("start")

    def run(self, cell: Cell) -> Body:
        if not self.chunks:
            return
        yield Rest()
        for number in range(self.chunks):
            yield from cell.pace()
            for action, code in self.faults.get(number, []):
                failure = QmpdError("x", Kind.IO, errno=code)
                yield Failure("read", action, failure)
                if action is Action.REPORT:
                    raise QmpdError(failure.strerror, Kind.IO, errno=code)
            if self.gate is not None:
                self.inside.set()
                self.gate.wait()
            cell.advance(CHUNK, charged=CHUNK)
        yield from cell.checkpoint()

    def prepare(self) -> Steps[None]:
        return self._phase("prepare")

    def commit(self) -> Steps[None]:
        return self._phase("commit")

    def abort(self) -> Steps[None]:
        return self._phase("abort")

    def clean(self) -> Steps[None]:
        return self._phase("clean")

    def _phase(self, name: str) -> Steps[None]:
        yield lambda: None
        self.phases.append(name)
        if name in self.failing:
            raise self.failing[name]


class Follower(Memory):
    """Becomes ready, and ends when completed or softly cancelled."""

    done = False

    def run(self, cell: Cell) -> Body:
        yield Rest()
        yield Ready()
        while not self.done:
            yield from cell.checkpoint()
            yield Rest(3600.0)

    def complete(self) -> None:
        self.done = True

    def soft_cancel(self) -> bool:
        self.done = True
        return True
