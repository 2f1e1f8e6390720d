"""What each driver asks of each child, cell by cell, and the checks of a node."""

from __future__ import annotations

from typing import Any

import pytest

from qmpd.block.api import Perm, Role
from qmpd.errors import QmpdError
from qmpd.graph.edit import Graph
from qmpd.graph.node import Backend, Edge, JobParent
from qmpd.graph.permissions import check_state, child_permissions, child_role
from tests.graph.fakes import FILTERED, IMAGE, add, connect, make

CR, W, WU, R, NONE, ALL = (
    Perm.CONSISTENT_READ, Perm.WRITE, Perm.WRITE_UNCHANGED, Perm.RESIZE, Perm.NONE, Perm.ALL,
)  # fmt: skip
DATA, META, COW = Role.DATA, Role.METADATA, Role.COW

#: driver, role, read-only?, (P, S) of the parent -> (perm, shared) of the child.
CELLS = [
    # a format over its file: metadata is written even when nobody writes
    ("qcow2", IMAGE, False, (NONE, ALL), (CR | W | R, CR | WU)),
    ("qcow2", IMAGE, True, (NONE, ALL), (CR, CR | WU)),
    ("qcow2", IMAGE, False, (CR | W, CR | W | WU), (CR | W | R, CR | WU)),
    ("qcow2", IMAGE, True, (CR, WU), (CR, WU)),
    ("qcow2", IMAGE, False, (WU, ALL), (CR | W | WU | R, CR | WU)),
    # with its guest data elsewhere
    ("qcow2", META | Role.PRIMARY, False, (NONE, ALL), (CR | W | R, CR | WU)),
    ("qcow2", META | Role.PRIMARY, True, (CR, ALL), (CR, CR | WU)),
    ("qcow2", DATA, False, (NONE, ALL), (NONE, CR | W | WU)),
    ("qcow2", DATA, False, (CR | W, ALL), (CR | W | R, CR | W | WU)),
    ("qcow2", DATA, False, (WU, ALL), (W | WU | R, CR | W | WU)),
    # a backing file: read when the overlay is read; may change if the overlay may
    ("qcow2", COW, False, (NONE, ALL), (NONE, ALL)),
    ("qcow2", COW, False, (CR | W | WU | R, ALL), (CR, ALL)),
    ("qcow2", COW, True, (CR, CR | WU | R), (CR, CR | WU)),
    ("qcow2", COW, True, (CR, NONE), (CR, CR | WU)),
    ("qcow2", COW, True, (CR, W), (CR, ALL)),
    # raw takes nothing that nobody asked of it
    ("raw", FILTERED, False, (NONE, ALL), (NONE, ALL)),
    ("raw", FILTERED, False, (CR | W, CR | W | WU), (CR | W, CR | W | WU)),
    ("raw", DATA | Role.PRIMARY, False, (NONE, ALL), (NONE, CR | W | WU)),
    ("raw", DATA | Role.PRIMARY, False, (CR | W, ALL), (CR | W, CR | W | WU)),
    ("raw", DATA | Role.PRIMARY, False, (WU, ALL), (WU, CR | W | WU)),
    ("raw", DATA | Role.PRIMARY, False, (R, ALL), (R, CR | W | WU)),
    # filters
    ("throttle", FILTERED, False, (CR | W, CR | WU), (CR | W, CR | WU)),
    ("copy-on-read", FILTERED, False, (CR, CR | W), (CR | WU, CR | W | WU)),
    ("copy-on-read", FILTERED, False, (NONE, ALL), (WU, ALL)),
    ("preallocate", FILTERED, False, (CR, ALL), (CR, ALL)),
    ("preallocate", FILTERED, False, (W, ALL), (W | R, CR | WU)),
    ("preallocate", FILTERED, False, (R, ALL), (W | R, CR | WU)),
    ("blkdebug", FILTERED, False, (CR, CR | W), (CR, CR | W)),
    ("commit_top", FILTERED, True, (CR | W, NONE), (NONE, ALL)),
    ("mirror_top", FILTERED, False, (CR | W, CR), (CR | W, CR)),
]


def edge_below(driver: str, role: Role, *, read_only: bool = False, **more: Any) -> Edge:
    parent = make("parent", driver, read_only=read_only, is_filter=bool(role & Role.FILTERED), **more)
    return Edge(parent, "child", make("child"), role, NONE, ALL)


@pytest.mark.parametrize(("driver", "role", "read_only", "given", "asked"), CELLS)
def test_what_a_driver_asks_of_its_child(
    driver: str, role: Role, read_only: bool, given: tuple[Perm, Perm], asked: tuple[Perm, Perm]
) -> None:
    """The table of spec/block-graph.md section 2, cell by cell."""
    edge = edge_below(driver, role, read_only=read_only)
    assert child_permissions(edge.parent, edge, *given) == asked  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("attributes", "given", "asked"),
    [
        ({"stopping": True}, (CR | W, NONE), (NONE, ALL)),
        ({"active_commit": True}, (CR | W, CR), (W, CR | W)),
    ],
)
def test_a_mirror_filter_asks_by_its_phase(
    attributes: dict[str, Any], given: tuple[Perm, Perm], asked: tuple[Perm, Perm]
) -> None:
    """An active commit cannot rely on consistent reads below itself; a stopping mirror needs nothing."""
    edge = edge_below("mirror_top", FILTERED)
    for name, value in attributes.items():
        setattr(edge.parent.driver, name, value)  # type: ignore[union-attr]
    assert child_permissions(edge.parent, edge, *given) == asked  # type: ignore[arg-type]


