"""Nodes, the edges between them, and the parents that are not nodes.

Plain objects: they hold state and answer questions. Every change goes through :class:`qmpd.graph.edit.Edit`, so that it
can be undone. Control thread only, except :attr:`Edge.device`, whose I/O methods any worker may call.

Source: spec/block-graph.md sections 1 and 2.3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from qmpd.block.api import BlockDevice, Driver, Perm, Role
from qmpd.block.contract import Checked
from qmpd.block.meter import WriteMeter
from qmpd.errors import Kind, QmpdError
from qmpd.graph.filename import filename_of
from qmpd.graph.spec import NodeSpec
from qmpd.units import SECTOR, align_up

_serial = itertools.count()


class Backend:
    """A parent that does I/O: an export, a job's handle, a command's temporary handle.

    An owner that lets other threads do I/O through the edge overrides the three hooks: requests in flight must be over
    before a node below goes away, and must go to the new node afterwards.
    """

    type_name: ClassVar[str] = "block-backend"

    def __init__(self) -> None:
        self.serial = next(_serial)
        self.edge: Edge | None = None
        #: For one that puts up with an inactive node: what it needs and what it shares while the node is active.
        self.waives: tuple[Perm, Perm] | None = None

    @property
    def label(self) -> str:
        """How error messages call it."""
        return "an unnamed block device"

    @property
    def graph_name(self) -> str:
        """Its name in x-debug-query-block-graph."""
        return ""

    def quiesce(self) -> None:
        """Hold back new requests and return when none is in flight. Worker thread."""

    def resume(self) -> None:
        """Let requests go on. Control thread; cannot fail."""

    def retargeted(self, edge: Edge) -> None:
        """``edge`` leads to another node from now on: use ``edge.device`` anew. Control thread; cannot fail."""


class JobParent:
    """A block job as a parent of the nodes it works on."""

    type_name: ClassVar[str] = "block-job"

    def __init__(self, job_type: str, job_id: str) -> None:
        self.serial = next(_serial)
        self.job_type = job_type
        self.job_id = job_id

    @property
    def label(self) -> str:
        """How error messages call it."""
        return f"{self.job_type} job '{self.job_id}'"

    @property
    def graph_name(self) -> str:
        """Its name in x-debug-query-block-graph."""
        return self.job_id


class Edge:
    """One parent's hold on one node. Identity matters: an edge keeps being itself when its node is replaced."""

    __slots__ = ("_device", "admits", "blocker", "frozen", "name", "node", "parent", "perm", "role", "serial", "shared")

    def __init__(self, parent: Parent, name: str, node: Node, role: Role, perm: Perm, shared: Perm) -> None:
        self.parent = parent
        self.name = name
        self.node = node
        self.role = role
        self.perm = perm
        self.shared = shared
        self.serial = next(_serial)
        #: A job relies on the link: it may not be changed.
        self.frozen = False
        #: Of the node's parents only these may write, whatever ``shared`` says: None is everybody.
        self.admits: frozenset[Edge] | None = None
        #: What this link, if a backing link, refuses on its node.
        self.blocker: OpBlocker | None = None
        self._device: BlockDevice | None = None

    @property
    def device(self) -> BlockDevice:
        """I/O on the node through this edge, checked against the edge's permissions. Changes when the node does."""
        if self._device is None:
            node = self.node
            self._device = Checked(node.opened, lambda: self.perm, node=node.name, meter=node.written)
        return self._device

    def point_at(self, node: Node) -> Callable[[], None]:
        """Lead to ``node`` (Edit only); the call returned takes it back."""
        old, device = self.node, self._device
        self.node, self._device = node, None

        def back() -> None:
            self.node, self._device = old, device

        return back

    def unshared(self, other: Edge) -> Perm:
        """Of what the parent behind ``other`` needs, that which this one does not tolerate."""
        refused = ~self.shared
        if self.admits is not None and other not in self.admits:
            refused |= Perm.WRITE
        return other.perm & refused

    def check_unfrozen(self) -> None:
        """Raise if a job relies on this link staying as it is (spec/block-graph.md section 2.2, first text)."""
        if self.frozen:
            raise QmpdError(
                f"Cannot change frozen '{self.name}' link from '{self.parent_name}' to '{self.node.name}'",
                Kind.PERMISSION,
                node=self.node.name,
            )

    @property
    def parent_name(self) -> str:
        """The parent's node name, or what it is called in a graph dump."""
        return self.parent.graph_name

    def __repr__(self) -> str:
        return f"<Edge {self.parent_name} -{self.name}-> {self.node.name} {self.perm!r}/{self.shared!r}>"


@dataclass(frozen=True, slots=True, eq=False)
class OpBlocker:
    """A reason why operations on a node are refused, except those in ``allowed``."""

    reason: str
    allowed: frozenset[str] = frozenset()


#: What a node used as a backing file may still take part in (spec/block-graph.md section 2.3).
ALLOWED_ON_BACKING = frozenset({"commit-target", "stream", "backup-source", "backup-target"})


