"""A manager of jobs made of memory, with everything it tells in one log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
import trio.testing

from qmpd.control.bridge import Bridge
from qmpd.control.manager import JobManager
from qmpd.errors import QmpdError
from qmpd.graph.edit import Graph
from qmpd.jobs.job import Job


@contextmanager
def refused(text: str) -> Iterator[pytest.ExceptionInfo[QmpdError]]:
    """Exactly this text, no more and no less."""
    with pytest.raises(QmpdError) as error:
        yield error
    assert str(error.value) == text


class Bench:
    """A manager whose events are told in one line each, with replies in their place."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.log: list[str] = []
        self.lock = trio.Lock()
        self.jobs = JobManager(self.publish, Bridge(8), Graph(), self.lock)
        self.nursery = nursery

    def publish(self, name: str, data: dict[str, Any]) -> None:
        if name == "JOB_STATUS_CHANGE":
            assert set(data) == {"id", "status"}
            self.log.append(data["status"] if data["id"] == "j0" else f"{data['id']}:{data['status']}")
        else:
            rest = {key: value for key, value in data.items() if key not in ("device", "id", "type")}
            self.log.append(name.removeprefix("BLOCK_JOB_") + "".join(f" {k}={v}" for k, v in rest.items()))

    async def do(self, call: Awaitable[None] | None) -> None:
        """Carry out a verb; the log gets R where the reply falls."""
        if call is not None:
            await call
        self.log.append("R")

    async def launch(self, job: Job) -> None:
        await self.do(self.jobs.launch(lambda: job))

    def life(self, job_id: str = "j0") -> Any:
        return self.jobs.find(job_id)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the other tasks and threads get on until it holds."""
        while not condition():
            await trio.testing.wait_all_tasks_blocked()

    async def rested(self, job_id: str = "j0") -> None:
        """Let it get on to where it sleeps, is paused or over."""
        await trio.testing.wait_all_tasks_blocked()  # a thread at work counts as blocked, hence the rest
        await self.until(lambda: not self.life(job_id).busy)
        await trio.testing.wait_all_tasks_blocked()

    async def gone(self) -> None:
        await self.until(lambda: self.jobs.query_jobs() == [])

    def told(self) -> str:
        """The log since the last look."""
        log, self.log[:] = ", ".join(self.log), []
        return log
