"""Adding and removing nodes. Sources: spec/block-graph.md sections 4 and 5."""

from qmpd.commands.blockdev_options import BlockdevOptions, root_spec
from qmpd.control.bridge import run_steps
from qmpd.control.qapi import QapiModel, Str
from qmpd.control.registry import Context, command
from qmpd.errors import QmpdError
from qmpd.graph.edit import Graph
from qmpd.graph.node import Backend, Node
from qmpd.graph.open import close_node, open_tree


@command("blockdev-add")
async def blockdev_add(ctx: Context, args: BlockdevOptions) -> None:
    """Open a node with all its children."""
    spec = root_spec(args)
    async with ctx.graph_lock:
        await run_steps(open_tree(ctx.graph, spec, monitor_owned=True))


class BlockdevDel(QapiModel):
    node_name: Str


@command("blockdev-del")
async def blockdev_del(ctx: Context, args: BlockdevDel) -> None:
    """Close a node that blockdev-add made and nobody uses."""
    async with ctx.graph_lock:
        node = find_node(ctx.graph, args.node_name)
        check_deletable(node)
        await run_steps(close_node(ctx.graph, node))


def find_node(graph: Graph, name: str) -> Node:
    """The node of that name, as blockdev-del, -reopen and -set-active look it up."""
    node = graph.find(name)
    if node is None:
        raise QmpdError(f"Failed to find node with node-name='{name}'")
    return node


def check_deletable(node: Node) -> None:
    """Raise unless blockdev-del may take the node away; the order of the checks is the peer's."""
    if any(isinstance(edge.parent, Backend) for edge in node.parents):
        raise QmpdError(f"Node {node.name} is in use", node=node.name)
    node.check_op("drive-del")
    if not node.monitor_owned:
        raise QmpdError(f"Node {node.name} is not owned by the monitor", node=node.name)
    if node.parents:
        raise QmpdError(f"Block device {node.name} is in use", node=node.name)
