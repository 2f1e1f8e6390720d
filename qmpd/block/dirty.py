"""Which parts of a device changed since somebody last looked: a bit for each granule.

Marking comes from many threads on the path of every write, so it is a few integer operations under a lock. Taking, by
the one who copies, finds and clears whole stretches at once.
"""

from __future__ import annotations

import errno
import threading
from typing import Final

import numpy as np
import numpy.typing as npt

from qmpd.errors import Kind, QmpdError, strerror
from qmpd.units import ceil_div

I64 = npt.NDArray[np.int64]

_WINDOW: Final = 1 << 11
"""Bytes of the map (eight granules each) that one :meth:`DirtyMap.take` looks into."""
_SEARCH: Final = 1 << 16
"""Bytes of the map that are searched in one step for the next bit."""


class DirtyMap:
    """Dirty granules of a device of ``length`` bytes. Offsets and lengths in bytes; any thread, several at a time.

    Memory is taken as it is marked, 8 MiB for 4 TiB all dirty in granules of 64 KiB. Raises QmpdError (ENOMEM) if even
    the address space is too small for the device.
    """

    def __init__(self, length: int, granularity: int) -> None:
        self.length = length
        self.granularity = granularity
        self._granules = ceil_div(length, granularity)
        self._map = _zeros(ceil_div(self._granules, 8))
        #: The same memory: faster for a byte, slower for many.
        self._bits = self._map.data
        self._count = 0
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """How much is dirty, in whole granules; the last one ends with the device."""
        with self._lock:
            if not self._count:
                return 0
            last = self._granules - 1
            is_last = self._bits[last >> 3] >> (last & 7) & 1
            return self._count * self.granularity - is_last * (self._granules * self.granularity - self.length)

    # -- marking -----------------------------------------------------------------------------------------------------

    def mark(self, offset: int, length: int) -> None:
        """Make every granule dirty that the range touches; what lies beyond the device counts for nothing."""
        stop = min(offset + length, self.length)
        if offset >= stop:
            return
        first, end = offset // self.granularity, ceil_div(stop, self.granularity)
        with self._lock:
            if end - first == 1:
                self._mark_one(first)
            else:
                self._mark_many(first, end)

    def _mark_one(self, granule: int) -> None:
        bit = 1 << (granule & 7)
        if not self._bits[granule >> 3] & bit:
            self._bits[granule >> 3] |= bit
            self._count += 1

    def _mark_many(self, first: int, end: int) -> None:
        low, high = first >> 3, ceil_div(end, 8)
        old = int.from_bytes(self._bits[low:high], "little")
        new = old | ((1 << (end - first)) - 1) << (first & 7)
        self._bits[low:high] = new.to_bytes(high - low, "little")
        self._count += new.bit_count() - old.bit_count()

    def mark_ranges(self, start: I64, end: I64) -> None:
        """:meth:`mark` for many ranges ``[start[i], end[i])`` at once, which are sorted and lie within the device."""
        if not len(start):
            return
        first, stop = start // self.granularity, -(-end // self.granularity)
        low = int(first[0]) & ~7
        depth = np.zeros(int(stop[-1]) - low + 1, np.int32)
        np.add.at(depth, first - low, 1)
        np.add.at(depth, stop - low, -1)
        packed = np.packbits(np.cumsum(depth[:-1], dtype=np.int32) > 0, bitorder="little")
        with self._lock:
            part = self._map[low >> 3 : (low >> 3) + len(packed)]
            before = _ones(part)
            part |= packed
            self._count += _ones(part) - before

    # -- taking ------------------------------------------------------------------------------------------------------

    def take(self, start: int, limit: int, *, single: bool = False) -> tuple[I64, I64]:
        """Clear some dirty stretches and return them: ``(start, end)`` of each, sorted and disjoint; empty if all is
        clean.

        They are the next ones from ``start`` on, going round at the end of the device; all of them lie close together
        and are ``limit`` bytes at most, but a granule at least. ``single``: only the first stretch.
        """
        with self._lock:
            first = self._next(min(start // self.granularity, self._granules))
            low = first & ~7
            window = self._map[low >> 3 : (low >> 3) + _WINDOW]
            bits = np.unpackbits(window, bitorder="little")
            bits[: first - low] = 0
            taken = np.flatnonzero(bits)[: max(1, limit // self.granularity)]
            last = np.flatnonzero(np.diff(taken) != 1)
            if single and len(last):
                taken = taken[: last[0] + 1]
                last = last[:0]
            mask = np.zeros(len(bits), np.uint8)
            mask[taken] = 1
            window &= ~np.packbits(mask, bitorder="little")
            self._count -= len(taken)
        if not len(taken):
            return taken, taken
        begin = taken[np.concatenate(([0], last + 1))] + low
        stop = taken[np.concatenate((last, [len(taken) - 1]))] + (low + 1)
        return begin * self.granularity, np.minimum(stop * self.granularity, self.length)

    def _next(self, granule: int) -> int:
        """The first dirty granule from ``granule`` on, else the first of all; 0 if there is none. Lock held."""
        if not self._count:
            return 0
        at = granule >> 3
        rest = self._bits[at] >> (granule & 7) if at < len(self._bits) else 0
        if rest:
            return granule + _lowest(rest)
        found = self._find(at + 1, len(self._bits))
        if found is None:
            found = self._find(0, at + 1)
        assert found is not None, "the count says that there is one"
        return found * 8 + _lowest(self._bits[found])

    def _find(self, low: int, high: int) -> int | None:
        """The first byte in ``[low, high)`` of the map with a bit in it."""
        for at in range(low, high, _SEARCH):
            found = np.flatnonzero(self._map[at : min(at + _SEARCH, high)])
            if len(found):
                return at + int(found[0])
        return None


def _zeros(count: int) -> npt.NDArray[np.uint8]:
    try:
        return np.zeros(count, np.uint8)
    except (MemoryError, ValueError):
        raise QmpdError(strerror(errno.ENOMEM), Kind.IO, errno=errno.ENOMEM) from None


def _lowest(byte: int) -> int:
    return (byte & -byte).bit_length() - 1


def _ones(part: npt.NDArray[np.uint8]) -> int:
    return int.from_bytes(part.tobytes(), "little").bit_count()
