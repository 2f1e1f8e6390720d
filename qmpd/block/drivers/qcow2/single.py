"""Requests inside one cluster, without arrays: what guests mostly send, ten times faster than the general way.

Everything out of the ordinary (compressed, shared or damaged clusters, copying into extended L2 entries) is left to
:mod:`writing`, which also finds the words for what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final

from qmpd.block.debug import Event
from qmpd.block.drivers.qcow2.inflight import Claim
from qmpd.block.drivers.qcow2.tables import COMPRESSED, COPIED, L2_RESERVED, MAX_HOST, OFFSET_MASK, ZERO
from qmpd.block.extents import RunKind, Runs

if TYPE_CHECKING:
    from qmpd.block.drivers.qcow2.clusters import Clusters
    from qmpd.block.drivers.qcow2.image import Image
    from qmpd.block.drivers.qcow2.reading import Reader

_NOT_IN_PLACE: Final = COMPRESSED | L2_RESERVED


class Remap:
    """One guest cluster claimed for a new mapping; as a context manager, what :meth:`Single.place` gives."""

    __slots__ = ("_claim", "_owner", "cluster", "entry", "fresh", "host", "virgin")

    def __init__(self, owner: Single, claim: Claim, cluster: int, entry: int, host: int, *, virgin: int) -> None:
        self._owner = owner
        self._claim = claim
        self.cluster = cluster
        #: The old entry, and the host byte offset the new one will have.
        self.entry = entry
        self.host = host
        self.fresh = not entry & OFFSET_MASK
        #: A fresh cluster never written before.
        self.virgin = self.fresh and host >= virgin

    def __enter__(self) -> Runs:
        size = self._owner.cluster_size
        return Runs.single(self.cluster * size, size, RunKind.DATA, self.host)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner.finish(self, self._claim, publish=kind is None)


class Single:
    """The short way through an image's metadata."""

    def __init__(self, image: Image, clusters: Clusters, reader: Reader, begin: Callable[[], None]) -> None:
        self._image = image
        self._clusters = clusters
        self._reader = reader
        self._begin = begin
        self._geometry = image.geometry
        self.cluster_size = image.geometry.cluster_size

    def write(self, offset: int, data: memoryview) -> bool:
        """Write if it can be done here; False if not, with nothing changed."""
        bits = self._geometry.cluster_bits
        if offset >> bits != (offset + len(data) - 1) >> bits:
            return False
        if self._write_in_place(offset, data):
            return True
        remap = self._remap(offset >> bits)
        if remap is None:
            return False
        with remap:
            self._fill(remap, offset & (self.cluster_size - 1), data)
        return True

    def place(self, offset: int) -> Remap | None:
        """The cluster at ``offset`` for a caller who fills it; None if it is not an ordinary one."""
        remap = self._remap(offset >> self._geometry.cluster_bits)
        if remap is not None:
            self._image.announce(Event.WRITE_AIO)
        return remap

    # -- in place ------------------------------------------------------------------------------------------------------

    def _write_in_place(self, offset: int, data: memoryview) -> bool:
        image = self._image
        end = offset + len(data)
        with image.lock:
            self._begin()
            image.inflight.wait(offset, end)
            host = self._place_of(offset, end)
            if not host:
                return False
            ticket = image.inflight.enter()
        try:
            image.announce(Event.WRITE_AIO)
            image.data.write(host, data)
        finally:
            image.inflight.leave(ticket)
        return True

    def _place_of(self, offset: int, end: int) -> int:
        """Host offset at which ``[offset, end)``, inside one cluster, may be overwritten; 0 if it may not."""
        geometry = self._geometry
        table = self._clusters.table(offset >> geometry.span_bits)
        if table is None:
            return 0
        self._clusters.vet(table)
        row = table.data[(offset >> geometry.cluster_bits) & (geometry.l2_entries - 1)]
        entry = int(row[0])
        if entry & (_NOT_IN_PLACE | ZERO) or not self._is_own(entry, offset >> geometry.cluster_bits):
            return 0
        inner = offset & (self.cluster_size - 1)
        if geometry.extended:
            touched = geometry.touched(inner, inner + end - offset)
            if int(row[1]) & touched != touched or int(row[1]) >> 32 & touched:
                return 0
        return (entry & OFFSET_MASK) + inner

    def _is_own(self, entry: int, guest: int) -> bool:
        """Is the host cluster this guest cluster's alone, beyond doubt? (spec/qcow2.md section 10)

        For the first cluster of a data file the answer is no, since its offset looks like none.
        """
        image = self._image
        host = entry & OFFSET_MASK
        if self._geometry.external:
            return bool(entry & COPIED and host) and host == guest << self._geometry.cluster_bits
        if not entry & COPIED or not host or host & (self.cluster_size - 1) or host >= image.frontier:
            return False
        cluster = host >> self._geometry.cluster_bits
        return image.refcounts.get(cluster) == 1 and image.overlap.at(cluster) is None

    # -- with a new mapping --------------------------------------------------------------------------------------------

    def _remap(self, cluster: int) -> Remap | None:
        """Claim an unallocated, zero or own cluster and give it a host cluster."""
        image, geometry = self._image, self._geometry
        if geometry.extended:
            return None
        start = cluster << geometry.cluster_bits
        with image.lock:
            self._begin()
            claim = Claim(start, start + self.cluster_size)
            image.inflight.claim(claim)
            try:
                remap = self._take(claim, cluster)
            except BaseException:
                image.inflight.unclaim(claim)
                raise
            if remap is None:
                image.inflight.unclaim(claim)
            return remap

    def _take(self, claim: Claim, cluster: int) -> Remap | None:
        image, l1_index = self._image, cluster >> self._geometry.l2_bits
        table = self._clusters.table(l1_index)
        if table is not None:
            self._clusters.vet(table)
        entry = 0 if table is None else int(table.data[cluster & (self._geometry.l2_entries - 1), 0])
        virgin = image.alloc.virgin << self._geometry.cluster_bits
        if entry & OFFSET_MASK:
            if entry & _NOT_IN_PLACE or (entry & ZERO and image.header.version < 3) or not self._is_own(entry, cluster):
                return None
            return Remap(self, claim, cluster, entry, entry & OFFSET_MASK, virgin=virgin)
        if entry not in (0, ZERO) or (entry and image.header.version < 3):
            return None
        self._clusters.writable_table(l1_index)
        if self._geometry.external:
            image.check_room(min((cluster + 1) * self.cluster_size, self._reader.size))
            return Remap(self, claim, cluster, entry, cluster * self.cluster_size, virgin=MAX_HOST)
        host = image.alloc.allocate_one() << self._geometry.cluster_bits
        return Remap(self, claim, cluster, entry, host, virgin=virgin)

    def finish(self, remap: Remap, claim: Claim, *, publish: bool) -> None:
        """Point the entry at the new place, or give the place back; let others have the cluster again."""
        image = self._image
        published = False
        with image.lock:
            try:
                if publish:
                    self._publish(remap)
                    published = True
            finally:
                if remap.fresh and not published and not self._geometry.external:
                    image.alloc.give_back_one(remap.host >> self._geometry.cluster_bits)
                image.inflight.unclaim(claim)
            image.settle()

    def _publish(self, remap: Remap) -> None:
        table = self._clusters.writable_table(remap.cluster >> self._geometry.l2_bits)
        row = remap.cluster & (self._geometry.l2_entries - 1)
        table.data[row, 0] = remap.host | COPIED
        self._image.meta.l2.touch(table, row, row + 1)

    # -- copy-on-write -------------------------------------------------------------------------------------------------

    def _fill(self, remap: Remap, inner: int, data: memoryview) -> None:
        """Write the whole new cluster: ``data`` at ``inner``, around it what the guest sees there now.

        One that somebody else has mapped since this request was looked at is written in place: around it there may be
        writes on their way that must not be undone.
        """
        image, size = self._image, self.cluster_size
        in_use = not remap.fresh and not remap.entry & ZERO
        if in_use or len(data) == size or (remap.virgin and self._is_blank(remap)):
            image.announce(Event.WRITE_AIO)
            image.data.write(remap.host + inner, data)
            return
        start = remap.cluster * size
        if self._geometry.external:  # a data file ends with the disk
            size = min(size, self._reader.size - start)
        content = memoryview(bytearray(size))
        after = inner + len(data)
        image.announce(Event.COW_READ)
        if inner:
            self._reader.readinto(start, content[:inner])
        if after < size:
            self._reader.readinto(start + after, content[after:])
        content[inner:after] = data
        image.announce(Event.COW_WRITE)
        image.announce(Event.WRITE_AIO)
        image.data.write(remap.host, content)

    def _is_blank(self, remap: Remap) -> bool:
        """Does the guest see nothing but zeros there?"""
        if remap.entry & ZERO:
            return True
        backing = self._reader.backing
        return remap.entry == 0 and (backing is None or remap.cluster * self.cluster_size >= backing.length)
