"""Edits: what each change does, what refuses it, and that a refusal leaves no trace."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from qmpd.block.api import Perm, Role
from qmpd.errors import QmpdError
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Backend, Edge, JobParent, Node
from tests.graph.fakes import FILTERED, IMAGE, add, add_image, connect, dump, fake, make, show

CR, W, WU, R, NONE, ALL = (
    Perm.CONSISTENT_READ, Perm.WRITE, Perm.WRITE_UNCHANGED, Perm.RESIZE, Perm.NONE, Perm.ALL,
)  # fmt: skip


@pytest.fixture
def graph() -> Graph:
    return Graph()


def chain_of_three(graph: Graph) -> tuple[Node, Node, Node]:
    """top over mid over base, the lower two read-only."""
    base = add_image(graph, "base", read_only=True)
    mid = add_image(graph, "mid", base, read_only=True)
    return add_image(graph, "top", mid), mid, base


def refused(graph: Graph, change: Callable[[Edit], object]) -> str:
    """Make ``change`` in an edit that must fail without a trace; the error's text."""
    before = dump(graph)
    with pytest.raises(QmpdError) as caught, graph.edit() as edit:
        change(edit)
    assert dump(graph) == before
    return caught.value.desc


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "1abc", " x", "#x", "_x", "-x", "ä", "a b", "x\n"])
def test_a_malformed_name_is_refused(graph: Graph, name: str) -> None:
    """Letters first, then letters, digits, '-', '.', '_'. (Names with '#' in front are ours.)"""
    with pytest.raises(QmpdError) as caught:
        graph.check_new_name(name)
    assert caught.value.desc == f"Invalid node-name: '{name}'"


def test_the_order_of_name_checks(graph: Graph) -> None:
    """Form, then existence, then length."""
    graph.check_new_name("a" * 31)
    with pytest.raises(QmpdError, match="Node name too long"):
        graph.check_new_name("a" * 32)
    with pytest.raises(QmpdError, match="Invalid node-name: '1a"):
        graph.check_new_name("1" + "a" * 40)
    add(graph, "x")
    assert refused(graph, lambda edit: edit.add_node(make("x"))) == "Duplicate nodes with node-name='x'"


def test_generated_names_count_up_and_cannot_be_given_by_users(graph: Graph) -> None:
    """#block, a counter, two digits."""
    names = [graph.generate_name() for _ in range(12)]
    assert [name[:-2] for name in names] == [f"#block{number}" for number in range(12)]
    assert all(name[-2:].isdigit() for name in names)


def test_looking_up(graph: Graph) -> None:
    """An unknown name gives the text of a dangling reference."""
    node = add(graph, "x")
    assert graph.find("x") is graph.get("x") is node
    assert graph.find("y") is None
    with pytest.raises(QmpdError, match="Cannot find device='' nor node-name='y'"):
        graph.get("y")
    with pytest.raises(QmpdError, match="Cannot find device='y' nor node-name='y'"):
        graph.get("y", "y")


# -- links -------------------------------------------------------------------------------------------------------------


def test_a_chain_has_the_permissions_the_peer_gives_it(graph: Graph) -> None:
    """A chain at rest, as recorded."""
    chain_of_three(graph)
    edges = [show(edge) for node in reversed(graph.nodes) for edge in node.children.values()]
    assert edges == [
        "top -file-> top-file perm=consistent-read,resize,write shared=consistent-read,write-unchanged",
        "top -backing-> mid perm=- shared=consistent-read,resize,write,write-unchanged",
        "mid -file-> mid-file perm=consistent-read shared=consistent-read,write-unchanged",
        "mid -backing-> base perm=- shared=consistent-read,resize,write,write-unchanged",
        "base -file-> base-file perm=consistent-read shared=consistent-read,write-unchanged",
    ]


