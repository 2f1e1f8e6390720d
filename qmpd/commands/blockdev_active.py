"""blockdev-set-active. Source: spec/toolbox.md section 9."""

from functools import partial

from qmpd.commands.blockdev import find_node
from qmpd.control.bridge import run_steps
from qmpd.control.qapi import Bool, QapiModel, Str
from qmpd.control.registry import Context, command
from qmpd.graph import activity
from qmpd.graph.edit import Graph
from qmpd.graph.node import topological
from qmpd.jobs.surgery import while_quiet
from qmpd.steps import Steps


class BlockdevSetActive(QapiModel):
    """Without a name: all nodes."""

    node_name: Str | None = None
    active: Bool


@command("blockdev-set-active")
async def blockdev_set_active(ctx: Context, args: BlockdevSetActive) -> None:
    """Give nodes up for another program, or take them back."""
    async with ctx.graph_lock:
        await run_steps((_activate if args.active else _inactivate)(ctx.graph, args.node_name))


def _activate(graph: Graph, name: str | None) -> Steps[None]:
    nodes = activity.activation(graph.nodes if name is None else [find_node(graph, name)])
    yield from while_quiet(graph, nodes, partial(activity.activate, graph, nodes))


def _inactivate(graph: Graph, name: str | None) -> Steps[None]:
    if name is None:
        nodes, failure = [node for node in topological(graph.nodes) if node.active], "Failed to inactivate all nodes"
    else:
        nodes, failure = activity.inactivation(find_node(graph, name)), "Failed to inactivate node"
    yield from while_quiet(graph, nodes, partial(activity.inactivate, graph, nodes, failure))
