"""What happened while a client was away, and what it wants to hear from now on: events by number, results, progress."""

from typing import Any

from qmpd.commands.jobs import JobOutcome, JobType
from qmpd.control.bus import Subscription
from qmpd.control.history import Excerpt, History
from qmpd.control.qapi import AnyValue, Bool, Int, Number, QapiModel, Str
from qmpd.control.registry import Context, command, event
from qmpd.errors import QmpdError


class Timestamp(QapiModel):
    """A time on the wall clock, since the epoch."""

    seconds: Int
    microseconds: Int


class LoggedEvent(QapiModel):
    """An event as it was told."""

    number: Int
    timestamp: Timestamp
    event: Str
    data: AnyValue = None


class EventLog(QapiModel):
    """Where the log stands.

    Numbers mean something within one ``log``; ``incarnation`` is another one after each start of the daemon. ``last``
    is the newest event's number. ``complete`` says that of the events asked for none is missing: they may be too old
    to be kept, or have been of another log.
    """

    log: Str
    incarnation: Str
    last: Int
    complete: Bool


class Events(EventLog):
    """Result of x-qmpd-events."""

    events: list[LoggedEvent]


class EventsSince(QapiModel):
    """Arguments of x-qmpd-events. ``since`` is the last event that the client knows, of ``log``."""

    since: Int | None = None
    log: Str | None = None
    names: list[Str] | None = None


class Subscribe(QapiModel):
    """Arguments of x-qmpd-subscribe. Without ``names`` all events are meant, without ``since`` those from now on."""

    names: list[Str] | None = None
    progress: Bool | None = None
    since: Int | None = None
    log: Str | None = None


class JobResultsSince(QapiModel):
    """Arguments of x-qmpd-job-results: only those of the job ``id``, only those after event ``since``."""

    id: Str | None = None
    since: Int | None = None


class JobResult(QapiModel):
    """How a job ended; offset and length in bytes, or steps. ``number`` is that of the event that told."""

    number: Int
    id: Str
    type_: JobType
    outcome: JobOutcome
    error: Str | None = None
    offset: Int
    len_: Int
    began: Timestamp
    ended: Timestamp
    incarnation: Str


@command("x-qmpd-events", returns=Events, features=("unstable",))
def events(ctx: Context, args: EventsSince) -> dict[str, Any]:
    """The events after ``since``, oldest first, as far as they are kept."""
    history = ctx.bus.history
    excerpt = history.since(_number(args.since), args.log)
    wanted = Subscription(_names(args.names))
    rows = [found.as_json() for found in excerpt.events if wanted.wants(found.name)]
    return {**_stand(history, excerpt), "events": rows}


@command("x-qmpd-subscribe", returns=EventLog, features=("unstable",))
def subscribe(ctx: Context, args: Subscribe) -> dict[str, Any]:
    """Have events with their numbers, also those that only qmpd has, and the progress of jobs.

    Those after ``since`` come at once, before the answer.
    """
    if ctx.outbox is None:
        raise QmpdError("Only the client of a monitor can subscribe to events")
    since = None if args.since is None else _number(args.since)
    subscription = Subscription(_names(args.names), bool(args.progress))
    return _stand(ctx.bus.history, ctx.bus.subscribe(ctx.outbox, subscription, since, args.log))


@command("x-qmpd-unsubscribe", features=("unstable",))
def unsubscribe(ctx: Context) -> None:
    """Have the events that a client has who did not subscribe."""
    if ctx.outbox is not None:
        ctx.bus.unsubscribe(ctx.outbox)


@command("x-qmpd-job-results", returns=list[JobResult], features=("unstable",))
def job_results(ctx: Context, args: JobResultsSince) -> list[dict[str, Any]]:
    """How jobs ended, oldest first; also of jobs that are gone."""
    results = ctx.bus.history.results_since(_number(args.since))
    return [result.as_json() for result in results if args.id in (None, result.job_id)]


def _number(since: int | None) -> int:
    if since is not None and since < 0:
        raise QmpdError("Parameter 'since' expects a non-negative value")
    return since or 0


def _names(names: list[str] | None) -> frozenset[str] | None:
    return None if names is None else frozenset(names)


def _stand(history: History, excerpt: Excerpt) -> dict[str, Any]:
    return {
        "log": history.log,
        "incarnation": history.incarnation,
        "last": history.last,
        "complete": excerpt.complete,
    }


# -- events ------------------------------------------------------------------------------------------------------------


class JobProgress(QapiModel):
    """How far a job is, about twice a second while it moves, and once at its end.

    ``done`` and ``total`` are bytes of what really is to be copied (steps for jobs that copy nothing); neither ever
    falls. ``rate`` is in bytes a second, ``eta`` the seconds left at that rate; both are there once they are known.
    """

    id: Str
    type_: JobType
    done: Int
    total: Int
    rate: Number | None = None
    eta: Number | None = None


event("X_QMPD_JOB_PROGRESS", JobProgress, features=("unstable",))
