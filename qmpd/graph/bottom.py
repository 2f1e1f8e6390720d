"""The ``bottom`` of a copy-on-read node: found, and held in place as long as the node is there.

The node copies what lies in its chain down to the bottom, so these links stay as they are (spec/block-graph.md
section 4). Control thread.
"""

from __future__ import annotations

from qmpd.block.filters.copy_on_read import CopyOnRead
from qmpd.errors import QmpdError
from qmpd.graph import chain
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Node


def hold(graph: Graph, node: Node) -> None:
    """Freeze the links from ``node``, just opened, down to its bottom, and tell its driver what lies between.

    Does nothing for other nodes. Raises QmpdError if there is no such node below, or if a job holds one of the links.
    """
    name = node.spec.options.get("bottom")
    if not isinstance(node.driver, CopyOnRead) or name is None:
        return
    bottom = graph.find(name)
    if bottom is None or bottom.driver is None:
        raise QmpdError(f"Bottom node '{name}' not found")
    if bottom.is_filter:
        raise QmpdError(f"Bottom node '{name}' is a filter")
    with graph.edit() as edit:
        node.held = chain.freeze(edit, node, bottom)
    below = bottom.chain_edge
    node.driver.bound(chain.layers(node.children[node.driver.slot].node, below.node if below else None))


def release(edit: Edit, node: Node) -> None:
    """``node`` goes: its links may be changed."""
    chain.unfreeze(edit, node.held)
    node.held = []
