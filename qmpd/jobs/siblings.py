"""Siblings: images that a commit would change although they are not in its chain.

A commit writes to base. Whatever is backed by base, or by an image between base and top, sees that, unless it goes
through top: what top shows is the same before and after, so overlays of top are no siblings, whether the commit relinks
them or they go on with top. They are found in the graph, and by what headers say on disk.

Images that an earlier commit has left behind, and nobody has used since, are no siblings either: their content is in
base. What is backed by *them* is.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from qmpd.block.overlays import Stamp, View, identity_of, stamp_of
from qmpd.block.trust import Identity
from qmpd.errors import QmpdError
from qmpd.graph import chain
from qmpd.graph.edit import Graph
from qmpd.graph.node import Backend, Node
from qmpd.jobs.files import storage_of
from qmpd.jobs.plan import CommitPlan
from qmpd.steps import Steps

_TOLD = 8
"""So many siblings are named in an error."""


class SiblingPolicy(StrEnum):
    """What to do about siblings."""

    REFUSE = "refuse"
    WARN = "warn"
    ALLOW = "allow"


@dataclass(frozen=True, slots=True)
class Sibling:
    """An image, and what it is backed by: paths, or names of nodes that are in no file."""

    image: str
    backing: str


def find_siblings(graph: Graph, plan: CommitPlan) -> Steps[list[Sibling]]:
    """The images that the commit would change, each with the image through which it would. Changes nothing."""
    known = _Known(graph, plan)
    on_disk: View = yield partial(graph.overlays.look, known.directories)
    return known.siblings(on_disk)


def refusal(siblings: Sequence[Sibling]) -> QmpdError:
    """What the client is told."""
    named = ", ".join(f"'{one.image}' (backed by '{one.backing}')" for one in siblings[:_TOLD])
    more = f" and {len(siblings) - _TOLD} more" if len(siblings) > _TOLD else ""
    text = "Other images are backed by what the commit writes to, and would show something else afterwards"
    return QmpdError(f"{text}: {named}{more}; x-qmpd-siblings 'allow' commits all the same", path=siblings[0].image)


def left_behind(nodes: Iterable[Node]) -> dict[Identity, Stamp]:
    """The files of these nodes as they are now. Control thread: asks the kernel what it has in memory."""
    found = {}
    for node in nodes:
        storage = storage_of(chain.skip_filters(node))
        if storage is not None:
            status = os.fstat(storage.fd)
            found[identity_of(status)] = stamp_of(status)
    return found


class _Known:
    """The part of the question that the graph answers. An image is its file, or its node where it is in none."""

    def __init__(self, graph: Graph, plan: CommitPlan) -> None:
        self._graph = graph
        images = list(dict.fromkeys(chain.skip_filters(node) for node in chain.walk(plan.device)))
        above = list(dict.fromkeys(chain.skip_filters(node) for node in plan.intermediates))
        written = [chain.skip_filters(plan.base), *reversed(above[1:])]
        self._names: dict[Hashable, str] = {}
        self._own = {self._key(node) for node in images}
        #: What the commit writes to, or makes to show something else.
        self._written = [self._key(node) for node in written]
        self.directories = list(dict.fromkeys(place for node in images for place in _places(node)))
        #: Image -> what is backed by it in the graph; images that are open, and those that somebody works with.
        self._overlays: dict[Hashable, dict[Hashable, None]] = {}
        self._open: set[Hashable] = set()
        self._used: set[Hashable] = set()
        for node in graph.nodes:
            if not node.is_filter and node.driver is not None and node.driver.supports_backing:
                self._add(node)

    def _add(self, node: Node) -> None:
        key = self._key(node)
        self._open.add(key)
        if any(isinstance(edge.parent, Backend) for edge in node.parents):
            self._used.add(key)
        if node.cow_edge is not None:
            below = self._key(chain.skip_filters(node.cow_edge.node))
            self._overlays.setdefault(below, {})[key] = None

    def _key(self, node: Node) -> Hashable:
        storage = storage_of(node)
        if storage is None or storage.fd < 0:
            self._names.setdefault(node, node.name)
            return node
        key = identity_of(os.fstat(storage.fd))
        self._names.setdefault(key, storage.location)
        return key

    def siblings(self, on_disk: View) -> list[Sibling]:
        """Climb from what is written to all that is backed by it, but not through the chain."""
        found, seen, left = [], set(self._own), list(self._written)
        for below in left:  # grows meanwhile
            for above, stamp in self._overlays_of(below, on_disk):
                if above in seen:
                    continue
                seen.add(above)
                left.append(above)
                if not self._is_left_behind(above, stamp):
                    found.append(Sibling(self._names[above], self._names[below]))
        return sorted(found, key=lambda one: one.image)

    def _overlays_of(self, key: Hashable, on_disk: View) -> Iterator[tuple[Hashable, Stamp | None]]:
        if isinstance(key, tuple):
            for file in on_disk.overlays_of(key):
                self._names.setdefault(file.identity, file.path)
                yield file.identity, file.stamp
        yield from self._overlays.get(key, {}).items()

    def _is_left_behind(self, key: Hashable, stamp: Stamp | None) -> bool:
        """Has a commit taken all that matters out of it, and has nobody used it since?"""
        left = self._graph.overlays.left_stamp(key) if isinstance(key, tuple) else None
        if left is None or key in self._used:
            return False
        return key in self._open or left == stamp  # open, nobody works with it


def _places(node: Node) -> list[str]:
    """The directories in which the node's file is."""
    storage = storage_of(node)
    if storage is None or storage.format_name != "file":
        return []
    return [os.path.dirname(storage.location), os.path.dirname(os.path.realpath(storage.location))]