def test_drivers_hear_of_their_children_and_permissions(graph: Graph) -> None:
    """Attached devices arrive at the parent's driver, cumulative permissions at the child's."""
    top, mid, _ = chain_of_three(graph)
    assert fake(top).children["backing"] is top.children["backing"].device
    assert fake(graph.get("top-file")).granted == (CR | W | R, CR | WU)
    with graph.edit() as edit:
        edit.detach(top.children["backing"])
    assert fake(top).children["backing"] is None
    assert mid.parents == []


def test_permissions_travel_down_the_whole_subtree(graph: Graph) -> None:
    """A reader on top makes every backing file readable, down to the bottom."""
    top, mid, base = chain_of_three(graph)
    user = Backend()
    edge = connect(graph, user, "root", top, perm=CR, shared=CR | W | WU)
    assert [node.children["backing"].perm for node in (top, mid)] == [CR, CR]
    assert user.edge is edge
    with graph.edit() as edit:
        edit.set_perm(edge, NONE, ALL)
    assert [node.children["backing"].perm for node in (top, mid)] == [NONE, NONE]
    assert base.cumulative() == (NONE, ALL)


def test_an_edge_does_its_io_with_its_own_permissions(graph: Graph) -> None:
    """A reader cannot write, and can after its permissions are raised."""
    node = add(graph, "n")
    edge = connect(graph, Backend(), "root", node, perm=CR, shared=ALL)
    with pytest.raises(QmpdError, match="No 'write, write unchanged' permission on node 'n'"):
        edge.device.write(0, b"x")
    with graph.edit() as edit:
        edit.set_perm(edge, CR | W, ALL)
    edge.device.write(0, b"x")


def test_a_cycle_is_refused(graph: Graph) -> None:
    """Also a cycle of one, and one over several nodes."""
    top, _, base = chain_of_three(graph)
    text = refused(graph, lambda edit: edit.attach(base, "backing", top, Role.COW))
    assert text == "Making 'top' a backing child of 'base' would create a cycle"
    text = refused(graph, lambda edit: edit.attach(base, "backing", base, Role.COW))
    assert text == "Making 'base' a backing child of 'base' would create a cycle"
    other = add_image(graph, "other", base)
    text = refused(graph, lambda edit: edit.replace(other.children["backing"], other))
    assert text == "Making 'other' a backing child of 'other' would create a cycle"


def test_a_read_only_child_of_a_writable_format(graph: Graph) -> None:
    """read-write qcow2 over a read-only file node."""
    file, image = add(graph, "f", read_only=True), add(graph, "q", "qcow2")
    assert refused(graph, lambda edit: edit.attach(image, "file", file, IMAGE)) == "Block node is read-only"


def test_inactive_below_active_is_refused(graph: Graph) -> None:
    """The text that block-commit gives."""
    mid = make("mid", "qcow2", active=False)
    filter_node = add(graph, "flt", "commit_top", is_filter=True)
    with graph.edit() as edit:
        edit.add_node(mid)
    text = refused(graph, lambda edit: edit.attach(filter_node, "backing", mid, FILTERED))
    assert text == "Inactive 'mid' can't be a backing child of active 'flt'"


def test_replacing_makes_the_newest_parent(graph: Graph) -> None:
    """Conflicts are told newest first, so the order is part of the interface."""
    old, new = add(graph, "old"), add(graph, "new")
    one = connect(graph, Backend(), "root", new, perm=CR, shared=ALL)
    two = connect(graph, Backend(), "root", old, perm=CR, shared=ALL)
    device = two.device
    with graph.edit() as edit:
        edit.replace(two, new)
    assert new.parents == [one, two]
    assert two.device is not device
    assert fake(old).granted == (NONE, ALL)


def test_a_backend_hears_that_its_node_changed_but_not_of_a_change_undone(graph: Graph) -> None:
    """Exports fetch the new device when told."""

    class Listener(Backend):
        heard: list[str]

        def retargeted(self, edge: Edge) -> None:
            self.heard.append(edge.node.name)

    old, new, bad = add(graph, "old"), add(graph, "new"), add(graph, "bad")
    listener = Listener()
    listener.heard = []
    edge = connect(graph, listener, "root", old, perm=CR, shared=ALL)
    fake(bad).fail_check = True
    refused(graph, lambda edit: edit.replace(edge, bad))
    assert listener.heard == []
    with graph.edit() as edit:
        edit.replace(edge, new)
    assert listener.heard == ["new"]


