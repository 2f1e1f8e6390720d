"""Giving nodes up for another program, and taking them back.

An inactive node does not write, holds no locks and lets everybody else use its files; its users can still read. When it
is activated, what others have changed is read anew. Source: spec/toolbox.md section 9.

Deviation: all nodes are checked before the first one is changed, and either all become inactive or none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from qmpd.block.api import Perm
from qmpd.errors import Kind, QmpdError
from qmpd.graph.edit import Graph
from qmpd.graph.node import Node, topological
from qmpd.steps import Steps

_WRITES: Final = Perm.WRITE | Perm.WRITE_UNCHANGED


def inactivation(root: Node) -> list[Node]:
    """Whom inactivating ``root`` is about: itself and all below that no other active node uses, parents first.

    Raises if an active node stands on ``root``.
    """
    if any(isinstance(edge.parent, Node) and edge.parent.active for edge in root.parents):
        raise QmpdError("Node has active parent node", Kind.PERMISSION, node=root.name)
    doomed: dict[Node, None] = {}
    for node in topological([root]):
        above = [edge.parent for edge in node.parents if isinstance(edge.parent, Node)]
        if node is root or all(parent in doomed or not parent.active for parent in above):
            doomed[node] = None
    return [node for node in doomed if node.active]


def activation(roots: Iterable[Node]) -> list[Node]:
    """Whom activating ``roots`` is about: whatever is inactive among them and below, parents first."""
    return [node for node in topological(roots) if not node.active]


def inactivate(graph: Graph, nodes: list[Node], failure: str) -> Steps[None]:
    """Let go of ``nodes``, parents first, whose users hold back their requests. Raises with the text ``failure``."""
    for node in nodes:
        if any(edge.perm & _WRITES for edge in node.parents if not isinstance(edge.parent, Node)):
            raise QmpdError(f"{failure}: Operation not permitted", Kind.PERMISSION, node=node.name)
    for node in nodes:
        if not node.read_only:
            yield node.opened.flush
    with graph.edit() as edit:
        for node in nodes:
            edit.set_active(node, False)


def activate(graph: Graph, nodes: list[Node]) -> Steps[None]:
    """Take ``nodes``, parents first, whose users hold back their requests, into use again. A failure changes nothing.

    The locks are taken before anything is read, so that nobody changes it any more.
    """
    with graph.edit() as edit:
        for node in nodes:
            edit.set_active(node, True)
    try:
        for node in reversed(nodes):
            yield node.opened.reload
    except Exception:
        with graph.edit() as edit:
            for node in nodes:
                edit.set_active(node, False)
        raise
