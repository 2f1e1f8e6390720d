"""Taking and deleting internal snapshots (spec/qcow2.md sections 4 and 5, spec/toolbox.md section 12).

A snapshot is a copy of the L1 table: all that it leads to gets one more user. While that goes on the dirty bit is set,
so that the next writer counts anew; version 2 has no such bit, and is left with leaked clusters at worst. The order,
each step durable before the next one:

    take:    copy of the L1 table, new snapshot table -> dirty bit -> copied flags off -> counts up
             -> header names the new table -> dirty bit off
    delete:  new snapshot table -> dirty bit -> header names it -> counts down -> copied flags on -> dirty bit off

A worker thread; requests must be kept away by the caller.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import numpy as np

from qmpd.block.drivers.qcow2.cache import read_padded
from qmpd.block.drivers.qcow2.clusters import Clusters
from qmpd.block.drivers.qcow2.copied import clear_flags, refresh_flags
from qmpd.block.drivers.qcow2.header import MAX_L1_ENTRIES, MAX_SNAPSHOTS
from qmpd.block.drivers.qcow2.image import Image
from qmpd.block.drivers.qcow2.snapshots import MAX_TABLE, Snapshot, new_entry
from qmpd.block.drivers.qcow2.tables import I64, OFFSET_MASK, U64, bad_entries
from qmpd.block.drivers.qcow2.writing import Writer
from qmpd.block.drivers.qcow2.zeroing import Eraser
from qmpd.errors import Kind, QmpdError, strerror
from qmpd.units import ceil_div

#: Longer names are cut when they are read by others, so that the snapshot would not be found again. Bytes.
MAX_NAME: Final = 255


class Snapshotter:
    """Changes the list of snapshots of one image."""

    def __init__(self, image: Image, clusters: Clusters, writer: Writer, eraser: Eraser) -> None:
        self._image = image
        self._clusters = clusters
        self._writer = writer
        self._eraser = eraser

    # -- take ------------------------------------------------------------------------------------------------------

    def take(self, name: str, nanoseconds: int) -> Snapshot:
        """Keep what the disk holds now, durably; ``nanoseconds`` (since the epoch) is the time to note.

        Raises EINVAL, EFBIG and ENOSPC errors with nothing changed, CORRUPT for a mapping that cannot be followed. If
        the file fails half way, the image takes no more writes until it is opened again.
        """
        encoded = len(name.encode())
        if encoded > MAX_NAME:
            text = f"Snapshot name is too long: {encoded} bytes, at most {MAX_NAME} can be read back"
            raise QmpdError(text, errno=errno.EINVAL)
        image = self._image
        with self._alone():
            if len(image.snapshots) >= MAX_SNAPSHOTS:
                raise _failure(errno.EFBIG)
            image.meta.l1.complete(image.header.l1_size)
            self._check_counts()
            first, count = self._copy_l1()
            with self._giving_back(first, count):
                snapshot = new_entry(
                    _next_number(image.snapshots),
                    name,
                    (first * image.geometry.cluster_size, image.header.l1_size),
                    image.header.size,
                    nanoseconds,
                )
                table = self._write_table([*image.snapshots, snapshot])
            with self._dirty():
                clear_flags(image)
                self._each(image.meta.l1.entries, lambda clusters: image.refcounts.add(clusters, +1))
                image.meta.flush_refcounts()
                self._switch([*image.snapshots, snapshot], table)
            return snapshot

    def _check_counts(self) -> None:
        """Can everything have one more user? Raises EINVAL if not, CORRUPT for what cannot be followed."""
        image = self._image
        limit = np.uint64(image.refcounts.maximum)
        more = np.zeros(ceil_div(image.frontier, image.geometry.cluster_size) + 1, np.uint32)

        def look(clusters: I64) -> None:
            np.add.at(more, clusters, 1)
            if (image.refcounts.get_many(clusters) + more[clusters] > limit).any():
                raise _failure(errno.EINVAL)

        self._each(image.meta.l1.entries, look)

    def _copy_l1(self) -> tuple[int, int]:
        """A copy of the L1 table, written but not synced: (first cluster, number of clusters)."""
        image, size = self._image, self._image.geometry.cluster_size
        entries = image.meta.l1.entries & np.uint64(OFFSET_MASK)
        count = max(1, ceil_div(len(entries) * 8, size))
        first = image.alloc.allocate_run(count)
        with self._giving_back(first, count):
            image.file.write(first * size, entries.astype(">u8").tobytes().ljust(count * size, b"\0"))
        return first, count

    # -- delete ----------------------------------------------------------------------------------------------------

    def delete(self, key: str) -> None:
        """Forget the first snapshot with that id, durably, and give up the space that nothing else uses.

        Raises ENOENT if there is none and ENOSPC errors with nothing changed, CORRUPT for a mapping that cannot be
        followed. If the file fails half way, the image takes no more writes until it is opened again.
        """
        image = self._image
        with self._alone():
            snapshot = next((known for known in image.snapshots if known.id == key), None)
            if snapshot is None:
                raise _failure(errno.ENOENT)
            l1 = self._load_l1(snapshot)
            self._each(l1, lambda clusters: None)
            left = [known for known in image.snapshots if known is not snapshot]
            table = self._write_table(left)
            with self._dirty():
                self._switch(left, table)
                self._each(l1, lambda clusters: image.alloc.give_back(clusters, discard=True))
                image.alloc.give_back(self._run(snapshot.l1_offset, snapshot.l1_size * 8), discard=True)
                refresh_flags(image)

    def _load_l1(self, snapshot: Snapshot) -> U64:
        """The L1 table of a snapshot. Raises CORRUPT for one that cannot be."""
        image = self._image
        offset, entries = snapshot.l1_offset, snapshot.l1_size
        if offset % image.geometry.cluster_size or entries > MAX_L1_ENTRIES or offset + entries * 8 > image.file_end:
            raise image.corruption(f"L1 table of snapshot '{snapshot.name}' is invalid")
        if not image.refcounts.get_many(self._run(offset, entries * 8)).all():
            raise image.corruption(f"L1 table of snapshot '{snapshot.name}' has refcount 0")
        return np.frombuffer(read_padded(image.file, offset, entries * 8), ">u8").astype(np.uint64)

    # -- the table -------------------------------------------------------------------------------------------------

    def _write_table(self, snapshots: list[Snapshot]) -> int:
        """A table of these, durable but not named by the header; returns its host offset, 0 for no snapshots."""
        image, size = self._image, self._image.geometry.cluster_size
        raw = b"".join(snapshot.raw for snapshot in snapshots)
        if len(raw) > MAX_TABLE:
            raise _failure(errno.EFBIG)
        if not raw:
            return 0
        count = ceil_div(len(raw), size)
        first = image.alloc.allocate_run(count)
        with self._giving_back(first, count):
            image.file.write(first * size, raw.ljust(count * size, b"\0"))
            image.meta.flush_refcounts()
        return first * size

    def _switch(self, snapshots: list[Snapshot], offset: int) -> None:
        """Let the header name a table; the old one is free."""
        image, header = self._image, self._image.header
        old = self._run(header.snapshots_offset, sum(snapshot.entry_size for snapshot in image.snapshots))
        image.write_header_field(60, struct.pack(">IQ", len(snapshots), offset))
        image.header = replace(header, nb_snapshots=len(snapshots), snapshots_offset=offset)
        image.snapshots = snapshots
        image.note_areas()
        image.alloc.give_back(old, discard=True)

    # -- around it -------------------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody maps anything meanwhile; nothing cached is dirty at first, all is durable at the end. Lock held."""
        image = self._image
        with image.lock:
            self._writer.begin()
            claim = self._eraser.claim_everything()
            try:
                image.meta.flush(image.alloc.release)
                yield
                image.meta.flush(image.alloc.release)
            finally:
                image.inflight.unclaim(claim)

    @contextmanager
    def _dirty(self) -> Iterator[None]:
        """With the dirty bit set. A failure within leaves it so."""
        image = self._image
        image.set_dirty_bit(on=True)
        try:
            yield
            image.meta.flush(image.alloc.release)
        except QmpdError as error:
            image.take_no_more_writes(error)
            raise
        image.set_dirty_bit(on=False)

    @contextmanager
    def _giving_back(self, first: int, count: int) -> Iterator[None]:
        """A failure within frees clusters that nothing refers to yet."""
        try:
            yield
        except QmpdError:
            self._image.alloc.give_back(np.arange(first, first + count, dtype=np.int64))
            raise

    def _run(self, offset: int, length: int) -> I64:
        """The clusters of a structure."""
        size = self._image.geometry.cluster_size
        return np.arange(offset // size, ceil_div(offset + length, size) if length else offset // size, dtype=np.int64)

    # -- everything that an L1 table leads to ----------------------------------------------------------------------

    def _each(self, l1: U64, use: Callable[[I64], None]) -> None:
        """Call ``use`` with the host clusters under each L1 entry, one for each reference, the L2 table itself last.

        Raises CORRUPT for what cannot be followed, or must not be given up.
        """
        image, size = self._image, self._image.geometry.cluster_size
        for index, entry in enumerate(l1.tolist()):
            offset = entry & OFFSET_MASK
            if not offset:
                continue
            if offset % size or offset >= image.file_end or image.is_structure(offset):
                raise image.corruption(f"L2 table offset {offset:#x} is invalid (L1 index: {index:#x})")
            table = image.meta.l2.peek(offset)
            guest = np.arange(len(table), dtype=np.int64) + (index << image.geometry.l2_bits)
            bad = bad_entries(image.geometry, guest, table, version=image.header.version)
            if bad:
                position, reason = bad
                raise self._clusters.damaged(reason, int(table[position, 0]), offset, int(guest[position]))
            self._clusters.check_dropped(table)
            found = self._clusters.host_clusters(table)
            if len(found) and (int(found.max()) + 1) * size > image.frontier:
                raise image.corruption(f"Cluster offset {int(found.max()) * size:#x} behind the end of the file")
            use(np.append(found, offset // size))
            image.settle()


def _next_number(snapshots: list[Snapshot]) -> int:
    """One more than the highest id that is a number; that of a deleted snapshot may return."""
    return 1 + max((int(known.id) for known in snapshots if known.id.isascii() and known.id.isdigit()), default=0)


def _failure(number: int) -> QmpdError:
    return QmpdError(strerror(number), Kind.INVALID, errno=number)
