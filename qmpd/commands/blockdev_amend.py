"""x-blockdev-amend. Source: spec/toolbox.md section 10."""

from enum import StrEnum

from qmpd.commands.blockdev_create import QCryptoBlockFormat
from qmpd.commands.blockdev_options import BlockdevDriver
from qmpd.control.qapi import Bool, Int, QapiModel, Str
from qmpd.control.registry import Context, command
from qmpd.errors import Kind, QmpdError
from qmpd.jobs.amend import AmendJob

AmendDriver = StrEnum(  # type: ignore[misc]  # computed: what nodes can be, and one that is refused by its members
    "AmendDriver", {"LUKS": "luks"} | {driver.name: driver.value for driver in BlockdevDriver}
)


class QCryptoBlockLUKSKeyslotState(StrEnum):
    ACTIVE = "active"
    INACTIVE = "inactive"


class BlockdevAmendOptions(QapiModel, discriminator="driver"):
    driver: AmendDriver


class BlockdevAmendOptionsLUKS(BlockdevAmendOptions, branch="luks"):
    state: QCryptoBlockLUKSKeyslotState
    new_secret: Str | None = None
    old_secret: Str | None = None
    keyslot: Int | None = None
    iter_time: Int | None = None
    secret: Str | None = None


class QCryptoBlockAmendOptions(QapiModel, discriminator="format"):
    format: QCryptoBlockFormat


class QCryptoBlockAmendOptionsLUKS(QCryptoBlockAmendOptions, branch="luks"):
    state: QCryptoBlockLUKSKeyslotState
    new_secret: Str | None = None
    old_secret: Str | None = None
    keyslot: Int | None = None
    iter_time: Int | None = None
    secret: Str | None = None


class BlockdevAmendOptionsQcow2(BlockdevAmendOptions, branch="qcow2"):
    encrypt: QCryptoBlockAmendOptions | None = None


class BlockdevAmend(QapiModel):
    job_id: Str
    node_name: Str
    options: BlockdevAmendOptions
    force: Bool | None = None


@command("x-blockdev-amend", features=("unstable",))
async def blockdev_amend(ctx: Context, args: BlockdevAmend) -> None:
    """Start the job that changes an image's options."""
    await ctx.jobs.launch(lambda: _make_job(ctx, args))


def _make_job(ctx: Context, args: BlockdevAmend) -> AmendJob:
    node = ctx.graph.get(args.node_name)
    options = args.options
    if node.driver_name != options.driver:
        raise QmpdError("x-blockdev-amend doesn't support changing the block driver", node=node.name)
    if not isinstance(options, BlockdevAmendOptionsQcow2):
        raise QmpdError("Driver does not support x-blockdev-amend", Kind.UNSUPPORTED, node=node.name)
    return AmendJob(args.job_id, encryption=options.encrypt is not None)
