"""Opening a tree of nodes from its description, and closing nodes.

Everything here is ``Steps``: what touches files runs on workers, what touches the graph on the control thread. The
caller holds the graph lock from the first step to the last. A failure closes whatever was opened and leaves the graph
as it was.

Children are attached, and their permissions (file locks included) taken, before a format driver reads its first byte.

What an image header says is not trusted (spec/block-graph.md section 9), unless the operator wants that. A backing
file is opened from the header only if its name is a plain path (resolved against the image's directory), its format is
given as raw or qcow2, the file is one that :mod:`qmpd.block.trust` lets images name and not in the chain already, and
the chain is not absurdly deep. Formats are not guessed: a guest chooses what the first bytes of its raw disk are.
Naming ``backing`` in the description overrides all of this; the header is not looked at then.

A data file is opened from the header in the same way, but its name is never anything else than a path, and since the
guest writes to it, it must be in the image's directory or below, unless the operator says otherwise.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from qmpd.block import trust
from qmpd.block.api import BackingReference, BlockDevice, Driver, Role
from qmpd.block.drivers import DRIVERS
from qmpd.block.trust import Identity, OpenFile, Trust
from qmpd.errors import Kind, QmpdError, from_oserror
from qmpd.graph import bottom, filename
from qmpd.graph.edit import Graph
from qmpd.graph.node import Node, topological
from qmpd.graph.permissions import child_role, takes_children
from qmpd.graph.spec import NodeSpec
from qmpd.steps import Steps

_log = logging.getLogger(__name__)

MAX_DEPTH: Final = 64
"""Levels of nodes that one description, or the headers below it, may stack."""

_QCOW2_MAGIC: Final = b"QFI\xfb"

#: Children that are opened by themselves, each when it is known to be needed.
_IN_TURN: Final = ("file", "backing", "data-file")

_BACKING_FAILED = "Could not open backing file: "


def open_tree(graph: Graph, spec: NodeSpec, *, monitor_owned: bool = False) -> Steps[Node]:
    """Open ``spec`` with all its children.

    The result has no parents yet. Unless ``monitor_owned``, whoever gets it attaches it in the next edit or closes it.
    Raises QmpdError.
    """
    opener = _Opener(graph)
    try:
        node = yield from opener.open(spec, _Place())
        node.monitor_owned = monitor_owned
        return node
    except Exception:
        yield from close_nodes(graph, opener.made)
        raise


# -- closing -----------------------------------------------------------------------------------------------------------


def close_node(graph: Graph, node: Node) -> Steps[None]:
    """Close a node without parents, and every node below that only it was holding."""
    yield from close_nodes(graph, _held_only_by([node]))


def close_unreferenced(graph: Graph) -> Steps[None]:
    """Close what nobody holds any more after an edit that took links away."""
    yield from close_nodes(graph, _held_only_by(graph.unreferenced()))


def close_nodes(graph: Graph, doomed: Iterable[Node]) -> Steps[None]:
    """Close exactly these nodes. Parents go first: a format may write to its file as it closes."""
    wanted = set(doomed)
    order = [node for node in topological(wanted) if node in wanted]
    for node in order:
        if node.driver is not None:
            try:
                yield node.driver.close
            except QmpdError as error:
                _log.error("node %s: while closing: %s", node.name, error)
    with graph.edit() as edit:
        for node in order:
            bottom.release(edit, node)
            edit.remove_node(node)


def _held_only_by(roots: list[Node]) -> set[Node]:
    doomed = set(roots)
    for node in topological(roots):
        if node not in doomed and not node.monitor_owned and all(edge.parent in doomed for edge in node.parents):
            doomed.add(node)
    return doomed


# -- opening -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the tree a node is about to go."""

    parent: Node | None = None
    backing: bool = False
    depth: int = 0
    #: Names on the way here through headers: the topmost image's, then those found. Empty if the operator named this.
    names: tuple[str, ...] = ()
    #: Every file of the chain above.
    above: frozenset[Identity] = frozenset()
    #: What the last of the names is for.
    slot: str = "backing"
    #: Of a data file that a header names: the directories where it may be written.
    writable_in: frozenset[Identity] | None = None

    @property
    def parent_spec(self) -> NodeSpec | None:
        return self.parent.spec if self.parent else None

    def below(self, parent: Node, *, backing: bool = False) -> _Place:
        """The place of a child that is described where ``parent`` is."""
        return replace(self, parent=parent, backing=backing, depth=self.depth + 1)

    def opening(self, trusted: Trust) -> OpenFile:
        """How a file here is opened."""
        if not self.names:
            return trusted.open

        return _OpenNamed(trusted, self)


