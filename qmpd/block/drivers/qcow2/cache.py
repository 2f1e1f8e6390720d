"""Metadata in memory: the two pointer tables, and bounded write-back caches of what they point at.

:meth:`MetadataCache.flush` is the only place that writes cached metadata in bulk, because it is the only place that
knows the order that keeps an image consistent through a crash (spec/qcow2.md section 5):

    data and refcount blocks -> sync -> refcount table -> sync -> L2 tables -> sync -> L1 -> sync -> frees

Everything here is called with the image lock held. Tables are evicted between operations only (:meth:`trim`), so a
reference to a table stays good while the lock is held.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from qmpd.block.api import BlockDevice
from qmpd.block.debug import Event, announcer
from qmpd.block.drivers.qcow2.tables import U64
from qmpd.units import align_up, ceil_div

Array = npt.NDArray[Any]

#: Changed tables are written in pieces of this size: a page, so that the kernel need not read around them.
_WRITE_UNIT: Final = 4096


def read_padded(file: BlockDevice, offset: int, length: int) -> bytearray:
    """``length`` bytes of the image file; zeros behind its end."""
    buffer = bytearray(length)
    inside = min(length, max(0, file.length - offset))
    if inside:
        file.readinto(offset, memoryview(buffer)[:inside])
    return buffer


class Codec:
    """How a table is stored: bytes to a native array and back."""

    #: Entries in 8 bytes, the smallest piece that can be stored by itself.
    per_word: int

    def decode(self, raw: bytearray) -> Array:
        raise NotImplementedError

    def encode(self, part: Array) -> bytes:
        raise NotImplementedError


class L2Codec(Codec):
    """Big-endian 64-bit words; an entry is a row of one or two."""

    def __init__(self, words: int) -> None:
        self._words = words
        self.per_word = 1

    def decode(self, raw: bytearray) -> U64:
        return np.frombuffer(raw, ">u8").astype(np.uint64).reshape(-1, self._words)

    def encode(self, part: Array) -> bytes:
        return part.astype(">u8").tobytes()


class Moments(NamedTuple):
    """What is announced (:mod:`qmpd.block.debug`) before a table is read, and before it is written."""

    load: Event
    update: Event


class Table:
    """One cached cluster of metadata. ``data`` is changed in place, then :meth:`TableCache.touch` is told."""

    __slots__ = ("data", "high", "low", "offset")

    def __init__(self, offset: int, data: Array) -> None:
        self.offset = offset
        self.data = data
        self.low = len(data)
        self.high = 0


class TableCache:
    """L2 tables or refcount blocks, by host offset, least recently used first."""

    def __init__(self, file: BlockDevice, codec: Codec, table_size: int, limit: int, moments: Moments) -> None:
        self.set_file(file)
        self._moments = moments
        self._codec = codec
        self._size = table_size
        self.limit = limit
        #: Are tables kept for good, however many?
        self.keeps_all = False
        self._tables: OrderedDict[int, Table] = OrderedDict()
        self._dirty: dict[int, Table] = {}

    def set_file(self, file: BlockDevice) -> None:
        """Go on with another device for the same bytes."""
        self.file = file
        self._announce = announcer(file)

    def get(self, offset: int) -> Table:
        """The table at that host offset, read if need be (zeros where the file has ended)."""
        table = self._tables.get(offset)
        if table is None:
            table = self._tables[offset] = Table(offset, self._read(offset))
        else:
            self._tables.move_to_end(offset)
        return table

    def cached(self, offset: int) -> Table | None:
        """The table, if it is in memory."""
        return self._tables.get(offset)

    def changed(self, offset: int) -> bool:
        """Has the table changes that are not on disk?"""
        return offset in self._dirty

    def peek(self, offset: int) -> Array:
        """The content, not kept if it was not cached: for scans larger than the cache."""
        table = self._tables.get(offset)
        if table is not None:
            return table.data
        return self._read(offset)

    def _read(self, offset: int) -> Array:
        self._announce(self._moments.load)
        return self._codec.decode(read_padded(self.file, offset, self._size))

    def create(self, offset: int, data: Array) -> Table:
        """Start a new table there; all of it will be written."""
        table = Table(offset, data)
        self._tables[offset] = table
        self.touch(table, 0, len(data))
        return table

    def touch(self, table: Table, low: int, high: int) -> None:
        """Rows ``[low, high)`` of ``table`` have changed."""
        table.low = min(table.low, low)
        table.high = max(table.high, high)
        self._dirty[table.offset] = table

    def forget(self, offset: int) -> None:
        """The cluster is no table any more; changes to it are dropped."""
        self._tables.pop(offset, None)
        self._dirty.pop(offset, None)

    @property
    def dirty(self) -> bool:
        return bool(self._dirty)

    @property
    def crowded(self) -> bool:
        """Do changed tables alone fill the cache?"""
        return len(self._dirty) * self._size >= self.limit

    def write_back(self) -> list[Table]:
        """Write the changed parts. They count as changed until :meth:`settle` is told that they are durable."""
        written = [self._dirty[offset] for offset in sorted(self._dirty)]
        for table in written:
            self._write(table)
        return written

    def _write(self, table: Table) -> None:
        rows = len(table.data)
        unit = max(1, rows * _WRITE_UNIT // self._size)
        low = table.low // unit * unit
        high = min(align_up(table.high, unit), rows)
        self._announce(self._moments.update)
        self.file.write(table.offset + low * self._size // rows, self._codec.encode(table.data[low:high]))

    def settle(self, written: list[Table]) -> None:
        """These are on disk."""
        for table in written:
            table.low, table.high = len(table.data), 0
            self._dirty.pop(table.offset, None)

    def trim(self) -> None:
        """Drop unchanged tables, oldest first, down to the limit."""
        excess = len(self._tables) - max(2, self.limit // self._size)
        if excess <= 0 or self.keeps_all:
            return
        for offset in [o for o in self._tables if o not in self._dirty][:excess]:
            del self._tables[offset]

    def clear(self) -> None:
        self._tables.clear()
        self._dirty.clear()


class PointerTable:
    """The L1 table or the refcount table: in memory as far as the file has it, changed entry by entry.

    What a header claims behind the end of the file takes no memory; before such a table is written it is completed.
    """

    def __init__(self, file: BlockDevice, offset: int, entries: U64, update: Event) -> None:
        """``update`` is announced before the table is written."""
        self.set_file(file)
        self._update = update
        self.offset = offset
        self.entries = entries
        self._dirty: set[int] = set()

    @classmethod
    def load(cls, file: BlockDevice, offset: int, count: int, update: Event) -> PointerTable:
        """``count`` entries at host byte ``offset``, without those wholly behind the file's end: they are 0."""
        count = min(count, ceil_div(max(0, file.length - offset), 8))
        entries = np.frombuffer(read_padded(file, offset, count * 8), ">u8").astype(np.uint64)
        return cls(file, offset, entries, update)

    def complete(self, count: int) -> None:
        """Have all ``count`` entries that the header claims."""
        missing = count - len(self.entries)
        if missing > 0:
            self.entries = np.append(self.entries, np.zeros(missing, np.uint64))

    def set_file(self, file: BlockDevice) -> None:
        """Go on with another device for the same bytes."""
        self.file = file
        self._announce = announcer(file)

    def __getitem__(self, index: int) -> int:
        return int(self.entries[index])

    def __setitem__(self, index: int, value: int) -> None:
        self.entries[index] = value
        self._dirty.add(index)

    def __len__(self) -> int:
        return len(self.entries)

    def revert(self, index: int) -> None:
        """The entry is 0 again, as it is on disk."""
        self.entries[index] = 0
        self._dirty.discard(index)

    @property
    def dirty(self) -> bool:
        return bool(self._dirty)

    def write_back(self) -> None:
        """Write changed entries, neighbours (up to a sector apart) together."""
        changed = np.array(sorted(self._dirty), np.int64)
        starts = np.flatnonzero(np.diff(changed, prepend=-1000) > 64)
        for first, last in zip(starts, np.append(starts[1:], len(changed)) - 1, strict=True):
            low, high = int(changed[first]), int(changed[last]) + 1
            self._announce(self._update)
            self.file.write(self.offset + low * 8, self.entries[low:high].astype(">u8").tobytes())

    def settle(self) -> None:
        self._dirty.clear()


