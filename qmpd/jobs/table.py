"""The life of a job as two tables and one transition function.

Source: spec/jobs-and-commit.md sections 1.1 and 1.2. Control thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Final, Protocol

from qmpd.errors import QmpdError

#: Publishes an event: its name and its data.
Publish = Callable[[str, dict[str, Any]], None]


class Status(Enum):
    """Where a job is in its life; the values are QMP's."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class Verb(Enum):
    """What a client may ask of a job; the values appear in refusals."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"
    CHANGE = "change"


#: Status -> what may follow it.
NEXT: Final[Mapping[Status, frozenset[Status]]] = {
    Status.UNDEFINED: frozenset({Status.CREATED}),
    Status.CREATED: frozenset({Status.RUNNING, Status.ABORTING, Status.NULL}),
    Status.RUNNING: frozenset({Status.PAUSED, Status.READY, Status.WAITING, Status.ABORTING}),
    Status.PAUSED: frozenset({Status.RUNNING}),
    Status.READY: frozenset({Status.STANDBY, Status.WAITING, Status.ABORTING}),
    Status.STANDBY: frozenset({Status.READY}),
    Status.WAITING: frozenset({Status.PENDING, Status.ABORTING}),
    Status.PENDING: frozenset({Status.ABORTING, Status.CONCLUDED}),
    Status.ABORTING: frozenset({Status.ABORTING, Status.CONCLUDED}),
    Status.CONCLUDED: frozenset({Status.NULL}),
    Status.NULL: frozenset(),
}

_STARTED: Final = frozenset({Status.CREATED, Status.RUNNING, Status.PAUSED, Status.READY, Status.STANDBY})

#: Verb -> the states that accept it.
ACCEPTED: Final[Mapping[Verb, frozenset[Status]]] = {
    Verb.CANCEL: _STARTED | {Status.WAITING, Status.PENDING},
    Verb.PAUSE: _STARTED,
    Verb.RESUME: _STARTED,
    Verb.SET_SPEED: _STARTED,
    Verb.CHANGE: _STARTED,
    Verb.COMPLETE: frozenset({Status.READY, Status.STANDBY}),
    Verb.FINALIZE: frozenset({Status.PENDING}),
    Verb.DISMISS: frozenset({Status.CONCLUDED}),
}


class HasStatus(Protocol):
    """What the tables need to know of a job."""

    id: str
    status: Status


class IllegalTransition(AssertionError):  # noqa: N818  named for what happened; never shown to a client
    """A programming error of ours: the table does not know this step."""


def transition(job: HasStatus, new: Status, publish: Publish) -> None:
    """Move ``job`` to ``new`` and tell everybody; entering ``aborting`` a second time is legal and silent.

    Raises :class:`IllegalTransition`, with nothing changed, when the table has no such step.
    """
    old = job.status
    if new not in NEXT[old]:
        raise IllegalTransition(f"job {job.id!r}: {old.value} -> {new.value}")
    if new is old:
        return
    job.status = new
    publish("JOB_STATUS_CHANGE", {"status": new.value, "id": job.id})


def check_verb(job: HasStatus, verb: Verb) -> None:
    """Raise the refusal clients know when ``job`` cannot accept ``verb`` now."""
    if job.status not in ACCEPTED[verb]:
        raise QmpdError(f"Job '{job.id}' in state '{job.status.value}' cannot accept command verb '{verb.value}'")