@dataclass(frozen=True, slots=True)
class _OpenNamed:
    """Opens what a header names; see :data:`OpenFile`."""

    trusted: Trust
    place: _Place

    @property
    def rechecks(self) -> bool:
        """Must it be asked again when a file that is open is to be written?"""
        return self.place.writable_in is not None

    def __call__(self, path: str, flags: int, mode: int) -> int:
        place = self.place
        try:
            return self.trusted.open_from_image(
                path, flags, place.above, slot=place.slot, writable_in=place.writable_in
            )
        except QmpdError as error:
            raise error.prefixed(_way(place.names)) from None


class _Opener:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.made: list[Node] = []

    def open(self, spec: NodeSpec, place: _Place) -> Steps[Node]:
        """Open one node and all below it."""
        if place.depth > MAX_DEPTH:
            raise QmpdError(f"More than {MAX_DEPTH} images on top of each other", Kind.UNSUPPORTED)
        driver_class = DRIVERS.get(spec.driver)
        if driver_class is None:
            raise QmpdError(f"Unknown driver '{spec.driver}'", Kind.UNSUPPORTED)
        effective = spec.effective(place.parent_spec, backing=place.backing)
        node = _new_node(spec, effective, place.parent)
        # As in QEMU: the file is opened before the node's name is looked at, what only the driver knows of after it.
        early = yield from self._children(spec, lambda slot: slot == "file", place.below(node))
        self._register(node, effective)
        late = yield from self._children(spec, lambda slot: slot not in _IN_TURN, place.below(node))
        self._attach(node, early | late)
        if driver_class.supports_data_file:
            yield from self._open_data_file(node, driver_class, place)
        yield from self._open_driver(node, driver_class, place)
        if driver_class.supports_backing:
            yield from self._open_backing(node, place)
        return node

    def _children(self, spec: NodeSpec, wanted: Callable[[str], bool], place: _Place) -> Steps[dict[str, Node]]:
        """Those in the slots that are wanted."""
        children: dict[str, Node] = {}
        for slot, child in spec.children.items():
            if wanted(slot) and child is not None:
                children[slot] = yield from self._child(child, place)
        return children

    def _child(self, child: NodeSpec | str, place: _Place) -> Steps[Node]:
        """An existing node by name, or a new one."""
        if isinstance(child, str):
            return self.graph.get(child, child)
        return (yield from self.open(child, place))

    def _register(self, node: Node, effective: NodeSpec) -> None:
        """From here on the name is taken."""
        check_common(effective)
        node.name = effective.node_name if effective.node_name is not None else self.graph.generate_name()
        with self.graph.edit() as edit:
            edit.add_node(node)
        self.made.append(node)

    def _attach(self, node: Node, children: Mapping[str, Node]) -> None:
        with self.graph.edit() as edit:
            for slot, child in children.items():
                edit.attach(node, slot, child, child_role(node.driver_name, slot, node.spec.options))

    def _open_driver(self, node: Node, driver_class: type[Driver], place: _Place) -> Steps[None]:
        children: dict[str, BlockDevice] = {name: edge.device for name, edge in node.children.items()}
        read_only = bool(node.spec.read_only) or not node.active
        node.driver = yield partial(
            driver_class.open,  # type: ignore[attr-defined]
            children,
            driver_options(self.graph, node.spec) | {"open-file": place.opening(self.graph.trust)},
            read_only=read_only,
        )
        if takes_children(node.driver_name):
            with self.graph.edit() as edit:  # what it asks of its child, it knows only now
                edit.refresh(node)
        bottom.hold(self.graph, node)

    def _open_data_file(self, node: Node, driver_class: type[Driver], place: _Place) -> Steps[None]:
        """The data file that the description names, or else the header."""
        file, described = node.children.get("file"), node.spec.children.get("data-file")
        if file is None:
            return
        read_only = bool(node.spec.read_only) or not node.active
        look = partial(driver_class.named_data_file, read_only=read_only, thorough=described is not None)
        name = yield partial(look, file.device)
        if described is not None:
            child = yield from self._child(described, place.below(node))
        elif name is not None:
            child = yield from self._data_file_from_header(node, name, place)
        else:
            return
        with self.graph.edit() as edit:
            edit.attach(node, "data-file", child, child_role(node.driver_name, "data-file", {}))
            edit.set_role(file, child_role(node.driver_name, "file", {}, data_file=True))

    def _data_file_from_header(self, node: Node, name: str, place: _Place) -> Steps[Node]:
        path = filename.resolve_data_file(node, name)
        driver = (yield partial(_probe, self.graph.trust, path))[0] if self.graph.trust.image_names else "file"
        below = replace(
            place.below(node),
            names=(*(place.names or (filename.image_path(node) or node.name,)), name),
            above=place.above | (yield partial(_identities, node)),
            slot="data-file",
            writable_in=(yield partial(_directory, filename.image_location(node))),
        )
        return (yield from self.open(NodeSpec(driver, options={"filename": path}), below))

    def _open_backing(self, node: Node, place: _Place) -> Steps[None]:
        described = "backing" in node.spec.children
        child: NodeSpec | str | None = node.spec.children.get("backing")
        try:
            if not described:
                backing = yield from self._open_from_header(node, place)
            elif child is None or child == "":
                return
            else:
                backing = yield from self._child(child, place.below(node, backing=True))
        except QmpdError as error:
            raise error.prefixed(_BACKING_FAILED) from None
        if backing is None:
            return
        node.backing_from_header = not described
        with self.graph.edit() as edit:
            edit.attach(node, "backing", backing, Role.COW)

    def _open_from_header(self, node: Node, place: _Place) -> Steps[Node | None]:
        reference = node.opened.backing_reference
        if reference is None:
            return None
        names = (*(place.names or (filename.image_path(node) or node.name,)), reference.filename)
        above = place.above | (yield partial(_identities, node))
        try:
            if self.graph.trust.image_names:
                spec = yield from self._trusted_spec(node, reference)
            else:
                spec = backing_spec(node, reference)
        except QmpdError as error:
            raise error.prefixed(_way(names)) from None
        below = replace(place.below(node, backing=True), names=names, above=above, slot="backing", writable_in=None)
        return (yield from self.open(spec, below))

    def _trusted_spec(self, node: Node, reference: BackingReference) -> Steps[NodeSpec]:
        """What the header of ``node`` names, taken as if the operator had said it."""
        name = reference.filename
        if name.startswith("json:"):
            return _in_format(self.graph.parse_description(name.removeprefix("json:")), reference.format)
        protocol, _, path = name.partition(":")
        if not filename.has_protocol(name):
            path = filename.resolve_backing(node, reference)
        elif protocol != "file":
            raise QmpdError(f"Unknown protocol '{protocol}'", Kind.UNSUPPORTED)
        driver, found = yield partial(_probe, self.graph.trust, path)
        return NodeSpec(reference.format or found, children={"file": NodeSpec(driver, options={"filename": path})})


