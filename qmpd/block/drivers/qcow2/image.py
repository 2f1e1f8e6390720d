"""One open image: header, geometry, cached metadata, and the lock around them.

Lock: ``Image.lock`` (re-entrant, one per image) covers everything in this package that is not plain data I/O. It is
taken inside the request that needs it and never while a lock of another image is held, except that a request may take
the locks of the devices below (file, backing) while holding it.
"""

from __future__ import annotations

import errno
import logging
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np

from qmpd.block.api import BlockDevice
from qmpd.block.debug import Event, announcer
from qmpd.block.drivers.qcow2 import header as hdr
from qmpd.block.drivers.qcow2.alloc import Allocator
from qmpd.block.drivers.qcow2.bitmaps import Bitmap, load_bitmaps
from qmpd.block.drivers.qcow2.cache import L2Codec, MetadataCache, Moments, PointerTable, TableCache, read_padded
from qmpd.block.drivers.qcow2.header import Header
from qmpd.block.drivers.qcow2.headerwrite import rewrite
from qmpd.block.drivers.qcow2.inflight import Inflight
from qmpd.block.drivers.qcow2.overlap import Overlap
from qmpd.block.drivers.qcow2.refcounts import RefcountCodec, Refcounts, bad_block_pointer
from qmpd.block.drivers.qcow2.snapshots import Snapshot, load_snapshots
from qmpd.block.drivers.qcow2.tables import COPIED, L1_RESERVED, OFFSET_MASK, Geometry
from qmpd.errors import Kind, QmpdError, strerror
from qmpd.units import MIB, align_up, ceil_div

_log = logging.getLogger(__name__)

#: Bounds of the two caches when the options do not say otherwise, bytes.
L2_CACHE: Final = 32 * MIB
REFCOUNT_CACHE: Final = 8 * MIB

L2_MOMENTS: Final = Moments(Event.L2_LOAD, Event.L2_UPDATE)
REFBLOCK_MOMENTS: Final = Moments(Event.REFBLOCK_LOAD, Event.REFBLOCK_UPDATE_PART)


