"""Walks along backing chains.

A chain goes from a node down through backing links and through the one child of each filter. Nothing here changes
anything except :func:`freeze` and :func:`unfreeze`, through the edit they are given. Control thread only. Sources:
spec/block-graph.md section 2.2, spec/jobs-and-commit.md sections 3.1 and 3.2.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from qmpd.block.api import BlockDevice, Role
from qmpd.errors import Kind, QmpdError
from qmpd.graph import filename
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Backend, Edge, Node


def walk(node: Node) -> Iterator[Node]:
    """``node`` and everything below it in its chain, filters included."""
    current: Node | None = node
    while current is not None:
        yield current
        edge = current.chain_edge
        current = edge.node if edge else None


def contains(top: Node, node: Node) -> bool:
    """Is ``node`` in the chain of ``top`` (``top`` itself included)?"""
    return any(below is node for below in walk(top))


def bottom(node: Node) -> Node:
    """The deepest node of the chain."""
    for below in walk(node):
        node = below
    return node


def skip_filters(node: Node) -> Node:
    """The first node at or below ``node`` that is no filter."""
    return next((below for below in walk(node) if not below.is_filter), node)


def next_image(node: Node) -> Node | None:
    """The next node below that is no filter: the backing image as users think of it."""
    edge = skip_filters(node).cow_edge
    return skip_filters(edge.node) if edge else None


def find_overlay(top: Node, node: Node) -> Node | None:
    """The node of ``top``'s chain whose backing image is ``node``, filters skipped; None if there is none."""
    sought = skip_filters(node)
    for above in walk(skip_filters(top)):
        if not above.is_filter and next_image(above) is sought:
            return above
    return None


def overlays(node: Node) -> list[Edge]:
    """The links of those that use ``node`` itself as their backing node, oldest first."""
    return [edge for edge in node.parents if edge.role & Role.COW]


def backends_above(nodes: Iterable[Node]) -> list[Backend]:
    """All backends whose requests can reach one of ``nodes``; what must be quiet before links there change."""
    found: dict[Backend, None] = {}
    seen: set[Node] = set()

    def climb(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        for edge in node.parents:
            if isinstance(edge.parent, Node):
                climb(edge.parent)
            elif isinstance(edge.parent, Backend):
                found[edge.parent] = None

    for node in nodes:
        climb(node)
    return list(found)


# -- looking nodes up --------------------------------------------------------------------------------------------------


def get_in_chain(graph: Graph, name: str, top: Node) -> Node:
    """The node of that name, which must be in the chain of ``top`` (top itself counts)."""
    node = graph.get(name)
    if not contains(top, node):
        raise QmpdError(f"'{name}' is not in this backing file chain", node=name)
    return node


def find_by_file(top: Node, name: str) -> Node | None:
    """The backing image below ``top`` that ``name`` means, None if there is none.

    Each overlay's backing node is compared by its file name; where the link is what the header says, ``name`` may also
    be a path as seen from that overlay's directory, and real paths are compared.
    """
    above: Node | None = skip_filters(top)
    while above is not None:
        below = next_image(above)
        if below is not None and _is_named(above, below, name):
            return below
        above = below
    return None


def _is_named(above: Node, below: Node, name: str) -> bool:
    actual = filename.filename_of(below)
    if name == actual:
        return True
    reference, image = above.opened.backing_reference, filename.image_path(above)
    if reference is None or image is None or filename.is_backing_overridden(above):
        return False
    if filename.has_protocol(name) or filename.has_protocol(reference.filename):
        return name == reference.filename
    real = os.path.realpath(filename.combine(image, name))
    return real == os.path.realpath(filename.combine(image, reference.filename))


# -- holding a stretch in place ----------------------------------------------------------------------------------------


def stretch(top: Node, base: Node) -> list[Edge]:
    """The chain links from ``top`` down to ``base``, which must be below."""
    edges: list[Edge] = []
    for node in walk(top):
        if node is base:
            return edges
        if node.chain_edge is not None:
            edges.append(node.chain_edge)
    raise QmpdError(f"'{base.name}' is not in this backing file chain", node=base.name)


def freeze(edit: Edit, top: Node, base: Node) -> list[Edge]:
    """Freeze the links from ``top`` down to ``base``; raise if another job holds one or owns a filter among them."""
    edges = stretch(top, base)
    for edge in edges:
        edit.freeze(edge)
    for edge in edges:
        if edge.node.never_freeze:
            text = f"Cannot freeze '{edge.name}' link to '{edge.node.name}'"
            raise QmpdError(text, Kind.PERMISSION, node=edge.node.name)
    return edges


def unfreeze(edit: Edit, edges: Iterable[Edge]) -> None:
    """Let go of links frozen before."""
    for edge in edges:
        edit.unfreeze(edge)


def layers(top: Node, base: Node | None) -> list[BlockDevice]:
    """What workers need to see the content of ``top`` above ``base``: a device a layer, from top to bottom.

    A snapshot: the list stays valid while the stretch is frozen. A layer with filters over it is represented by its
    uppermost filter, so that its reads are throttled or made to fail as they are for everybody else. Job filters, which
    are empty layers of their own, are left out, and so are filters over ``base`` itself: they show nothing of their
    own.
    """
    found: list[BlockDevice] = []
    fresh = True
    for node in walk(top):
        if node is base:
            if not fresh:
                found.pop()
            break
        if node.is_filter and "backing" in node.children:
            continue
        if fresh:
            found.append(node.opened)
        fresh = not node.is_filter
    return found
