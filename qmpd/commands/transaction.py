"""transaction: several changes to the graph, or several jobs, all or none. Source: spec/toolbox.md section 13.

The jobs are those that qmpd has; as actions they are called ``x-qmpd-...``, since the peer knows other ones. A list is
of one sort or the other: what a job needs is looked at when the graph is as it is.
"""

from collections.abc import Callable
from enum import StrEnum
from functools import partial

from qmpd.commands.block_commit import BlockCommit, commit_of
from qmpd.commands.block_stream import BlockStream, stream_of
from qmpd.commands.blockdev_snapshot import (
    BlockdevSnapshot,
    BlockdevSnapshotInternal,
    BlockdevSnapshotSync,
    carry_out,
    snapshot_of,
    snapshot_sync_of,
)
from qmpd.commands.queue import refuse_in_transaction
from qmpd.control.qapi import QapiModel
from qmpd.control.registry import Context, command
from qmpd.errors import QmpdError
from qmpd.jobs.internal_snapshot import SnapshotInternal
from qmpd.jobs.job import Job
from qmpd.jobs.transaction import Abort, Action


class TransactionActionKind(StrEnum):
    ABORT = "abort"
    BLOCKDEV_SNAPSHOT = "blockdev-snapshot"
    BLOCKDEV_SNAPSHOT_INTERNAL_SYNC = "blockdev-snapshot-internal-sync"
    BLOCKDEV_SNAPSHOT_SYNC = "blockdev-snapshot-sync"
    X_QMPD_BLOCK_COMMIT = "x-qmpd-block-commit"
    X_QMPD_BLOCK_STREAM = "x-qmpd-block-stream"


class AbortData(QapiModel):
    """Nothing."""


class TransactionAction(QapiModel, discriminator="type_"):
    type_: TransactionActionKind


class AbortWrapper(TransactionAction, branch=TransactionActionKind.ABORT):
    data: AbortData


class BlockdevSnapshotWrapper(TransactionAction, branch=TransactionActionKind.BLOCKDEV_SNAPSHOT):
    data: BlockdevSnapshot


class BlockdevSnapshotInternalWrapper(TransactionAction, branch=TransactionActionKind.BLOCKDEV_SNAPSHOT_INTERNAL_SYNC):
    data: BlockdevSnapshotInternal


class BlockdevSnapshotSyncWrapper(TransactionAction, branch=TransactionActionKind.BLOCKDEV_SNAPSHOT_SYNC):
    data: BlockdevSnapshotSync


class BlockCommitWrapper(TransactionAction, branch=TransactionActionKind.X_QMPD_BLOCK_COMMIT):
    data: BlockCommit


class BlockStreamWrapper(TransactionAction, branch=TransactionActionKind.X_QMPD_BLOCK_STREAM):
    data: BlockStream


class ActionCompletionMode(StrEnum):
    INDIVIDUAL = "individual"
    GROUPED = "grouped"


class TransactionProperties(QapiModel):
    completion_mode: ActionCompletionMode | None = None


class Transaction(QapiModel):
    actions: list[TransactionAction]
    properties: TransactionProperties | None = None


_JOBS = (BlockCommitWrapper, BlockStreamWrapper)


@command("transaction")
async def run_transaction(ctx: Context, args: Transaction) -> None:
    """Carry out all actions or none; or start all jobs or none, ``grouped`` ones to end together as well."""
    jobs = [action for action in args.actions if isinstance(action, _JOBS)]
    others = [action for action in args.actions if not isinstance(action, _JOBS)]
    is_grouped = args.properties is not None and args.properties.completion_mode is ActionCompletionMode.GROUPED
    if others and is_grouped:
        kind = others[0].type_.value
        raise QmpdError(f"Action '{kind}' does not support transaction property completion-mode = grouped")
    if others and jobs:
        kind, job = others[0].type_.value, jobs[0].type_.value
        raise QmpdError(f"Action '{kind}' cannot be in one transaction with '{job}', which starts a job")
    if jobs:
        await ctx.jobs.launch_all([_maker(ctx, action) for action in jobs], together=is_grouped)
    else:
        await carry_out(ctx, [_action(action) for action in others])


def _maker(ctx: Context, action: BlockCommitWrapper | BlockStreamWrapper) -> Callable[[], Job]:
    refuse_in_transaction(action.data)
    match action:
        case BlockCommitWrapper(data=data):
            return commit_of(ctx, data)
        case BlockStreamWrapper(data=data):
            return partial(stream_of, ctx.graph, data)


def _action(action: TransactionAction) -> Action:
    match action:
        case BlockdevSnapshotWrapper(data=data):
            return snapshot_of(data)
        case BlockdevSnapshotSyncWrapper(data=data):
            return snapshot_sync_of(data)
        case BlockdevSnapshotInternalWrapper(data=data):
            return SnapshotInternal(data.device, data.name)
        case _:
            return Abort()
