"""The writing half: data into clusters, in place or copied (spec/qcow2.md sections 5 and 6). Any worker thread.

A request that needs new mappings goes through three steps: *plan* under the lock (claim the range, take clusters, make
L2 tables), move data without it, *publish* under it. A failure before publishing gives everything back. Nothing is
synced here: the cache's flush puts data and counts on disk before the entries that rely on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from types import TracebackType
from typing import Final

import numpy as np

from qmpd.block.debug import Event
from qmpd.block.drivers.qcow2.clusters import Clusters, States
from qmpd.block.drivers.qcow2.copied import refresh_flags
from qmpd.block.drivers.qcow2.header import BITMAPS, DIRTY, KNOWN_AUTOCLEAR
from qmpd.block.drivers.qcow2.image import Image
from qmpd.block.drivers.qcow2.inflight import Claim
from qmpd.block.drivers.qcow2.reading import Reader
from qmpd.block.drivers.qcow2.repair import rebuild_refcounts
from qmpd.block.drivers.qcow2.single import Single
from qmpd.block.drivers.qcow2.tables import I64, MAX_HOST, U64, Bools
from qmpd.block.extents import RunKind, Runs
from qmpd.errors import Kind, QmpdError
from qmpd.units import MIB

#: Larger writes are cut into pieces of this size, so that none holds up its neighbours for long.
_PIECE: Final = 64 * MIB


@dataclass(slots=True)
class Plan:
    """Where a request's clusters go: one row per guest cluster."""

    claim: Claim
    clusters: I64
    states: States
    #: Host byte offset each cluster will have.
    host: U64
    #: Rows with a cluster taken for this request.
    fresh: Bools
    #: Taken clusters from this index on were never written before, hence read as zeros.
    virgin: int


