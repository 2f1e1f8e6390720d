"""copy-on-read: what is read stays; nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpd.block.api import Perm
from qmpd.block.debug import Event
from qmpd.block.drivers.qcow2 import Qcow2
from qmpd.block.extents import RunKind
from qmpd.block.filters.blkdebug import Blkdebug
from qmpd.block.filters.copy_on_read import CopyOnRead
from qmpd.errors import QmpdError
from qmpd.units import KIB, MIB
from tests.block.conformance import checked, noise, read
from tests.block.filters.rig import filter_over, new_file, new_qcow2

LENGTH = 4 * MIB
DATA = noise(LENGTH, 1)
CLUSTER = 64 * KIB

Chain = tuple[Qcow2, Qcow2, CopyOnRead]


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    """(base full of data, an empty overlay, the filter over it)."""
    base, top = new_qcow2(tmp_path / "base", LENGTH), new_qcow2(tmp_path / "top", LENGTH)
    base.write(0, DATA)
    top.attach("backing", checked(base, Perm.CONSISTENT_READ))
    yield base, top, filter_over("copy-on-read", checked(top, Perm.WRITE_UNCHANGED))
    top.close()
    base.close()


def allocated(device: Qcow2) -> list[tuple[int, int]]:
    """(offset, length) of what the image itself has."""
    spans: list[tuple[int, int]] = []
    for run in device.map(0, device.length):
        if run.kind == RunKind.UNALLOCATED:
            continue
        if spans and sum(spans[-1]) == run.offset:
            spans[-1] = spans[-1][0], spans[-1][1] + run.length
        else:
            spans.append((run.offset, run.length))
    return spans


def test_what_is_read_is_in_the_image_afterwards(chain: Chain) -> None:
    """In whole clusters, and no more than that."""
    _, top, cor = chain
    assert read(cor, 100_000, 70_000) == DATA[100_000:170_000]
    assert allocated(top) == [(CLUSTER, 2 * CLUSTER)]
    top.attach("backing", None)
    assert read(top, CLUSTER, 2 * CLUSTER) == DATA[CLUSTER : 3 * CLUSTER]


def test_reading_everything_makes_the_image_stand_alone(chain: Chain) -> None:
    """Zeros become zero clusters; they take no room."""
    base, top, cor = chain
    base.write_zeroes(MIB, MIB)
    expected = read(base, 0, LENGTH)
    assert read(cor, 0, LENGTH) == expected
    assert allocated(top) == [(0, LENGTH)]
    assert {run.kind for run in top.map(MIB, MIB)} == {RunKind.ZERO}
    top.attach("backing", None)
    assert read(top, 0, LENGTH) == expected


def test_what_the_image_has_is_left_alone(chain: Chain) -> None:
    """No second copy, no old data over new."""
    _, top, cor = chain
    top.write(CLUSTER, b"new" * 10)
    before = top.map(CLUSTER, CLUSTER).host.tolist()
    assert read(cor, 0, 3 * CLUSTER)[CLUSTER : CLUSTER + 30] == b"new" * 10
    assert top.map(CLUSTER, CLUSTER).host.tolist() == before


def test_bottom_bounds_what_is_copied(tmp_path: Path) -> None:
    """Data of the bottom and above is copied, what lies below it is read only."""
    images = [new_qcow2(tmp_path / name, LENGTH) for name in ("top", "mid", "base")]
    top, mid, base = images
    base.write(0, DATA)
    mid.write(MIB, b"m" * CLUSTER)
    mid.attach("backing", checked(base))
    top.attach("backing", checked(mid))
    cor = filter_over("copy-on-read", checked(top))
    cor.bound([top, mid])
    expected = DATA[:MIB] + b"m" * CLUSTER + DATA[MIB + CLUSTER :]
    assert read(cor, 0, LENGTH) == expected
    assert allocated(top) == [(MIB, CLUSTER)]
    for image in images:
        image.close()


def test_without_the_permission_nothing_is_read(chain: Chain) -> None:
    """A copy that fails is not hidden."""
    _, top, _ = chain
    cor = filter_over("copy-on-read", checked(top, Perm.CONSISTENT_READ))
    with pytest.raises(QmpdError, match="No 'write, write unchanged' permission on node 'under-test'"):
        read(cor, 0, 1)
    assert allocated(top) == []


def test_a_write_waits_for_a_copy_of_the_same_bytes(tmp_path: Path) -> None:
    """What the guest writes meanwhile is not overwritten with what was there before."""
    base = new_qcow2(tmp_path / "base", LENGTH)
    base.write(0, DATA)
    file = new_file(tmp_path / "top")
    debug: Blkdebug = filter_over("blkdebug", checked(file))
    top = new_qcow2(tmp_path / "top", LENGTH, checked(debug))
    top.attach("backing", checked(base))
    cor = filter_over("copy-on-read", checked(top))
    debug.breakpoints.set(Event.READ_BACKING_AIO, "copying")
    reader = threading.Thread(target=read, args=(cor, 0, 10))
    reader.start()
    assert debug.breakpoints.wait("copying")
    writer = threading.Thread(target=cor.write, args=(0, b"guest"))
    writer.start()
    debug.breakpoints.remove("copying")
    reader.join()
    writer.join()
    assert read(top, 0, 10) == b"guest" + DATA[5:10]
    for driver in (top, base, file):
        driver.close()
