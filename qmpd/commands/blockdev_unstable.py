"""Commands for experiments: children of quorum nodes, and the thread a node runs in.

Both are here for clients that try them; there is no quorum, and qmpd runs I/O on threads of its own. Source:
spec/toolbox.md section 10.
"""

from typing import Annotated

from qmpd.commands.blockdev import find_node
from qmpd.commands.objects import Iothread
from qmpd.control.qapi import Alternate, Bool, NullType, QapiModel, Str
from qmpd.control.registry import Context, command
from qmpd.errors import Kind, QmpdError
from qmpd.graph.node import Backend

# -- x-blockdev-change -------------------------------------------------------------------------------------------------


class BlockdevChange(QapiModel):
    parent: Str
    child: Str | None = None
    node: Str | None = None


@command("x-blockdev-change", features=("unstable",))
def blockdev_change(ctx: Context, args: BlockdevChange) -> None:
    """Refused, for the reason that comes first: no driver takes children at run time."""
    parent = ctx.graph.get(args.parent, args.parent)
    if args.child is not None and args.node is not None:
        raise QmpdError("The parameters child and node are in conflict")
    if args.child is not None:
        if args.child not in parent.children:
            raise QmpdError(f"Node '{args.parent}' does not have child '{args.child}'", node=parent.name)
        raise QmpdError(f"The node {parent.name} does not support removing a child", Kind.UNSUPPORTED)
    if args.node is None:
        raise QmpdError("Either child or node must be specified")
    if ctx.graph.find(args.node) is None:
        raise QmpdError(f"Node '{args.node}' not found")
    raise QmpdError(f"The node {parent.name} does not support adding a child", Kind.UNSUPPORTED)


# -- x-blockdev-set-iothread -------------------------------------------------------------------------------------------

StrOrNull = Annotated[Str | NullType, Alternate("StrOrNull")]


class BlockdevSetIothread(QapiModel):
    """``iothread`` null: the main thread."""

    node_name: Str
    iothread: StrOrNull
    force: Bool | None = None


@command("x-blockdev-set-iothread", features=("unstable",))
def blockdev_set_iothread(ctx: Context, args: BlockdevSetIothread) -> None:
    """Note the thread, which cannot be deleted while the node is there."""
    node = find_node(ctx.graph, args.node_name)
    if not args.force and any(isinstance(edge.parent, Backend) for edge in node.parents):
        raise QmpdError(
            f"Node {node.name} is associated with a BlockBackend and could be in use"
            " (use force=true to override this check)",
            node=node.name,
        )
    thread: Iothread | None = None
    if isinstance(args.iothread, str):
        found = ctx.objects.find(args.iothread)
        if not isinstance(found, Iothread):
            raise QmpdError(f"Cannot find iothread {args.iothread}")
        thread = found
    node.iothread = thread
    if thread is not None:
        thread.tenants.append(lambda: ctx.graph.find(node.name) is node and node.iothread is thread)
