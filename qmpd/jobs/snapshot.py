"""Putting an overlay on top of a node, so that what is written from now on goes there.

All users of the node move to the overlay, the node becomes its backing file and read-only. The overlay is a node that
exists (blockdev-snapshot) or an image made for it (blockdev-snapshot-sync). Source: spec/toolbox.md sections 2 and 3.

Deviations: an overlay shorter than the node is refused, because its users would ask for bytes past its end. The name
of a new overlay is checked before its file is made, the file is removed again if nothing comes of it, the backing file
name in it leads from its own directory, and its node stays until it is deleted.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from qmpd.block.api import Perm, Role
from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers.qcow2.create import CreateOptions, check, create
from qmpd.block.storage.create import create_file
from qmpd.block.trust import OpenFile
from qmpd.errors import Kind, QmpdError
from qmpd.graph import filename
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Backend, Node
from qmpd.graph.open import close_node, open_tree
from qmpd.graph.spec import NodeSpec
from qmpd.jobs.header import name_seen_from
from qmpd.jobs.transaction import Action
from qmpd.steps import Steps

_log = logging.getLogger(__name__)

_OPERATION: Final = "external-snapshot"

#: Drivers that can make images.
_CREATABLE: Final = frozenset({"qcow2", "raw", "file", "host_device"})


class Snapshot(Action):
    """blockdev-snapshot: ``overlay`` is a node."""

    def __init__(self, node: str, overlay: str) -> None:
        self.names = (node, overlay)
        self._flushing = _Flush()

    def prepare(self, graph: Graph, before: Sequence[Action]) -> Steps[None]:
        node = graph.find(self.names[0])
        if node is not None:
            yield from self._flushing.run(node)

    def apply(self, edit: Edit) -> None:
        name, overlay = self.names
        node = edit.graph.get(name, name)
        node.check_op(_OPERATION)
        self._flushing.check()
        put_on_top(edit, node, edit.graph.get(overlay, overlay))


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """Arguments of blockdev-snapshot-sync; ``create`` is false for an image that exists."""

    device: str | None
    node_name: str | None
    snapshot_file: str
    snapshot_node_name: str | None
    format: str = "qcow2"
    create: bool = True


class SnapshotSync(Action):
    """blockdev-snapshot-sync: the overlay is made, or opened, for the purpose."""

    def __init__(self, request: SyncRequest) -> None:
        self.names = () if request.node_name is None else (request.node_name,)
        self._request = request
        self._flushing = _Flush()
        self._overlay: Node | None = None
        #: (device, inode) of the file that was made, if it is a new one.
        self._made: tuple[int, int] | None = None
        self._path = ""

    # -- before the graph changes --------------------------------------------------------------------------------------

    def prepare(self, graph: Graph, before: Sequence[Action]) -> Steps[None]:
        node, backing = self._look_ahead(graph, before)
        yield from self._flushing.run(node)
        self._flushing.check()
        self._check_name(graph)
        request = self._request
        if request.create:
            self._check_creation(backing)
        self._path = _plain_path(request.snapshot_file)
        if request.create:
            yield from self._create(graph, node, backing)
        self._overlay = yield from open_tree(graph, self._spec(node), monitor_owned=True)

    def _look_ahead(self, graph: Graph, before: Sequence[Action]) -> tuple[Node, str]:
        """The node, and its file name as it will be when the actions before this one are done."""
        found: list[tuple[Node, str]] = []

        def change(edit: Edit) -> None:
            for action in before:
                action.apply(edit)
            node = self._node(graph)
            found.append((node, node.filename))

        graph.rehearse(change)
        return found[0]

    def _node(self, graph: Graph) -> Node:
        """Devices do not exist: the node name decides."""
        request = self._request
        if request.node_name is None:
            raise QmpdError(f"Cannot find device='{request.device or ''}' nor node-name=''")
        node = graph.get(request.node_name, request.device or "")
        node.check_op(_OPERATION)
        return node

    def _check_name(self, graph: Graph) -> None:
        name = self._request.snapshot_node_name
        if name is None:
            raise QmpdError("New overlay node-name missing")
        if graph.find(name) is not None:
            raise QmpdError("New overlay node-name already in use")
        graph.check_new_name(name)

    def _check_creation(self, backing: str) -> None:
        """The order is the peer's."""
        image_format = self._request.format
        driver = DRIVERS.get(image_format)
        if driver is None:
            raise QmpdError(f"Unknown file format '{image_format}'", Kind.UNSUPPORTED)
        path = _plain_path(self._request.snapshot_file)
        if image_format not in _CREATABLE:
            raise QmpdError(f"Format driver '{image_format}' does not support image creation", Kind.UNSUPPORTED)
        if not driver.supports_backing:
            raise QmpdError(f"Backing file not supported for file format '{image_format}'", Kind.UNSUPPORTED)
        if filename.same_file(path, backing):
            raise QmpdError("Error: Trying to create an image with the same filename as the backing file")

    def _spec(self, node: Node) -> NodeSpec:
        """What the overlay is opened as: with the flags of the node it goes on."""
        driver, path = DRIVERS.get(self._request.format), self._path
        if driver is not None and driver.is_filter:
            raise QmpdError("Filters cannot be used as overlays")
        protocol = driver is not None and driver.is_protocol
        return NodeSpec(
            self._request.format,
            node_name=self._request.snapshot_node_name,
            read_only=node.read_only,
            auto_read_only=node.spec.auto_read_only,
            cache_direct=node.spec.cache_direct,
            cache_no_flush=node.spec.cache_no_flush,
            discard=node.spec.discard,
            children={} if protocol else {"file": NodeSpec("file", options={"filename": path}), "backing": None},
            options={"filename": path} if protocol else {},
        )

    # -- making the image ----------------------------------------------------------------------------------------------

    def _create(self, graph: Graph, node: Node, backing: str) -> Steps[None]:
        location = filename.image_location(node) if backing == filename.image_path(node) else None
        options = CreateOptions(
            size=node.length,
            backing_file=name_seen_from(self._path, backing, location),
            backing_fmt=node.driver_name,
        )
        check(options)
        self._made = yield partial(_make_file, self._path, graph.trust.open)
        yield partial(create_file, self._path, 0, open_file=graph.trust.open)
        file = yield from open_tree(graph, NodeSpec("file", options={"filename": self._path}))
        try:
            yield from _format(graph, file, options)
        finally:
            yield from close_node(graph, file)

    # -- the change, and taking it back --------------------------------------------------------------------------------

    def apply(self, edit: Edit) -> None:
        assert self._overlay is not None, "applied before it was prepared"
        put_on_top(edit, self._node(edit.graph), self._overlay)

    def undo(self, graph: Graph) -> Steps[None]:
        if self._overlay is not None:
            yield from close_node(graph, self._overlay)
        if self._made is not None:
            yield partial(_remove, self._path, self._made)


