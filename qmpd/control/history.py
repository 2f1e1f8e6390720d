"""What happened, kept for those who were away: the last events and the results of the last jobs.

Every event has a number; numbers count up and never repeat within one *log*. The log lives as long as the memory of it:
without a state directory that is one *incarnation* of the daemon, so a client that comes back after a restart sees by
the log's id that its number means nothing any more. Control thread.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from qmpd.wire import messages

EVENTS: Final = 10_000
"""Events kept; some two megabytes when written out."""

RESULTS: Final = 1_000
"""Results of jobs kept."""


@dataclass(frozen=True, slots=True)
class Event:
    """One numbered event. ``time`` is the wall clock's, in nanoseconds since the epoch."""

    number: int
    name: str
    data: dict[str, Any] | None
    time: int

    @property
    def timestamp(self) -> dict[str, int]:
        """As events on the wire have it."""
        return timestamp(self.time)

    def message(self, *, pretty: bool, numbered: bool) -> bytes:
        """As it goes over the wire; only who asked for it gets the number."""
        stamp = self.timestamp
        number = self.number if numbered else None
        return messages.event(
            self.name, self.data, stamp["seconds"], stamp["microseconds"], number=number, pretty=pretty
        )

    def as_json(self) -> dict[str, Any]:
        """An entry of x-qmpd-events."""
        row = {"number": self.number, "timestamp": self.timestamp, "event": self.name}
        return row if self.data is None else {**row, "data": self.data}


@dataclass(frozen=True, slots=True)
class Result:
    """How a job ended, told by the event ``number``. Times in nanoseconds since the epoch, the rest as events have it.

    ``outcome`` is ``completed``, ``failed`` (then ``error`` says why) or ``cancelled``.
    """

    number: int
    job_id: str
    job_type: str
    outcome: str
    error: str | None
    offset: int
    length: int
    began: int
    ended: int
    incarnation: str

    def as_json(self) -> dict[str, Any]:
        """An entry of x-qmpd-job-results."""
        row = {
            "number": self.number,
            "id": self.job_id,
            "type": self.job_type,
            "outcome": self.outcome,
            "offset": self.offset,
            "len": self.length,
            "began": timestamp(self.began),
            "ended": timestamp(self.ended),
            "incarnation": self.incarnation,
        }
        return row if self.error is None else {**row, "error": self.error}


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Events after some number. ``complete``: none of those asked for is missing."""

    events: list[Event]
    complete: bool


def timestamp(time: int) -> dict[str, int]:
    """Nanoseconds since the epoch as QMP spells a time."""
    seconds, nanoseconds = divmod(time, 1_000_000_000)
    return {"seconds": seconds, "microseconds": nanoseconds // 1000}


class History:
    """The last events and results. ``last`` is the number of the newest event, 0 before the first."""

    def __init__(self, *, events: int = EVENTS, results: int = RESULTS) -> None:
        """How many of each are kept."""
        self.incarnation = str(uuid.uuid4())
        self.log = self.incarnation
        self.last = 0
        self.events: deque[Event] = deque(maxlen=events)
        self.results: deque[Result] = deque(maxlen=results)
        #: The newest event that is no longer kept; 0 if all are.
        self._forgotten = 0

    def add(self, event: Event) -> None:
        """Keep an event, which is the newest."""
        if len(self.events) == self.events.maxlen:
            self._forgotten = self.events[0].number
        self.events.append(event)
        self.last = event.number

    def resume(self, log: str, events: Iterable[Event], results: Iterable[Result]) -> None:
        """Go on with a log of earlier incarnations."""
        self.log = log
        self.events.extend(events)
        self.results.extend(results)
        if self.events:
            self.last = self.events[-1].number
            self._forgotten = self.events[0].number - 1

    def since(self, number: int, log: str | None = None) -> Excerpt:
        """The events after ``number`` of ``log``; if that is another log, all of this one."""
        if (log is not None and log != self.log) or number > self.last:
            return Excerpt(list(self.events), complete=False)
        return Excerpt([event for event in self.events if event.number > number], number >= self._forgotten)

    def results_since(self, number: int) -> list[Result]:
        """The results told by events after ``number``, oldest first."""
        return [result for result in self.results if result.number > number]
