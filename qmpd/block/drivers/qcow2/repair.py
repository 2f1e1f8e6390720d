"""Rebuilding the refcounts of an image whose dirty bit is set (spec/qcow2.md section 1.1).

The old counts are not trusted at all: references are counted from the mapping, and a new refcount structure is written
behind everything in use before the header is pointed at it. A crash in between leaves the image as it was.
"""

from __future__ import annotations

import logging
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from qmpd.block.drivers.qcow2 import header as hdr
from qmpd.block.drivers.qcow2.cache import L2Codec, read_padded
from qmpd.block.drivers.qcow2.tables import COMPRESSED, I64, OFFSET_MASK, U64
from qmpd.errors import Kind, QmpdError
from qmpd.units import ceil_div

if TYPE_CHECKING:
    from qmpd.block.drivers.qcow2.image import Image

_log = logging.getLogger(__name__)


def rebuild_refcounts(image: Image) -> None:
    """Count all references, store them, clear the dirty bit. Lock held; nothing cached is dirty.

    Raises CORRUPT, with nothing changed, for references that lie outside the file or are too many to store.
    """
    _log.warning("qcow2: image was not closed cleanly, rebuilding refcount structure")
    counts = ReferenceCounter(image).count()
    if len(counts) and int(counts.max()) > image.refcounts.maximum:
        raise _hopeless(f"a cluster has {int(counts.max())} references")
    _store(image, counts)
    image.header = replace(image.header, incompatible=image.header.incompatible & ~hdr.DIRTY)
    image.write_header_field(72, struct.pack(">Q", image.header.incompatible))


class ReferenceCounter:
    """Counts how often each host cluster is referred to, refcount structures left out."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._size = image.geometry.cluster_size
        self._counts = np.zeros(image.file_end // self._size, np.int64)

    def count(self) -> I64:
        """One number per cluster of the file."""
        image, header = self._image, self._image.header
        self._add_range(0, self._size)
        self._add_range(header.l1_offset, header.l1_size * 8)
        self._add_tree(image.meta.l1.entries)
        self._add_range(header.snapshots_offset, sum(snapshot.entry_size for snapshot in image.snapshots))
        for snapshot in image.snapshots:
            if snapshot.l1_size > hdr.MAX_L1_ENTRIES:
                raise _hopeless(f"snapshot '{snapshot.name}' has an L1 table of {snapshot.l1_size} entries")
            self._add_range(snapshot.l1_offset, snapshot.l1_size * 8)
            self._add_tree(self._words(snapshot.l1_offset, snapshot.l1_size))
        self._add_bitmaps()
        return self._counts

    def _words(self, offset: int, count: int) -> U64:
        return np.frombuffer(read_padded(self._image.file, offset, count * 8), ">u8").astype(np.uint64)

    def _add_range(self, offset: int, length: int) -> None:
        if length:
            self._add(np.arange(offset // self._size, ceil_div(offset + length, self._size), dtype=np.int64))

    def _add(self, clusters: I64) -> None:
        if len(clusters) and int(clusters.max()) >= len(self._counts):
            raise _hopeless(f"a reference to {int(clusters.max()) * self._size:#x}, behind the end of the file")
        np.add.at(self._counts, clusters, 1)

    def _offsets(self, entries: U64) -> I64:
        offsets = (entries & np.uint64(OFFSET_MASK)).astype(np.int64)
        used: I64 = offsets[offsets != 0]
        if (used % self._size).any():
            raise _hopeless("an unaligned reference")
        return used

    def _add_tree(self, l1: U64) -> None:
        """L2 tables of an L1 table and what they map."""
        codec = L2Codec(self._image.geometry.words)
        for offset in self._offsets(l1).tolist():
            self._add_range(offset, self._size)
            entries = codec.decode(read_padded(self._image.file, offset, self._size))[:, 0]
            compressed = (entries & np.uint64(COMPRESSED)) != 0
            self._add(self._offsets(entries[~compressed]) // self._size)
            for entry in entries[compressed].tolist():
                host, length = self._image.geometry.compressed_span(entry)
                # The last sectors may be announced, but not stored.
                self._add_range(host, max(1, min(length, len(self._counts) * self._size - host)))

    def _add_bitmaps(self) -> None:
        image = self._image
        directory = image.header.extension(hdr.EXT_BITMAPS)
        if directory is None or not image.header.autoclear & hdr.BITMAPS:
            return
        _, _, length, offset = struct.unpack(">IIQQ", directory)
        self._add_range(offset, length)
        for bitmap in image.bitmaps:
            self._add_range(bitmap.table_offset, bitmap.table_entries * 8)
            self._add(self._offsets(self._words(bitmap.table_offset, bitmap.table_entries)) // self._size)


def _store(image: Image, counts: I64) -> None:
    """Write ``counts`` as a new refcount structure behind the last cluster in use."""
    size, per_block = image.geometry.cluster_size, image.refcounts.per_block
    used = np.flatnonzero(counts)
    first = int(used[-1]) + 1 if len(used) else 1
    blocks, clusters = 1, 1
    while True:
        needed = ceil_div(first + clusters + blocks, per_block), ceil_div(blocks * 8, size)
        if needed == (blocks, clusters):
            break
        blocks, clusters = needed
    if clusters * size > hdr.MAX_REFCOUNT_TABLE:
        raise _hopeless("the refcount table would be too large")
    full = np.zeros(blocks * per_block, np.int64)
    full[:first] = counts[:first]
    full[first : first + clusters + blocks] = 1
    codec, start = image.refcounts.codec, (first + clusters) * size
    native = full.astype(codec.empty(0).dtype)
    for index in range(blocks):
        part = native[index * per_block : (index + 1) * per_block]
        image.file.write(start + index * size, codec.encode(part))
    table = np.zeros(clusters * size // 8, np.uint64)
    table[:blocks] = start + np.arange(blocks, dtype=np.uint64) * np.uint64(size)
    image.file.write(first * size, table.astype(">u8").tobytes())
    image.file.flush()
    image.write_header_field(48, struct.pack(">QI", first * size, clusters))
    image.header = replace(image.header, refcount_table_offset=first * size, refcount_table_clusters=clusters)
    image.meta.refcount_blocks.clear()
    image.meta.refcount_table.offset, image.meta.refcount_table.entries = first * size, table
    image.overlap.blocks = set(range(first + clusters, first + clusters + blocks))
    image.note_areas()
    image.alloc.virgin = max(image.alloc.virgin, first + clusters + blocks)


def _hopeless(why: str) -> QmpdError:
    return QmpdError(f"qcow2: Image is dirty and cannot be repaired ({why}); use qemu-img check -r all", Kind.CORRUPT)
