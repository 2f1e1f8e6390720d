"""Jobs that wait until their chain is free, for clients that asked for it. Control thread.

A chain is what is below a job's device. A waiting job starts when no running job has a node of it, no job that waits
longer wants one, and no more jobs run than may. What it wants is looked at when it starts, as if its command came then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import trio

from qmpd.control.exports import Call
from qmpd.control.history import Result, timestamp
from qmpd.control.joblife import Life
from qmpd.control.manager import JobManager
from qmpd.errors import QmpdError
from qmpd.graph.edit import Graph
from qmpd.graph.node import Node
from qmpd.jobs.job import Job
from qmpd.jobs.table import Publish, Status

ROOM: Final = "queue"
KIND: Final = "queued"
"""Of the calls that bring back what waits, in the state."""

QUEUED: Final = "X_QMPD_JOB_QUEUED"
DEQUEUED: Final = "X_QMPD_JOB_DEQUEUED"


@dataclass(eq=False, slots=True)
class Order:
    """A command that starts a job: what makes it, and what clients said, by which equal commands are known."""

    id: str
    job_type: str
    device: str
    command: str
    arguments: dict[str, Any]
    make: Callable[[], Job]
    #: Nanoseconds since the epoch.
    since: int = field(default_factory=time.time_ns)

    @property
    def asked(self) -> dict[str, Any]:
        """What two equal commands have in common."""
        own = ("x-qmpd-queue", "x-qmpd-idempotent")
        said = {name: value for name, value in self.arguments.items() if name not in own}
        return {"command": self.command, "arguments": said}


@dataclass(frozen=True, slots=True)
class Reason:
    """What a job waits for: the end of job ``id``, its turn after ``id``, which waits too, or that fewer jobs run."""

    kind: str
    id: str | None = None

    def as_json(self) -> dict[str, Any]:
        """As clients are told."""
        return {"kind": self.kind} | ({} if self.id is None else {"id": self.id})


class _BusyError(Exception):
    """Between the look and the start somebody else was faster."""


class JobQueue:
    """What waits, in its order. ``limit`` is how many jobs may run before one waits; 0 for any number."""

    def __init__(self, jobs: JobManager, graph: Graph, graph_lock: trio.Lock, publish: Publish) -> None:
        self.limit = 0
        self.keep_result: Callable[[Result], object] = lambda result: None
        #: The number of the event published last, and the daemon's incarnation: what results are told by.
        self.stand: Callable[[], tuple[int, str]] = lambda: (0, "")
        self._jobs = jobs
        self._graph = graph
        self._graph_lock = graph_lock
        self._publish = publish
        self._waiting: list[Order] = []
        #: On its way from the queue to the jobs.
        self._starting: Order | None = None
        self._wake = trio.Event()
        jobs.is_reserved = self._is_reserved
        jobs.on_end = self._poke

    # -- commands ------------------------------------------------------------------------------------------------------

    async def start(self, order: Order, *, queue: bool, idempotent: bool) -> None:
        """Start the job, or have it wait if ``queue``; an ``idempotent`` one that is there already is started."""
        if idempotent:
            async with self._graph_lock:
                if self._is_there(order):
                    return
        if not queue:
            await self._jobs.launch(partial(_make, order))
            return
        self._jobs.check_id(order.id)
        if self._graph.find(order.device) is None or self._reason(order) is None:
            try:
                await self._jobs.launch(partial(self._make_if_free, order))
            except _BusyError:
                pass
            else:
                return
        self._waiting.append(order)
        reason = self._reason(order) or Reason("job")
        data = {"id": order.id, "type": order.job_type, "device": order.device, "waiting-on": reason.as_json()}
        self._publish(QUEUED, data)
        self._poke()

    def cancel(self, job_id: str) -> bool:
        """Let a job wait no more; False if none of that name does."""
        for order in self._waiting:
            if order.id == job_id and order is not self._starting:
                self._leave(order, "cancelled")
                return True
        return False

    def query(self) -> dict[str, Any]:
        """What waits, for what, and how many run."""
        return {"limit": self.limit, "running": self._running, "waiting": [self._row(one) for one in self._waiting]}

    def calls(self) -> dict[str, Call]:
        """Key -> the command that has it wait again."""
        return {f"{KIND}:{order.id}": Call(order.command, order.arguments) for order in self._waiting}

    # -- the queue -----------------------------------------------------------------------------------------------------

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start what may start, for ever."""
        task_status.started()
        while True:
            self._wake = trio.Event()
            for order in list(self._waiting):
                if order in self._waiting and self._reason(order) is None:
                    await self._let_go(order)
            await self._wake.wait()

    def shutdown(self) -> None:
        """The daemon ends: nothing starts any more."""
        while self._waiting:
            self._leave(self._waiting[-1], "cancelled")

    async def _let_go(self, order: Order) -> None:
        self._starting = order
        try:
            await self._jobs.launch(partial(self._make_if_free, order))
        except _BusyError:
            return
        except QmpdError as error:
            self._leave(order, "failed", error)
        else:
            self._leave(order, "started")
        finally:
            self._starting = None

    def _make_if_free(self, order: Order) -> Job:
        """Called with the graph lock held."""
        if self._graph.find(order.device) is not None and self._reason(order) is not None:
            raise _BusyError
        return _make(order)

    def _leave(self, order: Order, outcome: str, error: QmpdError | None = None) -> None:
        if order not in self._waiting:
            return
        self._waiting.remove(order)
        told = {} if error is None else {"error": error.desc}
        self._publish(DEQUEUED, {"id": order.id, "type": order.job_type, "outcome": outcome} | told)
        if outcome != "started":
            number, incarnation = self.stand()
            self.keep_result(
                Result(
                    number=number,
                    job_id=order.id,
                    job_type=order.job_type,
                    outcome=outcome,
                    error=None if error is None else error.desc,
                    offset=0,
                    length=0,
                    began=order.since,
                    ended=time.time_ns(),
                    incarnation=incarnation,
                )
            )
        self._poke()

    # -- who waits for whom --------------------------------------------------------------------------------------------

    def _reason(self, order: Order) -> Reason | None:
        """Why it cannot start now."""
        nodes = self._chain(order)
        for life in reversed(self._jobs.lives):
            if nodes & set(life.job.nodes):
                return Reason("job", life.job.id)
        for other in self._before(order):
            if nodes & self._chain(other):
                return Reason("queued", other.id)
        return Reason("limit") if self.limit and self._running >= self.limit else None

    def _before(self, order: Order) -> Iterable[Order]:
        for other in self._waiting:
            if other is order:
                return
            yield other

    def _chain(self, order: Order) -> set[Node]:
        device = self._graph.find(order.device)
        return set() if device is None else set(device.subtree())

    @property
    def _running(self) -> int:
        return sum(not _is_over(life) for life in self._jobs.lives)

    def _is_there(self, order: Order) -> bool:
        known = [(life.job.id, life.job.asked) for life in self._jobs.lives]
        known += [(other.id, other.asked) for other in self._waiting]
        return (order.id, order.asked) in known

    def _is_reserved(self, job_id: str) -> bool:
        return any(order.id == job_id and order is not self._starting for order in self._waiting)

    def _row(self, order: Order) -> dict[str, Any]:
        reason = self._reason(order) or Reason("job")
        row = {"id": order.id, "type": order.job_type, "device": order.device, "since": timestamp(order.since)}
        return row | {"waiting-on": reason.as_json()}

    def _poke(self) -> None:
        self._wake.set()


def _make(order: Order) -> Job:
    job = order.make()
    job.asked = order.asked
    return job


def _is_over(life: Life) -> bool:
    return life.job.status in (Status.CONCLUDED, Status.NULL)
