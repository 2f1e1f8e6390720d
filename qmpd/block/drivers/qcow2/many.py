"""Many requests at once, as far as they meet ordinary clusters: looked up under one hold of the lock, moved together.

Nothing is remembered from one batch to the next: each is looked up in the tables as they are at that moment, by the
rules of :mod:`reading` and :mod:`single`. What is out of the ordinary (tables not in memory or not vetted, clusters
that are compressed, shared, damaged or being moved, mappings to be made) is left to those, who also find the words for
what is wrong. Any worker thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

_NEVER_IN_PLACE: Final = COMPRESSED | L2_RESERVED


class _Parts:
    """Pieces of requests that go to one device, and the request that each belongs to."""

    __slots__ = ("_buffers", "_offsets", "_owners")

    def __init__(self) -> None:
        self._offsets: list[int] = []
        self._buffers: list[memoryview] = []
        self._owners: list[int] = []

    def add(self, owner: int, offset: int, buffer: memoryview) -> None:
        self._owners.append(owner)
        self._offsets.append(offset)
        self._buffers.append(buffer)

    def move(self, move: Callable[[Batch], Sequence[int]]) -> list[int]:
        """Have all pieces moved; the owners of those that were not."""
        if not self._owners:
            return []
        return [self._owners[index] for index in move(Batch(self._offsets, self._buffers))]


class Many:
    """Batches of reads and writes for one image."""

    def __init__(self, image: Image, clusters: Clusters, reader: Reader, writer: Writer) -> None:
        self._image = image
        self._clusters = clusters
        self._reader = reader
        self._writer = writer
        self._geometry = image.geometry

    # -- read ----------------------------------------------------------------------------------------------------------

    def read(self, batch: Batch) -> Sequence[int]:
        """See :meth:`BlockDevice.read_many`."""
        image, backing = self._image, self._reader.backing
        if batch.high > self._reader.size:
            return batch.indexes
        below_end = 0 if backing is None else backing.length
        here, below = _Parts(), _Parts()
        left: list[int] = []
        with image.lock:
            file_end = image.file.length
            for owner, offset in enumerate(batch.offsets):
                for start, part in self._pieces(offset, batch.buffers[owner]):
                    host = self._find(start, len(part), file_end)
                    if host > 0:
                        here.add(owner, host, part)
                    elif host == _ZEROS or (host == _BELOW and backing is None):
                        part[:] = bytes(len(part))
                    elif host == _BELOW and start + len(part) <= below_end:
                        below.add(owner, start, part)
                    else:
                        left.append(owner)
            ticket = image.inflight.enter()
        try:
            left += here.move(image.file.read_many)
            if backing is not None:
                left += below.move(backing.read_many)
        finally:
            image.inflight.leave(ticket)
        return sorted(set(left))

    def _find(self, start: int, length: int, file_end: int) -> int:
        """The offset in the file at which to read so many bytes of one cluster, or what they are instead."""
        geometry, meta = self._geometry, self._image.meta
        index, l1 = start >> geometry.span_bits, meta.l1.entries
        pointer = int(l1[index]) & OFFSET_MASK if index < len(l1) else 0
        if not pointer:
            return _BELOW
        table = meta.l2.cached(pointer)
        if table is None:
            return _LEFT
        row = (start >> geometry.cluster_bits) & (geometry.l2_entries - 1)
        entry = int(table.data[row, 0])
        inner = start & (geometry.cluster_size - 1)
        host = entry & OFFSET_MASK
        if entry & COMPRESSED or host & (geometry.cluster_size - 1):
            return _LEFT
        if geometry.extended:
            if not self._has_units(table, row, inner, length):
                return _LEFT
        elif entry & ZERO:
            return _ZEROS if self._image.header.version >= 3 else _LEFT
        elif not host:
            return _BELOW
        return host + inner if host and host + inner + length <= file_end else _LEFT

    # -- write ---------------------------------------------------------------------------------------------------------

    def write(self, batch: Batch) -> Sequence[int]:
        """See :meth:`BlockDevice.write_many`. Only what can be overwritten in place."""
        image = self._image
        parts = _Parts()
        left: list[int] = []
        with image.lock:
            if not self._writer.has_begun:
                return batch.indexes
            frontier = image.frontier
            for owner, offset in enumerate(batch.offsets):
                pieces = self._pieces(offset, batch.buffers[owner])
                places = [self._place_of(start, len(part), frontier) for start, part in pieces]
                if not all(places):
                    left.append(owner)
                    continue
                for host, (_, part) in zip(places, pieces, strict=True):
                    parts.add(owner, host, part)
            ticket = image.inflight.enter()
        try:
            left += parts.move(image.file.write_many)
        finally:
            image.inflight.leave(ticket)
        return sorted(set(left))

    def _place_of(self, start: int, length: int, frontier: int) -> int:
        """The offset in the file at which so many bytes of one cluster may be overwritten; 0 if they may not.

        See :meth:`Single._place_of`, which asks the same and reads what it needs for the answer.
        """
        geometry, image = self._geometry, self._image
        index, l1 = start >> geometry.span_bits, image.meta.l1.entries
        table = image.meta.l2.cached(int(l1[index]) & OFFSET_MASK) if index < len(l1) else None
        if table is None or not self._clusters.is_vetted(table) or image.inflight.remapped(start, start + length):
            return 0
        row = (start >> geometry.cluster_bits) & (geometry.l2_entries - 1)
        entry = int(table.data[row, 0])
        inner = start & (geometry.cluster_size - 1)
        host = entry & OFFSET_MASK
        if entry & (_NEVER_IN_PLACE | ZERO) or not entry & COPIED or not host:
            return 0
        if host & (geometry.cluster_size - 1) or host >= frontier:
            return 0
        if geometry.extended and not self._has_units(table, row, inner, length):
            return 0
        cluster = host >> geometry.cluster_bits
        if image.refcounts.remembered(cluster) != 1 or image.overlap.at(cluster) is not None:
            return 0
        return host + inner

    # -- both ----------------------------------------------------------------------------------------------------------

    def _pieces(self, offset: int, buffer: memoryview) -> list[tuple[int, memoryview]]:
        """A request cut by clusters."""
        size = self._geometry.cluster_size
        room = size - (offset & (size - 1))
        length = len(buffer)
        if length <= room:
            return [(offset, buffer)]
        cuts = [0, *range(room, length, size), length]
        return [(offset + low, buffer[low:high]) for low, high in pairwise(cuts)]

    def _has_units(self, table: Table, row: int, inner: int, length: int) -> bool:
        """Are all units that these bytes of a cluster fall into allocated, with extended L2 entries?"""
        touched = self._geometry.touched(inner, inner + length)
        bits = int(table.data[row, 1])
        return bits & touched == touched and not bits >> 32 & touched