class MetadataCache:
    """All cached metadata of one image."""

    def __init__(
        self,
        file: BlockDevice,
        data: BlockDevice,
        *,
        l1: PointerTable,
        refcount_table: PointerTable,
        l2: TableCache,
        refcount_blocks: TableCache,
    ) -> None:
        self._file = file
        #: Where the guest's data is: ``file``, or a file of its own.
        self.data = data
        self.l1 = l1
        self.refcount_table = refcount_table
        self.l2 = l2
        self.refcount_blocks = refcount_blocks

    def set_file(self, file: BlockDevice) -> None:
        """Go on with another device for the same bytes."""
        self._file = file
        for part in (self.l1, self.refcount_table, self.l2, self.refcount_blocks):
            part.set_file(file)

    @property
    def dirty(self) -> bool:
        return self.l2.dirty or self.l1.dirty or self.refcount_blocks.dirty or self.refcount_table.dirty

    @property
    def crowded(self) -> bool:
        """Is it time to flush, because changed tables fill a cache?"""
        return self.l2.crowded or self.refcount_blocks.crowded

    def flush(self, release: Callable[[], None]) -> None:
        """Make everything durable, in order, then call ``release`` to give up what no entry refers to any more.

        Raises the file's errors; what was not made durable stays marked as changed.
        """
        self.flush_refcounts()
        if self.l2.dirty:
            tables = self.l2.write_back()
            self._file.flush()
            self.l2.settle(tables)
        if self.l1.dirty:
            self.l1.write_back()
            self._file.flush()
            self.l1.settle()
        release()
        # Counts that went down: a crash before they are durable only leaks, so no sync.
        if self.refcount_blocks.dirty:
            self.refcount_blocks.settle(self.refcount_blocks.write_back())

    def flush_refcounts(self) -> None:
        """Data, refcount blocks and the refcount table durable: what must come before any new mapping."""
        blocks = self.refcount_blocks.write_back()
        if self.data is not self._file:
            self.data.flush()
        self._file.flush()
        self.refcount_blocks.settle(blocks)
        if self.refcount_table.dirty:
            self.refcount_table.write_back()
            self._file.flush()
            self.refcount_table.settle()

    def trim(self) -> None:
        """Between operations: back below the size limits."""
        self.l2.trim()
        self.refcount_blocks.trim()
