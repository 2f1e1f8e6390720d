"""Changing the size of the disk (spec/qcow2.md section 9). A worker thread; waits for all remapping requests."""

from __future__ import annotations

import errno
import struct
from dataclasses import replace
from typing import Final

import numpy as np

from qmpd.block.debug import Event
from qmpd.block.drivers.qcow2.clusters import Clusters
from qmpd.block.drivers.qcow2.header import MAX_L1_ENTRIES
from qmpd.block.drivers.qcow2.image import Image
from qmpd.block.drivers.qcow2.reading import Reader
from qmpd.block.drivers.qcow2.tables import OFFSET_MASK
from qmpd.block.drivers.qcow2.writing import Writer
from qmpd.block.drivers.qcow2.zeroing import Eraser
from qmpd.errors import Kind, QmpdError, strerror
from qmpd.units import MAX_LENGTH, SECTOR, align_down, align_up, ceil_div

#: Bytes mapped at once.
_STRIDE: Final = 1 << 30


class Resizer:
    """Grows and shrinks one image."""

    def __init__(self, image: Image, clusters: Clusters, reader: Reader, writer: Writer, eraser: Eraser) -> None:
        self._image = image
        self._clusters = clusters
        self._reader = reader
        self._writer = writer
        self._eraser = eraser

    def check(self, size: int) -> None:
        """Could the image have this size (bytes)? Raises QEMU's errors."""
        header = self._image.header
        if size % SECTOR:
            raise QmpdError("The new size must be a multiple of 512")
        if size > MAX_LENGTH:
            raise QmpdError(f"offset({size}) exceeds maximum({MAX_LENGTH})")
        if header.version < 3 and header.nb_snapshots:
            raise QmpdError("Can't resize a v2 image which has snapshots", Kind.UNSUPPORTED)
        if self._image.geometry.l1_entries(size) > MAX_L1_ENTRIES:
            text = f"Failed to grow the L1 table: {strerror(errno.EFBIG)}"
            raise QmpdError(text, Kind.IO, errno=errno.EFBIG)

    def truncate(self, size: int) -> None:
        """Give the image a size that :meth:`check` found possible; durable at return.

        A failure leaves the old size (shrinking: perhaps with less data in the part to go).
        """
        with self._image.lock:
            self._writer.begin()
            claim = self._eraser.claim_everything()
        try:
            if size > self._reader.size:
                self._grow(size)
            elif size < self._reader.size:
                self._shrink(size)
        finally:
            with self._image.lock:
                self._image.inflight.unclaim(claim)

    def _store_size(self, size: int) -> None:
        self._image.header = replace(self._image.header, size=size)
        self._image.write_header_field(24, struct.pack(">Q", size))

    # -- grow ------------------------------------------------------------------------------------------------------

    def _grow(self, size: int) -> None:
        old = self._reader.size
        needed = self._image.geometry.l1_entries(size)
        if needed > len(self._image.meta.l1):
            with self._image.lock:
                self._grow_l1(needed)
        if self._image.geometry.external:
            self._grow_data(old, size)
        self._reader.size = size
        try:
            self._blank(old, size)
            if self._image.header.raw_data:
                self.map_all(old, size)
            self._image.flush()
            with self._image.lock:
                self._store_size(size)
        except BaseException:
            self._reader.size = old
            raise

    def _grow_data(self, old: int, size: int) -> None:
        """Have room for the disk in its data file. Where the file alone is the disk, the new part of it is zeros."""
        data, raw = self._image.data, self._image.header.raw_data
        if getattr(data, "growable", False):
            if raw and data.length > old:
                data.truncate(old)
            data.truncate(size)
            return
        if data.length < size:
            raise QmpdError("Cannot grow device files", Kind.UNSUPPORTED)
        if raw:
            data.write_zeroes(old, size - old)

    def map_all(self, start: int, end: int) -> None:
        """Let the guest see ``[start, end)`` as the data file has it."""
        start = align_down(start, self._image.geometry.cluster_size)
        for offset in range(start, end, _STRIDE):
            with self._writer.place_one(offset, min(_STRIDE, end - offset)):
                pass

    def _blank(self, old: int, size: int) -> None:
        """New bytes read as zeros: not as what a longer life left in the last cluster, not as the backing file."""
        cluster = self._image.geometry.cluster_size
        edge = min(size, align_up(old, cluster))
        if edge > old:
            self._eraser.write_zeroes(old, edge - old, unmap=False)
        below = self._reader.backing
        if below is not None:
            end = min(size, align_up(below.length, cluster))
        else:
            # Named, but not attached: its length is not known. (Nor are the bytes that would have to come along
            # with a part of a cluster, so the last cluster of the old size stays as it is.)
            end = size if self._image.header.backing is not None else 0
        if end > edge:
            self._eraser.write_zeroes(edge, end - edge, unmap=False)

    def _grow_l1(self, entries: int) -> None:
        """Move the L1 table to where it has room. Lock held."""
        image, size = self._image, self._image.geometry.cluster_size
        image.meta.flush(image.alloc.release)
        clusters = ceil_div(entries * 8, size)
        image.announce(Event.L1_GROW_ALLOC_TABLE)
        first = image.alloc.allocate_run(clusters)
        table, header = image.meta.l1, image.header
        grown = np.zeros(entries, np.uint64)
        grown[: len(table)] = table.entries
        try:
            image.meta.flush_refcounts()
            image.announce(Event.L1_GROW_WRITE_TABLE)
            image.file.write(first * size, grown.astype(">u8").tobytes())
            image.file.flush()
            image.announce(Event.L1_GROW_ACTIVATE_TABLE)
            image.write_header_field(36, struct.pack(">IQ", entries, first * size))
        except QmpdError:
            image.alloc.give_back(np.arange(first, first + clusters, dtype=np.int64))
            raise
        table.entries, table.offset = grown, first * size
        image.header = replace(header, l1_size=entries, l1_offset=first * size)
        image.note_areas()
        old = header.l1_offset // size
        image.alloc.give_back(np.arange(old, old + ceil_div(header.l1_size * 8, size), dtype=np.int64))

    # -- shrink ----------------------------------------------------------------------------------------------------

    def _shrink(self, size: int) -> None:
        image, geometry = self._image, self._image.geometry
        old, self._reader.size = self._reader.size, size
        try:
            self._eraser.drop_range(align_up(size, geometry.cluster_size), align_up(old, geometry.cluster_size))
            with image.lock:
                image.meta.flush(image.alloc.release)
                self._drop_tables(geometry.l1_entries(size))
                image.meta.flush(image.alloc.release)
                self._drop_refcount_blocks()
                self._cut_file()
                self._store_size(size)
                if geometry.external and getattr(image.data, "growable", False):
                    image.data.truncate(size)
                    image.data.flush()
        except BaseException:
            self._reader.size = old
            raise

    def _drop_tables(self, first: int) -> None:
        """L2 tables from L1 entry ``first`` on, whose entries are all zero now. Lock held."""
        image = self._image
        image.announce(Event.L1_SHRINK_FREE_L2_CLUSTERS)
        offsets = (image.meta.l1.entries & np.uint64(OFFSET_MASK)).astype(np.int64)
        for index in (np.flatnonzero(offsets[first:]) + first).tolist():
            cluster = int(offsets[index]) // image.geometry.cluster_size
            image.meta.l1[index] = 0
            image.meta.l2.forget(int(offsets[index]))
            image.overlap.l2.discard(cluster)
            image.alloc.free_later(np.array([cluster], np.int64))

    def _drop_refcount_blocks(self) -> None:
        """Blocks at the end that count nothing but themselves. Lock held."""
        image, per_block = self._image, self._image.refcounts.per_block
        gone = []
        for index in np.flatnonzero(image.meta.refcount_table.entries)[:0:-1].tolist():
            block = image.refcounts.block(index)
            if block is None:
                break
            cluster = block.offset // image.geometry.cluster_size
            if cluster // per_block != index or np.flatnonzero(block.data).tolist() != [cluster - index * per_block]:
                break
            image.meta.refcount_table[index] = 0
            image.meta.refcount_blocks.forget(block.offset)
            image.overlap.blocks.discard(cluster)
            gone.append(index)
        if gone:
            image.meta.flush(image.alloc.release)

    def _cut_file(self) -> None:
        image = self._image
        used = image.alloc.last_used() + 1
        if used * image.geometry.cluster_size < image.file.length and getattr(image.file, "growable", False):
            image.file.truncate(used * image.geometry.cluster_size)
            image.alloc.rewind(used)
