"""Giving nodes up for another program, and taking them back.

An inactive node does not write, holds no locks and lets everybody else use its files; its users can still read. When it
is activated, what others have changed is read anew. A user that may write keeps a node active, unless it can do without
its permissions meanwhile (:attr:`Backend.waives`). Source: spec/toolbox.md section 9.

Deviation: all nodes are checked before the first one is changed, and either all become inactive or none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from qmpd.block.api import Perm
from qmpd.errors import Kind, QmpdError
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Backend, Edge, Node, topological
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
        users = [edge for edge in node.parents if not isinstance(edge.parent, Node) and _waived(edge) is None]
        if any(edge.perm & _WRITES for edge in users):
            raise QmpdError(f"{failure}: Operation not permitted", Kind.PERMISSION, node=node.name)
    for node in nodes:
        if not node.read_only:
            yield node.opened.flush
    with graph.edit() as edit:
        _set_active(edit, nodes, False)


def activate(graph: Graph, nodes: list[Node]) -> Steps[None]:
    """Take ``nodes``, parents first, whose users hold back their requests, into use again. A failure changes nothing.

    The locks are taken before anything is read, so that nobody changes it any more.
    """
    with graph.edit() as edit:
        _set_active(edit, nodes, True)
    try:
        for node in reversed(nodes):
            yield node.opened.reload
    except Exception:
        with graph.edit() as edit:
            _set_active(edit, nodes, False)
        raise


def permissions(node: Node, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
    """What a user who puts up with inactive nodes asks of ``node`` now."""
    return (perm, shared) if node.active else (Perm.NONE, Perm.ALL)


def _set_active(edit: Edit, nodes: Iterable[Node], active: bool) -> None:
    for node in nodes:
        edit.set_active(node, active)
        for edge in node.parents:
            if (waived := _waived(edge)) is not None:
                edit.set_perm(edge, *permissions(node, *waived))


def _waived(edge: Edge) -> tuple[Perm, Perm] | None:
    return edge.parent.waives if isinstance(edge.parent, Backend) else None