class Writer:
    """Writes one image."""

    def __init__(self, image: Image, clusters: Clusters, reader: Reader) -> None:
        self._image = image
        self._clusters = clusters
        self._reader = reader
        self._geometry = image.geometry
        self._single = Single(image, clusters, reader, self.begin)
        self._ready = False
        self._bitmaps_dropped = False

    # -- before the first write ------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make sure that the image may be written: structure sound, refcounts right, unknown promises revoked.

        Lock held or nobody else there. Raises CORRUPT with nothing written, except that a dirty image is repaired.
        """
        image = self._image
        if self._ready:
            return
        image.check_structure()
        if image.header.incompatible & DIRTY:
            rebuild_refcounts(image)
            refresh_flags(image)
            image.set_dirty_bit(on=False)
        else:
            image.check_refcounts()
            size = image.geometry.cluster_size
            image.meta.refcount_table.complete(image.header.refcount_table_clusters * size // 8)
        known = image.header.autoclear & KNOWN_AUTOCLEAR
        if known != image.header.autoclear:
            image.write_header(replace(image.header, autoclear=known))
        self._ready = True

    def begin(self) -> None:
        """Start of every change to guest data; lock held."""
        if self._image.read_only:
            raise QmpdError("Block node is read-only", Kind.PERMISSION)
        self._image.check_alive()
        if not self._ready:
            self.prepare()
        if not self._bitmaps_dropped:
            header = self._image.header
            if header.autoclear & BITMAPS:
                self._image.write_header(replace(header, autoclear=header.autoclear & ~BITMAPS))
                self._image.bitmaps = []
                self._image.note_areas()
            self._bitmaps_dropped = True

    @property
    def has_begun(self) -> bool:
        """Has :meth:`begin` nothing to do, nor to refuse? Lock held."""
        return self._ready and self._bitmaps_dropped and not self._image.read_only and self._image.is_alive

    def reset(self) -> None:
        """The image became read-only: check again before it is written again."""
        self._ready = self._bitmaps_dropped = False

    # -- write -----------------------------------------------------------------------------------------------------

    def write(self, offset: int, data: memoryview) -> None:
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            if not self._single.write(offset + start, piece):
                self._write_mapped(offset + start, piece)

    def _write_mapped(self, offset: int, data: memoryview) -> None:
        geometry = self._geometry
        end = offset + len(data)
        first, last = offset >> geometry.cluster_bits, (end - 1) >> geometry.cluster_bits
        with self.remapping(np.arange(first, last + 1, dtype=np.int64)) as plan:
            needed = np.full(len(plan.clusters), self._clusters.all_units, np.uint64)
            for row in {0, last - first}:
                base = (first + row) << geometry.cluster_bits
                inner = max(0, offset - base), min(geometry.cluster_size, end - base)
                needed[row] = self._fill_around(plan, row, *inner)
            for row, count in _neighbours(plan.host, geometry.cluster_size):
                low = max(offset, (first + row) << geometry.cluster_bits)
                high = min(end, (first + row + count) << geometry.cluster_bits)
                host = int(plan.host[row]) + (low & (geometry.cluster_size - 1))
                self._image.announce(Event.WRITE_AIO)
                self._image.data.write(host, data[low - offset : high - offset])
            with self._image.lock:
                self._publish(plan, needed)

    # -- plan, publish ---------------------------------------------------------------------------------------------

    @contextmanager
    def remapping(self, clusters: I64) -> Iterator[Plan]:
        """Claim ``clusters`` (ascending) and give each a host cluster of its own.

        Left without :meth:`_publish`, by an exception, it gives the new ones back.
        """
        image = self._image
        with image.lock:
            self.begin()
            claim = _claim(clusters, self._geometry.cluster_size)
            image.inflight.claim(claim)
            try:
                plan = self._plan(claim, clusters)
            except BaseException:
                image.inflight.unclaim(claim)
                raise
        try:
            yield plan
        except BaseException:
            if not self._geometry.external:
                with image.lock:
                    image.alloc.give_back(plan.host[plan.fresh].astype(np.int64) // self._geometry.cluster_size)
            raise
        finally:
            with image.lock:
                image.inflight.unclaim(claim)
        with image.lock:
            image.settle()

    def _plan(self, claim: Claim, clusters: I64) -> Plan:
        image, size = self._image, self._geometry.cluster_size
        states = self._clusters.load(clusters)
        self._clusters.vet_tables(clusters)
        self._clusters.check_exclusive(states, states.exclusive)
        fresh = ~states.exclusive
        self._clusters.check_dropped(states.entries[fresh])
        self._clusters.reserve_tables(clusters)
        if self._geometry.external:
            image.check_room(min(int(clusters[-1] + 1) * size, self._reader.size))
            return Plan(claim, clusters, states, (clusters * size).astype(np.uint64), fresh, MAX_HOST)
        host = states.host.copy()
        virgin = image.alloc.virgin
        count = int(fresh.sum())
        if count:
            host[fresh] = (image.alloc.allocate(count) * size).astype(np.uint64)
        return Plan(claim, clusters, states, host, fresh, virgin)

    def _publish(self, plan: Plan, needed: U64) -> None:
        """Point the entries at the plan's clusters; ``needed`` units hold data now. Lock held."""
        states, fresh = plan.states, plan.fresh
        kept = np.where(fresh, np.uint64(0), states.allocated)
        entries = self._clusters.compose(plan.host, kept | needed, states.zero & ~needed, np.ones(len(fresh), np.bool_))
        self._clusters.store(plan.clusters, entries)
        if fresh.any():
            self._image.alloc.free_later(self._clusters.host_clusters(states.entries[fresh]))

    # -- copy-on-write ---------------------------------------------------------------------------------------------

    def _fill_around(self, plan: Plan, row: int, low: int, high: int) -> int:
        """Copy what must come along when bytes ``[low, high)`` of a cluster are written. Returns the units needed."""
        states = plan.states
        needed = self._geometry.touched(low, high)
        if states.compressed[row]:
            needed = self._clusters.all_units
        allocated = int(states.allocated[row])
        present = 0
        if plan.fresh[row]:
            needed |= allocated
        else:
            present = allocated
        virgin = bool(plan.fresh[row]) and int(plan.host[row]) >= plan.virgin * self._geometry.cluster_size
        base = int(plan.clusters[row]) << self._geometry.cluster_bits
        for start, stop in self._stretches(needed & ~present):
            for begin, end in ((start, min(stop, low)), (max(start, high), stop)):
                if begin < end:
                    self._copy(base + begin, int(plan.host[row]) + begin, end - begin, virgin=virgin)
        return needed

    def _copy(self, guest: int, host: int, length: int, *, virgin: bool) -> None:
        if self._geometry.external:  # a data file ends with the disk
            length = max(0, min(length, self._reader.size - guest))
        content = bytearray(length)
        self._image.announce(Event.COW_READ)
        self._reader.readinto(guest, memoryview(content))
        if virgin and content == bytes(length):
            return  # the file reads as zeros there already
        self._image.announce(Event.COW_WRITE)
        self._image.data.write(host, content)

    def _stretches(self, units: int) -> Iterator[tuple[int, int]]:
        """Byte ranges within a cluster of neighbouring units in a mask."""
        size = self._geometry.unit_size
        start = None
        for unit in range(self._geometry.units + 1):
            wanted = units >> unit & 1
            if wanted and start is None:
                start = unit
            elif not wanted and start is not None:
                yield start * size, unit * size
                start = None

    # -- place -----------------------------------------------------------------------------------------------------

    def place(self, offset: I64, length: I64) -> AbstractContextManager[Runs]:
        """Whole clusters for a caller who fills them (see BlockDevice.place), several ranges at once."""
        return self._place(offset, length)

    def place_one(self, offset: int, length: int) -> AbstractContextManager[Runs]:
        """The same for one range."""
        return _PlaceOne(self, offset, length)

    def begin_place(self, offset: int, length: int) -> AbstractContextManager[Runs]:
        """The way to place one range; a short one for a single cluster. It may be under way already."""
        if length == self._geometry.cluster_size:
            single = self._single.place(offset)
            if single is not None:
                return single
        return self._place(np.array([offset], np.int64), np.array([length], np.int64))

    @contextmanager
    def _place(self, offset: I64, length: I64) -> Iterator[Runs]:
        geometry = self._geometry
        clusters = _cluster_numbers(offset, length, geometry.cluster_bits)
        with self.remapping(clusters) as plan:
            self._image.announce(Event.WRITE_AIO)
            yield self._placed(plan, int(offset[-1] + length[-1]))
            self._clear_tail(plan, int(offset[-1] + length[-1]))
            with self._image.lock:
                self._publish(plan, np.full(len(clusters), self._clusters.all_units, np.uint64))

    def _placed(self, plan: Plan, end: int) -> Runs:
        size = self._geometry.cluster_size
        clusters, host = plan.clusters, plan.host.astype(np.int64)
        if len(clusters) == 1:
            only = int(clusters[0]) * size
            return Runs.single(only, min(end, only + size) - only, RunKind.DATA, int(host[0]))
        fresh = np.empty(len(clusters), np.bool_)
        fresh[0] = True
        fresh[1:] = (np.diff(clusters) != 1) | (np.diff(host) != size)
        head = np.flatnonzero(fresh)
        start = clusters[head] * size
        length = np.diff(np.append(head, len(clusters))) * size
        length[-1] = min(int(length[-1]), end - int(start[-1]))
        return Runs(start, length, np.full(len(head), RunKind.DATA, np.uint8), host[head])

    def _clear_tail(self, plan: Plan, end: int) -> None:
        """Behind the end of the disk there must be zeros, or growing it would show old bytes.

        Not in a data file, where growing the disk clears them.
        """
        inner = end & (self._geometry.cluster_size - 1)
        if inner and not self._geometry.external:
            host = int(plan.host[-1]) + inner
            self._image.file.write_zeroes(host, self._geometry.cluster_size - inner)


