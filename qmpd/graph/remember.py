"""The graph as rows of plain values, and back: what a daemon needs to have the same nodes after it was killed.

Rows say what is, not how it came to be: options as they are in effect, every child by its name. So it does not matter
which commands and jobs made the graph what it is, and no header is asked which image lies below. What belongs to jobs
is left out: their filters (users are remembered on the nodes below), and the writing they were lent nodes for.

Control thread; restoring is ``Steps``, with the graph lock held.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from qmpd.block.api import Role
from qmpd.block.drivers import DRIVERS
from qmpd.errors import QmpdError
from qmpd.graph.edit import Graph
from qmpd.graph.node import Node, topological
from qmpd.graph.open import open_tree
from qmpd.graph.spec import COMMON, NodeSpec
from qmpd.steps import Steps

Row = dict[str, Any]

#: Attributes of a node that are rows' members of the same name, beside the options.
_PLAIN: Final = ("monitor_owned", "implicit", "backing_from_header")


def describe(graph: Graph, lent: Iterable[Node] = ()) -> dict[str, Row]:
    """A row for each node that a client or an export relies on, and all below them.

    ``lent`` are nodes that jobs made writable for as long as they last.
    """
    read_only = {node for lender in lent for node in _with_followers(lender)}
    roots = [node for node in graph.nodes if node.monitor_owned or any(not _is_node(edge) for edge in node.parents)]
    # Links are unique by node here: what a link leads to is looked at behind the filters of jobs.
    return {
        node.name: _row(node, read_only=node.read_only or node in read_only)
        for node in topological(roots)
        if node.driver is not None and not node.never_freeze
    }


def behind_filters(node: Node) -> Node:
    """The node that ``node`` is, or that it is a job's filter above."""
    while node.never_freeze and node.filter_edge is not None:
        node = node.filter_edge.node
    return node


def _is_node(edge: Any) -> bool:
    return isinstance(edge.parent, Node)


def _with_followers(node: Node) -> Iterable[Node]:
    """The node, and the inline children that are read-only when it is."""
    yield node
    for edge in node.children.values():
        child = edge.node
        if child.inherits_from is node and "read-only" not in child.explicit and not edge.role & Role.COW:
            yield from _with_followers(child)


def _row(node: Node, *, read_only: bool) -> Row:
    spec = replace(node.spec, read_only=read_only, active=node.active)
    children: dict[str, str | None] = {slot: behind_filters(edge.node).name for slot, edge in node.children.items()}
    if node.opened.supports_backing:
        children.setdefault("backing", None)
    row: Row = {
        "driver": spec.driver,
        "common": {name: getattr(spec, attribute) for name, attribute in COMMON.items()},
        "options": dict(spec.options),
        "children": children,
        "explicit": sorted(node.explicit),
        "inherits-from": node.inherits_from.name if node.inherits_from else None,
    }
    if "filename" in spec.options:
        row["directory"] = os.getcwd()
    return row | {name: getattr(node, name) for name in _PLAIN}


# -- and back ----------------------------------------------------------------------------------------------------------


def restore(graph: Graph, rows: Mapping[str, Row]) -> Steps[dict[str, QmpdError]]:
    """Open all nodes again, children first. Those that cannot be are in the answer, and so is what lies above them."""
    graph.reserve_names(rows)
    failed: dict[str, QmpdError] = {}
    for name in _children_first(rows):
        row = rows[name]
        lacking = [child for child in row["children"].values() if child is not None and graph.find(child) is None]
        try:
            if lacking:
                raise QmpdError(f"Node '{lacking[0]}', which lies below it, is not there", node=name)
            yield from _restore_node(graph, name, row)
        except QmpdError as error:
            failed[name] = error
    for name, row in rows.items():
        node, above = graph.find(name), graph.find(row["inherits-from"] or "")
        if node is not None and name not in failed:
            node.inherits_from = above
    return failed


def with_all_below(rows: Mapping[str, Row], names: Iterable[str]) -> set[str]:
    """The names, and those of all nodes that they would need."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name in rows and name not in found:
            found.add(name)
            left += [child for child in rows[name]["children"].values() if child is not None]
    return found


def _restore_node(graph: Graph, name: str, row: Row) -> Steps[None]:
    options = dict(row["options"])
    if "directory" in row and row["directory"] != os.getcwd():
        options["filename"] = os.path.join(row["directory"], options["filename"])
    common = {attribute: row["common"][option] for option, attribute in COMMON.items()}
    spec = NodeSpec(row["driver"], name, children=row["children"], options=options, **common)
    if row["driver"] not in DRIVERS:
        raise QmpdError(f"Unknown driver '{row['driver']}'", node=name)
    node = yield from open_tree(graph, spec)
    node.explicit = frozenset(row["explicit"])
    for attribute in _PLAIN:
        setattr(node, attribute, row[attribute])


def _children_first(rows: Mapping[str, Row]) -> list[str]:
    """Names in an order in which they can be opened. No recursion: clients can stack thousands of nodes."""
    order: dict[str, None] = {}
    stack = [(name, False) for name in reversed(list(rows))]
    seen: set[str] = set()
    while stack:
        name, done = stack.pop()
        if done:
            order[name] = None
        elif name in rows and name not in seen:
            seen.add(name)
            stack.append((name, True))
            stack += [(child, False) for child in rows[name]["children"].values() if child is not None]
    return list(order)
