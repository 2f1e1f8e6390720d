"""Snapshots, by overlays and inside images. Source: spec/toolbox.md sections 2, 3 and 12."""

from enum import StrEnum

from qmpd.commands.block_info import SnapshotInfo
from qmpd.control.bridge import run_steps
from qmpd.control.qapi import WIRE, QapiModel, Str
from qmpd.control.registry import Context, command
from qmpd.jobs import internal_snapshot, transaction
from qmpd.jobs.internal_snapshot import SnapshotInternal
from qmpd.jobs.snapshot import Snapshot, SnapshotSync, SyncRequest
from qmpd.jobs.transaction import Action


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


def snapshot_of(args: BlockdevSnapshot) -> Action:
    return Snapshot(args.node, args.overlay)


def snapshot_sync_of(args: BlockdevSnapshotSync) -> Action:
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
    await carry_out(ctx, [snapshot_of(args)])


@command("blockdev-snapshot-sync")
async def blockdev_snapshot_sync(ctx: Context, args: BlockdevSnapshotSync) -> None:
    """Make an image and put it on top of a node."""
    await carry_out(ctx, [snapshot_sync_of(args)])


@command("blockdev-snapshot-internal-sync")
async def blockdev_snapshot_internal_sync(ctx: Context, args: BlockdevSnapshotInternal) -> None:
    """Keep what a disk holds now, inside its image."""
    await carry_out(ctx, [SnapshotInternal(args.device, args.name)])


@command("blockdev-snapshot-delete-internal-sync", returns=SnapshotInfo)
async def blockdev_snapshot_delete_internal_sync(
    ctx: Context, args: BlockdevSnapshotDeleteInternalSync
) -> SnapshotInfo:
    """Forget a snapshot inside an image, and tell what it was."""
    async with ctx.graph_lock:
        steps = internal_snapshot.delete(ctx.graph, args.device, args.id, args.name)
        return SnapshotInfo.parse(await run_steps(steps), WIRE)


async def carry_out(ctx: Context, actions: list[Action]) -> None:
    """All actions or none."""
    async with ctx.graph_lock:
        await run_steps(transaction.run(ctx.graph, actions))
