"""Counting who refers to each host cluster (spec/qcow2.md sections 2 to 4), and noting what cannot be right on the way.

The counts are an array over the file that takes memory where something is counted. Tables shared by snapshots are read
once, and counted for each that refers to them. Nothing here looks at the counts stored in the image.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from qmpd.block.drivers.qcow2 import header as hdr
from qmpd.block.drivers.qcow2.cache import L2Codec, read_padded
from qmpd.block.drivers.qcow2.tables import (
    ALL_ALLOCATED,
    COMPRESSED,
    COPIED,
    I64,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    U64,
    Bools,
)
from qmpd.block.findings import Report, Severity
from qmpd.errors import Kind, QmpdError, strerror
from qmpd.units import MIB, SECTOR, align_up, ceil_div

if TYPE_CHECKING:
    from qmpd.block.drivers.qcow2.image import Image

#: More clusters than this are not checked, as QEMU would not.
_MAX_CLUSTERS: Final = (1 << 31) - 1
#: Extra data that entries of the snapshot table have since version 3, bytes.
_SNAPSHOT_EXTRA: Final = 16
_BITMAP_RESERVED: Final = 0xFF000000000001FE
_BITMAP_PIECE: Final = MIB

_OFFSET = np.uint64(OFFSET_MASK)
_NO_TABLES = np.empty(0, np.int64)


@dataclass(slots=True)
class Usage:
    """How the guest's clusters are stored, the active layer only."""

    allocated: int = 0
    fragmented: int = 0
    compressed: int = 0


