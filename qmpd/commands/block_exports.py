"""Exporting nodes over NBD. Source: spec/nbd-export.md sections 1-4."""

from enum import StrEnum
from functools import partial
from typing import Annotated, Any

from qmpd.commands.objects import Iothread
from qmpd.commands.socket_address import SocketAddress, SocketAddressLegacy, absolute, listen_at, nested
from qmpd.commands.tls_objects import admission, server_credentials
from qmpd.control import exports
from qmpd.control.exports import Wanted
from qmpd.control.nbdserver import Terms
from qmpd.control.qapi import Alternate, Bool, QapiModel, Str, Uint32
from qmpd.control.registry import Context, command, event
from qmpd.errors import QmpdError

# -- the server --------------------------------------------------------------------------------------------------------


class NbdServerOptionsBase(QapiModel):
    """What does not depend on how addresses are written; zero is no limit."""

    handshake_max_seconds: Uint32 | None = None
    tls_creds: Str | None = None
    tls_authz: Str | None = None
    max_connections: Uint32 | None = None


class NbdServerOptions(NbdServerOptionsBase):
    """--nbd-server."""

    addr: SocketAddress

    def as_command(self) -> dict[str, Any]:
        """Arguments of nbd-server-start."""
        return self.to_wire() | {"addr": nested(self.addr)}


class NbdServerStart(NbdServerOptionsBase):
    """nbd-server-start."""

    addr: SocketAddressLegacy


def _terms(ctx: Context, args: NbdServerOptionsBase) -> Terms:
    encrypted = args.tls_creds is not None
    return Terms(
        handshake_seconds=10 if args.handshake_max_seconds is None else args.handshake_max_seconds,
        max_connections=100 if args.max_connections is None else args.max_connections,
        credentials=server_credentials(ctx.objects, args.tls_creds) if args.tls_creds is not None else None,
        admit=admission(ctx.objects, args.tls_authz) if encrypted and args.tls_authz is not None else None,
    )


@command("nbd-server-start")
async def nbd_server_start(ctx: Context, args: NbdServerStart) -> None:
    """Listen for NBD clients."""
    call = args.to_wire() | {"addr": absolute(args.addr).to_wire()}
    await exports.of(ctx).start(partial(listen_at, args.addr), partial(_terms, ctx, args), call)


@command("nbd-server-stop")
async def nbd_server_stop(ctx: Context) -> None:
    """Remove all exports, cut all clients and listen no more."""
    await exports.of(ctx).stop()


# -- exports -----------------------------------------------------------------------------------------------------------


class BlockExportType(StrEnum):
    """Ways to export a node."""

    NBD = "nbd"


class BlockDirtyBitmap(QapiModel):
    """A bitmap of a particular node."""

    node: Str
    name: Str


BlockDirtyBitmapOrStr = Annotated[Str | BlockDirtyBitmap, Alternate("BlockDirtyBitmapOrStr")]


class BlockExportOptions(QapiModel, discriminator="type"):
    """What all exports have."""

    type: BlockExportType
    id: Str
    fixed_iothread: Bool | None = None
    iothread: Str | None = None
    node_name: Str
    writable: Bool | None = None
    writethrough: Bool | None = None
    allow_inactive: Bool | None = None


class BlockExportOptionsNbd(BlockExportOptions, branch=BlockExportType.NBD):
    """An export to NBD clients; its name is the node's unless given."""

    name: Str | None = None
    description: Str | None = None
    bitmaps: list[BlockDirtyBitmapOrStr] | None = None
    allocation_depth: Bool | None = None


@command("block-export-add")
async def block_export_add(ctx: Context, args: BlockExportOptions) -> None:
    """Export a node. An iothread is held in place and has no effect: connections have threads of their own."""
    assert isinstance(args, BlockExportOptionsNbd)
    exported = await exports.of(ctx).add(
        Wanted(
            id=args.id,
            node_name=args.node_name,
            name=args.name if args.name is not None else args.node_name,
            description=args.description or "",
            writable=bool(args.writable),
            writethrough=bool(args.writethrough),
            allocation_depth=bool(args.allocation_depth),
            allow_inactive=bool(args.allow_inactive),
            bitmaps=[item if isinstance(item, str) else (item.node, item.name) for item in args.bitmaps or ()],
            iothread=args.iothread,
            check_place=partial(_iothread, ctx, args.iothread),
        )
    )
    thread = _iothread(ctx, args.iothread)
    if thread is not None:
        thread.tenants.append(lambda: not exported.gone.is_set())


def _iothread(ctx: Context, name: str | None) -> Iothread | None:
    if name is None:
        return None
    found = ctx.objects.find(name)
    if not isinstance(found, Iothread):
        raise QmpdError(f'iothread "{name}" not found')
    return found


class BlockExportRemoveMode(StrEnum):
    """Whether an export with clients is removed."""

    SAFE = "safe"
    HARD = "hard"


class BlockExportDel(QapiModel):
    """Arguments of block-export-del."""

    id: Str
    mode: BlockExportRemoveMode | None = None


@command("block-export-del")
async def block_export_del(ctx: Context, args: BlockExportDel) -> None:
    """Remove an export."""
    await exports.of(ctx).remove(args.id, hard=args.mode is BlockExportRemoveMode.HARD)


class BlockExportInfo(QapiModel):
    """One export; its node is the one it leads to now, which jobs may change."""

    id: Str
    type: BlockExportType
    node_name: Str
    shutting_down: Bool


@command("query-block-exports", returns=list[BlockExportInfo])
def query_block_exports(ctx: Context) -> list[BlockExportInfo]:
    """All exports, newest first."""
    return [
        BlockExportInfo(
            id=exported.export.id,
            type=BlockExportType.NBD,
            node_name=exported.export.edge.node.name if exported.export.edge is not None else "",
            shutting_down=exported.shutting_down,
        )
        for exported in exports.of(ctx).newest_first
    ]


class BlockExportDeleted(QapiModel):
    """Data of BLOCK_EXPORT_DELETED."""

    id: Str


event("BLOCK_EXPORT_DELETED", BlockExportDeleted)

# -- how it was done once ----------------------------------------------------------------------------------------------


class NbdServerAdd(QapiModel):
    """``device`` is a node; the export's name, if not given, is the same."""

    name: Str | None = None
    description: Str | None = None
    device: Str
    writable: Bool | None = None
    bitmap: Str | None = None


@command("nbd-server-add", features=("deprecated",))
async def nbd_server_add(ctx: Context, args: NbdServerAdd) -> None:
    """Export a node, writable only if it is; the id is the name."""
    node = ctx.graph.get(args.device, args.device)
    name = args.name if args.name is not None else args.device
    await exports.of(ctx).add(
        Wanted(
            id=name,
            node_name=args.device,
            device=args.device,
            name=name,
            description=args.description or "",
            writable=bool(args.writable) and not node.read_only,
            bitmaps=[args.bitmap] if args.bitmap is not None else [],
        )
    )


class NbdServerRemove(QapiModel):
    """``name`` is the export's id."""

    name: Str
    mode: BlockExportRemoveMode | None = None


@command("nbd-server-remove", features=("deprecated",))
async def nbd_server_remove(ctx: Context, args: NbdServerRemove) -> None:
    """Remove an export."""
    await exports.of(ctx).remove(args.name, hard=args.mode is BlockExportRemoveMode.HARD)
