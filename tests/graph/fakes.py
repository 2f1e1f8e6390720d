"""A driver that only keeps the books, and short ways to build and print graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from qmpd.block.api import BackingReference, BlockDevice, Buffer, Driver, Perm, Role
from qmpd.block.extents import RunKind, Runs
from qmpd.errors import QmpdError
from qmpd.graph.edit import Graph
from qmpd.graph.node import Edge, Node, Parent
from qmpd.graph.spec import NodeSpec

IMAGE = Role.DATA | Role.METADATA | Role.PRIMARY
FILTERED = Role.FILTERED | Role.PRIMARY


class FakeDriver(Driver):
    """Remembers what the graph told it; fails where told to.

    ``granted`` is what a file driver would hold locks for. ``checking`` and ``reopening`` are pending transactions,
    which must be over whenever an edit is.
    """

    supports_backing = True

    def __init__(self, name: str = "file", *, is_filter: bool = False, read_only: bool = False) -> None:
        self.format_name = name  # type: ignore[misc]
        self.is_filter = is_filter  # type: ignore[misc]
        self.is_protocol = name == "file"  # type: ignore[misc]
        self.read_only = read_only
        self.granted = (Perm.NONE, Perm.ALL)
        self.checking: tuple[Perm, Perm] | None = None
        self.reopening: bool | None = None
        self.children: dict[str, BlockDevice | None] = {}
        self.fail_check = False
        self.fail_reopen = False
        self.closed = False
        self.path = ""
        self.reference: BackingReference | None = None
        self.size = 1 << 20

    @classmethod
    def open(cls, children: Mapping[str, BlockDevice], options: Mapping[str, Any], *, read_only: bool) -> Self:
        raise NotImplementedError

    @property
    def length(self) -> int:
        return self.size

    @property
    def filename(self) -> str:
        return self.path

    @property
    def backing_reference(self) -> BackingReference | None:
        return self.reference

    def readinto(self, offset: int, buffer: memoryview) -> None: ...
    def write(self, offset: int, data: Buffer) -> None: ...
    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def flush(self) -> None: ...

    def map(self, offset: int, length: int) -> Runs:
        return Runs.single(offset, length, RunKind.UNALLOCATED)

    def close(self) -> None:
        self.closed = True

    def attach(self, name: str, child: BlockDevice | None) -> None:
        self.children[name] = child

    def permissions_check(self, perm: Perm, shared: Perm) -> None:
        if self.fail_check:
            raise QmpdError('Failed to get "write" lock')
        assert self.checking is None
        self.checking = (perm, shared)

    def permissions_commit(self, perm: Perm, shared: Perm) -> None:
        assert self.checking == (perm, shared)
        self.granted, self.checking = (perm, shared), None

    def permissions_abort(self) -> None:
        assert self.checking is not None
        self.checking = None

    def reopen_prepare(self, *, read_only: bool, options: Mapping[str, Any] | None = None) -> None:
        if self.fail_reopen:
            raise QmpdError("Could not open 'x': Permission denied")
        assert self.reopening is None
        self.reopening = read_only

    def reopen_commit(self) -> None:
        assert self.reopening is not None
        self.read_only, self.reopening = self.reopening, None

    def reopen_abort(self) -> None:
        assert self.reopening is not None
        self.reopening = None


def fake(node: Node) -> FakeDriver:
    """The fake driver of a node."""
    assert isinstance(node.driver, FakeDriver)
    return node.driver


def make(name: str, driver: str = "file", *, read_only: bool = False, is_filter: bool = False, **more: Any) -> Node:
    """A node that is in no graph yet."""
    spec = NodeSpec(driver, name, read_only=read_only, options=more.pop("options", {})).effective(None)
    built = FakeDriver(driver, is_filter=is_filter, read_only=read_only)
    return Node(name, driver, spec, read_only=read_only, driver=built, **more)


def add(graph: Graph, name: str, driver: str = "file", **more: Any) -> Node:
    """A node without children, owned by the monitor."""
    node = make(name, driver, monitor_owned=True, **more)
    with graph.edit() as edit:
        edit.add_node(node)
    return node


def connect(graph: Graph, parent: Parent, name: str, node: Node, role: Role = Role.NONE, **perms: Perm) -> Edge:
    """Attach in an edit of its own."""
    with graph.edit() as edit:
        return edit.attach(parent, name, node, role, **perms)


def add_image(graph: Graph, name: str, backing: Node | None = None, *, read_only: bool = False) -> Node:
    """A qcow2 node over an inline file node of its own, ``NAME-file``."""
    node = make(name, "qcow2", read_only=read_only, monitor_owned=True)
    file = make(f"{name}-file", read_only=read_only, inherits_from=node)
    with graph.edit() as edit:
        edit.add_node(file)
        edit.add_node(node)
        edit.attach(node, "file", file, IMAGE)
        if backing is not None:
            edit.attach(node, "backing", backing, Role.COW)
    return node


def show(edge: Edge) -> str:
    """One edge in one line, permissions in alphabetical order."""
    perms = [",".join(sorted(perm.names())) or "-" for perm in (edge.perm, edge.shared)]
    parent = edge.parent.graph_name or edge.parent.type_name
    return f"{parent} -{edge.name}-> {edge.node.name} perm={perms[0]} shared={perms[1]}"


def dump(graph: Graph) -> list[object]:
    """Everything that a failed edit must leave as it was."""
    state: list[object] = []
    for node in graph.table.values():
        driver = fake(node)
        state.append((
            node.name, node.read_only, node.spec, node.monitor_owned, [b.reason for b in node.blockers],
            [(id(e), show(e), e.frozen, e.role) for e in node.parents], list(node.children),
            driver.granted, driver.checking, driver.reopening, driver.read_only,
            {name: id(child) for name, child in driver.children.items()},
        ))  # fmt: skip
    return state
