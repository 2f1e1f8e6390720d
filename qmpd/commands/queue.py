"""Jobs that wait for their chain, and commands that may be sent twice. Source: docs/queue.md."""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from qmpd.commands.events import Timestamp
from qmpd.commands.jobs import JobType
from qmpd.control.qapi import Int, QapiModel, Str
from qmpd.control.queue import DEQUEUED, QUEUED, ROOM, JobQueue, Order
from qmpd.control.registry import Context, command, event
from qmpd.errors import QmpdError
from qmpd.jobs.job import Job


class WaitKind(StrEnum):
    """What a job waits for."""

    JOB = "job"
    QUEUED = "queued"
    LIMIT = "limit"


class WaitingOn(QapiModel):
    """The end of job ``id``, which has a node of the chain; its turn after job ``id``; or that fewer jobs run."""

    kind: WaitKind
    id: Str | None = None


class WaitingJob(QapiModel):
    """A job that has not started; ``since`` it was asked for."""

    id: Str
    type_: JobType
    device: Str
    since: Timestamp
    waiting_on: WaitingOn


class QueueInfo(QapiModel):
    """Result of x-qmpd-query-queue: so many jobs run, ``limit`` may before one waits (0: any number)."""

    limit: Int
    running: Int
    waiting: list[WaitingJob]


async def start(ctx: Context, name: str, args: Any, job_type: JobType, make: Callable[[], Job]) -> None:
    """Start the job that the command ``name`` asks for with ``args``, when and as often as they say."""
    queue: JobQueue | None = ctx.rooms.get(ROOM)
    if queue is None:
        await ctx.jobs.launch(make)
        return
    order = Order(args.job_id or "", job_type.value, args.device, name, args.to_wire(), make)
    await queue.start(order, queue=bool(args.x_qmpd_queue), idempotent=bool(args.x_qmpd_idempotent))


def refuse_in_transaction(args: Any) -> None:
    """All jobs of a transaction start or none: none can wait, or be there already."""
    for name in ("x-qmpd-queue", "x-qmpd-idempotent"):
        if getattr(args, name.replace("-", "_")):
            raise QmpdError(f"Parameter '{name}' is not supported in a transaction")


@command("x-qmpd-query-queue", returns=QueueInfo, features=("unstable",))
def query_queue(ctx: Context) -> dict[str, Any]:
    """What waits, in its order."""
    queue: JobQueue | None = ctx.rooms.get(ROOM)
    return {"limit": 0, "running": 0, "waiting": []} if queue is None else queue.query()


class QueueOutcome(StrEnum):
    STARTED = "started"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobQueued(QapiModel):
    """A job waits."""

    id: Str
    type_: JobType
    device: Str
    waiting_on: WaitingOn


class JobDequeued(QapiModel):
    """A job waits no more. ``error`` says why it could not start."""

    id: Str
    type_: JobType
    outcome: QueueOutcome
    error: Str | None = None


event(QUEUED, JobQueued, features=("unstable",))
event(DEQUEUED, JobDequeued, features=("unstable",))
