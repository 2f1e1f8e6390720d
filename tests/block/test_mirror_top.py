"""The filter of an active commit: a pass-through that remembers what may have changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock, call

import pytest

from qmpd.block.batch import Batch
from qmpd.block.dirty import DirtyMap
from qmpd.block.extents import RunKind
from qmpd.block.filters.mirror_top import MirrorTop
from qmpd.errors import Kind, QmpdError

G = 65536
CHANGES: list[tuple[str, Callable[[MirrorTop], None], Any]] = [
    ("write", lambda top: top.write(G, b"x" * 512), call(G, b"x" * 512)),
    ("write_zeroes", lambda top: top.write_zeroes(G, 512, unmap=False), call(G, 512, unmap=False)),
    ("discard", lambda top: top.discard(G, 512), call(G, 512)),
]


@pytest.fixture
def below() -> Mock:
    return Mock(length=4 * G, growable=False)


@pytest.fixture
def top(below: Mock) -> MirrorTop:
    return MirrorTop(below, DirtyMap(4 * G, G))


@pytest.mark.parametrize(("name", "change", "passed"), CHANGES)
def test_marks_when_the_change_has_been_made(
    top: MirrorTop, below: Mock, name: str, change: Callable[[MirrorTop], None], passed: Any
) -> None:
    """Not before: the one who copies could clear the mark and copy what is about to be overwritten."""
    seen: list[int] = []
    method = getattr(below, name)
    method.side_effect = lambda *_, **__: seen.append(top.dirty.bytes)

    change(top)

    assert method.mock_calls == [passed]
    assert seen == [0]
    assert top.dirty.bytes == G


@pytest.mark.parametrize(("name", "change", "passed"), CHANGES)
def test_marks_what_failed(
    top: MirrorTop, below: Mock, name: str, change: Callable[[MirrorTop], None], passed: Any
) -> None:
    """A part of it may have been done."""
    getattr(below, name).side_effect = QmpdError("x", Kind.IO, errno=5)

    with pytest.raises(QmpdError, match="x"):
        change(top)

    assert top.dirty.bytes == G


def test_what_changes_nothing_passes_through(top: MirrorTop, below: Mock) -> None:
    """Reads and syncs; nobody gets around the filter to the file itself, and its map is an empty layer."""
    buffer = memoryview(bytearray(512))
    top.readinto(G, buffer)
    top.flush()

    assert below.mock_calls == [call.readinto(G, buffer), call.flush()]
    assert top.direct(0, 512) is None
    batch = Batch([0], [memoryview(bytearray(512))])
    assert list(top.write_many(batch)) == list(top.read_many(batch)) == [0]
    assert top.placement_unit is None
    assert [run.kind for run in top.map(0, G)] == [RunKind.UNALLOCATED]
    assert top.length == 4 * G
    assert top.dirty.bytes == 0


def test_its_child_can_be_replaced_but_not_taken_away(top: MirrorTop) -> None:
    """And it has only the one."""
    top.attach("backing", Mock(length=G))
    assert top.length == G
    for name, child in (("backing", None), ("file", Mock())):
        with pytest.raises(QmpdError):
            top.attach(name, child)


def test_its_map_is_shown_as_a_bitmap(top: MirrorTop) -> None:
    """As the peer shows the one of its filter."""
    top.write(0, b"x")
    (bitmap,) = top.info().extra["dirty-bitmaps"]
    assert bitmap == {"count": G, "granularity": G, "recording": False, "busy": False, "persistent": False}
