"""Keeps the results of jobs, and tells how far jobs are to those who asked. Control thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import trio

from qmpd.control.bus import Bus
from qmpd.control.history import Result
from qmpd.control.joblife import Life, Observer
from qmpd.jobs.job import Job
from qmpd.jobs.table import Status
from qmpd.meter import Meter

INTERVAL: Final = 0.5
"""Seconds between two looks at the progress of all jobs."""

PROGRESS: Final = "X_QMPD_JOB_PROGRESS"


@dataclass(slots=True)
class _Record:
    """What is remembered of a life while it lasts; ``began`` in nanoseconds since the epoch."""

    began: int
    meter: Meter = field(default_factory=Meter)
    #: As told last: done and total.
    told: tuple[int, int] | None = None


class Records(Observer):
    """The observer of all jobs."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._records: dict[Life, _Record] = {}
        self._wake = trio.Event()
        bus.on_progress_wanted = self._tell_all

    def began(self, life: Life) -> None:
        self._records[life] = _Record(self._bus.clock())
        self._poke()

    def done(self, life: Life) -> None:
        if self._bus.wants_progress:
            self._look(life, self._records[life])

    def concluded(self, life: Life) -> None:
        job, progress = life.job, life.cell.progress
        self.keep_result(
            Result(
                number=self._bus.last,
                job_id=job.id,
                job_type=job.job_type,
                outcome=outcome(life),
                error=job.error.desc if job.error is not None and not life.cell.cancelled else None,
                offset=progress.current,
                length=progress.total,
                began=self._records.pop(life).began,
                ended=self._bus.clock(),
                incarnation=self._bus.history.incarnation,
            )
        )

    def keep_result(self, result: Result) -> None:
        """A job has ended; the event that says so was the last one published."""
        self._bus.history.results.append(result)

    async def tell_progress(self) -> None:
        """The task that looks, for ever. It sleeps while there is nothing to see or nobody to tell."""
        while True:
            if not (self._records and self._bus.wants_progress):
                self._wake = trio.Event()
                await self._wake.wait()
            await trio.sleep(INTERVAL)
            for life, record in list(self._records.items()):
                self._look(life, record)

    def _tell_all(self) -> None:
        """Somebody has just begun to listen, also to jobs that stand still."""
        for life, record in self._records.items():
            record.told = None
            self._look(life, record)
        self._poke()

    def _poke(self) -> None:
        self._wake.set()

    def _look(self, life: Life, record: _Record) -> None:
        work, meter = life.cell.work, record.meter
        if work is None or not work.total:
            return
        meter.update(trio.current_time(), work.current, work.total)
        if life.job.status in (Status.PAUSED, Status.STANDBY):
            meter.rest()
        if record.told != (now := (work.current, work.total)):
            record.told = now
            self._bus.tell_progress(PROGRESS, _data(life.job, meter))


def outcome(life: Life) -> str:
    """How a life ended, in one word."""
    if life.cell.cancelled:
        return "cancelled"
    return "completed" if life.job.error is None else "failed"


def _data(job: Job, meter: Meter) -> dict[str, Any]:
    data: dict[str, Any] = {"id": job.id, "type": job.job_type, "done": meter.offset, "total": meter.total}
    if meter.rate is not None:
        data["rate"] = round(meter.rate, 1)
    if meter.eta is not None:
        data["eta"] = round(meter.eta, 1)
    return data