def _new_node(spec: NodeSpec, effective: NodeSpec, parent: Node | None) -> Node:
    return Node(
        name=spec.node_name or "",
        driver_name=spec.driver,
        spec=effective,
        read_only=bool(effective.read_only),
        force_share=bool(effective.force_share),
        active=effective.active is not False,
        inherits_from=parent,
        explicit=spec.explicit,
    )


def check_common(spec: NodeSpec) -> None:
    """Combinations of common options that make no sense."""
    if spec.force_share and not spec.read_only:
        raise QmpdError("force-share=on can only be used with read-only images")
    if spec.detect_zeroes == "unmap" and spec.discard != "unmap":
        raise QmpdError("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")


def driver_options(graph: Graph, spec: NodeSpec) -> dict[str, Any]:
    """What a driver is opened with: its own options, and the common ones that concern it, by QMP name."""
    own = dict(spec.options)
    if "throttle-group" in own:
        own["find-throttle-group"] = graph.find_throttle_group
    return own | {
        "auto-read-only": bool(spec.auto_read_only),
        "cache.direct": bool(spec.cache_direct),
        "cache.no-flush": bool(spec.cache_no_flush),
        "discard": spec.discard,
        "detect-zeroes": spec.detect_zeroes,
        "force-share": bool(spec.force_share),
    }


