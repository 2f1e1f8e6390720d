"""The life of one job as seen from outside: from its first event, or from the middle, to its end.

State changes come as events. How far the job has got comes as events, too, from a daemon that has them, and is asked
for at short intervals of others. Nothing is missed as long as the events were subscribed to before the job was started
or looked up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

import trio

from qmpd.ctl.client import Client, CommandError, Event, Events
from qmpd.ctl.display import Display
from qmpd.meter import Meter

#: Seconds between two looks at the progress.
INTERVAL: Final = 0.2

#: What :func:`follow` needs to be subscribed to.
JOB_EVENTS: Final = (
    "JOB_STATUS_CHANGE",
    "BLOCK_JOB_COMPLETED",
    "BLOCK_JOB_CANCELLED",
    "BLOCK_JOB_ERROR",
    "BLOCK_JOB_READY",
    "BLOCK_JOB_PENDING",
    "X_QMPD_JOB_PROGRESS",
)

#: Text of the error of a job that was cancelled, in every query.
_CANCELLED_TEXT: Final = "Operation canceled"


class Outcome(Enum):
    """How a job ended; the values appear in ``--json`` output."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    READY = "ready"  # an active commit that has caught up and was asked to stay


@dataclass(frozen=True, slots=True)
class Ending:
    """The result of :func:`follow`. ``error`` is set for a failed job; lengths are in bytes, 0 if not known."""

    job: str
    outcome: Outcome
    error: str | None = None
    offset: int = 0
    length: int = 0


async def follow(
    client: Client, events: Events, job: str, display: Display, *, complete: bool = False, until_ready: bool = False
) -> Ending:
    """Follow ``job`` to its end.

    ``complete`` asks a job that has become ready to finish; ``until_ready`` is content with READY. Raises
    ConnectionLostError, and CommandError if the job cannot be found. Cancelling stops the watching, not the job.
    """
    return await _Follower(client, events, job, display, complete, until_ready).run()


@dataclass(slots=True)
class _Follower:
    client: Client
    events: Events
    job: str
    display: Display
    complete: bool
    until_ready: bool
    status: str = "created"
    told: Ending | None = None  # by an event, ahead of the status that makes it final
    meter: Meter = field(default_factory=Meter)
    pushed: bool = False  # progress comes as events

    async def run(self) -> Ending:
        self.pushed = await self.client.subscribe(progress=True) is not None
        if (row := await self._look()) is None:
            return await self._vanished()
        if row["status"] in ("ready", "standby") and (ending := await self._ready()):
            return ending
        if row["status"] == "concluded":
            return await self._concluded()
        next_look = self._next_look()
        while True:
            event = None
            with trio.move_on_at(next_look):
                event = await self.events.next()
            if event is None:
                await self._look()
                next_look = self._next_look()
            elif (ending := await self._handle(event)) is not None:
                self._show_end(ending)
                return ending

    def _next_look(self) -> float:
        return math.inf if self.pushed else trio.current_time() + INTERVAL

    async def _look(self) -> Mapping[str, Any] | None:
        """Ask how far the job is; None if there is no such job (any more)."""
        if (row := await self._row()) is None:
            return None
        self.status = row["status"]
        if not self.pushed:
            self._show(row["current-progress"], row["total-progress"])
        return row

    def _show(self, done: int, total: int) -> None:
        self.meter.update(trio.current_time(), done, total)
        if self.status in ("paused", "standby"):
            self.meter.rest()
        self.display.progress(self.meter, self.status)

    async def _row(self) -> Mapping[str, Any] | None:
        rows: list[Mapping[str, Any]] = await self.client.execute("query-jobs")
        return next((row for row in rows if row["id"] == self.job), None)

    async def _handle(self, event: Event) -> Ending | None:
        """What one event means for the job; not None is the end of the watch."""
        data = event.data
        if self.job not in (data.get("id"), data.get("device")):
            return None
        match event.name:
            case "X_QMPD_JOB_PROGRESS":
                self._show(data["done"], data["total"])
            case "JOB_STATUS_CHANGE":
                self.status = data["status"]
                return await self._concluded() if self.status in ("concluded", "null") else None
            case "BLOCK_JOB_COMPLETED":
                outcome = Outcome.FAILED if "error" in data else Outcome.COMPLETED
                self.told = Ending(self.job, outcome, data.get("error"), data["offset"], data["len"])
            case "BLOCK_JOB_CANCELLED":
                self.told = Ending(self.job, Outcome.CANCELLED, None, data["offset"], data["len"])
            case "BLOCK_JOB_ERROR":
                self._error(data["operation"], data["action"])
            case "BLOCK_JOB_READY":
                return await self._ready()
            case "BLOCK_JOB_PENDING":
                self.display.note(f"all data are in place; 'finalize {self.job}' changes the chain, 'cancel' does not")
        return None

    def _error(self, operation: str, action: str) -> None:
        hint = f"; 'resume {self.job}' tries again, 'cancel {self.job}' gives up" if action == "stop" else ""
        self.display.note(f"{operation} error, action: {action}{hint}")

    async def _ready(self) -> Ending | None:
        if self.until_ready:
            return Ending(self.job, Outcome.READY)
        if self.complete:
            with suppress(CommandError):  # refused only when the job is past being ready already
                await self.client.execute("job-complete", {"id": self.job})
        return None

    async def _concluded(self) -> Ending:
        """The job has ended: as an event said, or as the query says for job types without such events."""
        if self.told is not None:
            return self.told
        if (row := await self._row()) is None:
            return Ending(self.job, Outcome.COMPLETED)
        error = row.get("error")
        offset, length = row["current-progress"], row["total-progress"]
        if error is None:
            return Ending(self.job, Outcome.COMPLETED, None, offset, length)
        if error == _CANCELLED_TEXT:
            return Ending(self.job, Outcome.CANCELLED, None, offset, length)
        return Ending(self.job, Outcome.FAILED, error, offset, length)

    async def _vanished(self) -> Ending:
        """No such job: its whole life may lie in the events that have come already."""
        while (event := self.events.next_nowait()) is not None:
            if (ending := await self._handle(event)) is not None:
                return ending
        raise CommandError("GenericError", f"Job not found: {self.job}")

    def _show_end(self, ending: Ending) -> None:
        if ending.length and not self.pushed:
            self.meter.update(trio.current_time(), ending.offset, ending.length)
        self.display.progress(self.meter, self.status)