def put_on_top(edit: Edit, node: Node, overlay: Node) -> None:
    """Let ``overlay`` take the place of ``node``, which becomes its backing file. Raises QmpdError."""
    _check_overlay(node, overlay)
    edit.attach(overlay, "backing", node, Role.COW)
    edit.move_parents(node, overlay)
    if node.opened.reopens:  # as at the peer, a filter that cannot simply stays as it is
        edit.set_read_only(node, True)


def _check_overlay(node: Node, overlay: Node) -> None:
    """The order is the peer's, but for the last."""
    needed, _ = overlay.cumulative()
    if needed & Perm.CONSISTENT_READ:
        raise QmpdError("The overlay is already in use", node=overlay.name)
    if overlay.is_filter:
        raise QmpdError("Filters cannot be used as overlays", node=overlay.name)
    if overlay.cow_edge is not None:
        raise QmpdError("The overlay already has a backing image", node=overlay.name)
    if not overlay.opened.supports_backing:
        raise QmpdError("The overlay does not support backing images", node=overlay.name)
    if overlay.length < node.length:
        text = f"The overlay is shorter than node '{node.name}': {overlay.length} bytes instead of {node.length}"
        raise QmpdError(text, node=overlay.name)


class _Flush:
    """Makes a node durable before the overlay hides it; a failure waits for its turn among the other errors."""

    def __init__(self) -> None:
        self._failure: QmpdError | None = None

    def run(self, node: Node) -> Steps[None]:
        if node.read_only:
            return
        try:
            yield node.opened.flush
        except QmpdError as error:
            text = f"Write to node '{node.name}' failed: {error.strerror}"
            self._failure = QmpdError(text, error.kind, node=node.name, errno=error.errno)

    def check(self) -> None:
        """Raise if the flush failed."""
        if self._failure is not None:
            raise self._failure


def _format(graph: Graph, file: Node, options: CreateOptions) -> Steps[None]:
    with graph.edit() as edit:
        edge = edit.attach(Backend(), "root", file, Role.NONE, perm=Perm.WRITE | Perm.RESIZE)
    try:
        yield partial(create, edge.device, options)
    finally:
        with graph.edit() as edit:
            edit.detach(edge)


def _plain_path(name: str) -> str:
    """A general file name as a path: of the protocols only ``file:`` is known."""
    if not filename.has_protocol(name):
        return name
    protocol, _, path = name.partition(":")
    if protocol != "file":
        raise QmpdError(f"Unknown protocol '{protocol}'", Kind.UNSUPPORTED)
    return path


# -- files: worker thread ----------------------------------------------------------------------------------------------


def _make_file(path: str, open_file: OpenFile) -> tuple[int, int] | None:
    """Make sure that there is a file; (device, inode) if there was none. Errors are left for those who use it."""
    try:
        fd = open_file(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except (OSError, ValueError, QmpdError):
        return None
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    return status.st_dev, status.st_ino


def _remove(path: str, made: tuple[int, int]) -> None:
    """Remove the file that was made, unless somebody has put another in its place."""
    try:
        status = os.lstat(path)
        if (status.st_dev, status.st_ino) == made:
            os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.error("'%s', made for a snapshot that failed, could not be removed: %s", path, error.strerror)