# -- header strings ----------------------------------------------------------------------------------------------------


def backing_spec(node: Node, reference: BackingReference) -> NodeSpec:
    """The description of what the header of ``node`` names. Raises where the header is not followed."""
    name = reference.filename
    if name.startswith("json:") or filename.has_protocol(name):
        raise QmpdError(f"a name found in an image must be a plain path; {trust.advice()}")
    if reference.format is None:
        raise QmpdError(f"the image names no format for it, and formats are not guessed; {trust.advice()}")
    if reference.format not in ("qcow2", "raw"):
        raise QmpdError(f"format '{reference.format}' is not supported", Kind.UNSUPPORTED)
    file = NodeSpec("file", options={"filename": filename.resolve_backing(node, reference)})
    return NodeSpec(reference.format, children={"file": file})


def _way(names: tuple[str, ...]) -> str:
    """The chain down to a name, in front of what is wrong with it."""
    return " -> ".join(names) + ": "


def _in_format(described: NodeSpec, wanted: str | None) -> NodeSpec:
    """The format that a header states goes before the one in its ``json:`` name."""
    spec = described if wanted is None else replace(described, driver=wanted)
    if spec.driver in ("qcow2", "raw") and spec.children.get("file") is None:
        raise QmpdError('A block device must be specified for "file"')
    return spec


def _probe(trusted: Trust, path: str) -> tuple[str, str]:
    """Drivers for a file and for what is in it, from its kind and first bytes. Worker thread."""
    try:
        fd = trusted.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error if isinstance(error, OSError) else OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        raise from_oserror(reason, f"Could not open '{path}': {reason.strerror}", path=path) from None
    try:
        kind = os.fstat(fd).st_mode
        driver = "host_device" if stat.S_ISBLK(kind) or stat.S_ISCHR(kind) else "file"
        has_magic = (stat.S_ISREG(kind) or stat.S_ISBLK(kind)) and os.pread(fd, 4, 0) == _QCOW2_MAGIC
        return driver, "qcow2" if has_magic else "raw"
    except OSError as error:
        raise from_oserror(error, f"Could not read '{path}': {error.strerror}", path=path) from None
    finally:
        os.close(fd)


def _directory(location: str | None) -> frozenset[Identity]:
    """Of the file at ``location``, if there is one. Worker thread."""
    if location is None:
        return frozenset()
    try:
        status = os.stat(os.path.dirname(location) or ".")
    except OSError:
        return frozenset()
    return frozenset({(status.st_dev, status.st_ino)})


def _identities(node: Node) -> frozenset[Identity]:
    """The files that a node's own data are in (backing not counted). Worker thread."""
    found: set[Identity] = set()
    for below in [edge.node for edge in node.children.values() if not edge.role & Role.COW]:
        found |= _identities(below)
    fd = getattr(node.driver, "fd", None)
    if isinstance(fd, int) and fd >= 0:
        found.add(trust.identity(fd))
    return frozenset(found)
