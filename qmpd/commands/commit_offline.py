"""x-qmpd-commit-offline: what ``qemu-img commit`` does, in the daemon. Source: spec/jobs-and-commit.md section 9."""

from qmpd.commands.block_commit import OWN
from qmpd.commands.jobs import JobType
from qmpd.commands.queue import start
from qmpd.control.guard import preflight
from qmpd.control.qapi import Bool, Int, QapiModel, Str
from qmpd.control.registry import Context, command
from qmpd.jobs.job import OnError
from qmpd.jobs.offline import OfflineCommitJob, plan_offline
from qmpd.jobs.plan import CommitRequest
from qmpd.jobs.siblings import SiblingPolicy


class CommitOffline(QapiModel):
    """Arguments of x-qmpd-commit-offline."""

    job_id: Str | None = None
    device: Str
    keep: Bool | None = None
    speed: Int | None = None  # bytes per second
    on_error: OnError | None = None
    auto_finalize: Bool | None = None
    auto_dismiss: Bool | None = None
    x_qmpd_siblings: SiblingPolicy | None = None
    x_qmpd_force: Bool | None = None
    x_qmpd_queue: Bool | None = None
    x_qmpd_idempotent: Bool | None = None


@command("x-qmpd-commit-offline", features=("unstable",))
async def commit_offline(ctx: Context, args: CommitOffline) -> None:
    """Start a job that moves all data of ``device``, which nobody writes to, into its backing image.

    Afterwards the image is empty, unless it is to ``keep`` its data.
    """
    given = {name: value for name, value in args if value is not None and not name.startswith(OWN)}
    keep = bool(given.pop("keep", False))
    checks = preflight(ctx, args.x_qmpd_siblings, force=bool(args.x_qmpd_force))

    def make() -> OfflineCommitJob:
        job = OfflineCommitJob(ctx.graph, plan_offline(ctx.graph, CommitRequest(**given)), keep=keep)
        job.preflight = checks
        return job

    await start(ctx, "x-qmpd-commit-offline", args, JobType.COMMIT, make)
