"""The graph, and the only way to change it: all of an edit happens, or nothing.

An :class:`Edit` applies each change in memory as it is called and remembers how to take it back. At the end of the
``with`` block the permissions of everything touched are computed anew, parents before children, and checked: parents
against each other, against read-only nodes, and by the drivers (which take their file locks). Any failure, there or in
the block, takes every step back in reverse and leaves no trace; otherwise drivers switch over, which cannot fail.

Control thread only, from the first call to the last; nothing in here waits. Source: spec/block-graph.md section 2.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

from qmpd.block.api import BlockDevice, Perm, Role
from qmpd.block.overlays import Overlays
from qmpd.block.throttling import ThrottleGroup
from qmpd.block.trust import Trust
from qmpd.errors import Kind, QmpdError
from qmpd.graph import permissions
from qmpd.graph.node import ALLOWED_ON_BACKING, Backend, Edge, JobParent, Node, OpBlocker, Parent, topological
from qmpd.graph.spec import NodeSpec
from qmpd.steps import Steps

_NODE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)
_MAX_NODE_NAME = 31
_GENERATED = re.compile(r"#block(\d+)\d\d", re.ASCII)


def _no_descriptions(text: str) -> NodeSpec:
    raise QmpdError("Descriptions in file names are not supported", Kind.UNSUPPORTED)


def _no_state() -> Steps[None]:
    yield from ()


class Graph:
    """All nodes of the daemon. Belongs to the thread that made it: the control thread."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        #: By name, oldest first, nodes being opened included. Changed by Edit only.
        self.table: dict[str, Node] = {}
        self._generated = 0
        #: Counts the edits that happened.
        self.version = 0
        #: Makes the graph as it is now durable, where somebody wants that: before users see a change, run this.
        self.save: Callable[[], Steps[None]] = _no_state
        #: Looks up a throttle group by its id, on any thread. Set by whoever keeps the objects of clients.
        self.find_throttle_group: Callable[[str], ThrottleGroup | None] = lambda name: None
        #: Which files may be opened. Set once, before any is.
        self.trust = Trust()
        #: What else is on disk that may be backed by the images of the graph.
        self.overlays = Overlays()
        #: The description that a ``json:`` name in an image stands for. Set by whoever knows the schema of clients.
        self.parse_description: Callable[[str], NodeSpec] = _no_descriptions

    def assert_control_thread(self) -> None:
        """Changes from any other thread are a bug."""
        if threading.get_ident() != self._thread:
            raise RuntimeError("the graph is changed on the control thread only")

    @property
    def nodes(self) -> list[Node]:
        """Every open node, oldest first."""
        return [node for node in self.table.values() if node.driver is not None]

    @property
    def parents(self) -> list[Backend | JobParent]:
        """The parents that are not nodes, oldest first."""
        found = {e.parent for node in self.table.values() for e in node.parents if not isinstance(e.parent, Node)}
        return sorted(found, key=lambda parent: parent.serial)

    def find(self, name: str) -> Node | None:
        """The node of that name, also one still being opened."""
        return self.table.get(name)

    def get(self, name: str, device: str = "") -> Node:
        """The node of that name, or the error of a reference that leads nowhere."""
        node = self.table.get(name)
        if node is None:
            raise QmpdError(f"Cannot find device='{device}' nor node-name='{name}'")
        return node

    def generate_name(self) -> str:
        """A name no user can give: ``#block``, a counter, two random digits."""
        name = f"#block{self._generated}{random.randrange(100):02d}"
        self._generated += 1
        return name

    def reserve_names(self, names: Iterable[str]) -> None:
        """Generate none of these names."""
        counters = [int(found[1]) for name in names if (found := _GENERATED.fullmatch(name))]
        self._generated = max([self._generated, *(counter + 1 for counter in counters)])

    def check_new_name(self, name: str) -> None:
        """Raise unless a new node may be called so; the order of the checks is the peer's."""
        if not _NODE_NAME.fullmatch(name):
            raise QmpdError(f"Invalid node-name: '{name}'")
        if name in self.table:
            raise QmpdError(f"Duplicate nodes with node-name='{name}'")
        if len(name) > _MAX_NODE_NAME:
            raise QmpdError("Node name too long")

    def unreferenced(self) -> list[Node]:
        """Open nodes that nobody holds any more: their last parent went away. Close them (open.py)."""
        return [node for node in self.nodes if not node.parents and not node.monitor_owned]

    def edit(self) -> Edit:
        """Begin a transaction; use as a context manager."""
        return Edit(self)

    def rehearse(self, change: Callable[[Edit], object]) -> None:
        """Raise what an edit that makes ``change`` would raise, and change nothing."""
        Edit(self).rehearse(change)


