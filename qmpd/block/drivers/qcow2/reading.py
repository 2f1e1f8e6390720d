"""The reading half: guest ranges to runs, runs to bytes. Any worker thread.

The image lock is held while entries are looked up, not while data is read or decompressed.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import numpy as np

from qmpd.block.api import BlockDevice
from qmpd.block.debug import Event
from qmpd.block.drivers.qcow2.cache import read_padded
from qmpd.block.drivers.qcow2.clusters import Clusters
from qmpd.block.drivers.qcow2.decompress import decompress
from qmpd.block.drivers.qcow2.image import Image
from qmpd.block.drivers.qcow2.tables import (
    COMPRESSED,
    I64,
    OFFSET_MASK,
    U64,
    ZERO,
    bad_entries,
    runs_of,
    units_of,
)
from qmpd.block.extents import Run, RunKind, Runs
from qmpd.errors import QmpdError
from qmpd.units import MIB

#: One map() looks at no more L2 tables than fit here; the caller asks again for the rest.
MAP_BUDGET: Final = 64 * MIB
#: Scans of more tables than this share of the cache do not go through it.
_SCAN_SHARE: Final = 2
#: Decompressed clusters kept: small sequential reads would decompress one cluster again and again.
_RECENT: Final = 4


class Reader:
    """Reads one image. ``backing`` is where unallocated bytes come from, if anything."""

    def __init__(self, image: Image, clusters: Clusters, size: int) -> None:
        self._image = image
        self._clusters = clusters
        self.size = size
        self.backing: BlockDevice | None = None
        self._recent: OrderedDict[int, bytes] = OrderedDict()

    # -- map -------------------------------------------------------------------------------------------------------

    def map(self, offset: int, length: int) -> Runs:
        """Where ``[offset, offset + length)`` lies, or a first part of it.

        A damaged entry ends the answer in front of it; at ``offset`` itself it raises CORRUPT.
        """
        with self._image.lock:
            numbers, entries, end = self._scan(offset, offset + length)
        if not len(numbers):
            return Runs.single(offset, end - offset, RunKind.UNALLOCATED)
        geometry = self._image.geometry
        return runs_of(geometry, units_of(geometry, numbers, entries), offset, end, self._image.data.length)

    def _scan(self, start: int, end: int) -> tuple[I64, U64, int]:
        """Cluster numbers and entries of everything allocated in the range, and how far the scan got. Lock held."""
        geometry, l1 = self._image.geometry, self._image.meta.l1.entries
        first, last = start >> geometry.span_bits, (end - 1) >> geometry.span_bits
        found = np.flatnonzero(l1[first : last + 1] & np.uint64(OFFSET_MASK)) + first
        budget = max(1, MAP_BUDGET // (geometry.cluster_size * (16 if geometry.extended else 1)))
        if len(found) > budget:
            end = int(found[budget]) << geometry.span_bits
            found = found[:budget]
        cached = len(found) * geometry.cluster_size * _SCAN_SHARE <= self._image.meta.l2.limit
        numbers: list[I64] = []
        entries: list[U64] = []
        for index in found.tolist():
            base = index << geometry.l2_bits
            low = max(0, (start >> geometry.cluster_bits) - base)
            high = min(geometry.l2_entries, ((end - 1) >> geometry.cluster_bits) + 1 - base)
            try:
                rows = self._rows(index, low, high, cached=cached)
                bad_at = self._first_bad(index, rows, low)
            except QmpdError:
                if base << geometry.cluster_bits <= start:
                    raise
                return *_joined(numbers, entries, geometry.words), base << geometry.cluster_bits
            if bad_at is not None:
                rows = rows[: bad_at - low]
                end = (base + bad_at) << geometry.cluster_bits
            used = np.flatnonzero(rows[:, 0] if geometry.words == 1 else rows.any(axis=1))
            if len(used):
                numbers.append(used + (base + low))
                entries.append(rows[used])
            if bad_at is not None:
                break
        return *_joined(numbers, entries, geometry.words), end

    def _rows(self, l1_index: int, low: int, high: int, *, cached: bool) -> U64:
        offset = self._clusters.table_offset(l1_index)
        l2 = self._image.meta.l2
        data: U64 = l2.get(offset).data if cached else l2.peek(offset)
        return data[low:high]

    def _first_bad(self, l1_index: int, rows: U64, low: int) -> int | None:
        """Index in the table of the first broken row, None if all are good; raises if it is the very first."""
        base = l1_index << self._image.geometry.l2_bits
        clusters = np.arange(base + low, base + low + len(rows), dtype=np.int64)
        bad = bad_entries(self._image.geometry, clusters, rows, version=self._image.header.version)
        if bad is None:
            return None
        position, reason = bad
        if position:
            return low + position
        table = self._clusters.table_offset(l1_index)
        raise self._clusters.damaged(reason, int(rows[0, 0]), table, base + low)

    # -- read ------------------------------------------------------------------------------------------------------

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """The guest's view, backing data included; zeros behind the end of the disk."""
        inside = max(0, min(len(buffer), self.size - offset))
        if inside < len(buffer):
            buffer[inside:] = bytes(len(buffer) - inside)
            buffer = buffer[:inside]
        if not inside or self._read_quickly(offset, buffer):
            return
        done = 0
        while done < inside:
            with self._image.inflight.io():
                runs = self.map(offset + done, inside - done)
                for run in runs:
                    at = run.offset - offset
                    self._read_run(run, buffer[at : at + run.length])
            done = runs.end - offset

    def _read_quickly(self, offset: int, buffer: memoryview) -> bool:
        """Reads inside one ordinary cluster, without building runs. False if it is something else."""
        image, geometry = self._image, self._image.geometry
        end = offset + len(buffer)
        if geometry.extended or offset >> geometry.cluster_bits != (end - 1) >> geometry.cluster_bits:
            return False
        with image.lock:
            table = self._clusters.table(offset >> geometry.span_bits)
            if table is None:
                return False
            row = (offset >> geometry.cluster_bits) & (geometry.l2_entries - 1)
            entry = int(table.data[row, 0])
            inner = offset & (geometry.cluster_size - 1)
            host = entry & OFFSET_MASK
            if entry & (COMPRESSED | ZERO) or not host or host & (geometry.cluster_size - 1):
                return False
            if host + inner + len(buffer) > image.data.length:
                return False
            if geometry.external and host != offset - inner:
                return False
            ticket = image.inflight.enter()
        try:
            image.announce(Event.READ_AIO)
            image.data.readinto(host + inner, buffer)
        finally:
            image.inflight.leave(ticket)
        return True

    def _read_run(self, run: Run, buffer: memoryview) -> None:
        if run.kind == RunKind.DATA:
            self._image.announce(Event.READ_AIO)
            self._image.data.readinto(run.host, buffer)
        elif run.kind == RunKind.COMPRESSED:
            self._read_compressed(run.offset, buffer)
        elif run.kind == RunKind.ZERO or self.backing is None:
            buffer[:] = bytes(len(buffer))
        else:
            self._image.announce(Event.READ_BACKING_AIO)
            self._read_backing(self.backing, run.offset, buffer)

    @staticmethod
    def _read_backing(backing: BlockDevice, offset: int, buffer: memoryview) -> None:
        inside = max(0, min(len(buffer), backing.length - offset))
        if inside:
            backing.readinto(offset, buffer[:inside])
        if inside < len(buffer):
            buffer[inside:] = bytes(len(buffer) - inside)

    def _read_compressed(self, offset: int, buffer: memoryview) -> None:
        image, size = self._image, self._image.geometry.cluster_size
        with image.lock:
            states = self._clusters.load(np.array([offset // size], np.int64))
        if not states.compressed[0]:
            # Overwritten since it was mapped: read what is there now.
            self.readinto(offset, buffer)
            return
        content = self._decompressed(int(states.entries[0, 0]), offset)
        buffer[:] = memoryview(content)[offset % size : offset % size + len(buffer)]

    def _decompressed(self, entry: int, offset: int) -> bytes:
        # An entry's value never comes to mean anything else while the image is open: nobody writes compressed clusters.
        content = self._recent.get(entry)
        if content is None:
            size = self._image.geometry.cluster_size
            host, length = self._image.geometry.compressed_span(entry)
            self._image.announce(Event.READ_COMPRESSED)
            stream = bytes(read_padded(self._image.file, host, length))
            content = decompress(self._image.header.compression_type, stream, size, offset=offset - offset % size)
            with self._image.lock:
                self._recent[entry] = content
                while len(self._recent) > _RECENT:
                    self._recent.popitem(last=False)
        return content

    # -- what is known to be zero ----------------------------------------------------------------------------------

    def reads_as_zero(self, offset: int, length: int) -> bool:
        """Is it certain, without reading data, that the range reads as zeros?"""
        end = min(offset + length, self.size)
        while offset < end:
            runs = self.map(offset, end - offset)
            for run in runs:
                if run.kind == RunKind.UNALLOCATED:
                    if self.backing is not None and run.offset < self.backing.length:
                        return False
                elif run.kind != RunKind.ZERO:
                    return False
            offset = runs.end
        return True


def _joined(numbers: list[I64], entries: list[U64], words: int) -> tuple[I64, U64]:
    if not numbers:
        return np.empty(0, np.int64), np.empty((0, words), np.uint64)
    if len(numbers) == 1:
        return numbers[0], entries[0]
    return np.concatenate(numbers), np.concatenate(entries)
