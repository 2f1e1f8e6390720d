"""Maps: complete, coalesced, cheap; and the pure arithmetic under them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.block.drivers.qcow2 import Qcow2, reading
from qmpd.block.drivers.qcow2.refcounts import RefcountCodec
from qmpd.block.drivers.qcow2.tables import COMPRESSED, Geometry
from qmpd.block.extents import Run, RunKind
from tests.block.qcow2.support import MemoryFile, new_image

MIB, TIB = 1 << 20, 1 << 40


class Counting(MemoryFile):
    """Counts what is read, and where."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        super().readinto(offset, buffer)


def whole_map(image: Qcow2) -> list[Run]:
    """All runs, asking again as often as needed."""
    runs: list[Run] = []
    offset = 0
    while offset < image.length:
        part = image.map(offset, image.length - offset)
        assert part.start == offset
        runs += part
        offset = part.end
    return runs


@pytest.mark.parametrize("options", [{}, {"extended_l2": True}, {"cluster_size": 512}])
def test_adjacent_clusters_make_one_run(options: dict[str, Any]) -> None:
    """A freshly placed region is one run, whatever the cluster size; the rest is one run on either side."""
    _, image = new_image(size=64 * MIB, **options)
    with image.place(MIB, 4 * MIB) as placed:
        pass
    image.data_child.truncate(16 * MIB)  # type: ignore[union-attr]
    kinds = [(run.offset, run.kind) for run in whole_map(image)]
    assert kinds[0] == (0, RunKind.UNALLOCATED)
    assert kinds[1] == (MIB, RunKind.DATA)
    assert kinds[-1] == (5 * MIB, RunKind.UNALLOCATED)
    assert sum(run.length for run in whole_map(image)) == 64 * MIB
    if not options:
        assert len(kinds) == 3
        assert len(placed) == 1


def test_a_sparse_giant_costs_no_more_than_its_tables() -> None:
    """4 TiB with 50 scattered clusters: one call, one read per L2 table."""
    file = Counting()
    new_image(file, size=4 * TIB)
    image = Qcow2.open({"file": file}, {}, read_only=False)
    for i in range(50):
        image.write(i * 80 * (1 << 30), b"x")
    image.close()
    image = Qcow2.open({"file": file}, {}, read_only=True)
    file.reads = 0
    runs = image.map(0, image.length)
    assert runs.end == image.length
    assert int((runs.kind == RunKind.DATA).sum()) == 50
    assert file.reads == 50


def test_a_map_stops_early_rather_than_read_too_many_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller gets a prefix and asks again."""
    _, image = new_image(size=64 * MIB, cluster_size=4096)
    for offset in range(0, 64 * MIB, 2 * MIB):
        image.write(offset, b"x")
    monkeypatch.setattr(reading, "MAP_BUDGET", 4 * 4096)
    part = image.map(0, image.length)
    assert part.end == 8 * MIB
    assert sum(run.kind == RunKind.DATA for run in whole_map(image)) == 32


def test_data_behind_the_end_of_the_file_is_zero() -> None:
    """A cluster that the file is too short for: what is missing reads as zeros, and the map says so."""
    file, image = new_image(size=MIB)
    image.write(0, b"x" * 512)
    assert [(run.offset, run.length, run.kind) for run in image.map(0, 65536)] == [
        (0, 512, RunKind.DATA),
        (512, 65024, RunKind.ZERO),
    ]
    assert file.length % 65536 == 512


def test_a_failed_placement_changes_nothing() -> None:
    """The clusters are free again, readers see what was there."""
    _, image = new_image(size=MIB)
    for offset, length in ((0, 65536), (0, 4 * 65536)):
        with pytest.raises(KeyboardInterrupt), image.place(offset, length):
            raise KeyboardInterrupt
        assert [run.kind for run in image.map(0, MIB)] == [RunKind.UNALLOCATED]
    with image.place(0, 65536) as again:
        first = int(again.host[0])
    _, other = new_image(size=MIB)
    with other.place(0, 65536) as runs:
        assert int(runs.host[0]) == first


def test_many_ranges_are_placed_at_once() -> None:
    """Ascending ranges with gaps get neighbouring clusters, and only they are mapped."""
    _, image = new_image(size=1 << 30)
    offset = np.arange(0, 1000, dtype=np.int64) * 2 * 65536
    with image.place_ranges(offset, np.full(1000, 65536, np.int64)) as runs:
        assert runs.offset.tolist() == offset.tolist()
        assert np.diff(runs.host).tolist() == [65536] * 999
    image.data_child.truncate(1 << 28)  # type: ignore[union-attr]
    assert [run.offset for run in whole_map(image) if run.kind == RunKind.DATA] == offset.tolist()


@given(bits=st.integers(9, 21), extended=st.booleans(), data=st.data())
def test_index_arithmetic_adds_up(bits: int, extended: bool, data: st.DataObject) -> None:
    """Any guest offset is found again from its indexes, and L1 tables are just long enough."""
    geometry = Geometry(bits, extended)
    offset = data.draw(st.integers(0, (1 << 62) - 1))
    l1, l2 = offset >> geometry.span_bits, (offset >> bits) & (geometry.l2_entries - 1)
    assert l1 * geometry.span + l2 * geometry.cluster_size + offset % geometry.cluster_size == offset
    assert geometry.l2_entries * geometry.words * 8 == geometry.cluster_size
    entries = geometry.l1_entries(offset)
    assert (entries - 1) * geometry.span < offset <= entries * geometry.span or offset == entries == 0


@given(bits=st.integers(9, 21), data=st.data())
def test_compressed_entries_name_the_bytes_that_were_put_in(bits: int, data: st.DataObject) -> None:
    """Offset and sector count share 62 bits; where the border lies depends on the cluster size."""
    shift = 62 - (bits - 8)
    host = data.draw(st.integers(0, min(1 << shift, 1 << 56) - 1))
    sectors = data.draw(st.integers(0, (1 << (bits - 8)) - 1))
    entry = COMPRESSED | sectors << shift | host
    assert Geometry(bits).compressed_span(entry) == (host, (sectors + 1) * 512 - host % 512)


@given(order=st.integers(0, 6), data=st.data())
def test_refcounts_of_every_width_survive_packing(order: int, data: st.DataObject) -> None:
    """Pack and unpack are inverse, and below a byte the lowest bits come first."""
    codec = RefcountCodec(order)
    counts = data.draw(st.lists(st.integers(0, (1 << codec.width) - 1), min_size=64, max_size=64))
    native = codec.empty(64)
    native[:] = counts
    raw = codec.encode(native)
    assert len(raw) * 8 == 64 * codec.width
    assert codec.decode(bytearray(raw)).tolist() == counts
    if order < 3:
        assert raw[0] & ((1 << codec.width) - 1) == counts[0]
    else:
        assert int.from_bytes(raw[: codec.width // 8], "big") == counts[0]