def test_moving_parents_onto_a_filter(graph: Graph) -> None:
    """Overlays and backends move; the filter's own link and jobs stay."""
    top, mid, _ = chain_of_three(graph)
    job, user = JobParent("commit", "j0"), Backend()
    connect(graph, job, "intermediate node", mid, perm=NONE, shared=ALL)
    export = connect(graph, user, "root", mid, perm=CR, shared=ALL)
    filter_node = make("cf", "commit_top", is_filter=True, read_only=True)
    with graph.edit() as edit:
        edit.add_node(filter_node)
        edit.attach(filter_node, "backing", mid, FILTERED)
        moved = edit.move_parents(mid, filter_node)
    assert moved == [export, top.children["backing"]]
    assert [edge.parent for edge in mid.parents] == [job, filter_node]
    assert top.backing is filter_node
    assert fake(top).children["backing"] is top.children["backing"].device


def test_moving_parents_leaves_those_kept(graph: Graph) -> None:
    """``keep`` decides per edge."""
    old, new = add(graph, "old"), add(graph, "new")
    edges = [connect(graph, Backend(), name, old) for name in ("stay", "go")]
    with graph.edit() as edit:
        edit.move_parents(old, new, keep=lambda edge: edge.name == "stay")
    assert old.parents == edges[:1]
    assert new.parents == edges[1:]


def test_removing_a_node_takes_its_links_along(graph: Graph) -> None:
    """The child is free afterwards; a node with parents cannot be removed."""
    image = add_image(graph, "q")
    file = graph.get("q-file")
    with graph.edit() as edit:
        edit.remove_node(image)
    assert graph.nodes == [file]
    assert file.parents == []
    assert graph.unreferenced() == [file]
    connect(graph, Backend(), "root", file)
    with pytest.raises(RuntimeError, match="still has parents"), graph.edit() as edit:
        edit.remove_node(file)


# -- rollback ----------------------------------------------------------------------------------------------------------


def test_a_failing_driver_takes_everything_back(graph: Graph) -> None:
    """Also what other drivers agreed to already."""
    top, mid, base = chain_of_three(graph)
    fake(graph.get("base-file")).fail_check = True

    def change(edit: Edit) -> None:
        edit.attach(Backend(), "root", top, Role.NONE, perm=CR | W, shared=CR | WU)
        edit.replace(top.children["backing"], base)
        edit.set_attribute(mid, "monitor_owned", False)
        edit.block_ops(mid, "busy")
        edit.add_node(make("more"))

    assert refused(graph, change) == 'Failed to get "write" lock'


def test_any_exception_in_the_block_takes_everything_back(graph: Graph) -> None:
    """Ours as well as a user's error."""
    top, _, base = chain_of_three(graph)
    before = dump(graph)

    def fail() -> None:
        with graph.edit() as edit:
            edit.replace(top.children["backing"], base)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert dump(graph) == before


def test_hooks_run_in_their_place(graph: Graph) -> None:
    """on_undo in reverse order and only then; on_commit only when it happened."""
    calls: list[str] = []
    node = add(graph, "n")

    def change(edit: Edit) -> None:
        edit.on_undo(lambda: calls.append("first"))
        edit.on_undo(lambda: calls.append("second"))
        edit.on_commit(lambda: calls.append("never"))
        edit.add_node(make("n"))

    refused(graph, change)
    assert calls == ["second", "first"]
    calls.clear()
    with graph.edit() as edit:
        edit.on_undo(lambda: calls.append("never"))
        edit.on_commit(lambda: calls.append("done"))
        edit.set_attribute(node, "implicit", True)
    assert calls == ["done"]