class References:
    """How often each cluster is referred to. Counts stop at the highest that the image can store."""

    def __init__(self, image: Image, report: Report, pulse: Callable[[], None]) -> None:
        """Faults go to ``report``; ``pulse`` is called now and then, and may raise to end the work.

        Raises EFBIG or ENOMEM errors for files with more clusters than can be counted.
        """
        self._image = image
        self._report = report
        self._pulse = pulse
        self._size = image.geometry.cluster_size
        self._file_length = align_up(image.file.length, SECTOR)
        self._clusters = ceil_div(self._file_length, self._size)
        if self._clusters > _MAX_CLUSTERS:
            raise QmpdError(strerror(errno.EFBIG), Kind.IO, errno=errno.EFBIG)
        self.usage = Usage()
        try:
            # What is referred to may end just behind the file.
            self._counts = image.refcounts.codec.empty(self._clusters + 1)
        except MemoryError:
            raise QmpdError(strerror(errno.ENOMEM), Kind.IO, errno=errno.ENOMEM) from None
        #: L2 tables by host offset, ascending; how many L1 entries lead there, and how many of the active L1 table.
        self.tables = _NO_TABLES
        self._uses = _NO_TABLES
        self.active_uses = _NO_TABLES

    @property
    def counts(self) -> U64:
        """One number per cluster, in the narrowest type; ends with the file or the last cluster referred to."""
        return self._counts if self._counts[-1] else self._counts[:-1]

    def count(self) -> None:
        """Everything but the refcount structure."""
        image, header = self._image, self._image.header
        self._region(0, self._size, "header", 0)
        self._region(header.l1_offset, header.l1_size * 8, "l1-table-offset", 40)
        self._l1_table(image.meta.l1.entries, header.l1_offset, active=True)
        self._snapshots()
        self._bitmaps()
        for table, uses, active in zip(
            self.tables.tolist(), self._uses.tolist(), self.active_uses.tolist(), strict=True
        ):
            self._pulse()
            self._l2_table(table, uses, active)

    def count_refcounts(self) -> None:
        """The refcount table and the blocks that it names."""
        header, size = self._image.header, self._size
        self._region(header.refcount_table_offset, header.refcount_table_clusters * size, "refcount-table-offset", 48)
        entries = self._image.meta.refcount_table.entries
        at = header.refcount_table_offset + np.arange(len(entries), dtype=np.int64) * 8
        reserved = (entries & np.uint64(511)) != 0
        unaligned = ~reserved & ((entries & np.uint64(size - 1)) != 0)
        outside = ~reserved & ~unaligned & (entries // np.uint64(size) >= len(self.counts))
        self._fault(reserved, "refcount-table-entry", "reserved bits are set", at, entries)
        self._fault(unaligned, "refcount-table-entry", "refcount block is not aligned to clusters", at, entries)
        self._fault(outside, "refcount-table-entry", "refcount block lies outside the file", at, entries)
        good = np.flatnonzero(~(reserved | unaligned | outside) & (entries != 0))
        clusters = (entries[good] // np.uint64(size)).astype(np.int64)
        first = np.zeros(len(good), np.bool_)
        first[np.unique(clusters, return_index=True)[1]] = True
        # Counts of one bit cannot tell that there are two uses; that has been noted as an overflow.
        shared = (~first | (self._counts[clusters] != 0)) & (self._image.refcounts.maximum > 1)
        self._fault(shared, "refcount-table-entry", "refcount block is in use otherwise", at[good], entries[good])
        self._spans(entries[good].astype(np.int64), np.int64(size), "refcount-table-entry", at[good], entries[good])

    # -- structures ------------------------------------------------------------------------------------------------

    def _l1_table(self, entries: U64, offset: int, *, active: bool) -> None:
        used = np.flatnonzero(entries)
        entries, at = entries[used], offset + used * 8
        tables = (entries & _OFFSET).astype(np.int64)
        self._fault((entries & np.uint64(L1_RESERVED)) != 0, "l1-entry", "reserved bits are set", at, entries)
        self._fault(tables % self._size != 0, "l1-entry", "L2 table is not aligned to clusters", at, entries)
        self._spans(tables, np.int64(self._size), "l1-entry", at, entries)
        merged, back = np.unique(np.concatenate((self.tables, tables)), return_inverse=True)
        fresh = np.ones(len(tables), np.int64)
        uses, active_uses = np.zeros((2, len(merged)), np.int64)
        np.add.at(uses, back, np.concatenate((self._uses, fresh)))
        np.add.at(active_uses, back, np.concatenate((self.active_uses, fresh * active)))
        self.tables, self._uses, self.active_uses = merged, uses, active_uses

    def _l2_table(self, offset: int, uses: int, active: int) -> None:
        geometry, size = self._image.geometry, self._size
        words = L2Codec(geometry.words).decode(read_padded(self._image.file, offset, size))
        entries = words[:, 0]
        at = offset + np.arange(len(entries), dtype=np.int64) * (8 * geometry.words)
        compressed: Bools = (entries & np.uint64(COMPRESSED)) != 0
        host = np.where(compressed, np.uint64(0), entries & _OFFSET).astype(np.int64)

        def fault(mask: Bools, text: str) -> None:
            self._fault(mask, "l2-entry", text, at, entries, times=uses)

        fault(~compressed & ((entries & np.uint64(L2_RESERVED)) != 0), "reserved bits are set")
        fault(compressed & ((entries & np.uint64(COPIED)) != 0), "compressed cluster has the copied flag")
        mapped = ~compressed & geometry.mapped(entries)
        if geometry.external:
            fault(compressed, "compressed cluster in an image with a data file")
            compressed = np.zeros_like(compressed)
        if geometry.extended:
            allocated, zero = words[:, 1] & np.uint64(ALL_ALLOCATED), words[:, 1] >> np.uint64(32)
            odd = compressed & (words[:, 1] != 0)
            fault(mapped & ((allocated & zero) != 0), "a sub-cluster is both allocated and zero")
            fault(odd, "compressed cluster has sub-clusters")
            fault(~mapped & ~compressed & (allocated != 0), "sub-clusters are allocated without a cluster")
            compressed &= ~odd
        fault(mapped & (host % size != 0), "cluster is not aligned")
        if not geometry.external:
            self._spans(host[mapped], np.int64(size), "l2-entry", at[mapped], entries[mapped], times=uses)
        start, length = geometry.compressed_spans(entries[compressed])
        self._spans(start, length, "l2-entry", at[compressed], entries[compressed], times=uses)
        if active:
            self._note_usage(host[mapped], len(start), active)

    def _note_usage(self, host: I64, compressed: int, times: int) -> None:
        usage = self.usage
        usage.allocated += times * (len(host) + compressed)
        usage.compressed += times * compressed
        # Streams share sectors, so reading neighbours one by one reads some twice: they count as fragments all.
        usage.fragmented += times * (int(np.count_nonzero(np.diff(host) != self._size)) + compressed)

    def _snapshots(self) -> None:
        image, header = self._image, self._image.header
        position = header.snapshots_offset
        self._region(position, sum(snapshot.entry_size for snapshot in image.snapshots), "snapshot-table-offset", 64)
        for snapshot in image.snapshots:
            self._pulse()
            offset, entries = snapshot.l1_offset, snapshot.l1_size
            if header.version >= 3 and snapshot.extra_size < _SNAPSHOT_EXTRA:
                text = f"entry of snapshot '{snapshot.name}' is incomplete"
                self._report.corruption(position + 36, "snapshot-extra-size", snapshot.extra_size, text)
            if offset % self._size:
                text = f"L1 table of snapshot '{snapshot.name}' is not aligned to clusters"
                self._report.corruption(position, "snapshot-l1-offset", offset, text)
            elif entries > hdr.MAX_L1_ENTRIES:
                text = f"L1 table of snapshot '{snapshot.name}' is too large"
                self._report.corruption(position + 8, "snapshot-l1-size", entries, text)
            elif offset >> 63:
                text = f"L1 table of snapshot '{snapshot.name}' cannot be read"
                self._report.note(Severity.ERROR, position, "snapshot-l1-offset", offset, text)
            else:
                self._region(offset, entries * 8, "snapshot-l1-offset", position)
                self._l1_table(self._words(offset, self._inside(offset, entries)), offset, active=False)
            position += snapshot.entry_size

    def _bitmaps(self) -> None:
        image = self._image
        directory = image.header.extension(hdr.EXT_BITMAPS)
        if directory is None or not image.header.autoclear & hdr.BITMAPS:
            return
        _, _, length, offset = struct.unpack(">IIQQ", directory)
        self._region(offset, length, "bitmap-directory-offset", 0)
        for bitmap in image.bitmaps:
            self._region(bitmap.table_offset, bitmap.table_entries * 8, "bitmap-table-offset", offset)
            step = _BITMAP_PIECE // 8
            entries = self._inside(bitmap.table_offset, bitmap.table_entries)
            for start in range(0, entries, step):
                self._pulse()
                count = min(step, entries - start)
                self._bitmap_table(bitmap.table_offset + start * 8, count)

    def _bitmap_table(self, offset: int, count: int) -> None:
        entries = self._words(offset, count)
        at = offset + np.arange(count, dtype=np.int64) * 8
        host = (entries & _OFFSET).astype(np.int64)
        used = host != 0
        bad = ((entries & np.uint64(_BITMAP_RESERVED)) != 0) | (used & ((host % self._size != 0) | (entries & 1 != 0)))
        self._fault(bad, "bitmap-table-entry", "reserved bits are set, or it is not aligned", at, entries)
        used &= ~bad
        self._spans(host[used], np.int64(self._size), "bitmap-table-entry", at[used], entries[used])

    # -- counting --------------------------------------------------------------------------------------------------

    def _inside(self, offset: int, entries: int) -> int:
        """How many of the 8-byte ``entries`` from ``offset`` on the file has; the others are zeros."""
        return min(entries, ceil_div(max(0, self._file_length - offset), 8))

    def _words(self, offset: int, count: int) -> U64:
        return np.frombuffer(read_padded(self._image.file, offset, count * 8), ">u8").astype(np.uint64)

    def _fault(self, mask: Bools, name: str, text: str, at: I64, entries: U64, *, times: int = 1) -> None:
        if mask.any():
            self._report.corruptions(name, text, at[mask], entries[mask], times=times)

    def _region(self, offset: int, length: int, name: str, at: int) -> None:
        """One reference to each cluster of a structure that the field ``name`` at ``at`` places there."""
        if not length:
            return
        if offset + length - self._file_length >= self._size:
            self._report.corruption(at, name, offset, f"{length} bytes reach behind the end of the file")
            return
        self._add(np.arange(offset // self._size, ceil_div(offset + length, self._size), dtype=np.int64), 1)

    def _spans(self, start: I64, length: I64 | np.int64, name: str, at: I64, entries: U64, *, times: int = 1) -> None:
        """``times`` references to each cluster that the bytes from each ``start`` touch."""
        end = start + length
        past = end - self._file_length >= self._size
        self._fault(past, name, "points behind the end of the file", at, entries, times=times)
        first, last = (start // self._size)[~past], ((end - 1) // self._size)[~past]
        self._add(first, times)
        for step in range(1, int((last - first).max(initial=0)) + 1):
            self._add(first[last - first >= step] + step, times)

    def _add(self, clusters: I64, times: int) -> None:
        if not len(clusters):
            return
        repeats = np.ones(len(clusters), np.uint64)
        if not (np.diff(clusters) > 0).all():
            clusters, counted = np.unique(clusters, return_counts=True)
            repeats = counted.astype(np.uint64)
        repeats *= np.uint64(times)
        old = self._counts[clusters].astype(np.uint64)
        room = np.uint64(self._image.refcounts.maximum) - old
        excess = repeats - np.minimum(repeats, room)
        self._counts[clusters] = (old + repeats - excess).astype(self._counts.dtype)
        for index in np.flatnonzero(excess).tolist():
            offset = int(clusters[index]) * self._size
            text = f"the cluster at {offset:#x} has more references than can be counted"
            self._report.corruption(offset, "cluster", offset, text, times=int(excess[index]))
