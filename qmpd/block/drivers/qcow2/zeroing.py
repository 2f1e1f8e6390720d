"""Zeroing and discarding by metadata (spec/qcow2.md section 8). Any worker thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from qmpd.block.drivers.qcow2.clusters import Clusters
from qmpd.block.drivers.qcow2.image import Image
from qmpd.block.drivers.qcow2.inflight import Claim
from qmpd.block.drivers.qcow2.reading import Reader
from qmpd.block.drivers.qcow2.tables import I64, U64, Bools
from qmpd.block.drivers.qcow2.writing import Writer
from qmpd.units import MIB, align_down, align_up

#: Zeros written where metadata cannot say it, in pieces of this size.
_ZEROES: Final = bytes(1 * MIB)


class Eraser:
    """Makes ranges read as zeros, or gives them up."""

    def __init__(self, image: Image, clusters: Clusters, reader: Reader, writer: Writer) -> None:
        self._image = image
        self._clusters = clusters
        self._reader = reader
        self._writer = writer
        self._geometry = image.geometry
        #: Pass discards of the guest on to the file?
        self.pass_discard = True

    @property
    def _may_uncover(self) -> bool:
        """Could an unallocated cluster show somebody else's bytes?"""
        return self._reader.backing is not None or self._image.header.backing is not None

    # -- zero ------------------------------------------------------------------------------------------------------

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """The range reads as zeros afterwards. Whole units by flag (v3), edges by writing."""
        end = offset + length
        if self._image.header.version < 3:
            self._zero_v2(offset, end, unmap=unmap)
            return
        unit = self._geometry.unit_size
        low = align_up(offset, unit)
        high = end if end >= self._reader.size else align_down(end, unit)
        if low >= high:
            self._write_zeroes(offset, end)
            return
        self._write_zeroes(offset, low)
        for first, last in self._by_table(low, align_up(high, unit)):
            self._zero_units(first, last, unmap=unmap)
        self._write_zeroes(high, end)

    def _zero_v2(self, offset: int, end: int, *, unmap: bool) -> None:
        """Version 2 has no zero flag: only an unallocated cluster without backing reads as zeros by itself."""
        size = self._geometry.cluster_size
        low = align_up(offset, size)
        high = end if end >= self._reader.size else align_down(end, size)
        if not unmap or self._may_uncover or low >= high:
            self._write_zeroes(offset, end)
            return
        self._write_zeroes(offset, low)
        self.drop_range(low, align_up(high, size))
        self._write_zeroes(high, end)

    def _write_zeroes(self, start: int, end: int) -> None:
        """By writing, unless it is known to be zero already."""
        if start >= end or self._reader.reads_as_zero(start, end - start):
            return
        for offset in range(start, end, len(_ZEROES)):
            self._writer.write(offset, memoryview(_ZEROES)[: min(len(_ZEROES), end - offset)])

    def _zero_units(self, start: int, end: int, *, unmap: bool) -> None:
        """Set zero flags for ``[start, end)``: whole units, within one L2 table."""
        geometry = self._geometry
        first, last = start >> geometry.cluster_bits, (end - 1) >> geometry.cluster_bits
        clusters = np.arange(first, last + 1, dtype=np.int64)
        wanted = np.full(len(clusters), self._clusters.all_units, np.uint64)
        if geometry.extended:
            mask = (geometry.cluster_size - 1, geometry.unit_size)
            wanted[-1] &= np.uint64((1 << ((((end - 1) & mask[0]) // mask[1]) + 1)) - 1)
            wanted[0] &= np.uint64(self._clusters.all_units & ~((1 << ((start & mask[0]) // mask[1])) - 1))
        if self._image.header.raw_data:
            self._zero_in_place(start, end, clusters, wanted, unmap=unmap)
            return
        by_writing = self._set_zero(clusters, wanted, unmap=unmap)
        # A compressed cluster has no flags per sub-cluster.
        for cluster in by_writing.tolist():
            low = max(start, cluster << geometry.cluster_bits)
            high = min(end, (cluster + 1) << geometry.cluster_bits, self._reader.size)
            self._write_zeroes(low, high)

    def _set_zero(self, clusters: I64, wanted: U64, *, unmap: bool) -> I64:
        """Set the ``wanted`` zero flags; returns the clusters where that is impossible."""
        image = self._image
        with image.lock:
            self._start(clusters)
            states = self._clusters.load(clusters)
            whole = wanted == np.uint64(self._clusters.all_units)
            impossible = states.compressed & ~whole
            drop = (whole & unmap) | states.compressed
            host = np.where(drop, np.uint64(0), states.host)
            entries = self._clusters.compose(
                host, states.allocated & ~wanted, states.zero | wanted, states.exclusive & ~drop
            )
            change = (entries != states.entries).any(axis=1) & ~impossible
            self._replace(clusters, states.entries, entries, change, dropped=change & drop, discard=self.pass_discard)
            rest: I64 = clusters[impossible]
            return rest

    def _zero_in_place(self, start: int, end: int, clusters: I64, wanted: U64, *, unmap: bool) -> None:
        """Zeros in ``[start, end)`` of a data file that must say by itself what the guest sees.

        Flags say it where the file is not looked at.
        """
        image = self._image
        with image.lock:
            self._start(clusters)
            states = self._clusters.load(clusters)
            stop = min(end, self._reader.size, image.data.length)
            if stop > start and (states.allocated & wanted).any():
                image.data.write_zeroes(start, stop - start, unmap=unmap)
            zero = states.zero | (wanted & ~states.allocated)
            entries = self._clusters.compose(states.host, states.allocated, zero, states.exclusive)
            change: Bools = (entries != states.entries).any(axis=1)
            self._replace(clusters, states.entries, entries, change, dropped=np.zeros_like(change), discard=False)

    # -- discard ---------------------------------------------------------------------------------------------------

    def discard(self, offset: int, length: int) -> None:
        """Give up whole clusters inside the range, without ever showing what lies below."""
        size = self._geometry.cluster_size
        end = offset + length
        low = align_up(offset, size)
        high = align_up(end, size) if end >= self._reader.size else align_down(end, size)
        uncovers = self._may_uncover
        if low >= high or (uncovers and self._image.header.version < 3):
            return
        for first, last in self._by_table(low, high):
            if self._image.header.version < 3:
                self.drop(first // size, last // size, discard=self.pass_discard)
            elif self._image.header.raw_data:
                if self.pass_discard and (uncovers or self._has_table(first)):
                    self._zero_units(first, last, unmap=True)
            else:
                self._discard_clusters(np.arange(first // size, last // size, dtype=np.int64), every=uncovers)

    def _discard_clusters(self, clusters: I64, *, every: bool) -> None:
        """Turn allocated clusters (all of them, if ``every``) into plain zeros."""
        with self._image.lock:
            if not every and not self._has_table(int(clusters[0]) << self._geometry.cluster_bits):
                return
            self._start(clusters)
            states = self._clusters.load(clusters)
            zero = np.full(len(clusters), self._clusters.all_units, np.uint64)
            nothing = np.zeros(len(clusters), np.uint64)
            entries = self._clusters.compose(nothing, nothing, zero, np.zeros(len(clusters), np.bool_))
            change: Bools = (entries != states.entries).any(axis=1)
            if not every:
                change = change & (states.mapped | states.compressed)
            self._replace(clusters, states.entries, entries, change, dropped=change, discard=self.pass_discard)

    def _has_table(self, offset: int) -> bool:
        """Is there an L2 table for the guest offset? Lock held."""
        return self._clusters.table(offset >> self._geometry.span_bits) is not None

    def drop(self, first: int, end: int, *, discard: bool) -> None:
        """Make clusters ``[first, end)``, within one L2 table, unallocated.

        The bytes in a data file stay: they may go when nothing on disk refers to them any more.
        """
        clusters = np.arange(first, end, dtype=np.int64)
        with self._image.lock:
            if self._clusters.table(first >> self._geometry.l2_bits) is None:
                return
            self._start(clusters)
            states = self._clusters.load(clusters)
            change: Bools = np.asarray(states.entries.any(axis=1))
            discard = discard and not self._geometry.external
            self._replace(
                clusters, states.entries, np.zeros_like(states.entries), change, dropped=change, discard=discard
            )

    def drop_range(self, start: int, end: int) -> None:
        """Make whole clusters unallocated, whatever then shows from below (bytes)."""
        size = self._geometry.cluster_size
        for first, last in self._by_table(start, end):
            self.drop(first // size, last // size, discard=self.pass_discard)

    # -- shared ----------------------------------------------------------------------------------------------------

    def _start(self, clusters: I64) -> None:
        """Wait for those who remap these clusters. Lock held."""
        bits = self._geometry.cluster_bits
        self._writer.begin()
        self._image.inflight.wait(int(clusters[0]) << bits, (int(clusters[-1]) + 1) << bits)

    def _replace(self, clusters: I64, old: U64, new: U64, change: Bools, *, dropped: Bools, discard: bool) -> None:
        """Store the changed entries and free what the dropped ones held. Lock held."""
        if not change.any():
            return
        if dropped.any():
            self._clusters.check_dropped(old[dropped])
        self._clusters.store(clusters[change], new[change])
        if dropped.any():
            self._image.alloc.free_later(self._clusters.host_clusters(old[dropped]), discard=discard)
        if discard and self._geometry.external:
            self._discard_data(clusters[dropped & self._geometry.mapped(old[:, 0])])
        self._image.settle()

    def _discard_data(self, clusters: I64) -> None:
        """Give up what a data file has of these clusters, at once: the next to write there will get the same place.

        The old entries may still be on disk then, but what was discarded or zeroed may be zeros after a crash too.
        """
        if not len(clusters):
            return
        size, end = self._geometry.cluster_size, min(self._reader.size, self._image.data.length)
        heads = np.flatnonzero(np.diff(clusters, prepend=-2) != 1)
        for first, last in zip(heads, np.append(heads[1:], len(clusters)) - 1, strict=True):
            low, high = int(clusters[first]) * size, min((int(clusters[last]) + 1) * size, end)
            if high > low:
                self._image.data.discard(low, high - low)

    def _by_table(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """``[start, end)`` cut where L2 tables end."""
        span = self._geometry.span
        while start < end:
            stop = min(end, align_down(start, span) + span)
            yield start, stop
            start = stop

    def claim_everything(self) -> Claim:
        """Keep all others from remapping anything (resizing); lock held."""
        claim = Claim(0, 1 << 63)
        self._image.inflight.claim(claim)
        return claim