def test_loosening_never_fails(graph: Graph) -> None:
    """If a driver cannot give a permission up, the link goes all the same and the driver keeps what it had."""
    node = add(graph, "n")
    edge = connect(graph, Backend(), "root", node, perm=CR | W, shared=CR)
    fake(node).fail_check = True
    with graph.edit() as edit:
        edit.set_perm(edge, CR, CR | WU)
    assert (edge.perm, edge.shared) == (CR, CR | WU)
    with graph.edit() as edit:
        edit.detach(edge)
    assert node.parents == []
    assert fake(node).granted == (CR | W, CR)
    assert fake(node).checking is None


@pytest.mark.parametrize(("perm", "shared"), [(CR | W, ALL), (NONE, CR)])
def test_asking_for_more_does_fail(graph: Graph, perm: Perm, shared: Perm) -> None:
    """More permissions, or fewer shared."""
    node = add(graph, "n")
    edge = connect(graph, Backend(), "root", node, perm=CR, shared=ALL)
    fake(node).fail_check = True
    assert refused(graph, lambda edit: edit.set_perm(edge, perm, shared)) == 'Failed to get "write" lock'


def test_another_thread_may_not_change_the_graph(graph: Graph) -> None:
    """It is a bug, so it is loud."""
    caught: list[BaseException] = []

    def change() -> None:
        try:
            with graph.edit():
                pass
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    thread.join()
    assert len(caught) == 1


# -- reopening ---------------------------------------------------------------------------------------------------------


def test_children_that_inherit_follow_a_reopen(graph: Graph) -> None:
    """The inline file goes along, the backing file does not."""
    _, mid, base = chain_of_three(graph)
    with graph.edit() as edit:
        edit.set_read_only(mid, False)
    assert not mid.read_only
    assert not fake(mid).read_only
    assert not graph.get("mid-file").read_only
    assert base.read_only
    assert fake(graph.get("mid-file")).granted == (CR | W | R, CR | WU)
    assert mid.spec.read_only is False
    with graph.edit() as edit:
        edit.set_read_only(mid, True)
    assert fake(graph.get("mid-file")).granted == (CR, CR | WU)
    assert graph.get("mid-file").read_only


@pytest.mark.parametrize("how", ["explicit", "referenced"])
def test_children_of_their_own_do_not_follow(graph: Graph, how: str) -> None:
    """So a base over a file that is read-only by itself cannot become writable."""
    base = add_image(graph, "base", read_only=True)
    file = graph.get("base-file")
    if how == "explicit":
        file.explicit = frozenset({"read-only"})
    else:
        file.inherits_from = None
    assert refused(graph, lambda edit: edit.set_read_only(base, False)) == "Block node is read-only"


def test_read_only_under_a_writer(graph: Graph) -> None:
    """The text of section 2.1 for a reopen."""
    node = add(graph, "r")
    connect(graph, Backend(), "root", node, perm=W, shared=ALL)
    text = refused(graph, lambda edit: edit.set_read_only(node, True))
    assert text == "Read-only block node 'r' cannot support read-write users"


def test_a_reopen_that_a_driver_refuses(graph: Graph) -> None:
    """The parent was ready already; it is told to forget it."""
    base = add_image(graph, "base", read_only=True)
    fake(graph.get("base-file")).fail_reopen = True
    assert refused(graph, lambda edit: edit.set_read_only(base, False)) == "Could not open 'x': Permission denied"


def test_a_rehearsal_finds_out_and_changes_nothing(graph: Graph) -> None:
    """Also what only the end of the block would find: here that the file may not be written."""
    base = add_image(graph, "base", read_only=True)
    before = dump(graph)
    graph.rehearse(lambda edit: edit.set_read_only(base, False))
    assert dump(graph) == before

    other = add_image(graph, "other", read_only=True)
    file = graph.get("other-file")
    with graph.edit() as edit:
        edit.set_attribute(file, "explicit", frozenset({"read-only"}))
    before = dump(graph)
    with pytest.raises(QmpdError, match=r"^Block node is read-only$"):
        graph.rehearse(lambda edit: edit.set_read_only(other, False))
    assert dump(graph) == before


