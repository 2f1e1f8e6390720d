"""Waiting for requests in flight, without waiting for those that are held back on purpose.

Control thread; what blocks is handed to a worker by the caller. The peer's drained sections do the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from qmpd.graph.node import Backend, Node, topological


@contextmanager
def hurried(backends: Iterable[Backend]) -> Iterator[None]:
    """Requests of these backends are not throttled in the block, those that wait already included."""
    nodes = hurry(backend.edge.node for backend in backends if backend.edge is not None)
    try:
        yield
    finally:
        for node in nodes:
            node.opened.drain_end()


def hurry(roots: Iterable[Node]) -> list[Node]:
    """Begin that for ``roots`` and all below, for good unless the caller ends it; the nodes it has begun for."""
    nodes = [node for node in topological(roots) if node.driver is not None]
    for node in nodes:
        node.opened.drain_begin()
    return nodes