class _PlaceOne:
    """Starts placing on entry, not when made: one that is never entered holds nothing."""

    __slots__ = ("_length", "_offset", "_way", "_writer")

    def __init__(self, writer: Writer, offset: int, length: int) -> None:
        self._writer, self._offset, self._length = writer, offset, length

    def __enter__(self) -> Runs:
        self._way = self._writer.begin_place(self._offset, self._length)
        return self._way.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._way.__exit__(kind, error, trace)


def _claim(clusters: I64, size: int) -> Claim:
    if int(clusters[-1]) - int(clusters[0]) == len(clusters) - 1:
        return Claim(int(clusters[0]) * size, int(clusters[-1]) * size + size)
    return Claim(int(clusters[0]) * size, int(clusters[-1]) * size + size, clusters * size, clusters * size + size)


def _cluster_numbers(offset: I64, length: I64, bits: int) -> I64:
    """All clusters of the given ranges."""
    if len(offset) == 1:
        start = int(offset[0])
        return np.arange(start >> bits, ((start + int(length[0]) - 1) >> bits) + 1, dtype=np.int64)
    first = offset >> bits
    count = ((offset + length - 1) >> bits) + 1 - first
    before = np.cumsum(count) - count
    return np.repeat(first - before, count) + np.arange(int(count.sum()), dtype=np.int64)


def _neighbours(host: U64, size: int) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of clusters that follow each other in the file."""
    heads = [0, *(np.flatnonzero(np.diff(host.astype(np.int64)) != size) + 1).tolist(), len(host)]
    for first, after in pairwise(heads):
        yield first, after - first