def test_writers_that_are_not_admitted(graph: Graph) -> None:
    """Whatever is shared: only those named may write, until the one who said so has left. Readers are welcome."""
    node = add(graph, "n")
    job, mine, reader = JobParent("commit", "j0"), Backend(), Backend()
    promise = connect(graph, job, "target", node, shared=ALL)
    own = connect(graph, mine, "root", node, perm=W, shared=ALL)
    with graph.edit() as edit:
        edit.admit_writers(promise, [own])
    connect(graph, reader, "root", node, perm=CR, shared=ALL)

    stranger = Backend()
    text = refused(graph, lambda edit: edit.attach(stranger, "root", node, Role.NONE, perm=W))
    assert text == (
        "Permission conflict on node 'n': permissions 'write' are both required by an unnamed block device (uses node "
        "'n' as 'root' child) and unshared by commit job 'j0' (uses node 'n' as 'target' child)."
    )
    assert stranger.edge is None
    with graph.edit() as edit:
        edit.detach(promise)
    connect(graph, stranger, "root", node, perm=W, shared=ALL)


# -- frozen links and blockers -----------------------------------------------------------------------------------------


def test_frozen_links(graph: Graph) -> None:
    """Each way to change one has its own text (section 2.2)."""
    _, mid, base = chain_of_three(graph)
    link = mid.children["backing"]
    with graph.edit() as edit:
        edit.freeze(link)
    text = refused(graph, lambda edit: edit.detach(link))
    assert text == "Cannot change frozen 'backing' link from 'mid' to 'base'"
    text = refused(graph, lambda edit: edit.freeze(link))
    assert text == "Cannot change 'backing' link from 'mid' to 'base'"
    other = add(graph, "other")
    assert refused(graph, lambda edit: edit.move_parents(base, other)) == "Cannot change 'backing' link to 'base'"
    with graph.edit() as edit:
        edit.unfreeze(link)
        edit.detach(link)
    assert mid.backing is None


def test_a_backing_node_is_blocked_for_most(graph: Graph) -> None:
    """Not for being streamed from, committed into or backed up."""
    top, mid, base = chain_of_three(graph)
    for operation in ("commit-target", "stream", "backup-source", "backup-target"):
        mid.check_op(operation)
    with pytest.raises(QmpdError, match="Node 'mid' is busy: node is used as backing hd of 'top'"):
        mid.check_op("drive-del")
    with graph.edit() as edit:
        edit.replace(top.children["backing"], base)
    mid.check_op("drive-del")
    with pytest.raises(QmpdError, match="Node 'base' is busy: node is used as backing hd of 'top'"):
        base.check_op("resize")


def test_the_newest_reason_is_told(graph: Graph) -> None:
    """A job's blocker hides the older backing one, and goes away by reason."""
    _, mid, _ = chain_of_three(graph)
    reason = "block device is in use by block job: commit"
    with graph.edit() as edit:
        edit.block_ops(mid, reason)
    with pytest.raises(QmpdError, match=f"Node 'mid' is busy: {reason}"):
        mid.check_op("stream")
    with graph.edit() as edit:
        edit.unblock_ops(mid, reason)
        edit.unblock_ops(mid, "never heard of it")
    mid.check_op("stream")


def test_a_root_node_has_backends_only(graph: Graph) -> None:
    """Overlays and jobs make it something else."""
    top, mid, _ = chain_of_three(graph)
    connect(graph, Backend(), "root", top)
    top.check_root()
    with pytest.raises(QmpdError, match="Need a root block node"):
        mid.check_root()
    connect(graph, JobParent("commit", "j0"), "main node", top)
    with pytest.raises(QmpdError, match="Need a root block node"):
        top.check_root()
