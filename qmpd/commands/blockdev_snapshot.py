"""Snapshots, by overlays and inside images; transactions. Source: spec/toolbox.md sections 2, 3, 12 and 13."""

from enum import StrEnum

from qmpd.commands.block_info import SnapshotInfo
from qmpd.control.bridge import run_steps
from qmpd.control.qapi import WIRE, QapiModel, Str
from qmpd.control.registry import Context, command
from qmpd.errors import QmpdError
from qmpd.jobs import internal_snapshot, transaction
from qmpd.jobs.internal_snapshot import SnapshotInternal
from qmpd.jobs.snapshot import Snapshot, SnapshotSync, SyncRequest
from qmpd.jobs.transaction import Abort, Action


class BlockdevSnapshot(QapiModel):
    node: Str
    overlay: Str


class NewImageMode(StrEnum):
    EXISTING = "existing"
    ABSOLUTE_PATHS = "absolute-paths"


class BlockdevSnapshotSync(QapiModel):
    device: Str | None = None
    node_name: Str | None = None
    snapshot_file: Str
    snapshot_node_name: Str | None = None
    format: Str | None = None
    mode: NewImageMode | None = None


class BlockdevSnapshotInternal(QapiModel):
    device: Str
    name: Str


class BlockdevSnapshotDeleteInternalSync(QapiModel):
    device: Str
    id: Str | None = None
    name: Str | None = None


def _snapshot(args: BlockdevSnapshot) -> Action:
    return Snapshot(args.node, args.overlay)


def _snapshot_sync(args: BlockdevSnapshotSync) -> Action:
    request = SyncRequest(
        args.device,
        args.node_name,
        args.snapshot_file,
        args.snapshot_node_name,
        format="qcow2" if args.format is None else args.format,
        create=args.mode is not NewImageMode.EXISTING,
    )
    return SnapshotSync(request)


@command("blockdev-snapshot", features=("allow-write-only-overlay",))
async def blockdev_snapshot(ctx: Context, args: BlockdevSnapshot) -> None:
    """Put a node on top of another."""
    await _run(ctx, [_snapshot(args)])


@command("blockdev-snapshot-sync")
async def blockdev_snapshot_sync(ctx: Context, args: BlockdevSnapshotSync) -> None:
    """Make an image and put it on top of a node."""
    await _run(ctx, [_snapshot_sync(args)])


@command("blockdev-snapshot-internal-sync")
async def blockdev_snapshot_internal_sync(ctx: Context, args: BlockdevSnapshotInternal) -> None:
    """Keep what a disk holds now, inside its image."""
    await _run(ctx, [SnapshotInternal(args.device, args.name)])


@command("blockdev-snapshot-delete-internal-sync", returns=SnapshotInfo)
async def blockdev_snapshot_delete_internal_sync(
    ctx: Context, args: BlockdevSnapshotDeleteInternalSync
) -> SnapshotInfo:
    """Forget a snapshot inside an image, and tell what it was."""
    async with ctx.graph_lock:
        steps = internal_snapshot.delete(ctx.graph, args.device, args.id, args.name)
        return SnapshotInfo.parse(await run_steps(steps), WIRE)


# -- transactions ------------------------------------------------------------------------------------------------------


class TransactionActionKind(StrEnum):
    ABORT = "abort"
    BLOCKDEV_SNAPSHOT = "blockdev-snapshot"
    BLOCKDEV_SNAPSHOT_INTERNAL_SYNC = "blockdev-snapshot-internal-sync"
    BLOCKDEV_SNAPSHOT_SYNC = "blockdev-snapshot-sync"


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


class ActionCompletionMode(StrEnum):
    INDIVIDUAL = "individual"
    GROUPED = "grouped"


class TransactionProperties(QapiModel):
    completion_mode: ActionCompletionMode | None = None


class Transaction(QapiModel):
    actions: list[TransactionAction]
    properties: TransactionProperties | None = None


@command("transaction")
async def run_transaction(ctx: Context, args: Transaction) -> None:
    """Carry out all actions or none. No action starts a job, so there is nothing that could complete as a group."""
    mode = args.properties.completion_mode if args.properties else None
    if args.actions and mode is ActionCompletionMode.GROUPED:
        kind = args.actions[0].type_.value
        raise QmpdError(f"Action '{kind}' does not support transaction property completion-mode = grouped")
    await _run(ctx, [_action(action) for action in args.actions])


def _action(action: TransactionAction) -> Action:
    match action:
        case BlockdevSnapshotWrapper(data=data):
            return _snapshot(data)
        case BlockdevSnapshotSyncWrapper(data=data):
            return _snapshot_sync(data)
        case BlockdevSnapshotInternalWrapper(data=data):
            return SnapshotInternal(data.device, data.name)
        case _:
            return Abort()


async def _run(ctx: Context, actions: list[Action]) -> None:
    async with ctx.graph_lock:
        await run_steps(transaction.run(ctx.graph, actions))
