"""Changing nodes that exist: options and children, length, the backing name in the header.

Sources: spec/block-graph.md section 6, spec/toolbox.md sections 4, 6 and 7.
"""

from functools import partial

from qmpd.block.api import Perm, Role
from qmpd.commands.blockdev_options import BlockdevOptions, to_spec
from qmpd.control.bridge import run_steps
from qmpd.control.qapi import Int, QapiModel, Str
from qmpd.control.registry import Context, command
from qmpd.errors import Kind, QmpdError
from qmpd.graph import chain, reopen
from qmpd.graph.edit import Graph
from qmpd.graph.node import Backend, Node
from qmpd.graph.open import close_unreferenced
from qmpd.graph.spec import NodeSpec
from qmpd.jobs.header import NewBacking, rewrite
from qmpd.jobs.surgery import quietly
from qmpd.steps import Steps
from qmpd.units import MAX_LENGTH

# -- blockdev-reopen ---------------------------------------------------------------------------------------------------


class BlockdevReopen(QapiModel):
    options: list[BlockdevOptions]


@command("blockdev-reopen")
async def blockdev_reopen(ctx: Context, args: BlockdevReopen) -> None:
    """Give nodes new descriptions, all at once."""
    specs = [to_spec(options) for options in args.options]
    async with ctx.graph_lock:
        await run_steps(_reopen(ctx.graph, specs))


def _reopen(graph: Graph, specs: list[NodeSpec]) -> Steps[None]:
    wanted = reopen.find_nodes(graph, specs)
    for node in wanted:
        yield node.opened.flush
    yield from quietly(graph, wanted, partial(reopen.apply, graph, wanted))
    yield from close_unreferenced(graph)


# -- block_resize ------------------------------------------------------------------------------------------------------


class BlockResize(QapiModel):
    """``size`` in bytes."""

    device: Str | None = None
    node_name: Str | None = None
    size: Int


@command("block_resize")
async def block_resize(ctx: Context, args: BlockResize) -> None:
    """Change the length of a node that nobody relies on."""
    async with ctx.graph_lock:
        node = _named(ctx.graph, args)
        if args.size < 0:
            raise QmpdError("Parameter 'size' expects a >0 size")
        node.check_op("resize")
        await run_steps(_resize(ctx.graph, node, args.size))


def _named(graph: Graph, args: BlockResize) -> Node:
    """The node name decides; there are no devices."""
    if args.node_name is None:
        raise QmpdError(f"Cannot find device='{args.device or ''}' nor node-name=''")
    return graph.get(args.node_name, args.device or "")


def _resize(graph: Graph, node: Node, size: int) -> Steps[None]:
    with graph.edit() as edit:
        edge = edit.attach(Backend(), "root", node, Role.NONE, perm=Perm.RESIZE)
    try:
        if node.read_only:
            raise QmpdError("Image is read-only", Kind.PERMISSION, node=node.name)
        if size > MAX_LENGTH:
            raise QmpdError(f"offset({size}) exceeds maximum({MAX_LENGTH})", node=node.name)
        yield partial(edge.device.truncate, size)
    finally:
        with graph.edit() as edit:
            edit.detach(edge)


# -- change-backing-file -----------------------------------------------------------------------------------------------


class ChangeBackingFile(QapiModel):
    device: Str
    image_node_name: Str
    backing_file: Str


@command("change-backing-file")
async def change_backing_file(ctx: Context, args: ChangeBackingFile) -> None:
    """Rewrite what an image's header says about its backing file. The graph stays as it is."""
    async with ctx.graph_lock:
        image = _image(ctx.graph, args)
        below = chain.next_image(image)
        assert below is not None
        new = NewBacking(below, args.backing_file)
        try:
            new.check([image])
        except QmpdError as error:
            text = f"Could not change backing file to '{args.backing_file}': {error.strerror}"
            raise QmpdError(text, error.kind, node=image.name, errno=error.errno) from None
        await run_steps(rewrite(ctx.graph, [image], new))


def _image(graph: Graph, args: ChangeBackingFile) -> Node:
    """The image to change, after all checks; their order is the peer's."""
    device = graph.get(args.device, args.device)
    device.check_root()
    image = graph.get(args.image_node_name)
    if image.chain_edge is None:
        raise QmpdError("not allowing backing file change on an image without a backing file", node=image.name)
    device.check_op("change")
    if not chain.contains(device, image):
        raise QmpdError(f"'{args.device}' and image file are not in the same chain", node=image.name)
    return image
