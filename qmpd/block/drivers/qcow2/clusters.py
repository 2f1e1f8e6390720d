"""Guest clusters to L2 entries and back (spec/qcow2.md sections 2 and 5). Called with the image lock held."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from qmpd.block.debug import Event
from qmpd.block.drivers.qcow2.cache import Table
from qmpd.block.drivers.qcow2.tables import (
    ALL_ALLOCATED,
    COMPRESSED,
    COPIED,
    I64,
    L2_RESERVED,
    OFFSET_MASK,
    U64,
    ZERO,
    Bools,
    Geometry,
    bad_entries,
    c_hex,
    entry_error,
)
from qmpd.errors import QmpdError

if TYPE_CHECKING:
    from qmpd.block.drivers.qcow2.image import Image


class States:
    """What some guest clusters are made of, column by column, in the same terms with and without extended L2.

    ``allocated`` and ``zero`` have one bit per unit; an image without extended L2 entries uses bit 0 alone.
    """

    __slots__ = ("allocated", "compressed", "entries", "exclusive", "host", "mapped", "zero")

    def __init__(self, geometry: Geometry, clusters: I64, entries: U64) -> None:
        first = entries[:, 0]
        self.entries = entries
        self.compressed: Bools = (first & np.uint64(COMPRESSED)) != 0
        plain = np.where(self.compressed, np.uint64(0), first)
        #: Is there a host cluster (other than a compressed one)?
        self.mapped: Bools = geometry.mapped(plain)
        #: Its byte offset, 0 where there is none.
        self.host: U64 = plain & np.uint64(OFFSET_MASK)
        #: A host cluster that may be written in place. In a data file there are no others.
        self.exclusive: Bools = self.mapped & ((plain & np.uint64(COPIED)) != 0)
        if geometry.external:
            guest = clusters.astype(np.uint64) << np.uint64(geometry.cluster_bits)
            self.host = np.where(self.mapped, guest, np.uint64(0))
            self.exclusive = self.mapped
        if geometry.extended:
            bitmap = np.where(self.compressed, np.uint64(0), entries[:, 1])
            self.allocated: U64 = bitmap & np.uint64(ALL_ALLOCATED)
            self.zero: U64 = bitmap >> np.uint64(32)
        else:
            self.zero = plain & np.uint64(ZERO)
            self.allocated = (self.mapped & (self.zero == 0)).astype(np.uint64)


class Clusters:
    """Reads and stores L2 entries, making tables as needed. Guest clusters are given by number, ascending."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._geometry = image.geometry
        self.all_units = (1 << image.geometry.units) - 1
        #: Host offsets of the L2 tables that may be relied on when writing.
        self._vetted: set[int] = set()

    # -- tables ----------------------------------------------------------------------------------------------------

    def table_offset(self, l1_index: int) -> int:
        """Host offset of the L2 table, 0 for none. Raises CORRUPT for pointers that cannot be followed."""
        l1 = self._image.meta.l1
        if l1_index >= len(l1):
            return 0
        offset = l1[l1_index] & OFFSET_MASK
        if offset % self._geometry.cluster_size:
            raise self._image.corruption(f"L2 table offset {offset:#x} unaligned (L1 index: {c_hex(l1_index)})")
        if offset:
            name = self._image.is_structure(offset)
            if name:
                raise self._image.corruption(
                    f"L2 table offset {offset:#x} overlaps with {name} (L1 index: {c_hex(l1_index)})"
                )
        return offset

    def table(self, l1_index: int) -> Table | None:
        """The L2 table for reading."""
        l1, l2 = self._image.meta.l1.entries, self._image.meta.l2
        if l1_index >= len(l1):
            return None
        table = l2.cached(int(l1[l1_index]) & OFFSET_MASK)
        if table is not None:
            return table
        offset = self.table_offset(l1_index)
        return l2.get(offset) if offset else None

    def writable_table(self, l1_index: int) -> Table:
        """The L2 table for changing: a missing one is made, a shared one is copied first."""
        image, size = self._image, self._geometry.cluster_size
        offset = image.meta.l1[l1_index] & OFFSET_MASK
        if image.meta.l2.changed(offset):
            return image.meta.l2.get(offset)  # looked at when it was changed first
        offset = self.table_offset(l1_index)
        if image.meta.l1[l1_index] & COPIED:
            if not offset:
                raise image.corruption(f"L1 entry {l1_index:#x} has no L2 table, but the copied flag")
            if offset >= image.frontier:
                raise image.corruption(f"L2 table offset {offset:#x} behind the end of the file")
            if image.refcounts.get(offset // size) != 1:
                raise image.corruption(f"L2 table at {offset:#x} has the copied flag, but its refcount is not 1")
            table = image.meta.l2.get(offset)
            self.vet(table)
            return table
        if offset:
            self.vet(image.meta.l2.get(offset))
            image.announce(Event.L2_ALLOC_COW_READ)
            data = image.meta.l2.get(offset).data.copy()
        else:
            data = np.zeros((self._geometry.l2_entries, self._geometry.words), np.uint64)
        cluster = int(image.alloc.allocate(1)[0])
        image.announce(Event.L2_ALLOC_WRITE)
        table = image.meta.l2.create(cluster * size, data)
        image.meta.l1[l1_index] = cluster * size | COPIED
        self._vetted.add(cluster * size)
        image.overlap.l2.add(cluster)
        if offset:
            image.alloc.free_later(np.array([offset // size], np.int64))
            image.overlap.l2.discard(offset // size)
        return table

    def vet(self, table: Table) -> None:
        """Look at all of a table before the first write below it. Raises CORRUPT.

        What its entries refer to must be in use by the counts, and have been when the image was opened: a cluster that
        looked free has perhaps been given to somebody else since.
        """
        if table.offset in self._vetted:
            return
        image, size = self._image, self._geometry.cluster_size
        clusters = self._ends(table.data)
        if len(clusters):
            new = image.alloc.newcomer(clusters)
            if new is not None:
                where = "behind the end of the file" if new * size >= image.file_end else "was free"
                raise image.corruption(f"Cluster offset {new * size:#x} {where}")
            free = image.refcounts.get_many(clusters) == 0
            if free.any():
                at = int(clusters[int(free.argmax())]) * size
                raise image.corruption(f"Cluster at {at:#x} is in use, but its refcount is 0")
        self._vetted.add(table.offset)

    def is_vetted(self, table: Table) -> bool:
        """Has :meth:`vet` looked at it already?"""
        return table.offset in self._vetted

    def vet_tables(self, clusters: I64) -> None:
        """:meth:`vet` the tables that these clusters belong to."""
        for l1_index, _, _ in self._groups(clusters):
            table = self.table(l1_index)
            if table is not None:
                self.vet(table)

    def _ends(self, entries: U64) -> I64:
        """The first and the last host cluster of everything that the entries refer to and that can be followed."""
        first, size = entries[:, 0], self._geometry.cluster_size
        if self._geometry.external:
            return np.empty(0, np.int64)
        compressed = (first & np.uint64(COMPRESSED)) != 0
        plain = (first[~compressed] & np.uint64(OFFSET_MASK)).astype(np.int64)
        ends: I64 = plain[(plain != 0) & (plain % size == 0)] // size
        if not compressed.any():
            return ends
        start, length = self._geometry.compressed_spans(first[compressed])
        return np.concatenate((ends, start // size, (start + length - 1) // size))

    # -- entries ---------------------------------------------------------------------------------------------------

    def load(self, clusters: I64) -> States:
        """Entries of ``clusters``. Raises CORRUPT if one of them breaks the format."""
        entries = np.zeros((len(clusters), self._geometry.words), np.uint64)
        for l1_index, where, low in self._groups(clusters):
            table = self.table(l1_index)
            if table is None:
                continue
            entries[where] = table.data[clusters[where] - low]
            version = self._image.header.version
            bad = bad_entries(self._geometry, clusters[where], entries[where], version=version)
            if bad:
                position, reason = bad
                cluster = int(clusters[where][position])
                raise self.damaged(reason, int(entries[where][position, 0]), table.offset, cluster)
        return States(self._geometry, clusters, entries)

    def store(self, clusters: I64, entries: U64) -> None:
        """Change entries in memory, all or none. What they replace is the caller's to free."""
        groups = [(self.writable_table(index), where, low) for index, where, low in self._groups(clusters)]
        for table, where, low in groups:
            rows = clusters[where] - low
            table.data[rows] = entries[where]
            self._image.meta.l2.touch(table, int(rows[0]), int(rows[-1]) + 1)

    def reserve_tables(self, clusters: I64) -> None:
        """Make sure that :meth:`store` finds writable tables: what can fail should fail before data moves."""
        for l1_index, _, _ in self._groups(clusters):
            self.writable_table(l1_index)

    def damaged(self, reason: str, entry: int, table_offset: int, cluster: int) -> QmpdError:
        """The error for a broken entry of a guest cluster; marks a writable image."""
        return self._image.corruption(entry_error(self._geometry, reason, entry, table_offset, cluster).desc)

    def _groups(self, clusters: I64) -> list[tuple[int, slice, int]]:
        """``clusters`` cut by L2 table: (L1 index, where in the array, first cluster of the table)."""
        bits = self._geometry.l2_bits
        first, last = int(clusters[0]) >> bits, int(clusters[-1]) >> bits
        if first == last:
            return [(first, slice(0, len(clusters)), first << bits)]
        l1 = clusters >> bits
        cuts = np.flatnonzero(np.diff(l1)) + 1
        edges = [0, *cuts.tolist(), len(clusters)]
        return [(int(l1[a]), slice(a, b), int(l1[a]) << bits) for a, b in pairwise(edges)]

    # -- composing and giving up -----------------------------------------------------------------------------------

    def compose(self, host: U64, allocated: U64, zero: U64, exclusive: Bools) -> U64:
        """Entries (n, words) from columns; the opposite of :class:`States`. No cluster is exclusive without a host."""
        first = host | np.where(exclusive, np.uint64(COPIED), np.uint64(0))
        if not self._geometry.extended:
            return (first | zero).reshape(-1, 1)
        return np.stack((first, allocated | (zero << np.uint64(32))), axis=1)

    def check_exclusive(self, states: States, chosen: Bools) -> None:
        """May the host clusters of the ``chosen`` entries be written in place? Raises CORRUPT (section 10, qmpd)."""
        image = self._image
        entries, host = states.entries[chosen, 0], states.host[chosen].astype(np.int64)
        if not len(host):
            return
        reserved = L2_RESERVED & ~ZERO | (ZERO if self._geometry.extended else 0)
        if (entries & np.uint64(reserved)).any():
            raise image.corruption(f"L2 entry {int(entries[0]):#x} has reserved bits set")
        if self._geometry.external:
            return
        if int(host.max()) >= image.frontier:
            raise image.corruption(f"Cluster offset {int(host.max()):#x} behind the end of the file")
        clusters = host // self._geometry.cluster_size
        name = image.overlap.any(clusters)
        if name:
            raise image.corruption(f"Preventing invalid write on metadata (overlaps with {name})")
        counts = image.refcounts.get_many(clusters)
        if (counts != 1).any():
            at = int(host[int((counts != 1).argmax())])
            raise image.corruption(f"Cluster at {at:#x} has the copied flag, but its refcount is not 1")

    def check_dropped(self, entries: U64) -> None:
        """May the references of these entries be given up? Raises CORRUPT if they point at what is not data."""
        clusters = self.host_clusters(entries)
        if not len(clusters):
            return
        name = self._image.overlap.any(clusters)
        if name:
            raise self._image.corruption(f"Preventing invalid free of metadata (overlaps with {name})")
        counts = self._image.refcounts.get_many(clusters)
        if (counts == 0).any():
            at = int(clusters[int((counts == 0).argmax())]) * self._geometry.cluster_size
            raise self._image.corruption(f"Cluster at {at:#x} is in use, but its refcount is 0")

    def host_clusters(self, entries: U64) -> I64:
        """Every reference that these entries hold, by cluster; compressed streams may touch several."""
        if self._geometry.external:
            return np.empty(0, np.int64)
        first = entries[:, 0]
        compressed = (first & np.uint64(COMPRESSED)) != 0
        plain = (first[~compressed] & np.uint64(OFFSET_MASK)).astype(np.int64) // self._geometry.cluster_size
        found = [plain[plain != 0]]
        for entry in first[compressed].tolist():
            offset, length = self._geometry.compressed_span(entry)
            size = self._geometry.cluster_size
            found.append(np.arange(offset // size, (offset + length - 1) // size + 1, dtype=np.int64))
        return np.concatenate(found) if len(found) > 1 else found[0]
