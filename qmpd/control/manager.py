"""All jobs of the daemon: ids, verbs, queries, and their end at shutdown.

Each job lives in a task of the manager's own nursery (:mod:`qmpd.control.joblife`). Verbs are called by command
handlers; ``async`` ones return when the events that clients expect before the reply are out. Control thread.
Source: spec/jobs-and-commit.md sections 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import trio

from qmpd.control.jobgroup import Group
from qmpd.control.joblife import Bridge, Life, Observer, Surroundings
from qmpd.errors import Kind, QmpdError
from qmpd.graph.edit import Graph
from qmpd.jobs.budget import Budget, Limits
from qmpd.jobs.job import Job, check_speed, well_formed_id
from qmpd.jobs.table import Publish, Status, Verb, check_verb


class _Birth:
    """How the task that makes a job reports to the command that asked for it."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: Exception | None = None
        self.lives: list[Life] = []


class JobManager:
    """The jobs, newest first."""

    def __init__(
        self,
        publish: Publish,
        bridge: Bridge,
        graph: Graph,
        graph_lock: trio.Lock,
        observer: Observer | None = None,
    ) -> None:
        #: What all jobs may do together.
        self.budget = Budget()
        self._around = Surroundings(publish, bridge, graph, graph_lock, observer or Observer(), self.budget)
        self._lives: list[Life] = []
        self._nursery: trio.Nursery | None = None
        self._closing = False
        #: Is that the id of a job that has not started yet?
        self.is_reserved: Callable[[str], bool] = lambda job_id: False
        #: Called when a job is over, or did not come to be.
        self.on_end: Callable[[], object] = lambda: None

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tasks of all jobs until cancelled. Call :meth:`shutdown` before."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    # -- birth ---------------------------------------------------------------------------------------------------------

    async def launch(self, make: Callable[[], Job], *, speed: int | None = None, paused: bool = False) -> None:
        """Make a job and start it; returns when its command can be answered.

        ``speed`` (bytes per second) and ``paused`` are for a job that goes on: what clients told it before.

        ``make`` validates and returns the job. It is called with the graph lock held, and whatever it or the job's
        ``start`` raises is raised here. A caller that is cancelled meanwhile does not stop the job.
        """

        def prepare(life: Life) -> None:
            if speed is not None:
                life.cell.set_speed(speed)
            if paused:
                life.pause()

        await self._launch([make], together=True, prepare=prepare)

    async def launch_all(self, makes: Sequence[Callable[[], Job]], *, together: bool) -> None:
        """:meth:`launch` several jobs, or none if one of them cannot start; ``together`` they also end."""
        await self._launch(makes, together=together, prepare=lambda life: None)

    async def _launch(
        self, makes: Sequence[Callable[[], Job]], *, together: bool, prepare: Callable[[Life], None]
    ) -> None:
        if self._nursery is None or self._closing:
            raise QmpdError("The daemon is shutting down")
        birth = _Birth()
        self._nursery.start_soon(self._bring_up, makes, together, prepare, birth)
        await birth.done.wait()
        if birth.error is not None:
            raise birth.error
        for life in birth.lives:
            await life.opened.wait()

    async def _bring_up(
        self, makes: Sequence[Callable[[], Job]], together: bool, prepare: Callable[[Life], None], birth: _Birth
    ) -> None:
        try:
            async with self._around.graph_lock:
                await self._create(makes, together, birth.lives)
                # As at the peer, the last one begins first.
                for life in reversed(birth.lives):
                    await life.begin()
                    prepare(life)
        except Exception as error:  # noqa: BLE001  it belongs to the command that waits
            birth.error = error
            return
        finally:
            birth.done.set()
        async with trio.open_nursery() as nursery:
            for life in reversed(birth.lives):
                nursery.start_soon(self._live, life)

    async def _create(self, makes: Sequence[Callable[[], Job]], together: bool, lives: list[Life]) -> None:
        """All of them or none."""
        group = Group()
        try:
            for make in makes:
                life = Life(self._checked(make()), self._around, group if together else Group())
                self._lives.insert(0, life)
                await life.create()
                lives.append(life)
        except BaseException:
            for life in lives:
                await life.take_back()
            raise
        finally:
            self._forget_gone()

    def _checked(self, job: Job) -> Job:
        self.check_id(job.id)
        return job

    async def _live(self, life: Life) -> None:
        await life.live()
        self._forget_null(life)
        self.on_end()

    def _forget_gone(self) -> None:
        for life in list(self._lives):
            self._forget_null(life)

    def _forget_null(self, life: Life) -> None:
        if life.job.status is Status.NULL:
            self._lives.remove(life)
            life.over.set()
            self.on_end()

    def check_id(self, job_id: str) -> None:
        """Raise unless a new job may be called so (section 1.4)."""
        if not well_formed_id(job_id):
            raise QmpdError(f"Invalid job ID '{job_id}'")
        if any(life.job.id == job_id for life in self._lives) or self.is_reserved(job_id):
            raise QmpdError(f"Job ID '{job_id}' already in use")

    @property
    def lives(self) -> list[Life]:
        """All of them, newest first."""
        return list(self._lives)

    # -- lookup --------------------------------------------------------------------------------------------------------

    def find(self, job_id: str) -> Life:
        """For job-* commands."""
        for life in self._lives:
            if life.job.id == job_id:
                return life
        raise QmpdError("Job not found")

    def find_block(self, device: str) -> Life:
        """For block-job-* commands; jobs of other kinds do not exist for them."""
        for life in self._lives:
            if life.job.id == device and life.job.is_block_job:
                return life
        raise QmpdError(f"Block job '{device}' not found", Kind.DEVICE_NOT_ACTIVE)

    # -- verbs: the order of the checks is part of the interface (section 1.2) -----------------------------------------

    def pause(self, life: Life) -> None:
        """Hold the job at its next checkpoint; a resting one at once."""
        check_verb(life.job, Verb.PAUSE)
        if life.job.user_paused:
            raise QmpdError("Job is already paused")
        life.pause()

    async def resume(self, life: Life) -> None:
        """Let a paused job go on. After an error returns when the failed chunk has been tried again."""
        if not life.job.user_paused:
            raise QmpdError("Can't resume a job that was not paused")
        check_verb(life.job, Verb.RESUME)
        if life.resume():
            await life.retried.wait()

    async def cancel(self, life: Life, *, force: bool) -> None:
        """End the job. One that rests is over at return; one at work ends at its next checkpoint."""
        job = life.job
        if not force and job.user_paused:
            raise QmpdError(f"The block job for device '{job.id}' is currently paused")
        check_verb(job, Verb.CANCEL)
        if not force and job.status in (Status.READY, Status.STANDBY) and job.soft_cancel():
            life.wake()
        elif life.cancel():
            await life.over.wait()

    def set_speed(self, life: Life, speed: int) -> None:
        """Bytes per second; 0 for no limit."""
        check_verb(life.job, Verb.SET_SPEED)
        check_speed(speed)
        life.cell.set_speed(speed)

    def set_budget(self, limits: Limits) -> None:
        """For all jobs together, at once."""
        self.budget.set(limits, trio.current_time())
        for life in self._lives:
            life.wake()

    def complete(self, life: Life) -> None:
        """Let a ready job end; the reply comes before its last events."""
        check_verb(life.job, Verb.COMPLETE)
        life.job.complete()
        life.wake()

    async def finalize(self, life: Life) -> None:
        """Let a pending job take its last step; returns when it has."""
        check_verb(life.job, Verb.FINALIZE)
        life.group.release()
        await life.over.wait()

    def dismiss(self, life: Life) -> None:
        """Forget a concluded job."""
        check_verb(life.job, Verb.DISMISS)
        life.dismiss()
        self._forget_null(life)

    def change(self, life: Life) -> None:
        """No job there is can change on the fly."""
        check_verb(life.job, Verb.CHANGE)
        raise QmpdError("Job type does not support change")

    # -- queries (section 2.1) -----------------------------------------------------------------------------------------

    def query_jobs(self) -> list[dict[str, Any]]:
        """QMP's JobInfo of every job."""
        return [_job_info(life) for life in self._lives]

    def query_block_jobs(self) -> list[dict[str, Any]]:
        """QMP's BlockJobInfo of every block job."""
        return [_block_job_info(life) for life in self._lives if life.job.is_block_job]

    # -- the end -------------------------------------------------------------------------------------------------------

    async def shutdown(self) -> None:
        """Cancel every job by force, one after the other; returns when none is left. No job can be made any more."""
        self._closing = True
        while self._lives:
            life = self._lives[0]
            if life.job.status is not Status.CONCLUDED:
                life.cancel()
                await life.over.wait()
            if life.job.status is Status.CONCLUDED:
                life.dismiss()
                self._forget_null(life)


def _error_info(life: Life) -> dict[str, Any]:
    return {} if life.job.error is None else {"error": life.job.error.desc}


def _job_info(life: Life) -> dict[str, Any]:
    job, progress = life.job, life.cell.progress
    return {
        "id": job.id,
        "type": job.job_type,
        "status": job.status.value,
        "current-progress": progress.current,
        "total-progress": progress.total,
    } | _error_info(life)


def _block_job_info(life: Life) -> dict[str, Any]:
    job, progress = life.job, life.cell.progress
    return {
        "type": job.job_type,
        "device": job.id,
        "len": progress.total,
        "offset": progress.current,
        "speed": life.cell.speed,
        "busy": life.busy,
        "paused": life.cell.paused,
        "io-status": job.io_status.value,
        "ready": job.status in (Status.READY, Status.STANDBY),
        "status": job.status.value,
        "auto-finalize": job.auto_finalize,
        "auto-dismiss": job.auto_dismiss,
    } | _error_info(life)
