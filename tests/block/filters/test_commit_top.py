"""The filter above a commit's top: transparent to readers, closed to writers, an empty layer for map."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpd.block.extents import RunKind, chain_runs
from qmpd.block.filters.commit_top import CommitTop
from qmpd.block.storage.file import FileStorage
from qmpd.errors import Kind, QmpdError
from qmpd.units import MIB
from tests.block.conformance import checked, noise, read


@pytest.fixture
def file(tmp_path: Path) -> FileStorage:
    (tmp_path / "f").write_bytes(noise(MIB, 1))
    return FileStorage.open({}, {"filename": str(tmp_path / "f")}, read_only=False)


@pytest.fixture
def top(file: FileStorage) -> CommitTop:
    return CommitTop.open({"backing": checked(file)})


def test_reads_pass_through(top: CommitTop, file: FileStorage) -> None:
    """Content, length and place are the child's, also after it grew."""
    assert read(checked(top), 1000, 5000) == noise(MIB, 1)[1000:6000]
    assert top.direct(512, 512) == (file, 512)
    file.truncate(2 * MIB)
    assert top.length == 2 * MIB


@pytest.mark.parametrize(
    "request_",
    [
        lambda top: top.write(0, b"x"),
        lambda top: top.write_zeroes(0, 512),
        lambda top: top.discard(0, 512),
        lambda top: top.truncate(512),
    ],
    ids=["write", "write_zeroes", "discard", "truncate"],
)
def test_nothing_is_written_through_it(top: CommitTop, request_) -> None:  # type: ignore[no-untyped-def]
    """Even by somebody who has all permissions."""
    with pytest.raises(QmpdError, match=r"^Block node is read-only$") as caught:
        request_(checked(top))
    assert caught.value.kind is Kind.PERMISSION
    assert top.read_only


def test_it_has_nothing_of_its_own(top: CommitTop, file: FileStorage) -> None:
    """As a layer of a chain it lets everything through to the layer below."""
    runs = list(chain_runs([checked(top), checked(file)], 0, MIB))
    assert [(run.kind, run.layer) for run in runs] == [(RunKind.DATA, 1)]


def test_only_the_backing_slot(top: CommitTop, file: FileStorage) -> None:
    """The child sits in the backing slot and cannot be taken away."""
    with pytest.raises(QmpdError):
        top.attach("file", checked(file))
    with pytest.raises(QmpdError):
        top.attach("backing", None)
    top.attach("backing", checked(file))
