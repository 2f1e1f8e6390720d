"""x-qmpd-plan-commit: what a block-commit would do and need, before it does it."""

from typing import Any

from qmpd.commands.block_commit import BlockCommit, request_of
from qmpd.commands.siblings import SiblingImage
from qmpd.control.bridge import run_steps
from qmpd.control.guard import effective
from qmpd.control.qapi import Bool, Int, Number, QapiModel, Str
from qmpd.control.registry import Context, command
from qmpd.jobs.forecast import forecast
from qmpd.jobs.plan import plan_commit


class PlannedImage(QapiModel):
    """An image of the chain; sizes in bytes. What only a file has is missing without one."""

    node_name: Str
    format: Str
    virtual_size: Int
    filename: Str | None = None
    device: Int | None = None
    inode: Int | None = None
    file_size: Int | None = None
    actual_size: Int | None = None


class PlannedCopy(QapiModel):
    """Bytes to copy by kind; ``other`` can be read through a driver only."""

    data: Int
    zero: Int
    compressed: Int
    other: Int


class PlannedGrowth(QapiModel):
    """What base's file gains: ``file-size`` and ``data`` in bytes, all else in clusters, of a qcow2 image only."""

    file_size: Int
    data: Int
    cluster_size: Int | None = None
    clusters: Int
    data_clusters: Int
    l1_clusters: Int
    l2_clusters: Int
    refcount_blocks: Int
    refcount_table_clusters: Int


class CommitForecast(QapiModel):
    """Result of x-qmpd-plan-commit; ``free`` in bytes."""

    active: Bool
    images: list[PlannedImage]
    copy_: PlannedCopy
    reflink: Bool
    growth: PlannedGrowth | None = None
    free: Int | None = None
    expected_seconds: Number | None = None
    siblings: list[SiblingImage]
    obstacles: list[Str]


@command("x-qmpd-plan-commit", returns=CommitForecast, features=("unstable",))
async def plan(ctx: Context, args: BlockCommit) -> CommitForecast:
    """Say what ``block-commit`` with these arguments would do, and what would stop it. Changes nothing."""
    async with ctx.graph_lock:
        policy = effective(ctx, args.x_qmpd_siblings)
        found = await run_steps(forecast(ctx.graph, plan_commit(ctx.graph, request_of(args)), policy))
    growth: dict[str, Any] | None = None
    if found.growth is not None:
        growth = {name: getattr(found.growth, name) for name in found.growth.__dataclass_fields__}
    images = [
        PlannedImage(
            node_name=image.node,
            format=image.format,
            virtual_size=image.length,
            filename=image.path,
            device=image.device,
            inode=image.inode,
            file_size=image.file_size,
            actual_size=image.allocated,
        )
        for image in found.images
    ]
    amount = found.copy
    return CommitForecast(
        active=found.active,
        images=images,
        copy_=PlannedCopy(data=amount.data, zero=amount.zero, compressed=amount.compressed, other=amount.other),
        reflink=found.reflink,
        growth=PlannedGrowth(**growth) if growth else None,
        free=found.free,
        expected_seconds=found.seconds,
        siblings=[SiblingImage(image=one.image, backing=one.backing) for one in found.siblings],
        obstacles=found.obstacles,
    )
