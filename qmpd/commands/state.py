"""What a daemon with a state directory writes down, and what it tells about coming back. Source: docs/durable.md."""

from typing import Any

from qmpd.commands.events import Timestamp
from qmpd.commands.jobs import JobType
from qmpd.control.durable import DurableRecords
from qmpd.control.history import timestamp
from qmpd.control.qapi import Bool, Int, QapiModel, Str
from qmpd.control.registry import Context, command, event


class PartialBase(QapiModel):
    """The file ``base`` holds a part of what the files ``images`` hold: job ``job`` has not brought it all there.

    Whoever reads base by itself, or through another overlay, may see a mixture.
    """

    base: Str
    images: list[Str]
    job: Str
    running: Bool
    since: Timestamp


class StateInfo(QapiModel):
    """``directory`` is there with --state-dir; ``durable`` says that it is written to."""

    directory: Str | None = None
    durable: Bool
    log: Str
    incarnation: Str
    partial_bases: list[PartialBase]


@command("x-qmpd-query-state", returns=StateInfo, features=("unstable",))
def query_state(ctx: Context) -> dict[str, Any]:
    """Where the state is, and which images are mixtures."""
    history, records = ctx.bus.history, ctx.rooms["records"]
    answer = {"durable": False, "log": history.log, "incarnation": history.incarnation, "partial-bases": []}
    if not isinstance(records, DurableRecords):
        return answer
    running = {life.job.id for life in ctx.jobs.lives}
    bases = [
        {
            "base": row["base"],
            "images": row["images"],
            "job": row["job"],
            "running": row["job"] in running,
            "since": timestamp(row["time"]),
        }
        for row in records.partial.values()
    ]
    return answer | {
        "directory": records.directory,
        "durable": records.journal.is_durable,
        "partial-bases": bases,
    }


class Restarted(QapiModel):
    """The daemon has come back with what ``previous`` left; nodes and exports are there again."""

    incarnation: Str
    previous: Str


class RestoreFailed(QapiModel):
    """Something could not be brought back. It stays in the state, and is tried again at the next start."""

    kind: Str
    name: Str
    error: Str


class JobResumed(QapiModel):
    """A job goes on from ``offset`` (bytes of the device), or ``waiting`` does so when it is resumed."""

    id: Str
    type_: JobType
    offset: Int
    waiting: Bool


class StateLost(QapiModel):
    """The state cannot be written any more: what runs goes on, but would not survive the end of the daemon."""

    error: Str


event("X_QMPD_RESTARTED", Restarted, features=("unstable",))
event("X_QMPD_RESTORE_FAILED", RestoreFailed, features=("unstable",))
event("X_QMPD_JOB_RESUMED", JobResumed, features=("unstable",))
event("X_QMPD_STATE_LOST", StateLost, features=("unstable",))