class Image:
    """State shared by the reading and the writing half of the driver."""

    def __init__(
        self, file: BlockDevice, data: BlockDevice | None, *, read_only: bool, l2_cache: int, refcount_cache: int
    ) -> None:
        """Reads and validates header, tables, snapshots and bitmaps. Raises CORRUPT or UNSUPPORTED errors."""
        self.file = file
        #: Where the guest's data is: a file of its own (``data``), or the image file.
        self.data = file if data is None else data
        #: Tells a blkdebug below of inner moments; called with or without the lock.
        self.announce = announcer(file)
        self.read_only = read_only
        start = bytes(read_padded(file, 0, min(file.length, 2 * MIB)))
        self.header = hdr.parse(start, read_only=read_only, data_file=data is not None)
        self.geometry = Geometry(self.header.cluster_bits, self.header.extended_l2, self.header.external_data)
        self.snapshots: list[Snapshot] = load_snapshots(file, self.header)
        self.bitmaps: list[Bitmap] = load_bitmaps(file, self.header)
        self.lock = threading.RLock()
        self.inflight = Inflight(self.lock)
        codec = RefcountCodec(self.header.refcount_order)
        size = self.geometry.cluster_size
        l1 = PointerTable.load(file, self.header.l1_offset, self.header.l1_size, Event.L1_UPDATE)
        self.announce(Event.REFTABLE_LOAD)
        table_entries = self.header.refcount_table_clusters * size // 8
        self.meta = MetadataCache(
            file,
            self.data,
            l1=l1,
            refcount_table=PointerTable.load(
                file, self.header.refcount_table_offset, table_entries, Event.REFBLOCK_ALLOC_HOOKUP
            ),
            l2=TableCache(file, L2Codec(self.geometry.words), size, l2_cache, L2_MOMENTS),
            refcount_blocks=TableCache(file, codec, size, refcount_cache, REFBLOCK_MOMENTS),
        )
        self.refcounts = Refcounts(self, codec)
        self.overlap = Overlap()
        self.alloc = Allocator(self)
        self.note_areas()
        #: Told about damage found: (message, fatal).
        self.on_corruption: Callable[[str, bool], None] | None = None
        self._dead: QmpdError | None = None

    @property
    def file_end(self) -> int:
        """Length of the image file rounded up to clusters, bytes."""
        return align_up(self.file.length, self.geometry.cluster_size)

    @property
    def frontier(self) -> int:
        """Entries may point below this: the file's end, or that of space taken but not written yet, bytes."""
        return max(self.file_end, self.alloc.virgin * self.geometry.cluster_size)

    def set_file(self, file: BlockDevice) -> None:
        """The same bytes through another device. Nothing in flight."""
        if not self.geometry.external:
            self.set_data(file)
        self.file = file
        self.announce = announcer(file)
        self.meta.set_file(file)

    def set_data(self, data: BlockDevice) -> None:
        """The guest's bytes through another device. Nothing in flight."""
        self.data = self.meta.data = data

    def check_room(self, end: int) -> None:
        """Is there room in the data file for guest bytes up to ``end``? Raises ENOSPC."""
        if end > self.data.length and not getattr(self.data, "growable", False):
            raise QmpdError(strerror(errno.ENOSPC), Kind.NO_SPACE, errno=errno.ENOSPC)

    # -- damage ----------------------------------------------------------------------------------------------------

    def corruption(self, text: str) -> QmpdError:
        """Note damage: a writable image is marked as corrupt on disk and takes no more writes. Returns the error."""
        error = QmpdError(text, Kind.CORRUPT)
        fatal = not self.read_only
        if fatal and self._dead is None:
            self._dead = error
            _log.error("qcow2: Marking image as corrupt: %s; further corruption events will be suppressed", text)
            self._set_corrupt_bit()
        if self.on_corruption is not None:
            self.on_corruption(text, fatal)
        return error

    def _set_corrupt_bit(self) -> None:
        if self.header.version < 3:
            return
        self.header = replace(self.header, incompatible=self.header.incompatible | hdr.CORRUPT)
        try:
            self.write_header_field(72, struct.pack(">Q", self.header.incompatible))
        except QmpdError as error:
            _log.error("qcow2: could not mark the image as corrupt: %s", error)

    def check_alive(self) -> None:
        """Raises for an image found corrupt while writable, or whose header could not be written."""
        if self._dead is not None:
            raise QmpdError(f"Image takes no more writes: {self._dead.desc}", Kind.CORRUPT)

    @property
    def is_alive(self) -> bool:
        """Would :meth:`check_alive` pass?"""
        return self._dead is None

    def take_no_more_writes(self, error: QmpdError) -> None:
        """Memory and file may have come to differ, because of ``error``."""
        self._dead = self._dead or error

    # -- the header on disk ----------------------------------------------------------------------------------------

    def write_header_field(self, offset: int, data: bytes) -> None:
        """Overwrite a few bytes of the header and sync: small enough for one sector, hence atomic.

        Raises the file's errors. What the header says is uncertain then, so the image takes no more writes.
        """
        try:
            self.file.write(offset, data)
            self.file.flush()
        except QmpdError as error:
            self.take_no_more_writes(error)
            raise

    def set_dirty_bit(self, *, on: bool) -> None:
        """Say whether refcounts and copied flags may be wrong. Version 3 only; otherwise nothing is done."""
        if self.header.version < 3:
            return
        incompatible = self.header.incompatible & ~hdr.DIRTY | (hdr.DIRTY if on else 0)
        self.write_header_field(72, struct.pack(">Q", incompatible))
        self.header = replace(self.header, incompatible=incompatible)

    def write_header(self, new: Header) -> None:
        """Replace the header durably; a crash leaves the old one or the new one. Raises ENOSPC, the file's errors."""
        self.header = rewrite(self.file, self.header, new)

    # -- flushing --------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Everything acknowledged is durable at return, in the order that survives a crash."""
        with self.lock:
            pending = self.meta.dirty or self.alloc.waiting
        # Data first, while others go on: so the syncs under the lock have little left to do.
        self.data.flush()
        if self.geometry.external:
            self.file.flush()
        if pending:
            with self.lock:
                self.check_alive()
                self.meta.flush(self.alloc.release)
                self.meta.trim()

    def settle(self) -> None:
        """At the end of a request, lock held: keep the caches within bounds."""
        if self.meta.crowded:
            self.meta.flush(self.alloc.release)
        self.meta.trim()

    # -- where metadata is -----------------------------------------------------------------------------------------

    def note_areas(self) -> None:
        """Tell the overlap check where the structures named by the header are."""
        size, header = self.geometry.cluster_size, self.header

        def area(offset: int, length: int) -> tuple[int, int]:
            return offset // size, ceil_div(offset + length, size) if length else offset // size

        self.overlap.place("qcow2_header", (0, 1))
        self.overlap.place("active L1 table", area(header.l1_offset, header.l1_size * 8))
        self.overlap.place("refcount table", area(header.refcount_table_offset, header.refcount_table_clusters * size))
        table = sum(snapshot.entry_size for snapshot in self.snapshots)
        self.overlap.place("snapshot table", area(header.snapshots_offset, table))
        limit = self.file_end
        self.overlap.place(
            "inactive L1 table",
            *(area(s.l1_offset, s.l1_size * 8) for s in self.snapshots if s.l1_offset + s.l1_size * 8 <= limit),
        )
        directory = header.extension(hdr.EXT_BITMAPS) if header.autoclear & hdr.BITMAPS else None
        if directory is not None and len(directory) >= 24:
            _, _, length, offset = struct.unpack_from(">IIQQ", directory)
            self.overlap.place("bitmap directory", area(offset, length))

    def is_structure(self, offset: int) -> str | None:
        """What structure other than an L2 table lies at that host offset, if any."""
        cluster = offset // self.geometry.cluster_size
        name = self.overlap.at(cluster)
        if name is not None and name != "active L2 table":
            return name
        blocks = self.meta.refcount_table.entries
        if not self.overlap.blocks and (blocks & np.uint64(OFFSET_MASK) == np.uint64(offset)).any():
            return "refcount block"
        return None

    def check_structure(self) -> None:
        """What must hold before anything is written (spec/qcow2.md section 10). Raises CORRUPT, nothing changed."""
        size = self.geometry.cluster_size
        end = self.file_end
        header = self.header
        l1, table = self.meta.l1.entries, self.meta.refcount_table.entries
        mask, unit = np.uint64(OFFSET_MASK), np.uint64(size - 1)
        l2_offsets, block_offsets = l1 & mask, table & mask
        unaligned = np.flatnonzero(block_offsets & unit)
        if len(unaligned):
            raise _unwritable(bad_block_pointer(int(block_offsets[unaligned[0]]), int(unaligned[0])))
        l2_offsets = l2_offsets[(l2_offsets != 0) & (l2_offsets & unit == 0)]
        block_offsets = block_offsets[block_offsets != 0]
        rules = (
            (
                bool(header.l1_size) and header.l1_offset + header.l1_size * 8 > end,
                "L1 table lies behind the end of the file",
            ),
            (header.refcount_table_offset >= end, "refcount table lies behind the end of the file"),
            (bool((l2_offsets >= end).any()), "L2 table lies behind the end of the file"),
            (bool((block_offsets >= end).any()), "refcount block lies behind the end of the file"),
            (bool((l1 & np.uint64(L1_RESERVED)).any()), "L1 entry with reserved bits set"),
            (bool((l1 == np.uint64(COPIED)).any()), "L1 entry without an L2 table, but with the copied flag"),
            (len(np.unique(l2_offsets)) != len(l2_offsets), "two L1 entries share one L2 table"),
            (len(np.unique(block_offsets)) != len(block_offsets), "two refcount table entries share one block"),
        )
        for broken, text in rules:
            if broken:
                raise _unwritable(text)
        self.overlap.l2 = set((l2_offsets // np.uint64(size)).tolist())
        self.overlap.blocks = set((block_offsets // np.uint64(size)).tolist())
        conflict = self.overlap.conflict()
        if conflict:
            raise _unwritable(f"{conflict[0]} overlaps with {conflict[1]}")

    def check_refcounts(self) -> None:
        """Header, L1 and refcount table must be counted, or they would be handed out as free space."""
        size, header = self.geometry.cluster_size, self.header
        pieces = (
            (0, 1, "header"),
            (header.l1_offset, header.l1_size * 8, "L1 table"),
            (header.refcount_table_offset, header.refcount_table_clusters * size, "refcount table"),
        )
        for offset, length, name in pieces:
            clusters = np.arange(offset // size, ceil_div(offset + length, size), dtype=np.int64)
            if length and not self.refcounts.get_many(clusters).all():
                raise _unwritable(f"the {name} has refcount 0")


def _unwritable(why: str) -> QmpdError:
    return QmpdError(f"qcow2: Image is damaged ({why}); cannot be opened read/write", Kind.CORRUPT)
