"""One job's life, told by one task: start, body, phases, events.

The task belongs to the daemon, so no client takes a job with it when it hangs up. Verbs arrive from other tasks of the
control thread; they poke the life (:meth:`Life.cancel` and friends) and, where clients expect the events before the
reply, wait on one of its trio events. Source: spec/jobs-and-commit.md sections 1 and 2.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import trio

from qmpd.control.jobgroup import Group
from qmpd.errors import Kind, QmpdError, strerror
from qmpd.graph.edit import Graph
from qmpd.graph.open import close_unreferenced
from qmpd.jobs.budget import Budget
from qmpd.jobs.cell import Cell, Rest, cancelled
from qmpd.jobs.job import Action, Body, Failure, IoStatus, Job, Ready
from qmpd.jobs.table import Publish, Status, transition
from qmpd.steps import Steps

T = TypeVar("T")
_log = logging.getLogger(__name__)

RETRY_DELAY: Final = 0.1
"""Seconds before a chunk that on-error says to ignore is tried again; without it a dead disk makes a job spin."""

#: Status -> what it becomes when a pause takes effect, and the other way round.
_PAUSED: Final = {Status.RUNNING: Status.PAUSED, Status.READY: Status.STANDBY}
_RESUMED: Final = {paused: active for active, paused in _PAUSED.items()}


class Bridge(Protocol):
    """What is needed of ``control.bridge``."""

    async def to_worker(self, fn: Callable[..., T], *args: Any) -> T: ...
    async def run_steps(self, steps: Steps[T]) -> T: ...


class Observer:
    """Who is told of a life beside the events. This one does not care. Nothing here raises."""

    def began(self, life: Life) -> None:
        """The job has got what it needs to run."""

    #: Waits until what was told so far is durable; None: nobody makes it so.
    settle: Callable[[], Awaitable[None]] | None = None

    def done(self, life: Life) -> None:
        """No progress will follow."""

    def concluded(self, life: Life) -> None:
        """The job has ended, and the event that says so has just been published."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all lives share. Phases that change the graph run with ``graph_lock`` held."""

    publish: Publish
    bridge: Bridge
    graph: Graph
    graph_lock: trio.Lock
    observer: Observer
    budget: Budget


def _next(body: Body) -> Rest | Failure | Ready | None:
    """Worker thread: the body's next stretch; None when it ended."""
    return next(body, None)