def test_blkdebug_asks_for_what_its_options_say() -> None:
    """take-child-perms adds, unshare-child-perms takes away."""
    edge = edge_below("blkdebug", FILTERED)
    edge.parent.driver.take_child_perms = W  # type: ignore[union-attr]
    edge.parent.driver.unshare_child_perms = CR  # type: ignore[union-attr]
    assert child_permissions(edge.parent, edge, CR, ALL) == (CR | W, ALL & ~CR)  # type: ignore[arg-type]


@pytest.mark.parametrize("role", [IMAGE, COW])
def test_an_inactive_parent_lets_others_write(role: Role) -> None:
    """Another process may own the image meanwhile."""
    edge = edge_below("qcow2", role, read_only=False, active=False)
    perm, shared = child_permissions(edge.parent, edge, NONE, ALL)  # type: ignore[arg-type]
    assert shared & (W | R) == W | R
    assert not perm & W


def test_force_share_on_the_child_shares_everything() -> None:
    """Whatever the parent would have unshared."""
    edge = edge_below("qcow2", IMAGE, read_only=True)
    edge.node.force_share = True
    assert child_permissions(edge.parent, edge, CR, CR) == (CR, ALL)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("driver", "child", "options", "data_file", "role"),
    [
        ("qcow2", "file", {}, False, IMAGE),
        ("qcow2", "file", {}, True, META | Role.PRIMARY),
        ("qcow2", "data-file", {}, True, DATA),
        ("qcow2", "backing", {}, False, COW),
        ("raw", "file", {}, False, FILTERED),
        ("raw", "file", {"offset": 0}, False, DATA | Role.PRIMARY),
        ("raw", "file", {"size": 512}, False, DATA | Role.PRIMARY),
        ("blkdebug", "image", {}, False, FILTERED),
        ("commit_top", "backing", {}, False, FILTERED),
    ],
)
def test_roles(driver: str, child: str, options: dict[str, Any], data_file: bool, role: Role) -> None:
    """The table of spec/block-graph.md section 1."""
    assert child_role(driver, child, options, data_file=data_file) == role


def test_a_conflict_names_both_parents_and_the_bits_in_conflict() -> None:
    """The text of section 2.1, with only the conflicting bits."""
    graph = Graph()
    file, old, new = add(graph, "f1"), add(graph, "x", "qcow2"), add(graph, "b1", "qcow2")
    connect(graph, old, "file", file, IMAGE)
    with pytest.raises(QmpdError) as caught:
        connect(graph, new, "file", file, IMAGE)
    assert caught.value.desc == (
        "Permission conflict on node 'f1': permissions 'write, resize' are both required by node 'x' (uses node 'f1' as"
        " 'file' child) and unshared by node 'b1' (uses node 'f1' as 'file' child)."
    )


def test_parents_that_are_not_nodes_in_a_conflict() -> None:
    """A backend has no name, a job has its type and id."""
    graph = Graph()
    node = add(graph, "mid")
    connect(graph, JobParent("commit", "j0"), "intermediate node", node, perm=NONE, shared=W | WU)
    with pytest.raises(QmpdError) as caught:
        connect(graph, Backend(), "root", node, perm=CR, shared=ALL)
    assert caught.value.desc == (
        "Permission conflict on node 'mid': permissions 'consistent read' are both required by an unnamed block device"
        " (uses node 'mid' as 'root' child) and unshared by commit job 'j0' (uses node 'mid' as 'intermediate node'"
        " child)."
    )


def test_the_newest_parent_is_looked_at_first() -> None:
    """Of several conflicts, the one where the newest parent does not share is told."""
    graph = Graph()
    node = add(graph, "n")
    connect(graph, Backend(), "old", node, perm=W, shared=ALL)
    connect(graph, Backend(), "middle", node, perm=CR | R, shared=ALL)
    with pytest.raises(QmpdError, match=r"'consistent read, resize' are both required by.*'middle' child.*'new' child"):
        connect(graph, Backend(), "new", node, perm=NONE, shared=WU)


@pytest.mark.parametrize(
    ("read_only", "was", "active", "perm", "text"),
    [
        (True, True, True, W, "Block node is read-only"),
        (True, True, True, WU, "Block node is read-only"),
        (True, False, True, W, "Read-only block node 'n' cannot support read-write users"),
        (False, False, False, R, "Permission 'resize' unavailable on inactive node"),
        (False, False, False, W | R, "Permission 'write, resize' unavailable on inactive node"),
    ],
)
def test_what_a_node_cannot_give(read_only: bool, was: bool, active: bool, perm: Perm, text: str) -> None:
    """Texts of section 2.1."""
    node = make("n", read_only=read_only, active=active)
    with pytest.raises(QmpdError) as caught:
        check_state(node, perm, was_read_only=was)
    assert caught.value.desc == text


def test_a_read_only_node_gives_resize_and_reads() -> None:
    """Only writing is refused."""
    check_state(make("n", read_only=True), CR | R, was_read_only=True)


def test_writing_without_resize_needs_an_aligned_length() -> None:
    """A driver with large requests would have to write past the end."""
    node = make("n")
    node.driver.request_alignment = 4096  # type: ignore[union-attr]
    node.driver.size = 4096 + 512  # type: ignore[union-attr]
    with pytest.raises(QmpdError, match="Image size is not a multiple of request alignment"):
        check_state(node, W, was_read_only=False)
    check_state(node, W | R, was_read_only=False)
