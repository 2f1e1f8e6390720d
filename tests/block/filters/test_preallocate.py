"""preallocate: space beforehand, and back afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpd.block.api import Perm
from qmpd.block.contract import Checked
from qmpd.block.filters.preallocate import Preallocate
from qmpd.block.storage.file import FileStorage
from qmpd.errors import Kind, QmpdError
from qmpd.units import KIB, MIB
from tests.block.conformance import checked, read
from tests.block.filters.rig import filter_over, new_file

WRITER = Perm.WRITE | Perm.RESIZE


@pytest.fixture
def file(tmp_path: Path) -> Iterator[FileStorage]:
    file = new_file(tmp_path / "disk", 4 * KIB)
    yield file
    file.close()


@pytest.fixture
def disk(file: FileStorage) -> Preallocate:
    driver = filter_over("preallocate", checked(file), prealloc_size=MIB, prealloc_align=256 * KIB)
    assert isinstance(driver, Preallocate)
    return driver


def size(file: FileStorage) -> int:
    return os.stat(file.path).st_size


def test_growing_takes_space_for_later(file: FileStorage, disk: Preallocate) -> None:
    """The node is as long as its data; the file has room, allocated and zero."""
    disk.write(4 * KIB, b"x" * KIB)
    assert (disk.length, size(file)) == (5 * KIB, 1280 * KIB)
    assert os.stat(file.path).st_blocks * 512 >= MIB
    assert disk.holds_preallocation
    assert read(disk, 4 * KIB, 2 * KIB) == b"x" * KIB + bytes(KIB)
    disk.write(5 * KIB, b"y" * MIB)
    assert (disk.length, size(file)) == (MIB + 5 * KIB, 1280 * KIB)


def test_writing_inside_takes_nothing(file: FileStorage, disk: Preallocate) -> None:
    """Nor does reading."""
    disk.write(0, b"x")
    assert (disk.length, size(file)) == (4 * KIB, 4 * KIB)
    assert not disk.holds_preallocation


def test_zeroes_behind_the_data_are_there_already(file: FileStorage, disk: Preallocate) -> None:
    """They only move the end."""
    disk.write(4 * KIB, b"x")
    disk.write_zeroes(5 * KIB, 100 * KIB)
    assert disk.length == 105 * KIB
    disk.write(0, b"data" * KIB)
    disk.write_zeroes(2 * KIB, 100 * KIB)
    assert read(disk, 0, 105 * KIB) == (b"data" * KIB)[: 2 * KIB] + bytes(103 * KIB)


def test_space_goes_back_at_close(file: FileStorage, disk: Preallocate) -> None:
    """To the sector."""
    disk.write(4 * KIB, b"x")
    disk.close()
    assert size(file) == 4 * KIB + 512
    disk.close()


def test_space_goes_back_with_the_last_writer(file: FileStorage, disk: Preallocate) -> None:
    """Before the child loses the permission; from then on the file's length is the node's."""
    disk.permissions_commit(WRITER, Perm.ALL)
    disk.write(4 * KIB, b"x")
    disk.permissions_check(WRITER, Perm.ALL)
    assert size(file) > MIB
    disk.permissions_check(Perm.CONSISTENT_READ, Perm.ALL)
    disk.permissions_commit(Perm.CONSISTENT_READ, Perm.ALL)
    assert not disk.holds_preallocation
    file.truncate(64 * KIB)
    assert disk.length == 64 * KIB


@pytest.mark.parametrize(("length", "left"), [(2 * KIB, 2 * KIB), (64 * KIB, 1280 * KIB), (4 * MIB, 4 * MIB)])
def test_truncating(file: FileStorage, disk: Preallocate, length: int, left: int) -> None:
    """What is cut off does not come back; growth within the space taken costs nothing."""
    disk.write(4 * KIB, b"x" * 4 * KIB)
    disk.truncate(length)
    assert (disk.length, size(file)) == (length, left)
    disk.truncate(8 * MIB)
    kept = min(length, 8 * KIB)
    assert read(disk, kept, 16 * KIB) == bytes(16 * KIB)


class Full(Checked):
    """No space left for zeros."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        raise QmpdError("No space left on device", Kind.NO_SPACE)


def test_no_space_beforehand_is_no_error(file: FileStorage) -> None:
    """The write itself goes on; the file system is not asked every time."""
    disk = filter_over("preallocate", Full(file, Perm.ALL, node="disk"))
    disk.write(4 * KIB, b"x")
    disk.write(8 * KIB, b"x")
    assert (disk.length, size(file)) == (8 * KIB + 512, 8 * KIB + 1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prealloc_align": 100}, "prealloc-align parameter of preallocate filter is not aligned to 512"),
        ({"prealloc_align": -512}, "Value '-512' is out of range for parameter 'prealloc-align'"),
        ({"prealloc_size": -1}, "Value '-1' is out of range for parameter 'prealloc-size'"),
    ],
)
def test_what_is_refused(file: FileStorage, options: dict[str, int], text: str) -> None:
    """With the peer's texts; 0 is fine."""
    with pytest.raises(QmpdError) as caught:
        filter_over("preallocate", checked(file), **options)
    assert caught.value.desc == text
    filter_over("preallocate", checked(file), prealloc_align=0, prealloc_size=0).write(4 * KIB, b"x")
