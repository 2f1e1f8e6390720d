"""block-commit. Source: spec/jobs-and-commit.md section 3."""

from collections.abc import Callable
from typing import Annotated

from qmpd.commands.jobs import JobType
from qmpd.commands.queue import start
from qmpd.control.guard import preflight
from qmpd.control.qapi import Bool, Features, Int, QapiModel, Str
from qmpd.control.registry import Context, command
from qmpd.jobs.job import Job, OnError
from qmpd.jobs.plan import CommitRequest
from qmpd.jobs.remake import make_commit
from qmpd.jobs.siblings import SiblingPolicy

_DEPRECATED = Features(("deprecated",))
UNSTABLE = Features(("unstable",))

#: How the names of members begin that are about the job, but not of the peer's request.
OWN = "x_qmpd_"


class BlockCommit(QapiModel):
    """Arguments of block-commit. ``base`` and ``top`` are file names."""

    job_id: Str | None = None
    device: Str
    base_node: Str | None = None
    base: Annotated[Str | None, _DEPRECATED] = None
    top_node: Str | None = None
    top: Annotated[Str | None, _DEPRECATED] = None
    backing_file: Str | None = None
    backing_mask_protocol: Bool | None = None
    speed: Int | None = None  # bytes per second
    on_error: OnError | None = None
    filter_node_name: Str | None = None
    auto_finalize: Bool | None = None
    auto_dismiss: Bool | None = None
    x_qmpd_siblings: Annotated[SiblingPolicy | None, UNSTABLE] = None
    x_qmpd_force: Annotated[Bool | None, UNSTABLE] = None
    x_qmpd_queue: Annotated[Bool | None, UNSTABLE] = None
    x_qmpd_idempotent: Annotated[Bool | None, UNSTABLE] = None


def request_of(args: BlockCommit) -> CommitRequest:
    """What was not given keeps the default of CommitRequest."""
    return CommitRequest(**{name: value for name, value in args if value is not None and not name.startswith(OWN)})


def commit_of(ctx: Context, args: BlockCommit) -> Callable[[], Job]:
    """What makes the job when the graph can be looked at."""
    request, checks = request_of(args), preflight(ctx, args.x_qmpd_siblings, force=bool(args.x_qmpd_force))
    return lambda: make_commit(ctx.graph, request, checks)


@command("block-commit")
async def block_commit(ctx: Context, args: BlockCommit) -> None:
    """Start a job that moves the data of ``top`` and all images down to ``base`` into ``base``."""
    await start(ctx, "block-commit", args, JobType.COMMIT, commit_of(ctx, args))
