"""blockdev-reopen: giving nodes other options and other children, all at once or not at all.

A description says all there is to say about a node: what it leaves out goes back to its default, or to what the node
whose inline child it is has. Children given inline follow their parent where they were not told otherwise, in both
directions. The caller has flushed the nodes and keeps requests out. Control thread. Sources: spec/block-graph.md
section 6, spec/toolbox.md section 6.

Deviations, all towards accepting less surprise: an option once given need not be repeated for ever; read-only can be
taken back; a window of raw cannot be made smaller under its users.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from qmpd.block.api import Role
from qmpd.errors import Kind, QmpdError
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Backend, Edge, Node
from qmpd.graph.open import check_common, driver_options
from qmpd.graph.permissions import child_role
from qmpd.graph.spec import NodeSpec

#: What only these drivers can be without from now on; elsewhere an option once given can only be given again.
_RESETTABLE: Final = {
    "qcow2": None,
    "raw": frozenset({"offset", "size"}),
    "throttle": frozenset({"throttle-group"}),
    "preallocate": None,
}

Wanted = dict[Node, NodeSpec]
"""Node -> its new description; of several for one node, the last."""


def find_nodes(graph: Graph, specs: Iterable[NodeSpec]) -> Wanted:
    """Whom the descriptions are about."""
    wanted: Wanted = {}
    for spec in specs:
        if spec.node_name is None:
            raise QmpdError("node-name not specified")
        node = graph.find(spec.node_name)
        if node is None:
            raise QmpdError(f"Failed to find node with node-name='{spec.node_name}'")
        wanted[node] = spec
    return wanted


def apply(graph: Graph, wanted: Wanted) -> None:
    """Reopen all of ``wanted`` in one edit. Children that lost their last parent are left for the caller to close."""
    with graph.edit() as edit:
        _Reopening(graph, edit, wanted).run()


class _Reopening:
    def __init__(self, graph: Graph, edit: Edit, wanted: Wanted) -> None:
        self.graph = graph
        self.edit = edit
        self.wanted = wanted
        #: What each node will be, once that is decided.
        self.effective: Wanted = {}

    def run(self) -> None:
        for node, spec in self.wanted.items():
            self._check(node, spec)
            for slot in sorted(spec.children):  # backing before file, as QEMU takes them
                self._set_child(node, slot, spec.children[slot])
            self._check_fixed(node, spec)
        for node in self.wanted:
            self._reopen(node)
            self._take_along(node)

    def _check(self, node: Node, spec: NodeSpec) -> None:
        """Can the node be reopened so, whatever its children?"""
        driver = node.opened
        node.check_reopens()
        if spec.driver != node.driver_name:
            _check_kept(node, spec)
        takes_backing = driver.supports_backing and not node.is_filter
        if takes_backing and "backing" not in spec.children and (node.cow_edge or driver.backing_reference):
            raise QmpdError(f"backing is missing for '{node.name}'", node=node.name)

    def _check_fixed(self, node: Node, spec: NodeSpec) -> None:
        """What may not change at all."""
        if spec.driver != node.driver_name:
            raise _unchangeable(node, "driver")
        if bool(spec.force_share) != node.force_share and not _follows(node, "force-share", spec):
            raise _unchangeable(node, "force-share")
        if spec.active is not None and spec.active != node.active:
            raise _unchangeable(node, "active")

    # -- children ----------------------------------------------------------------------------------------------------

    def _set_child(self, node: Node, slot: str, child: NodeSpec | str | None) -> None:
        edge = node.children.get(slot)
        if isinstance(child, NodeSpec):
            _check_same(node, slot, edge, child)
        elif child is None or child == "":
            if edge is not None and slot == "data-file":
                raise _unchangeable(node, slot)
            if edge is not None:
                self._check_replaceable(edge)
                self.edit.detach(edge)
        else:
            self._link(node, slot, edge, self.graph.get(child))

    def _link(self, node: Node, slot: str, edge: Edge | None, child: Node) -> None:
        if edge is not None and edge.node is child:
            return
        self.edit.check_acyclic(node, slot, child)
        if slot == "backing" and not node.opened.supports_backing:
            text = f"Driver '{node.driver_name}' of node '{node.name}' does not support backing files"
            raise QmpdError(text, Kind.UNSUPPORTED, node=node.name)
        if slot not in ("file", "backing"):
            raise _unchangeable(node, slot)
        if slot == "file" and edge is None:  # only a description for another driver has one
            raise _unchangeable(node, "driver")
        if edge is None:
            self.edit.attach(node, slot, child, child_role(node.driver_name, slot, node.spec.options))
        else:
            self._check_replaceable(edge)
            self.edit.replace(edge, child)

    def _check_replaceable(self, edge: Edge) -> None:
        edge.check_unfrozen()
        if edge.node.implicit:
            raise QmpdError(f"Cannot replace implicit {edge.name} child of {edge.parent_name}", node=edge.node.name)

    # -- options -----------------------------------------------------------------------------------------------------

    def _reopen(self, node: Node) -> None:
        if node in self.effective:
            return
        given = self.wanted[node]
        above = node.inherits_from
        if above is not None and above in self.wanted:
            self._reopen(above)
        parent = None if above is None else self.effective.get(above, above.spec)
        backing = above is not None and above.backing is node
        spec = given.effective(parent, backing=backing)
        check_common(spec)
        _check_window(node, spec)
        self.effective[node] = spec
        self.edit.set_attribute(node, "explicit", given.explicit)
        for edge in node.children.values():
            external = "data-file" in node.children
            self.edit.set_role(edge, child_role(node.driver_name, edge.name, spec.options, data_file=external))
        self.edit.reopen(node, spec, driver_options(self.graph, spec))

    def _take_along(self, node: Node) -> None:
        """Let inline children follow in what they were not told for themselves."""
        for edge in node.children.values():
            child = edge.node
            if child.inherits_from is not node or child in self.wanted or child in self.effective:
                continue
            spec = _inherited(child, node.spec, backing=bool(edge.role & Role.COW))
            self.effective[child] = spec
            if spec != child.spec:
                self.edit.reopen(child, spec, driver_options(self.graph, spec))
            self._take_along(child)


def _inherited(child: Node, parent: NodeSpec, *, backing: bool) -> NodeSpec:
    names = {"cache.direct": "cache_direct", "cache.no-flush": "cache_no_flush"}
    if not backing:
        names |= {"read-only": "read_only", "auto-read-only": "auto_read_only"}
    values = {attribute: getattr(parent, attribute) for name, attribute in names.items() if name not in child.explicit}
    return replace(child.spec, **values)


def _follows(node: Node, option: str, spec: NodeSpec) -> bool:
    """Does the node have the option from the node it was described in, and is it not mentioned?"""
    return node.inherits_from is not None and option not in node.explicit | spec.explicit


def _unchangeable(node: Node, option: str) -> QmpdError:
    return QmpdError(f"Cannot change the option '{option}'", node=node.name)


def _check_kept(node: Node, spec: NodeSpec) -> None:
    """A description for another driver fails, as at the peer, at the first option that it would have to forget."""
    resettable = _RESETTABLE.get(node.driver_name, frozenset())
    if resettable is None:
        return
    for option in sorted(node.spec.options.keys() - spec.options.keys() - resettable):
        raise QmpdError(f"Option '{option}' cannot be reset to its default value", node=node.name)


def _check_same(node: Node, slot: str, edge: Edge | None, described: NodeSpec) -> None:
    """An inline description can only repeat what the inline child is."""
    if edge is None or edge.node.inherits_from is not node or edge.node.driver_name != described.driver:
        raise _unchangeable(node, f"{slot}.driver")
    known = edge.node.spec
    for option, value in described.options.items():
        if known.options.get(option) != value:
            raise _unchangeable(node, f"{slot}.{option}")
    if described.node_name is not None and described.node_name != edge.node.name:
        raise _unchangeable(node, f"{slot}.node-name")
    for inner, child in described.children.items():
        below = edge.node.children.get(inner)
        if isinstance(child, NodeSpec):
            _check_same(edge.node, inner, below, child)
        elif child != (below.node.name if below else None):
            raise _unchangeable(node, f"{slot}.{inner}")


def _check_window(node: Node, spec: NodeSpec) -> None:
    """Users of a raw node took its length for granted."""
    if node.driver_name != "raw" or not any(isinstance(edge.parent, Backend) for edge in node.parents):
        return
    available = node.children["file"].node.length - spec.options.get("offset", 0)
    if spec.options.get("size", available) < node.length:
        raise QmpdError(f"Node '{node.name}' is in use: it cannot be made smaller", node=node.name)