class Life:
    """The run-time side of one job. Control thread."""

    def __init__(self, job: Job, around: Surroundings, group: Group) -> None:
        self.job = job
        self.group = group
        group.join(self)
        self.cell = Cell(trio.lowlevel.current_clock().current_time, self._poke, around.budget)
        #: The opening stretch of the body is over: the job's command can be answered.
        self.opened = trio.Event()
        #: Concluded, and dismissed if the job does that itself.
        self.over = trio.Event()
        #: True while a worker thread is at it (``busy`` in queries).
        self.busy = False
        #: Set when a retry that a client asked for has had its outcome.
        self.retried = trio.Event()
        self.retried.set()
        self._around = around
        self._publish = around.publish
        self._bridge = around.bridge
        self._wake = trio.Event()

    # -- poked by verbs ------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """A resting body is paused at once; one at work, at its next checkpoint."""
        self.job.user_paused = True
        self.cell.pause()
        if not self.busy:
            self._show_paused()

    def resume(self) -> bool:
        """Go on. True: this retries a failed chunk, and :attr:`retried` tells when the outcome is known."""
        job = self.job
        retry = job.io_status is not IoStatus.OK and job.status in _RESUMED
        job.user_paused = False
        job.io_status = IoStatus.OK
        self._show_resumed()
        if retry:
            self.retried = trio.Event()
        self.cell.resume()
        return retry

    def cancel(self) -> bool:
        """End it by force. True: it rests, so its end is near and :attr:`over` worth waiting for."""
        resting = not self.busy and self.job.status is not Status.CREATED
        self.job.user_paused = False
        self.job.io_status = IoStatus.OK
        self.cell.cancel()
        return resting

    def wake(self) -> None:
        """Let a resting body look around."""
        self._poke()

    # -- birth: the caller holds the graph lock ------------------------------------------------------------------------

    async def create(self) -> None:
        """Take what the job needs. Raises what ``start`` raised, with the job gone."""
        self._to(Status.CREATED)
        try:
            await self._bridge.run_steps(self.job.start(self.cell))
        except BaseException:
            self._to(Status.NULL)
            raise

    async def take_back(self) -> None:
        """Give everything back: the job will not run, because another one of the same command cannot."""
        self._give_up(cancelled())
        await self._last_phases()
        self._to(Status.CONCLUDED)
        self._to(Status.NULL)

    async def begin(self) -> None:
        """Created to running."""
        self._around.observer.began(self)
        self._to(Status.RUNNING)
        if self._around.observer.settle is not None:
            await self._around.observer.settle()  # the body does nothing that nobody would know of

    # -- the task ------------------------------------------------------------------------------------------------------

    async def live(self) -> None:
        """Running to the end."""
        error = await self._run()
        await self._finish(error)
        self.opened.set()
        self.over.set()

    def dismiss(self) -> None:
        """Concluded to null."""
        self._to(Status.NULL)

    # -- running -------------------------------------------------------------------------------------------------------

    async def _run(self) -> QmpdError | None:
        """Drive the body; how it failed."""
        body = self.job.run(self.cell)
        try:
            if self.cell.cancelled:
                return cancelled()
            while (request := await self._stretch(body)) is not None:
                await self._serve(request)
        except QmpdError as error:
            return error
        except Exception:  # noqa: BLE001
            return self._our_fault()
        finally:
            self.retried.set()
        return None

    async def _stretch(self, body: Body) -> Rest | Failure | Ready | None:
        # Made anew before the body looks at its cell: a poke that comes while it works must not be lost.
        self._wake = trio.Event()
        self.busy = True
        try:
            return await self._bridge.to_worker(_next, body)
        finally:
            self.busy = False

    async def _serve(self, request: Rest | Failure | Ready) -> None:
        """Do what the body gave up its thread for."""
        match request:
            case Rest(delay):
                await self._rest(delay)
            case Failure():
                await self._fail(request)
            case Ready():
                self._to(Status.READY)
                self._publish("BLOCK_JOB_READY", self._block_job_data())
                self.opened.set()

    async def _fail(self, failure: Failure) -> None:
        self._publish(
            "BLOCK_JOB_ERROR",
            {"device": self.job.id, "operation": failure.operation, "action": failure.action.value},
        )
        if failure.action is Action.STOP and not self.cell.cancelled:
            self.job.user_paused = True
            if self.job.io_status is IoStatus.OK:
                no_space = failure.error.errno == errno.ENOSPC
                self.job.io_status = IoStatus.NOSPACE if no_space else IoStatus.FAILED
            self.cell.pause()
        if failure.action is not Action.REPORT:
            await self._rest(RETRY_DELAY)

    async def _rest(self, delay: float) -> None:
        """Hold the body for ``delay`` seconds or until poked, and as long as it is paused."""
        self.opened.set()
        self.retried.set()
        if delay > 0 and not self.cell.paused:
            with trio.move_on_after(delay):
                await self._wake.wait()
        while self.cell.paused:
            self._show_paused()
            self._wake = trio.Event()
            await self._wake.wait()
        self._show_resumed()

    # -- ending --------------------------------------------------------------------------------------------------------

    async def _finish(self, error: QmpdError | None) -> None:
        """Everything from the end of the body on. A cancellation may come in until the last step begins."""
        if error is None and not self.cell.cancelled:
            await self._pend()
        is_cancelled = self._look(error)
        await self.group.turn(self)
        is_cancelled = is_cancelled or (self.job.error is None and self._look(None))
        async with self._around.graph_lock:
            await self._last_phases()
        self._around.observer.done(self)
        self._announce_end("BLOCK_JOB_CANCELLED" if is_cancelled else "BLOCK_JOB_COMPLETED")
        self._to(Status.CONCLUDED)
        self._around.observer.concluded(self)
        if self.job.auto_dismiss:
            self._to(Status.NULL)

    def _look(self, error: QmpdError | None) -> bool:
        """Give up after an error or a cancellation; was it a cancellation?"""
        is_cancelled = self.cell.cancelled
        if is_cancelled:
            error = error or cancelled()
        if error is not None:
            self._give_up(error)
        return is_cancelled

    def _give_up(self, error: QmpdError) -> None:
        self.job.error = error
        self._to(Status.ABORTING)
        self.group.fail(self)

    async def _pend(self) -> None:
        """Wait for the others of the group, and stay in pending until told to go on."""
        self._to(Status.WAITING)
        self.group.arrive()
        while not (self.group.released or self.cell.cancelled):
            self.opened.set()
            self._wake = trio.Event()
            await self._wake.wait()

    def show_pending(self) -> None:
        """All of the group have arrived."""
        self._to(Status.PENDING)
        if not self.job.auto_finalize and self.job.is_block_job:
            self._publish("BLOCK_JOB_PENDING", {"type": self.job.job_type, "id": self.job.id})

    async def _last_phases(self) -> None:
        """Prepare, then commit or abort, then clean; nodes that nobody holds after that are closed."""
        job = self.job
        if job.error is None and (error := await self._failure(job.prepare())) is not None:
            self._give_up(error)
        ending = job.commit() if job.error is None else job.abort()
        for phase in (ending, job.clean(), close_unreferenced(self._around.graph)):
            if (error := await self._failure(phase)) is not None:
                _log.error("job %s: while ending: %s", job.id, error)

    async def _failure(self, steps: Steps[None]) -> QmpdError | None:
        """Carry out a phase; how it failed."""
        try:
            await self._bridge.run_steps(steps)
        except QmpdError as error:
            return error
        except Exception:  # noqa: BLE001
            return self._our_fault()
        return None

    def _our_fault(self) -> QmpdError:
        """Called while handling an exception that is a bug of ours: it must cost this job, not the daemon."""
        _log.exception("job %s: unexpected failure", self.job.id)
        return QmpdError(strerror(errno.EIO), Kind.IO, errno=errno.EIO)

    def _announce_end(self, event: str) -> None:
        if self.job.is_block_job:
            failed = {} if self.job.error is None or event == "BLOCK_JOB_CANCELLED" else {"error": self.job.error.desc}
            self._publish(event, self._block_job_data() | failed)

    # -- small things --------------------------------------------------------------------------------------------------

    def _to(self, status: Status) -> None:
        transition(self.job, status, self._publish)

    def _show_paused(self) -> None:
        if self.job.status in _PAUSED:
            self._to(_PAUSED[self.job.status])

    def _show_resumed(self) -> None:
        if self.job.status in _RESUMED:
            self._to(_RESUMED[self.job.status])

    def _block_job_data(self) -> dict[str, Any]:
        progress = self.cell.progress
        return {
            "device": self.job.id,
            "len": progress.total,
            "offset": progress.current,
            "speed": self.cell.speed,
            "type": self.job.job_type,
        }

    def _poke(self) -> None:
        self._wake.set()
