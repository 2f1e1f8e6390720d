"""Walking, searching and freezing backing chains."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpd.block.api import BackingReference, Perm, Role
from qmpd.errors import QmpdError
from qmpd.graph import chain
from qmpd.graph.edit import Graph
from qmpd.graph.node import Backend, Node
from tests.graph.fakes import FILTERED, add_image, connect, fake, make


class Chain:
    """base, mid and top, with a copy-on-read filter over mid."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.base = add_image(self.graph, "base", read_only=True)
        self.mid = add_image(self.graph, "mid", self.base, read_only=True)
        self.filter = make("cor", "copy-on-read", is_filter=True, read_only=False, monitor_owned=True)
        with self.graph.edit() as edit:
            edit.set_read_only(self.mid, False)
            edit.add_node(self.filter)
            edit.attach(self.filter, "file", self.mid, FILTERED)
        self.top = add_image(self.graph, "top", self.filter)

    @property
    def all(self) -> list[Node]:
        return [self.top, self.filter, self.mid, self.base]

    def with_files(self, **stored: str) -> Chain:
        """Give every image the path NAME.qcow2 and the header's backing strings in ``stored``."""
        for node in (self.base, self.mid, self.top):
            fake(self.graph.get(f"{node.name}-file")).path = f"{node.name}.qcow2"
            name = stored.get(node.name)
            fake(node).reference = BackingReference(name, "qcow2") if name else None
        return self


@pytest.fixture
def given() -> Chain:
    return Chain()


def test_walking(given: Chain) -> None:
    """Filters count as links of the chain; images skip them."""
    assert list(chain.walk(given.top)) == given.all
    assert chain.bottom(given.top) is given.base
    assert chain.skip_filters(given.filter) is given.mid
    assert chain.skip_filters(given.mid) is given.mid
    assert chain.next_image(given.top) is given.mid
    assert chain.next_image(given.filter) is given.base
    assert chain.next_image(given.base) is None


def test_membership(given: Chain) -> None:
    """A protocol node is not in the chain of its format node."""
    file = given.graph.get("mid-file")
    assert all(chain.contains(given.top, node) for node in given.all)
    assert not chain.contains(given.top, file)
    assert not chain.contains(given.mid, given.top)
    assert chain.get_in_chain(given.graph, "base", given.top) is given.base
    with pytest.raises(QmpdError, match="'mid-file' is not in this backing file chain"):
        chain.get_in_chain(given.graph, "mid-file", given.top)
    with pytest.raises(QmpdError, match="Cannot find device='' nor node-name='nope'"):
        chain.get_in_chain(given.graph, "nope", given.top)


def test_overlays(given: Chain) -> None:
    """find_overlay goes by image, overlays() by link."""
    sibling = add_image(given.graph, "sibling", given.base)
    assert chain.find_overlay(given.top, given.mid) is given.top
    assert chain.find_overlay(given.top, given.filter) is given.top
    assert chain.find_overlay(given.top, given.base) is given.mid
    assert chain.find_overlay(given.top, given.top) is None
    assert [edge.parent for edge in chain.overlays(given.base)] == [given.mid, sibling]


def test_backends_whose_requests_come_down(given: Chain) -> None:
    """Those on the node and on everything above it, each once."""
    users = [Backend(), Backend(), Backend()]
    for user, node in zip(users, (given.top, given.mid, given.base), strict=True):
        connect(given.graph, user, "root", node, perm=Perm.NONE)
    assert set(chain.backends_above([given.mid, given.top])) == set(users[:2])
    assert set(chain.backends_above([given.graph.get("base-file")])) == set(users)


def test_layers_are_seen_through_their_filters(given: Chain) -> None:
    """One device a layer; job filters are no layers."""
    assert chain.layers(given.top, given.base) == [given.top.driver, given.filter.driver]
    assert chain.layers(given.mid, None) == [given.mid.driver, given.base.driver]
    commit_top = make("cf", "commit_top", is_filter=True, read_only=True)
    with given.graph.edit() as edit:
        edit.add_node(commit_top)
        edit.attach(commit_top, "backing", given.top, FILTERED)
    assert chain.layers(commit_top, given.base) == [given.top.driver, given.filter.driver]


