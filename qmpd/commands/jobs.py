"""Jobs as clients see them: verbs, queries, events. Source: spec/jobs-and-commit.md sections 1 and 2.

``job-*`` commands find a job of any kind by id, ``block-job-*`` commands only block jobs, by what they call the device.
"""

from enum import StrEnum
from typing import Any

from qmpd.commands.block_queries import BlockDeviceIoStatus
from qmpd.control.qapi import Bool, Int, QapiModel, Str
from qmpd.control.queue import ROOM as QUEUE
from qmpd.control.queue import JobQueue
from qmpd.control.registry import Context, command, event
from qmpd.jobs.job import Action
from qmpd.jobs.table import Status


class JobType(StrEnum):
    """Kinds of jobs that QMP knows by name."""

    COMMIT = "commit"
    STREAM = "stream"
    MIRROR = "mirror"
    BACKUP = "backup"
    CREATE = "create"
    AMEND = "amend"
    SNAPSHOT_LOAD = "snapshot-load"
    SNAPSHOT_SAVE = "snapshot-save"
    SNAPSHOT_DELETE = "snapshot-delete"


class JobOutcome(StrEnum):
    """How a job ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class IoOperationType(StrEnum):
    READ = "read"
    WRITE = "write"


class JobRef(QapiModel):
    """A job by its id."""

    id: Str


class BlockJobRef(QapiModel):
    """A block job by its id, which these commands call the device."""

    device: Str


# -- verbs on any job --------------------------------------------------------------------------------------------------


@command("job-pause")
def job_pause(ctx: Context, args: JobRef) -> None:
    ctx.jobs.pause(ctx.jobs.find(args.id))


@command("job-resume")
async def job_resume(ctx: Context, args: JobRef) -> None:
    await ctx.jobs.resume(ctx.jobs.find(args.id))


def _cancel_waiting(ctx: Context, job_id: str) -> bool:
    queue: JobQueue | None = ctx.rooms.get(QUEUE)
    return queue is not None and queue.cancel(job_id)


@command("job-cancel")
async def job_cancel(ctx: Context, args: JobRef) -> None:
    """Always by force. One that waits for its chain waits no more."""
    if not _cancel_waiting(ctx, args.id):
        await ctx.jobs.cancel(ctx.jobs.find(args.id), force=True)


@command("job-complete")
def job_complete(ctx: Context, args: JobRef) -> None:
    ctx.jobs.complete(ctx.jobs.find(args.id))


@command("job-dismiss")
def job_dismiss(ctx: Context, args: JobRef) -> None:
    ctx.jobs.dismiss(ctx.jobs.find(args.id))


@command("job-finalize")
async def job_finalize(ctx: Context, args: JobRef) -> None:
    await ctx.jobs.finalize(ctx.jobs.find(args.id))


# -- verbs on block jobs -----------------------------------------------------------------------------------------------


class BlockJobSetSpeed(QapiModel):
    device: Str
    speed: Int  # bytes per second


class BlockJobCancel(QapiModel):
    device: Str
    force: Bool | None = None


class MirrorCopyMode(StrEnum):
    BACKGROUND = "background"
    WRITE_BLOCKING = "write-blocking"


class BlockJobChange(QapiModel, discriminator="type_"):
    id: Str
    type_: JobType


class BlockJobChangeMirror(BlockJobChange, branch=JobType.MIRROR):
    copy_mode: MirrorCopyMode


@command("block-job-set-speed")
def block_job_set_speed(ctx: Context, args: BlockJobSetSpeed) -> None:
    ctx.jobs.set_speed(ctx.jobs.find_block(args.device), args.speed)


@command("block-job-cancel")
async def block_job_cancel(ctx: Context, args: BlockJobCancel) -> None:
    if not _cancel_waiting(ctx, args.device):
        await ctx.jobs.cancel(ctx.jobs.find_block(args.device), force=bool(args.force))


@command("block-job-pause")
def block_job_pause(ctx: Context, args: BlockJobRef) -> None:
    ctx.jobs.pause(ctx.jobs.find_block(args.device))


@command("block-job-resume")
async def block_job_resume(ctx: Context, args: BlockJobRef) -> None:
    await ctx.jobs.resume(ctx.jobs.find_block(args.device))


@command("block-job-complete")
def block_job_complete(ctx: Context, args: BlockJobRef) -> None:
    ctx.jobs.complete(ctx.jobs.find_block(args.device))


@command("block-job-dismiss")
def block_job_dismiss(ctx: Context, args: JobRef) -> None:
    ctx.jobs.dismiss(ctx.jobs.find_block(args.id))


@command("block-job-finalize")
async def block_job_finalize(ctx: Context, args: JobRef) -> None:
    await ctx.jobs.finalize(ctx.jobs.find_block(args.id))


@command("block-job-change")
def block_job_change(ctx: Context, args: BlockJobChange) -> None:
    ctx.jobs.change(ctx.jobs.find_block(args.id))


# -- queries -----------------------------------------------------------------------------------------------------------


class JobInfo(QapiModel):
    """What query-jobs says of a job; progress in bytes or steps."""

    id: Str
    type_: JobType
    status: Status
    current_progress: Int
    total_progress: Int
    error: Str | None = None


class BlockJobInfo(QapiModel, discriminator="type_"):
    """What query-block-jobs says of a job; offset and length in bytes."""

    type_: JobType
    device: Str
    len_: Int
    offset: Int
    busy: Bool
    paused: Bool
    speed: Int
    io_status: BlockDeviceIoStatus
    ready: Bool
    status: Status
    auto_finalize: Bool
    auto_dismiss: Bool
    error: Str | None = None


class BlockJobInfoMirror(BlockJobInfo, branch=JobType.MIRROR):
    actively_synced: Bool


@command("query-jobs", returns=list[JobInfo])
def query_jobs(ctx: Context) -> list[dict[str, Any]]:
    """Newest first."""
    jobs: list[dict[str, Any]] = ctx.jobs.query_jobs()
    return jobs


@command("query-block-jobs", returns=list[BlockJobInfo])
def query_block_jobs(ctx: Context) -> list[dict[str, Any]]:
    """Newest first."""
    jobs: list[dict[str, Any]] = ctx.jobs.query_block_jobs()
    return jobs


# -- events ------------------------------------------------------------------------------------------------------------


class JobStatusChange(QapiModel):
    id: Str
    status: Status


class BlockJobProgress(QapiModel):
    """Where a block job was when something happened to it."""

    type_: JobType
    device: Str
    len_: Int
    offset: Int
    speed: Int


class BlockJobCompleted(BlockJobProgress):
    """``error`` is there if the job failed."""

    error: Str | None = None


class BlockJobError(QapiModel):
    device: Str
    operation: IoOperationType
    action: Action


class BlockJobPending(QapiModel):
    type_: JobType
    id: Str


event("JOB_STATUS_CHANGE", JobStatusChange)
event("BLOCK_JOB_COMPLETED", BlockJobCompleted)
event("BLOCK_JOB_CANCELLED", BlockJobProgress)
event("BLOCK_JOB_ERROR", BlockJobError)
event("BLOCK_JOB_READY", BlockJobProgress)
event("BLOCK_JOB_PENDING", BlockJobPending)