class Edit:
    """One transaction on the graph (see the module's text)."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._undo: list[Callable[[], object]] = []
        self._on_commit: list[Callable[[], object]] = []
        #: Where permissions must be computed anew.
        self._touched: dict[Node, None] = {}
        #: Child slots of nodes that lead elsewhere now, with the device their driver knows.
        self._slots: dict[tuple[Node, str], BlockDevice | None] = {}
        #: Edges of backends that lead elsewhere now.
        self._retargeted: dict[Edge, None] = {}
        #: Nodes in reopen, with their read-only flag from before.
        self._reopened: dict[Node, bool] = {}
        self._tightens = False

    # -- the frame ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Edit:
        self.graph.assert_control_thread()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.graph.assert_control_thread()
        if error is not None:
            self._roll_back_to(0)
            return
        try:
            granted = self._refresh()
            self._tell_drivers()
        except BaseException:
            self._roll_back_to(0)
            raise
        self._switch_over(granted)

    def rehearse(self, change: Callable[[Edit], object]) -> None:
        """See :meth:`Graph.rehearse`."""
        self.graph.assert_control_thread()
        try:
            change(self)
            self._refresh()
        finally:
            self._roll_back_to(0)

    def _roll_back_to(self, mark: int) -> None:
        while len(self._undo) > mark:
            self._undo.pop()()

    def _refresh(self) -> list[Node]:
        """Compute and check the permissions of all subtrees touched; the nodes whose drivers agreed."""
        mark = len(self._undo)
        agreed: list[Node] = []
        roots = [node for node in self._touched if self.graph.find(node.name) is node]
        try:
            for node in topological(roots):
                self._refresh_node(node, agreed)
        except QmpdError:
            # Giving something up cannot fail: what was granted before is then simply kept.
            if self._tightens:
                raise
            self._roll_back_to(mark)
            return []
        return agreed

    def _refresh_node(self, node: Node, agreed: list[Node]) -> None:
        permissions.check_parents(node)
        perm, shared = node.cumulative()
        permissions.check_state(node, perm, was_read_only=self._reopened.get(node, node.read_only))
        if node.driver is not None:
            node.driver.permissions_check(*_granted(node))
            self._undo.append(node.driver.permissions_abort)
            agreed.append(node)
        for edge in node.children.values():
            self._assign_perm(edge, *permissions.child_permissions(node, edge, perm, shared))

    def _tell_drivers(self) -> None:
        for (node, slot), old in self._slots.items():
            driver, edge = node.driver, node.children.get(slot)
            if driver is None or self.graph.find(node.name) is not node:
                continue
            driver.attach(slot, edge.device if edge else None)
            self._undo.append(partial(driver.attach, slot, old))

    def _switch_over(self, granted: list[Node]) -> None:
        """Past the point of no return. Children reopen first: a format may write to its file as it switches."""
        self.graph.version += 1
        for node in reversed(self._reopened):
            node.opened.reopen_commit()
        for node in granted:
            node.opened.permissions_commit(*_granted(node))
        for edge in self._retargeted:
            if isinstance(edge.parent, Backend) and edge.parent.edge is edge:
                edge.parent.retargeted(edge)
        for call in self._on_commit:
            call()

    def on_undo(self, call: Callable[[], object]) -> None:
        """Run ``call`` if the edit is taken back, in its place in the reverse order. It must not fail."""
        self._undo.append(call)

    def on_commit(self, call: Callable[[], object]) -> None:
        """Run ``call`` when the edit has happened. It must not fail."""
        self._on_commit.append(call)

    # -- nodes -------------------------------------------------------------------------------------------------------

    def add_node(self, node: Node) -> None:
        """Enter a node under its name, which must be free and well formed (or generated)."""
        if not node.name.startswith("#"):
            self.graph.check_new_name(node.name)
        self._keep_dict(self.graph.table)
        self.graph.table[node.name] = node
        self._touch(node)

    def remove_node(self, node: Node) -> None:
        """Take out a node without parents, and its links to its children. Closing the driver is the caller's."""
        if node.parents:
            raise RuntimeError(f"node {node.name} still has parents")
        for edge in list(node.children.values()):
            self.detach(edge)
        self._keep_dict(self.graph.table)
        del self.graph.table[node.name]

    def refresh(self, node: Node) -> None:
        """Compute the permissions below ``node`` anew, because its driver's demands have changed."""
        self._touch(node)
        self._tightens = True

    def set_attribute(self, node: Node, name: str, value: object) -> None:
        """Change a plain attribute of a node, e.g. ``monitor_owned``."""
        self._assign(node, name, value)

    def set_role(self, edge: Edge, role: Role) -> None:
        """What a child is to its parent from now on (raw: a window of its file, or all of it)."""
        if role != edge.role:
            self._assign(edge, "role", role)

    # -- links -------------------------------------------------------------------------------------------------------

    def attach(
        self, parent: Parent, name: str, child: Node, role: Role, *, perm: Perm = Perm.NONE, shared: Perm = Perm.ALL
    ) -> Edge:
        """Link ``parent`` to ``child``; ``perm`` and ``shared`` count for parents that are not nodes."""
        if isinstance(parent, Node):
            self._check_child(parent, name, child)
            if name in parent.children:
                raise RuntimeError(f"node {parent.name} has a {name} child")
        edge = Edge(parent, name, child, role, perm, shared)
        self._keep_list(child.parents)
        child.parents.append(edge)
        if isinstance(parent, Node):
            self._keep_slot(parent, name)
            self._keep_dict(parent.children)
            parent.children[name] = edge
            self._touch(parent)
        elif isinstance(parent, Backend):
            self._assign(parent, "edge", edge)
        self._block_backing(edge)
        self._touch(child)
        self._tightens = True
        return edge

    def detach(self, edge: Edge) -> None:
        """Take a link away. Gives permissions up, so it fails only on a frozen link."""
        edge.check_unfrozen()
        parent, child = edge.parent, edge.node
        self._keep_list(child.parents)
        child.parents.remove(edge)
        if isinstance(parent, Node):
            self._keep_slot(parent, edge.name)
            self._keep_dict(parent.children)
            del parent.children[edge.name]
        elif isinstance(parent, Backend):
            self._assign(parent, "edge", None)
        self._unblock_backing(edge)
        self._touch(child)

    def replace(self, edge: Edge, new: Node) -> None:
        """Let ``edge`` lead to ``new`` instead; it becomes the newest parent of ``new``."""
        old = edge.node
        if new is old:
            return
        if edge.frozen:
            raise QmpdError(f"Cannot change '{edge.name}' link to '{old.name}'", Kind.PERMISSION, node=old.name)
        if isinstance(edge.parent, Node):
            self._check_child(edge.parent, edge.name, new)
            self._keep_slot(edge.parent, edge.name)
            self._touch(edge.parent)
        elif isinstance(edge.parent, Backend):
            self._retargeted[edge] = None
        self._unblock_backing(edge)
        self._keep_list(old.parents)
        old.parents.remove(edge)
        self._undo.append(edge.point_at(new))
        self._keep_list(new.parents)
        new.parents.append(edge)
        self._block_backing(edge)
        self._touch(old)
        self._touch(new)
        self._tightens = True

    def move_parents(self, old: Node, new: Node, *, keep: Callable[[Edge], bool] | None = None) -> list[Edge]:
        """Let the parents of ``old`` hold ``new`` instead; the edges moved, newest first.

        Jobs stay with the node they were started on, and so does whatever is ``new`` itself or below it (a filter keeps
        its link to the node it was put above). ``keep`` names further edges that stay.
        """
        moved = [edge for edge in reversed(old.parents) if _follows(edge, new) and not (keep and keep(edge))]
        for edge in moved:
            self.replace(edge, new)
        return moved

    def set_perm(self, edge: Edge, perm: Perm, shared: Perm) -> None:
        """What a backend or job needs and tolerates from now on."""
        if isinstance(edge.parent, Node):
            raise TypeError("permissions of a node's children follow from its driver")
        if perm & ~edge.perm or edge.shared & ~shared:
            self._tightens = True
        self._assign_perm(edge, perm, shared)
        self._touch(edge.node)

    def admit_writers(self, edge: Edge, writers: Iterable[Edge]) -> None:
        """The parent behind ``edge`` tolerates no writers of its node but ``writers``; that ends when it detaches.

        For a promise that permissions cannot make: "nobody writes, except those who report it to me".
        """
        self._assign(edge, "admits", frozenset(writers))
        self._tightens = True
        self._touch(edge.node)

    # -- reopening ---------------------------------------------------------------------------------------------------

    def set_read_only(self, node: Node, read_only: bool) -> None:
        """Switch a node, and the inline children that follow it, to or from read-only.

        The caller has flushed the node (a blocking call) before the edit.
        """
        if node.read_only != read_only:
            node.check_reopens()
            self.reopen(node, replace(node.spec, read_only=read_only))
        for edge in node.children.values():
            child = edge.node
            follows = child.inherits_from is node and "read-only" not in child.explicit
            if follows and not edge.role & Role.COW:
                self.set_read_only(child, read_only)

    def reopen(self, node: Node, spec: NodeSpec, options: Mapping[str, Any] | None = None) -> None:
        """Continue with the common options of ``spec`` (effective) and, if given, other driver ``options``."""
        if node in self._reopened:
            raise RuntimeError(f"node {node.name} is reopened twice in one edit")
        read_only = bool(spec.read_only)
        node.opened.reopen_prepare(read_only=read_only, options=options)
        self._undo.append(node.opened.reopen_abort)
        self._reopened[node] = node.read_only
        self._assign(node, "spec", spec)
        self._assign(node, "read_only", read_only)
        self._touch(node)
        self._tightens = True

    def set_active(self, node: Node, active: bool) -> None:
        """Let a node use its files, or leave them to others. The caller has flushed it before, or reloads it after."""
        node.opened.reopen_prepare(read_only=node.read_only or not active)
        self._undo.append(node.opened.reopen_abort)
        self._reopened[node] = node.read_only
        self._assign(node, "active", active)
        self._touch(node)
        self._tightens = True

    # -- holding things in place -------------------------------------------------------------------------------------

    def freeze(self, edge: Edge) -> None:
        """Nobody may change this link until it is unfrozen (spec/block-graph.md section 2.2)."""
        if edge.frozen:
            text = f"Cannot change '{edge.name}' link from '{edge.parent_name}' to '{edge.node.name}'"
            raise QmpdError(text, Kind.PERMISSION, node=edge.node.name)
        self._assign(edge, "frozen", True)

    def unfreeze(self, edge: Edge) -> None:
        """The link may be changed again."""
        self._assign(edge, "frozen", False)

    def block_ops(self, node: Node, reason: str) -> OpBlocker:
        """Refuse every operation on ``node``, telling ``reason``."""
        return self._add_blocker(node, OpBlocker(reason))

    def unblock_ops(self, node: Node, blocker: OpBlocker | str) -> None:
        """Forget a blocker, or the newest one of that reason. Blockers that are gone already are no error."""
        for known in reversed(node.blockers):
            if blocker in (known, known.reason):
                self._keep_list(node.blockers)
                node.blockers.remove(known)
                return

    # -- remembering how to take it back -----------------------------------------------------------------------------

    def _touch(self, node: Node) -> None:
        self._touched[node] = None

    def _assign(self, target: object, name: str, value: object) -> None:
        self._undo.append(partial(setattr, target, name, getattr(target, name)))
        setattr(target, name, value)

    def _assign_perm(self, edge: Edge, perm: Perm, shared: Perm) -> None:
        self._assign(edge, "perm", perm)
        self._assign(edge, "shared", shared)

    def _keep_list(self, live: list[Any]) -> None:
        """Remember a list before it is changed: its order matters (newest parent, newest reason)."""
        self._undo.append(partial(live.__setitem__, slice(None), list(live)))

    def _keep_dict(self, live: dict[str, Any]) -> None:
        self._undo.append(partial(_restore_dict, live, dict(live)))

    def _keep_slot(self, parent: Node, name: str) -> None:
        edge = parent.children.get(name)
        known = edge.device if edge and edge.node.driver is not None else None
        self._slots.setdefault((parent, name), known)

    @staticmethod
    def check_acyclic(parent: Node, name: str, child: Node) -> None:
        """Raise if ``parent`` is ``child`` or below it."""
        if child.reaches(parent):
            text = f"Making '{child.name}' a {name} child of '{parent.name}' would create a cycle"
            raise QmpdError(text, node=child.name)

    def _check_child(self, parent: Node, name: str, child: Node) -> None:
        self.check_acyclic(parent, name, child)
        permissions.check_activity(parent, name, child)

    def _add_blocker(self, node: Node, blocker: OpBlocker) -> OpBlocker:
        self._keep_list(node.blockers)
        node.blockers.append(blocker)
        return blocker

    def _block_backing(self, edge: Edge) -> None:
        if edge.role & Role.COW:
            reason = f"node is used as backing hd of '{edge.parent_name}'"
            self._assign(edge, "blocker", self._add_blocker(edge.node, OpBlocker(reason, ALLOWED_ON_BACKING)))

    def _unblock_backing(self, edge: Edge) -> None:
        if edge.blocker is not None:
            self.unblock_ops(edge.node, edge.blocker)
            self._assign(edge, "blocker", None)


def _granted(node: Node) -> tuple[Perm, Perm]:
    """What the driver is to provide. An inactive node leaves its files to others: no locks."""
    return node.cumulative() if node.active else (Perm.NONE, Perm.ALL)


def _follows(edge: Edge, new: Node) -> bool:
    if isinstance(edge.parent, JobParent):
        return False
    return not (isinstance(edge.parent, Node) and new.reaches(edge.parent))


def _restore_dict(live: dict[str, Any], kept: dict[str, Any]) -> None:
    live.clear()
    live.update(kept)