@dataclass(slots=True, eq=False)
class Node:
    """One opened driver instance with a name.

    ``driver`` is None only while the node is being opened: children are attached (and their permissions taken) before
    the driver reads its first byte.
    """

    name: str
    driver_name: str
    spec: NodeSpec
    read_only: bool = False
    driver: Driver | None = None
    force_share: bool = False
    active: bool = True
    #: Created by blockdev-add, so only blockdev-del takes it away.
    monitor_owned: bool = False
    #: A filter that hides itself in queries.
    implicit: bool = False
    #: A job's filter: no other job may hold the link to it in place.
    never_freeze: bool = False
    #: The node whose inline description created this one: options not given follow that node's.
    inherits_from: Node | None = None
    #: Common options (QMP names) given for this node itself, hence not changed by a parent's reopen.
    explicit: frozenset[str] = frozenset()
    #: The backing link was made by the header's string, not by the user.
    backing_from_header: bool = False
    #: Oldest first.
    parents: list[Edge] = field(default_factory=list)
    #: In the order attached.
    children: dict[str, Edge] = field(default_factory=dict)
    #: Links that are frozen because this node is there.
    held: list[Edge] = field(default_factory=list)
    #: Oldest first.
    blockers: list[OpBlocker] = field(default_factory=list)
    #: The iothread object that a client put the node in. Means nothing here.
    iothread: object = None
    #: How far the node was written since it was opened.
    written: WriteMeter = field(default_factory=WriteMeter)

    type_name: ClassVar[str] = "block-driver"

    # -- what it is ------------------------------------------------------------------------------------------------

    @property
    def graph_name(self) -> str:
        """Its name in x-debug-query-block-graph."""
        return self.name

    @property
    def label(self) -> str:
        """How error messages call it as a parent."""
        return f"node '{self.name}'"

    @property
    def opened(self) -> Driver:
        """The driver of a node that is certainly open."""
        if self.driver is None:
            raise RuntimeError(f"node {self.name} is not open")
        return self.driver

    @property
    def length(self) -> int:
        """Bytes, rounded up to 512 as all of QEMU's node lengths are."""
        return align_up(self.opened.length, SECTOR)

    @property
    def is_filter(self) -> bool:
        """Does it show exactly its child's content?"""
        return self.driver is not None and self.driver.is_filter

    @property
    def filename(self) -> str:
        """The plain or composed file name (spec/block-graph.md section 8)."""
        return filename_of(self)

    # -- links -----------------------------------------------------------------------------------------------------

    @property
    def cow_edge(self) -> Edge | None:
        """The link to the backing node."""
        return next((edge for edge in self.children.values() if edge.role & Role.COW), None)

    @property
    def filter_edge(self) -> Edge | None:
        """The link to the node a filter driver shows."""
        if not self.is_filter:
            return None
        return next((edge for edge in self.children.values() if edge.role & Role.FILTERED), None)

    @property
    def chain_edge(self) -> Edge | None:
        """The next link of a backing chain, filters included."""
        return self.filter_edge if self.is_filter else self.cow_edge

    @property
    def primary_edge(self) -> Edge | None:
        """The link to the child that names this node."""
        return next((edge for edge in self.children.values() if edge.role & Role.PRIMARY), None)

    @property
    def backing(self) -> Node | None:
        """The attached backing node (for filters see chain.py)."""
        edge = self.cow_edge
        return edge.node if edge else None

    def subtree(self) -> list[Node]:
        """This node and everything below it, parents before children, each once."""
        return topological([self])

    def reaches(self, other: Node) -> bool:
        """Is ``other`` this node or one below it?"""
        return other in self.subtree()

    # -- permissions -------------------------------------------------------------------------------------------------

    def cumulative(self) -> tuple[Perm, Perm]:
        """What all parents together need, and what all of them tolerate."""
        perm, shared = Perm.NONE, Perm.ALL
        for edge in self.parents:
            perm |= edge.perm
            shared &= edge.shared
        return perm, shared

    def check_reopens(self) -> None:
        """Raise unless the driver can go on with other flags or options."""
        if not self.opened.reopens:
            text = f"Block format '{self.driver_name}' used by node '{self.name}' does not support reopening files"
            raise QmpdError(text, Kind.UNSUPPORTED, node=self.name)

    # -- operation blockers ----------------------------------------------------------------------------------------

    def check_op(self, operation: str) -> None:
        """Raise if ``operation`` is refused on this node; the newest reason is told."""
        for blocker in reversed(self.blockers):
            if operation not in blocker.allowed:
                raise QmpdError(f"Node '{self.name}' is busy: {blocker.reason}", node=self.name)

    def check_root(self) -> None:
        """Raise unless nothing but backends use this node."""
        if any(not isinstance(edge.parent, Backend) for edge in self.parents):
            raise QmpdError("Need a root block node", node=self.name)

    def __repr__(self) -> str:
        return f"<Node {self.name} {self.driver_name}{' ro' if self.read_only else ''}>"


Parent = Node | Backend | JobParent


def topological(roots: Iterable[Node]) -> list[Node]:
    """The roots and everything below them, parents before children, each node once.

    No recursion: clients can stack thousands of nodes.
    """
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(node, False) for node in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(edge.node, False) for edge in node.children.values()]
    order.reverse()
    return order
