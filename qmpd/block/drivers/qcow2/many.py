"""Many requests at once, as far as they meet ordinary clusters: looked up under one hold of the lock, moved together.

Nothing is remembered from one batch to the next: each is looked up in the tables as they are at that moment, by the
rules of :mod:`reading` and :mod:`single`. What is out of the ordinary (tables not in memory or not vetted, clusters
that are compressed, shared, damaged or being moved, mappings to be made) is left to those, who also find the words for
what is wrong. Any worker thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from qmpd.block.batch import Batch
from qmpd.block.drivers.qcow2.tables import COMPRESSED, COPIED, L2_RESERVED, OFFSET_MASK, ZERO

if TYPE_CHECKING:
    from qmpd.block.drivers.qcow2.cache import Table
    from qmpd.block.drivers.qcow2.clusters import Clusters
    from qmpd.block.drivers.qcow2.image import Image
    from qmpd.block.drivers.qcow2.reading import Reader
    from qmpd.block.drivers.qcow2.writing import Writer

#: What bytes are that have no place in the file. (Offset 0 is the header's: there is no guest data.)
_LEFT: Final = 0
_BELOW: Final = -1
_ZEROS: Final = -2

_NEVER_IN_PLACE: Final = COMPRESSED | L2_RESERVED | ZERO


class _Parts:
    """Pieces of requests that go to one device, and the request that each belongs to."""

    __slots__ = ("buffers", "offsets", "owners")

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.buffers: list[memoryview] = []
        self.owners: list[int] = []

    def add(self, owner: int, offset: int, buffer: memoryview) -> None:
        self.owners.append(owner)
        self.offsets.append(offset)
        self.buffers.append(buffer)

    def move(self, move: Callable[[Batch], Sequence[int]]) -> list[int]:
        """Have all pieces moved; the owners of those that were not."""
        if not self.owners:
            return []
        failed = move(Batch(self.offsets, self.buffers))
        return [self.owners[index] for index in failed] if failed else []


class _Tables:
    """L2 tables and refcount blocks that are in memory, each found once a batch. Lock held, all the time."""

    __slots__ = ("_blocks", "_image", "_per_block", "_tables")

    def __init__(self, image: Image) -> None:
        self._image = image
        self._per_block = image.refcounts.per_block
        self._tables: dict[int, Table | None] = {}
        self._blocks: dict[int, Table | None] = {}

    def table(self, l1_index: int) -> Table | None:
        """The L2 table if it is in memory."""
        try:
            return self._tables[l1_index]
        except KeyError:
            l1 = self._image.meta.l1.entries
            pointer = l1.item(l1_index) & OFFSET_MASK if l1_index < len(l1) else 0
            table = self._tables[l1_index] = self._image.meta.l2.cached(pointer)
            return table

    def count(self, cluster: int) -> int:
        """The refcount, 0 if its block is not in memory."""
        index, position = divmod(cluster, self._per_block)
        try:
            block = self._blocks[index]
        except KeyError:
            block = self._blocks[index] = self._image.refcounts.cached_block(index)
        return 0 if block is None else block.data.item(position)


class Many:
    """Batches of reads and writes for one image."""

    def __init__(self, image: Image, clusters: Clusters, reader: Reader, writer: Writer) -> None:
        self._image = image
        self._clusters = clusters
        self._reader = reader
        self._writer = writer
        self._geometry = geometry = image.geometry
        self._size = geometry.cluster_size
        self._inside = geometry.cluster_size - 1
        self._cluster_bits, self._span_bits = geometry.cluster_bits, geometry.span_bits
        self._rows = geometry.l2_entries - 1

    # -- read ----------------------------------------------------------------------------------------------------------

    def read(self, batch: Batch) -> Sequence[int]:
        """See :meth:`BlockDevice.read_many`."""
        image, backing = self._image, self._reader.backing
        if batch.high > self._reader.size:
            return batch.indexes
        here, below = _Parts(), _Parts()
        left: list[int] = []
        with image.lock:
            file_end, tables = image.data.length, _Tables(image)
            for owner, start, part in self._pieces(batch):
                host = self._find(tables, start, len(part), file_end)
                if host > 0:
                    here.add(owner, host, part)
                elif host == _ZEROS or (host == _BELOW and backing is None):
                    part[:] = bytes(len(part))
                elif host == _BELOW and backing is not None and start + len(part) <= backing.length:
                    below.add(owner, start, part)
                else:
                    left.append(owner)
            ticket = image.inflight.enter()
        try:
            left += here.move(image.data.read_many)
            if backing is not None:
                left += below.move(backing.read_many)
        finally:
            image.inflight.leave(ticket)
        return sorted(set(left)) if left else left

    def _find(self, tables: _Tables, start: int, length: int, file_end: int) -> int:
        """The offset in the file at which to read so many bytes of one cluster, or what they are instead."""
        table = tables.table(start >> self._span_bits)
        if table is None:
            return _BELOW if self._is_unmapped(start >> self._span_bits) else _LEFT
        row = start >> self._cluster_bits & self._rows
        entry: int = table.data.item(row, 0)
        inner, host = start & self._inside, entry & OFFSET_MASK
        if entry & COMPRESSED or host & self._inside:
            return _LEFT
        if self._geometry.external and entry & (OFFSET_MASK | COPIED) and (not host or host != start - inner):
            return _LEFT
        if self._geometry.extended:
            if not self._has_units(table, row, inner, length):
                return _LEFT
        elif entry & ZERO:
            return _ZEROS if self._image.header.version >= 3 else _LEFT
        elif not host:
            return _BELOW
        return host + inner if host and host + inner + length <= file_end else _LEFT

    def _is_unmapped(self, l1_index: int) -> bool:
        l1 = self._image.meta.l1.entries
        return l1_index >= len(l1) or not l1.item(l1_index) & OFFSET_MASK

    # -- write ---------------------------------------------------------------------------------------------------------

    def write(self, batch: Batch) -> Sequence[int]:
        """See :meth:`BlockDevice.write_many`. Only what can be overwritten in place."""
        image = self._image
        parts = _Parts()
        left: list[int] = []
        with image.lock:
            if not self._writer.has_begun:
                return batch.indexes
            frontier, tables = image.frontier, _Tables(image)
            moving = image.inflight.remapped(batch.low, batch.high)
            for owner, start, part in self._pieces(batch):
                host = self._place_of(tables, start, len(part), frontier)
                if host and not (moving and image.inflight.remapped(start, start + len(part))):
                    parts.add(owner, host, part)
                else:
                    left.append(owner)
            ticket = image.inflight.enter()
        try:
            left += parts.move(image.data.write_many)
        finally:
            image.inflight.leave(ticket)
        return sorted(set(left)) if left else left

    def _place_of(self, tables: _Tables, start: int, length: int, frontier: int) -> int:
        """The offset in the file at which so many bytes of one cluster may be overwritten; 0 if they may not.

        See :meth:`Single._place_of`, which asks the same and reads what it needs for the answer.
        """
        table = tables.table(start >> self._span_bits)
        if table is None or not self._clusters.is_vetted(table):
            return 0
        row = start >> self._cluster_bits & self._rows
        entry: int = table.data.item(row, 0)
        inner, host = start & self._inside, entry & OFFSET_MASK
        if entry & _NEVER_IN_PLACE or not entry & COPIED or not host or host & self._inside:
            return 0
        if self._geometry.extended and not self._has_units(table, row, inner, length):
            return 0
        if self._geometry.external:
            return host + inner if host == start - inner else 0
        if host >= frontier:
            return 0
        cluster = host >> self._cluster_bits
        return host + inner if tables.count(cluster) == 1 and self._image.overlap.at(cluster) is None else 0

    # -- both ----------------------------------------------------------------------------------------------------------

    def _pieces(self, batch: Batch) -> Iterator[tuple[int, int, memoryview]]:
        """All requests cut by clusters: (index of the request, offset, buffer)."""
        size, inside = self._size, self._inside
        for owner, offset in enumerate(batch.offsets):
            buffer = batch.buffers[owner]
            room = size - (offset & inside)
            length = len(buffer)
            if length <= room:
                yield owner, offset, buffer
                continue
            for low, high in pairwise([0, *range(room, length, size), length]):
                yield owner, offset + low, buffer[low:high]

    def _has_units(self, table: Table, row: int, inner: int, length: int) -> bool:
        """Are all units that these bytes of a cluster fall into allocated, with extended L2 entries?"""
        touched = self._geometry.touched(inner, inner + length)
        bits: int = table.data.item(row, 1)
        return bits & touched == touched and not bits >> 32 & touched
