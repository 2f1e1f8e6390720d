"""Which permissions a driver asks of its children, and whether a node's parents get along.

Pure functions over nodes; nothing here changes anything. Source: spec/block-graph.md sections 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qmpd.block.api import Perm, Role
from qmpd.errors import Kind, QmpdError
from qmpd.graph.node import Edge, Node
from qmpd.units import SECTOR

CR, W, WU, R = Perm.CONSISTENT_READ, Perm.WRITE, Perm.WRITE_UNCHANGED, Perm.RESIZE

Granted = tuple[Perm, Perm]
"""(perm, shared)"""

# -- roles -----------------------------------------------------------------------------------------------------------

IMAGE = Role.DATA | Role.METADATA | Role.PRIMARY
FILTERED = Role.FILTERED | Role.PRIMARY

_ROLES: Mapping[tuple[str, str], Role] = {
    ("qcow2", "file"): IMAGE,
    ("qcow2", "data-file"): Role.DATA,
    ("qcow2", "backing"): Role.COW,
    ("raw", "file"): FILTERED,
    ("throttle", "file"): FILTERED,
    ("copy-on-read", "file"): FILTERED,
    ("preallocate", "file"): FILTERED,
    ("compress", "file"): FILTERED,
    ("blkdebug", "image"): FILTERED,
    ("commit_top", "backing"): FILTERED,
    ("mirror_top", "backing"): FILTERED,
}


def child_role(driver_name: str, child: str, options: Mapping[str, Any], *, data_file: bool = False) -> Role:
    """The role of a driver's child; ``data_file``: the image keeps its guest data in a file of their own."""
    if driver_name == "raw" and ("offset" in options or "size" in options):
        return Role.DATA | Role.PRIMARY
    role = _ROLES[driver_name, child]
    return role & ~Role.DATA if data_file and child == "file" else role


# -- what a parent asks of a child -------------------------------------------------------------------------------------


def _filter(node: Node, perm: Perm, shared: Perm) -> Granted:
    return perm, shared


def _cow(node: Node, perm: Perm, shared: Perm) -> Granted:
    below = CR | WU | (W | R if shared & W else Perm.NONE)
    return perm & CR, below if node.active else below | W | R


def _storage(node: Node, role: Role, perm: Perm, shared: Perm) -> Granted:
    if role & Role.METADATA:
        perm |= CR | (W | R if is_writable(node) else Perm.NONE)
        shared &= ~(W | R)
    if role & Role.DATA:
        shared &= ~R
        perm |= W if perm & WU else Perm.NONE
        perm |= R if perm & W else Perm.NONE
    return perm, shared if node.active else shared | W | R


def _by_role(node: Node, role: Role, perm: Perm, shared: Perm) -> Granted:
    if role & Role.FILTERED:
        return _filter(node, perm, shared)
    if role & Role.COW:
        return _cow(node, perm, shared)
    return _storage(node, role, perm, shared)


def _qcow2(node: Node, role: Role, perm: Perm, shared: Perm) -> Granted:
    if role == Role.DATA and perm & R:
        perm |= W  # where the disk ends, a data file may have to be zeroed
    return _by_role(node, role, perm, shared)


def _raw(node: Node, role: Role, perm: Perm, shared: Perm) -> Granted:
    asked, shared_below = _by_role(node, role, perm, shared)
    return asked & ~(W | R) | perm & (W | R), shared_below


def _copy_on_read(node: Node, role: Role, perm: Perm, shared: Perm) -> Granted:
    asked = perm & (CR | W | R) | (WU if node.active else Perm.NONE)
    return asked, shared | WU


def _blkdebug(node: Node, role: Role, perm: Perm, shared: Perm) -> Granted:
    asked, shared_below = _by_role(node, role, perm, shared)
    take: Perm = getattr(node.driver, "take_child_perms", Perm.NONE)
    unshare: Perm = getattr(node.driver, "unshare_child_perms", Perm.NONE)
    return asked | take, shared_below & ~unshare


def _preallocate(node: Node, role: Role, perm: Perm, shared: Perm) -> Granted:
    if perm & (W | R) or getattr(node.driver, "holds_preallocation", False):
        return perm | W | R, shared & ~(W | R)
    return perm, shared


def _commit_top(node: Node, role: Role, perm: Perm, shared: Perm) -> Granted:
    return Perm.NONE, Perm.ALL


def _mirror_top(node: Node, role: Role, perm: Perm, shared: Perm) -> Granted:
    if getattr(node.driver, "stopping", False):
        return Perm.NONE, Perm.ALL
    if getattr(node.driver, "active_commit", False):
        return perm & ~CR, shared | W
    return perm, shared


_Rule = Callable[[Node, Role, Perm, Perm], Granted]

#: Drivers that differ from the rule of their child's role.
_RULES: Mapping[str, _Rule] = {
    "qcow2": _qcow2,
    "raw": _raw,
    "copy-on-read": _copy_on_read,
    "blkdebug": _blkdebug,
    "preallocate": _preallocate,
    "commit_top": _commit_top,
    "mirror_top": _mirror_top,
}


def takes_children(driver_name: str) -> bool:
    """Does the driver's own state, known only once it is open, decide what it asks of its child?"""
    return driver_name in ("blkdebug", "preallocate")


def child_permissions(node: Node, edge: Edge, perm: Perm, shared: Perm) -> Granted:
    """What ``node``, of which (perm, shared) is asked in sum, asks of the child behind ``edge``."""
    asked, shared_below = _RULES.get(node.driver_name, _by_role)(node, edge.role, perm, shared)
    return asked, Perm.ALL if edge.node.force_share else shared_below


# -- checks ------------------------------------------------------------------------------------------------------------


def is_writable(node: Node) -> bool:
    """May the node's driver write at all?"""
    return node.active and not node.read_only


def check_parents(node: Node) -> None:
    """Raise if one parent needs what another does not share. Pairs are looked at newest first."""
    for unshares in reversed(node.parents):
        for needs in reversed(node.parents):
            conflict = unshares.unshared(needs)
            if unshares is not needs and conflict:
                raise QmpdError(
                    f"Permission conflict on node '{node.name}': permissions '{conflict.text()}' are both required by"
                    f" {needs.parent.label} (uses node '{node.name}' as '{needs.name}' child) and unshared by"
                    f" {unshares.parent.label} (uses node '{node.name}' as '{unshares.name}' child).",
                    Kind.PERMISSION,
                    node=node.name,
                )


def check_state(node: Node, perm: Perm, *, was_read_only: bool) -> None:
    """Raise if the node itself cannot give ``perm``; ``was_read_only``: before the change that is being checked."""
    if not node.active and perm & (W | WU | R):
        text = f"Permission '{(perm & (W | WU | R)).text()}' unavailable on inactive node"
        raise QmpdError(text, Kind.PERMISSION, node=node.name)
    if node.read_only and perm & (W | WU):
        text = "Block node is read-only"
        if not was_read_only:
            text = f"Read-only block node '{node.name}' cannot support read-write users"
        raise QmpdError(text, Kind.PERMISSION, node=node.name)
    alignment: int = getattr(node.driver, "request_alignment", 1)
    if perm & (W | WU) and not perm & R and alignment > SECTOR and node.length % alignment:
        raise QmpdError(
            "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment",
            Kind.PERMISSION,
            node=node.name,
        )


def check_activity(parent: Node, name: str, child: Node) -> None:
    """Raise if an active node would stand on an inactive one."""
    if parent.active and not child.active:
        text = f"Inactive '{child.name}' can't be a {name} child of active '{parent.name}'"
        raise QmpdError(text, Kind.PERMISSION, node=child.name)
