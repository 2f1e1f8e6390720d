"""Which requests are under way: what has to wait for what, and when freed space may be used again.

Two rules. Requests that change the mapping of a cluster exclude each other on it (two copies-on-write into one
unallocated cluster would lose one's data). And host clusters given up while I/O is in flight are not handed out before
that I/O has ended, since it may still be aimed at them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from qmpd.block.drivers.qcow2.tables import I64


class Claim:
    """Guest ranges (sorted, disjoint, bytes) that one request changes. A thread never waits for its own."""

    __slots__ = ("begin", "end", "high", "low", "owner")

    def __init__(self, low: int, high: int, begin: I64 | None = None, end: I64 | None = None) -> None:
        """``[low, high)``, or of that the parts ``[begin[i], end[i])`` only."""
        self.low, self.high = low, high
        self.begin, self.end = begin, end
        self.owner = threading.get_ident()

    def meets(self, start: int, stop: int) -> bool:
        if stop <= self.low or self.high <= start or self.owner == threading.get_ident():
            return False
        if self.begin is None or self.end is None:
            return True
        at = int(np.searchsorted(self.end, start, "right"))
        return at < len(self.begin) and int(self.begin[at]) < stop

    def collides(self, other: Claim) -> bool:
        if other.high <= self.low or self.high <= other.low or self.owner == other.owner:
            return False
        if other.begin is None or other.end is None:
            return self.meets(other.low, other.high)
        return any(self.meets(low, high) for low, high in zip(other.begin.tolist(), other.end.tolist(), strict=True))


class Inflight:
    """Bookkeeping under the image lock; waiting releases it."""

    def __init__(self, lock: threading.RLock) -> None:
        self._changed = threading.Condition(lock)
        self._claims: list[Claim] = []
        self._active: set[int] = set()
        self._clock = 0

    def wait(self, start: int, stop: int) -> None:
        """Until nobody is remapping any of ``[start, stop)``. Lock held, and released while waiting."""
        while self.remapped(start, stop):
            self._changed.wait()

    def remapped(self, start: int, stop: int) -> bool:
        """Is somebody remapping any of ``[start, stop)``? Lock held."""
        return bool(self._claims) and any(claim.meets(start, stop) for claim in self._claims)

    def claim(self, claim: Claim) -> None:
        """Wait, then keep others from remapping these ranges until :meth:`unclaim`."""
        while any(known.collides(claim) for known in self._claims):
            self._changed.wait()
        self._claims.append(claim)

    def unclaim(self, claim: Claim) -> None:
        self._claims.remove(claim)
        self._changed.notify_all()

    def enter(self) -> int:
        """Data I/O begins; keep the ticket for :meth:`leave`."""
        self._clock += 1
        self._active.add(self._clock)
        return self._clock

    def leave(self, ticket: int) -> None:
        """Data I/O has ended. Needs no lock."""
        self._active.discard(ticket)

    @contextmanager
    def io(self) -> Iterator[None]:
        ticket = self.enter()
        try:
            yield
        finally:
            self.leave(ticket)

    @property
    def now(self) -> int:
        """A stamp for space given up now."""
        return self._clock

    def finished(self, stamp: int) -> bool:
        """Has all I/O ended that was under way at that stamp?"""
        return not self._active or min(self._active.copy()) > stamp
