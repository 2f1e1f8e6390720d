"""File names of nodes: plain where the name alone would open the same thing again, else ``json:`` with the options.

Also the arithmetic of names found in headers. Nothing here touches a file system. Source: spec/block-graph.md
section 8.

Deviation: whether a backing node is what the header names is decided by the resolved paths, not by comparing strings;
``./base.qcow2`` and ``base.qcow2`` are one file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from qmpd.block.api import BackingReference, Driver
from qmpd.errors import QmpdError

if TYPE_CHECKING:
    from qmpd.graph.node import Node

_MAX_NAME = 4095

#: Driver options that change what a guest sees, so that the plain file name would not say it all.
_STRONG: Mapping[str, frozenset[str]] = {
    "file": frozenset({"filename"}),
    "host_device": frozenset({"filename"}),
    "null-co": frozenset({"size", "read-zeroes"}),
    "null-aio": frozenset({"size", "read-zeroes"}),
    "raw": frozenset({"offset", "size"}),
    "throttle": frozenset({"throttle-group"}),
    "blkdebug": frozenset({"config", "inject-error", "set-state"}),
    "copy-on-read": frozenset({"bottom"}),
}

#: Job filters go by the name of the node under them.
_TRANSPARENT = frozenset({"commit_top", "mirror_top"})


class _Described(NamedTuple):
    """A node's file name, and the JSON of the options that would open it again."""

    name: str
    options: str


_Known = dict["Node", _Described]


def filename_of(node: Node) -> str:
    """The node's file name as queries report it and as a backing reference would store it."""
    return _describe(node)[node].name


def filenames_of(nodes: Iterable[Node]) -> dict[Node, str]:
    """:func:`filename_of` of all of them, in one pass over what they share."""
    known: _Known = {}
    return {node: _describe(node, known)[node].name for node in nodes}


def is_backing_overridden(node: Node) -> bool:
    """Is the backing child another than the one the header names (or missing, or there without being named)?"""
    return _overridden(node, _describe(node))


def exact_filename(node: Node) -> str:
    """The plain file name, '' if there is none."""
    name = filename_of(node)
    return "" if name.startswith("json:") else name


def _describe(node: Node, known: _Known | None = None) -> _Known:
    """Descriptions of the node and all below it. Children first, so that any depth takes linear time and no stack."""
    known = {} if known is None else known
    if node not in known:
        for below in reversed(node.subtree()):
            if below not in known:
                known[below] = _describe_one(below, known)
    return known


def _describe_one(node: Node, known: _Known) -> _Described:
    if node.implicit or node.driver_name in _TRANSPARENT:
        edge = node.filter_edge or node.primary_edge
        if edge is not None:
            return known[edge.node]
    overridden = _overridden(node, known)
    given = ((name, node.spec.options[name]) for name in _strong_given(node))
    options = {name: json.dumps(value) for option in given for name, value in _flat(*option)}
    options["driver"] = json.dumps(node.driver_name)
    for name, edge in node.children.items():
        if edge is not node.cow_edge or overridden:
            options[name] = known[edge.node].options
    if overridden and node.cow_edge is None:
        options["backing"] = "null"
    # Cut where it cannot show any more: a name is cut too, and this text comes after others in it.
    text = "{" + ", ".join(f'"{name}": {options[name]}' for name in sorted(options)) + "}"
    plain = "" if overridden else _plain(node, known)
    return _Described(plain or _cut("json:" + text), text[:_MAX_NAME])


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """An option without structure, its place in its name: ``inject-error.0.event``."""
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        yield name, value
        return
    for key, item in value.items():
        yield from _flat(f"{name}.{key}", item)


def _cut(name: str) -> str:
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 3] + "..."


def _strong_given(node: Node) -> list[str]:
    return sorted(_STRONG.get(node.driver_name, frozenset()) & node.spec.options.keys())


def _plain(node: Node, known: _Known) -> str:
    """The name of a node whose backing is as its header says, '' if it has none."""
    strong = _strong_given(node)
    if node.driver_name in ("null-co", "null-aio"):
        return "" if strong else f"{node.driver_name}://"
    if node.driver is not None and node.driver.is_protocol:
        return node.driver.filename or str(node.spec.options.get("filename", ""))
    child = node.primary_edge
    name = known[child.node].name if child else ""
    if child is None or name.startswith("json:"):
        return ""
    if node.driver_name == "blkdebug":
        return "" if set(strong) - {"config"} else f"blkdebug:{node.spec.options.get('config', '')}:{name}"
    protocol = child.node.driver is not None and (child.node.driver.is_protocol or child.node.driver_name == "blkdebug")
    return name if protocol and not node.is_filter and not strong else ""


def _overridden(node: Node, known: _Known) -> bool:
    if node.is_filter or node.driver is None or not node.driver.supports_backing:
        return False
    reference = node.driver.backing_reference
    edge = node.cow_edge
    if edge is None or reference is None:
        return edge is not None or reference is not None
    return not same_file(full_backing_filename(node, reference), known[edge.node].name)


# -- names in headers --------------------------------------------------------------------------------------------------


def has_protocol(name: str) -> bool:
    """Is there a ``proto:`` in front (a colon before any slash)?"""
    return ":" in name.partition("/")[0]


def combine(image: str, name: str) -> str:
    """``name`` as found in the header of the file ``image``, seen from where ``image`` is seen. Plain text work."""
    if name.startswith("/") or has_protocol(name):
        return name
    directory, slash, _ = image.rpartition("/")
    return directory + slash + name


def same_file(one: str, other: str) -> bool:
    """Are both the same path, however spelled? Symbolic links are not followed."""
    if one == other:
        return True
    if has_protocol(one) or has_protocol(other):
        return False
    return os.path.abspath(one) == os.path.abspath(other)


def image_path(node: Node) -> str | None:
    """The path of the file that holds the node's header, None if it is not in a plain file."""
    storage = _storage(node)
    return storage.filename if storage else None


def image_location(node: Node) -> str | None:
    """:func:`image_path` as it was when the file was opened, for the working directory may have changed since."""
    storage = _storage(node)
    return storage.location if storage else None


def _storage(node: Node) -> Driver | None:
    current: Node | None = node
    while current is not None:
        if current.driver_name in ("file", "host_device") and current.driver is not None:
            return current.driver
        edge = current.primary_edge
        current = edge.node if edge else None
    return None


def full_backing_filename(node: Node, reference: BackingReference) -> str:
    """The header's backing string resolved against the image's directory (as it is if that is not possible)."""
    path = image_path(node)
    return reference.filename if path is None else combine(path, reference.filename)


def resolve_data_file(node: Node, name: str) -> str:
    """The header's data file from the image's directory: a path, whatever it looks like."""
    if name.startswith("/"):
        return name
    image = image_path(node)
    if image is None:
        raise QmpdError(f"Cannot use relative data file names for '{filename_of(node)}'", node=node.name)
    directory, slash, _ = image.rpartition("/")
    return directory + slash + name


def resolve_backing(node: Node, reference: BackingReference) -> str:
    """As :func:`full_backing_filename`, raising where there is no directory to resolve against."""
    name = reference.filename
    if image_path(node) is None and not name.startswith("/") and not has_protocol(name):
        raise QmpdError(f"Cannot use relative backing file names for '{filename_of(node)}'", node=node.name)
    return full_backing_filename(node, reference)
