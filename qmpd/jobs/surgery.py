"""Graph operations that jobs have in common.

Control thread, graph lock held; what blocks is handed to a worker (``Steps``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

from qmpd.errors import QmpdError
from qmpd.graph import chain
from qmpd.graph.drain import hurried
from qmpd.graph.edit import Graph
from qmpd.graph.node import Backend, Node
from qmpd.steps import Steps

T = TypeVar("T")
_log = logging.getLogger(__name__)


def quietly(graph: Graph, nodes: Iterable[Node], change: Callable[[], T]) -> Steps[T]:
    """Run ``change`` while no request from above is inside ``nodes``: afterwards nobody holds on to an old link."""
    return (yield from while_quiet(graph, nodes, lambda: _at_once(change)))


def while_quiet(graph: Graph, nodes: Iterable[Node], work: Callable[[], Steps[T]]) -> Steps[T]:
    """:func:`quietly` for a change that has something to wait for. Guests stand still until it is over.

    The state, where there is one, has the change before they go on: what they write to another node than before must
    not be lost to a daemon that comes back with the old one.
    """
    backends = chain.backends_above(nodes)
    held: list[Backend] = []
    try:
        with hurried(backends):
            for backend in backends:
                held.append(backend)
                yield backend.quiesce
            version = graph.version
        result = yield from work()
        if graph.version != version:
            yield from graph.save()
        return result
    finally:
        for backend in held:
            backend.resume()


def _at_once(change: Callable[[], T]) -> Steps[T]:
    yield from ()
    return change()


def back_to_read_only(graph: Graph, node: Node) -> Steps[None]:
    """End a job's permission to write to ``node``. A failure leaves it writable, which harms nobody: it is logged."""
    try:
        yield node.opened.flush
        with graph.edit() as edit:
            edit.set_read_only(node, True)
    except QmpdError as error:
        _log.error("node %s: while reopening read-only: %s", node.name, error)