def test_a_filter_over_base_is_no_layer(given: Chain) -> None:
    """It shows base, which a commit would copy onto itself."""
    over = make("over", "throttle", is_filter=True)
    with given.graph.edit() as edit:
        edit.add_node(over)
        edit.attach(over, "file", given.base, FILTERED)
        edit.replace(given.mid.children["backing"], over)
    assert chain.layers(given.mid, given.base) == [given.mid.driver]
    assert chain.layers(over, given.base) == []


# -- by file name ------------------------------------------------------------------------------------------------------


def test_found_by_the_name_the_node_has(given: Chain) -> None:
    """Where the link was made by hand, nothing else counts."""
    given.with_files()
    assert chain.find_by_file(given.top, "base.qcow2") is given.base
    assert chain.find_by_file(given.top, "./base.qcow2") is None
    assert chain.find_by_file(given.top, "top.qcow2") is None


def test_found_by_a_path_as_seen_from_the_overlay(
    given: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the link is the header's: relative to that overlay's directory, links resolved."""
    monkeypatch.chdir(tmp_path)
    given.with_files(top="mid.qcow2", mid="base.qcow2")
    for name in ("base", "mid"):
        fake(given.graph.get(f"{name}-file")).path = f"d1/{name}.qcow2"
    fake(given.graph.get("top-file")).path = "d2/top.qcow2"
    fake(given.top).reference = BackingReference("../d1/mid.qcow2", "qcow2")
    (tmp_path / "d1").mkdir()
    (tmp_path / "d1" / "base.qcow2").touch()
    (tmp_path / "d1" / "alias").symlink_to("base.qcow2")
    (tmp_path / "d2").mkdir()
    for name in ("base.qcow2", "d1/base.qcow2", "alias", str(tmp_path / "d1" / "base.qcow2"), "../d1/base.qcow2"):
        assert chain.find_by_file(given.mid, name) is given.base, name
    assert chain.find_by_file(given.top, "d1/mid.qcow2") is given.mid
    assert chain.find_by_file(given.top, "../d1/mid.qcow2") is None  # a filter is in between: not what the header says


def test_protocol_names_are_compared_as_they_are(given: Chain) -> None:
    """No path arithmetic on them."""
    given.with_files(mid="nbd://host/x")
    fake(given.graph.get("base-file")).path = "nbd://host/x"
    assert chain.find_by_file(given.mid, "nbd://host/x") is given.base
    assert chain.find_by_file(given.mid, "x") is None


# -- freezing ----------------------------------------------------------------------------------------------------------


def test_a_stretch_is_frozen_and_let_go(given: Chain) -> None:
    """All links from top to base."""
    with given.graph.edit() as edit:
        edges = chain.freeze(edit, given.top, given.base)
    assert [edge.node for edge in edges] == given.all[1:]
    assert all(edge.frozen for edge in edges)
    with given.graph.edit() as edit:
        chain.unfreeze(edit, edges)
    assert not any(edge.frozen for edge in edges)


def test_a_stretch_with_a_frozen_link(given: Chain) -> None:
    """The second job is refused, and the first one's links are as before."""
    with given.graph.edit() as edit:
        first = chain.freeze(edit, given.mid, given.base)

    def second() -> None:
        with given.graph.edit() as edit:
            chain.freeze(edit, given.top, given.base)

    with pytest.raises(QmpdError, match="Cannot change 'backing' link from 'mid' to 'base'"):
        second()
    assert [edge.frozen for edge in chain.stretch(given.top, given.base)] == [False, False, True]
    assert all(edge.frozen for edge in first)


def test_another_jobs_filter_cannot_be_frozen_in(given: Chain) -> None:
    """It must be able to leave."""
    given.filter.never_freeze = True

    def freeze() -> None:
        with given.graph.edit() as edit:
            chain.freeze(edit, given.top, given.base)

    with pytest.raises(QmpdError, match="Cannot freeze 'backing' link to 'cor'"):
        freeze()
    assert not given.top.children["backing"].frozen


def test_a_stretch_that_does_not_exist(given: Chain) -> None:
    """base is above top."""
    with pytest.raises(QmpdError, match="'top' is not in this backing file chain"):
        chain.stretch(given.base, given.top)
    assert given.base.cow_edge is None
    assert given.top.children["backing"].role is Role.COW
