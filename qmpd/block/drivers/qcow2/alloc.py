"""Finding, taking and giving up host clusters (spec/qcow2.md sections 5 and 6).

Allocation only changes refcount blocks in memory; :meth:`MetadataCache.flush` brings them to disk before any mapping
that relies on them. Moving the refcount table itself is rare, and synced on the spot. Called with the image lock held.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from qmpd.block.debug import Event
from qmpd.block.drivers.qcow2.cache import Table
from qmpd.block.drivers.qcow2.header import MAX_REFCOUNT_TABLE
from qmpd.block.drivers.qcow2.tables import I64, MAX_HOST, U64, Bools
from qmpd.errors import Kind, QmpdError, strerror
from qmpd.units import ceil_div

if TYPE_CHECKING:
    from qmpd.block.drivers.qcow2.image import Image

#: Counts looked at in one go when searching; a few microseconds' worth.
_WINDOW: Final = 1024


class Freed(NamedTuple):
    """Clusters whose entries are gone from memory, but maybe not from disk yet."""

    clusters: I64
    discard: bool
    stamp: int


class Allocator:
    """The next-free cursor and the list of clusters on their way out."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._refcounts = image.refcounts
        self._cursor = 1
        #: No cluster from here on was ever written: they read as zeros once the file reaches them.
        self.virgin = ceil_div(image.file_end, image.geometry.cluster_size)
        self._freed: list[Freed] = []
        #: Clusters taken, for whatever use, less those free again, since the image was opened.
        self.balance = 0
        #: Where the file ended at first: what lay behind was nobody's.
        self._old_end = self.virgin
        #: By refcount block, which clusters of the old file were taken since: entries older than that must not refer
        #: to them.
        self._taken: dict[int, Bools] = {}

    # -- taking ----------------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> I64:
        """``count`` clusters with their counts set to 1, in ascending order, neighbours wherever space allows.

        Raises CORRUPT if metadata is known to lie there, EFBIG past the format's limits; then nothing is taken.
        """
        self._image.announce(Event.CLUSTER_ALLOC)
        found: list[I64] = []
        try:
            while count:
                taken = self._take_here(count)
                count -= len(taken)
                found.append(taken)
        except QmpdError:
            self.balance += sum(map(len, found))
            self.give_back(np.concatenate(found) if found else np.empty(0, np.int64))
            raise
        clusters = found[0] if len(found) == 1 else np.concatenate(found)
        self.balance += len(clusters)
        return self._accept(clusters)

    def allocate_one(self) -> int:
        """One cluster; as :meth:`allocate`, without arrays where the cursor stands on a free cluster."""
        image, cluster = self._image, self._cursor
        index, position = divmod(cluster, self._refcounts.per_block)
        block = self._refcounts.block(index)
        end = (cluster + 1) * image.geometry.cluster_size
        fits = end <= MAX_HOST and (getattr(image.file, "growable", False) or end <= image.file.length)
        if block is None or block.data[position] or not fits or image.overlap.at(cluster):
            return int(self.allocate(1)[0])
        image.announce(Event.CLUSTER_ALLOC)
        block.data[position] = 1
        self.balance += 1
        if cluster < self._old_end:
            self._note_taken(index, slice(position, position + 1))
        image.meta.refcount_blocks.touch(block, position, position + 1)
        self._cursor = cluster + 1
        self.virgin = max(self.virgin, cluster + 1)
        return cluster

    def _take_here(self, count: int) -> I64:
        """Free clusters from the cursor on, within one refcount block; moves the cursor."""
        index, position = divmod(self._cursor, self._refcounts.per_block)
        block = self._writable_block(index)
        window = block.data[position : position + max(count, _WINDOW)]
        free = np.flatnonzero(window == 0)[:count]
        base = index * self._refcounts.per_block + position
        self._cursor = base + (int(free[-1]) + 1 if len(free) == count else len(window))
        if len(free):
            window[free] = 1
            if base < self._old_end:
                self._note_taken(index, free + position)
            self._image.meta.refcount_blocks.touch(block, position + int(free[0]), position + int(free[-1]) + 1)
        return free + base

    def allocate_run(self, count: int) -> int:
        """The first of ``count`` neighbouring clusters, taken."""
        self._image.announce(Event.CLUSTER_ALLOC)
        first = self._find_run(count)
        self.balance += count
        if first is None:
            return int(self._accept(np.arange(count, dtype=np.int64) + self._append_region(count))[0])
        clusters = np.arange(first, first + count, dtype=np.int64)
        self._refcounts.add(clusters, +1)
        index = first // self._refcounts.per_block
        if first < self._old_end:
            self._note_taken(index, clusters - index * self._refcounts.per_block)
        return int(self._accept(clusters)[0])

    def _note_taken(self, index: int, positions: I64 | slice) -> None:
        taken = self._taken.get(index)
        if taken is None:
            taken = self._taken[index] = np.zeros(self._refcounts.per_block, np.bool_)
        taken[positions] = True

    def newcomer(self, clusters: I64) -> int | None:
        """The first of ``clusters`` that came into use after the image was opened, or lies behind its old end."""
        index = clusters // self._refcounts.per_block
        new = clusters >= self._old_end
        for block in np.unique(index).tolist():
            taken = self._taken.get(block)
            if taken is not None:
                mask = index == block
                new[mask] |= taken[clusters[mask] - block * self._refcounts.per_block]
        return int(clusters[int(new.argmax())]) if new.any() else None

    def _find_run(self, count: int) -> int | None:
        """A gap in the blocks that exist, from the cursor on."""
        per_block = self._refcounts.per_block
        start = self._cursor
        for index in range(start // per_block, len(self._image.meta.refcount_table)):
            block = self._refcounts.block(index)
            base = index * per_block
            if block is None:
                start = base + per_block
                continue
            used = np.flatnonzero(block.data) + base
            edges = np.concatenate(([start - 1], used[used >= start], [base + per_block]))
            gaps = np.flatnonzero(np.diff(edges) > count)
            if len(gaps):
                return int(edges[gaps[0]]) + 1
            start = int(edges[-2]) + 1
        return None

    def _accept(self, clusters: I64) -> I64:
        """Last checks on fresh clusters, before anybody uses them."""
        size = self._image.geometry.cluster_size
        if int(clusters[-1] + 1) * size > MAX_HOST:
            self.give_back(clusters)
            raise QmpdError(strerror(errno.EFBIG), Kind.IO, errno=errno.EFBIG)
        if int(clusters[-1] + 1) * size > self._image.file.length and not getattr(self._image.file, "growable", False):
            self.give_back(clusters)
            raise QmpdError(strerror(errno.ENOSPC), Kind.NO_SPACE, errno=errno.ENOSPC)
        name = self._image.overlap.any(clusters)
        if name:
            raise self._image.corruption(
                f"Preventing invalid allocation at offset {int(clusters[0]) * size:#x} ({name})"
            )
        self.virgin = max(self.virgin, int(clusters[-1]) + 1)
        return clusters

    # -- refcount blocks and table ---------------------------------------------------------------------------------

    def _writable_block(self, index: int) -> Table:
        """Refcount block ``index``; a missing one is created, describing itself in its first count."""
        while True:
            block = self._refcounts.block(index)
            if block is not None:
                return block
            if index >= len(self._image.meta.refcount_table):
                self._append_region(0)
                continue
            self._add_blocks(index, index * self._refcounts.per_block, 1, 1)

    def _add_blocks(self, index: int, first: int, count: int, used: int) -> None:
        """New blocks number ``index``... at clusters ``first``...; the first ``used`` clusters they cover count 1."""
        image, per_block = self._image, self._refcounts.per_block
        image.announce(Event.REFBLOCK_ALLOC)
        clusters = np.arange(first, first + count, dtype=np.int64)
        name = image.overlap.any(clusters)
        if name or not first:
            raise image.corruption(
                f"Preventing invalid allocation of refcount block at offset {first * image.geometry.cluster_size:#x}"
            )
        for i in range(count):
            data = self._refcounts.codec.empty(per_block)
            data[: max(0, used - i * per_block)] = 1
            offset = (first + i) * image.geometry.cluster_size
            image.meta.refcount_blocks.create(offset, data)
            image.meta.refcount_table[index + i] = offset
            image.overlap.blocks.add(first + i)
        self.balance += count
        self.virgin = max(self.virgin, first + count)

    def _append_region(self, extra: int) -> int:
        """Cover new ground behind the last block: blocks, a bigger table if they need it, ``extra`` clusters.

        All of it is counted as used. Returns the first of the extra clusters.
        """
        table = self._image.meta.refcount_table
        last = np.flatnonzero(table.entries)
        index = int(last[-1]) + 1 if len(last) else 0
        start = index * self._refcounts.per_block
        blocks, table_clusters = self._plan_region(index, extra)
        used = blocks + table_clusters + extra
        if (start + used) * self._image.geometry.cluster_size > MAX_HOST:
            raise QmpdError(strerror(errno.EFBIG), Kind.IO, errno=errno.EFBIG)
        old = table.entries
        if table_clusters:
            self._image.announce(Event.REFTABLE_GROW)
            table.entries = np.zeros(table_clusters * self._image.geometry.cluster_size // 8, np.uint64)
            table.entries[: len(old)] = old
        try:
            self._add_blocks(index, start, blocks, used)
            if table_clusters:
                self._move_table(start + blocks, table_clusters)
        except QmpdError:
            self._forget_blocks(index, start, blocks)
            table.entries = old
            raise
        return start + blocks + table_clusters

    def _forget_blocks(self, index: int, first: int, count: int) -> None:
        """Undo :meth:`_add_blocks`, before anything on disk points there."""
        for i in range(count):
            self._image.meta.refcount_blocks.forget((first + i) * self._image.geometry.cluster_size)
            self._image.meta.refcount_table.revert(index + i)
            self._image.overlap.blocks.discard(first + i)
        self.balance -= count

    def _plan_region(self, index: int, extra: int) -> tuple[int, int]:
        """Blocks and table clusters that a region starting at block ``index`` needs."""
        size, per_block = self._image.geometry.cluster_size, self._refcounts.per_block
        have = len(self._image.meta.refcount_table)
        blocks, table_clusters = 1, 0
        while True:
            if blocks * per_block < blocks + table_clusters + extra:
                blocks += ceil_div(blocks + table_clusters + extra - blocks * per_block, per_block)
            elif index + blocks > max(have, table_clusters * size // 8):
                # Half as much again, so that growing costs little on average.
                table_clusters = ceil_div(max(index + blocks, have * 3 // 2) * 8, size)
            else:
                break
        if table_clusters * size > MAX_REFCOUNT_TABLE:
            raise QmpdError(strerror(errno.EFBIG), Kind.IO, errno=errno.EFBIG)
        return blocks, table_clusters

    def _move_table(self, first: int, clusters: int) -> None:
        """Write the refcount table to its new place and point the header there, durably."""
        image, size = self._image, self._image.geometry.cluster_size
        table, old = image.meta.refcount_table, image.header
        image.announce(Event.REFBLOCK_ALLOC_WRITE_BLOCKS)
        blocks = image.meta.refcount_blocks.write_back()
        image.announce(Event.REFBLOCK_ALLOC_WRITE_TABLE)
        image.file.write(first * size, table.entries.astype(">u8").tobytes())
        image.file.flush()
        image.announce(Event.REFBLOCK_ALLOC_SWITCH_TABLE)
        image.write_header_field(48, struct.pack(">QI", first * size, clusters))
        image.meta.refcount_blocks.settle(blocks)
        table.offset = first * size
        table.settle()
        self.balance += clusters
        image.header = replace(old, refcount_table_offset=first * size, refcount_table_clusters=clusters)
        image.note_areas()
        gone = old.refcount_table_offset // size + np.arange(old.refcount_table_clusters, dtype=np.int64)
        self._drop(gone)
        self.virgin = max(self.virgin, first + clusters)

    # -- giving up -------------------------------------------------------------------------------------------------

    def give_back(self, clusters: I64, *, discard: bool = False) -> None:
        """References that no entry on disk holds, or ever held: given up at once."""
        if len(clusters):
            gone = self._drop(clusters)
            if discard and len(gone):
                self._pass_discard(gone)

    def give_back_one(self, cluster: int) -> None:
        """The same for a single cluster."""
        self._drop(np.array([cluster], np.int64))

    def free_later(self, clusters: I64, *, discard: bool = False) -> None:
        """References that no entry in memory holds any more: given up once that is durable."""
        if len(clusters):
            self._freed.append(Freed(clusters, discard, self._image.inflight.now))

    @property
    def waiting(self) -> bool:
        """Are there clusters to give up at the next flush?"""
        return bool(self._freed)

    def release(self) -> None:
        """The entries that dropped the freed clusters are durable: count them down, unless I/O may still hit them."""
        freed, self._freed = self._freed, []
        for item in freed:
            if not self._image.inflight.finished(item.stamp):
                self._freed.append(item)
                continue
            gone = self._drop(item.clusters)
            if item.discard and len(gone):
                self._pass_discard(gone)

    def _drop(self, clusters: I64) -> I64:
        """Lower counts; returns the clusters that are free now."""
        self._image.announce(Event.CLUSTER_FREE)
        self._refcounts.add(clusters, -1)
        clusters = np.unique(clusters)
        gone: I64 = clusters[self._refcounts.get_many(clusters) == 0]
        self.balance -= len(gone)
        if len(gone):
            self._cursor = min(self._cursor, int(gone[0]))
        return gone

    def lower(self, clusters: I64, counts: U64) -> None:
        """Give up references that nobody holds: ``counts`` are those that ascending ``clusters`` should have."""
        self._refcounts.lower_to(clusters, counts)
        gone = clusters[counts == 0]
        if len(gone):
            self._cursor = min(self._cursor, int(gone[0]))
            self._pass_discard(gone)

    def _pass_discard(self, clusters: I64) -> None:
        size = self._image.geometry.cluster_size
        heads = np.flatnonzero(np.diff(clusters, prepend=-2) != 1)
        for first, last in zip(heads, np.append(heads[1:], len(clusters)) - 1, strict=True):
            low, high = int(clusters[first]) * size, (int(clusters[last]) + 1) * size
            high = min(high, self._image.file.length)
            if high > low:
                self._image.file.discard(low, high - low)

    def start_over(self, cluster: int) -> None:
        """From ``cluster`` on everything is free."""
        self._cursor = cluster

    def rewind(self, virgin: int) -> None:
        """The file was cut to ``virgin`` clusters."""
        self.virgin = virgin
        self._cursor = min(self._cursor, virgin)

    def last_used(self) -> int:
        """The highest cluster in use, by its count."""
        table = self._image.meta.refcount_table
        for index in np.flatnonzero(table.entries)[::-1].tolist():
            block = self._refcounts.block(index)
            if block is not None and block.data.any():
                return int(index * self._refcounts.per_block + np.flatnonzero(block.data)[-1])
        return 0
