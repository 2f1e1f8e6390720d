"""Random edits on random graphs: an edit that fails changes nothing, one that succeeds leaves a consistent graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.block.api import Perm, Role
from qmpd.errors import QmpdError
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Backend, Edge, JobParent, Node
from qmpd.graph.permissions import check_parents, child_permissions
from tests.graph.fakes import FILTERED, IMAGE, add, add_image, connect, dump, fake, make

PERMS = st.integers(0, 15).map(Perm)
T = TypeVar("T")
Change = Callable[[Edit], object]


def build(data: st.DataObject) -> Graph:
    """A few chains over shared bases, a raw node, some users."""
    graph = Graph()
    images: list[Node | None] = [None]
    for number in range(data.draw(st.integers(1, 5))):
        backing = pick(data, images)
        images.append(add_image(graph, f"q{number}", backing, read_only=data.draw(st.booleans())))
    add(graph, "free", read_only=data.draw(st.booleans()))
    attempt(graph, lambda edit: edit.attach(make_in(edit, "raw"), "file", graph.get("free"), FILTERED))
    connect(graph, Backend(), "root", graph.get("free"))
    for _ in range(data.draw(st.integers(0, 3))):
        attempt(graph, attach_user(data, graph))
    return graph


def make_in(edit: Edit, driver: str) -> Node:
    node = make(edit.graph.generate_name(), driver)
    edit.add_node(node)
    return node


def attempt(graph: Graph, *changes: Change) -> bool:
    """Make the changes in one edit; False if it was refused."""
    try:
        with graph.edit() as edit:
            for change in changes:
                change(edit)
    except QmpdError:
        return False
    return True


# -- one random change each --------------------------------------------------------------------------------------------


def pick(data: st.DataObject, things: list[T]) -> T:
    """By number: what is drawn must not change under the hands of hypothesis."""
    return things[data.draw(st.integers(0, len(things) - 1))]


def any_node(data: st.DataObject, graph: Graph) -> Node:
    return pick(data, graph.nodes)


def any_edge(data: st.DataObject, graph: Graph) -> Edge:
    return pick(data, [edge for node in graph.nodes for edge in node.parents])


def attach_user(data: st.DataObject, graph: Graph) -> Change:
    parent = Backend() if data.draw(st.booleans()) else JobParent("commit", "j")
    node, perm, shared = any_node(data, graph), data.draw(PERMS), data.draw(PERMS)
    return lambda edit: edit.attach(parent, "root", node, Role.NONE, perm=perm, shared=shared)


def attach_format(data: st.DataObject, graph: Graph) -> Change:
    node = any_node(data, graph)
    return lambda edit: edit.attach(make_in(edit, "qcow2"), "file", node, IMAGE)


def put_filter(data: st.DataObject, graph: Graph) -> Change:
    below = any_node(data, graph)

    def change(edit: Edit) -> None:
        node = make(edit.graph.generate_name(), "commit_top", is_filter=True, read_only=True)
        edit.add_node(node)
        edit.attach(node, "backing", below, FILTERED)
        edit.move_parents(below, node)

    return change


def replace(data: st.DataObject, graph: Graph) -> Change:
    edge, node = any_edge(data, graph), any_node(data, graph)
    return lambda edit: edit.replace(edge, node) if edge in edge.node.parents else None


def move(data: st.DataObject, graph: Graph) -> Change:
    old, new = any_node(data, graph), any_node(data, graph)
    return lambda edit: edit.move_parents(old, new)


def detach(data: st.DataObject, graph: Graph) -> Change:
    edge = any_edge(data, graph)
    return lambda edit: edit.detach(edge) if edge in edge.node.parents else None


def reopen(data: st.DataObject, graph: Graph) -> Change:
    node, read_only = any_node(data, graph), data.draw(st.booleans())

    def change(edit: Edit) -> None:
        if not (set(node.subtree()) & set(edit._reopened)):
            edit.set_read_only(node, read_only)

    return change


def freeze(data: st.DataObject, graph: Graph) -> Change:
    edge = any_edge(data, graph)
    return lambda edit: edit.freeze(edge) if edge in edge.node.parents else None


def block(data: st.DataObject, graph: Graph) -> Change:
    node = any_node(data, graph)
    return lambda edit: edit.block_ops(node, "because")


def trip_driver(data: st.DataObject, graph: Graph) -> Change:
    """Let one driver refuse its permissions, in an edit that counts as asking for more."""
    node = any_node(data, graph)

    def change(edit: Edit) -> None:
        fake(node).fail_check = True
        edit.refresh(node)
        edit.on_undo(lambda: setattr(fake(node), "fail_check", False))
        edit.on_commit(lambda: setattr(fake(node), "fail_check", False))

    return change


CHANGES = [attach_user, attach_format, put_filter, replace, move, detach, reopen, freeze, block, trip_driver]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_an_edit_happens_wholly_or_not_at_all(data: st.DataObject) -> None:
    """Whatever is combined in one edit: refused means identical, done means consistent."""
    graph = build(data)
    for _ in range(data.draw(st.integers(1, 4))):
        before = dump(graph)
        kinds = data.draw(st.lists(st.sampled_from(CHANGES), min_size=1, max_size=4))
        changes = [kind(data, graph) for kind in kinds]
        if attempt(graph, *changes):
            check_consistent(graph)
        else:
            assert dump(graph) == before


def check_consistent(graph: Graph) -> None:
    """The invariants of a graph between edits."""
    for node in graph.nodes:
        assert all(edge.node is node for edge in node.parents)
        for name, edge in node.children.items():
            assert edge in edge.node.parents
            assert edge.name == name
            assert node not in edge.node.subtree()
            assert (edge.perm, edge.shared) == child_permissions(node, edge, *node.cumulative())
        check_parents(node)
        driver = fake(node)
        assert driver.checking is None
        assert driver.reopening is None
        assert driver.read_only == node.read_only
        assert driver.granted == node.cumulative()
