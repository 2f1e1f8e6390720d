"""One budget for all jobs: so many bytes and operations a second, whoever uses them. Any thread.

Who wants to move something takes a *ticket*, which says when: tickets are handed out one behind the other, each as far
behind the one before it as that one's amount takes. So however many jobs there are, what they do together is what the
budget says. An amount is guessed when the ticket is taken and set right when it is known; the next ticket pays for the
difference. Pure arithmetic over times it is handed, in seconds on any clock that does not run backwards.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from qmpd.jobs.pieces import CHUNK
from qmpd.units import KIB, align_down, ceil_div

BURST: Final = 0.05
"""Seconds of the budget that may be used later than they were there: sleeping takes longer than asked for."""
_SHARE: Final = 0.02
"""Seconds of the budget that one piece may take, as far as it is not smaller than the least piece."""
_LEAST: Final = 64 * KIB


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes and operations a second, 0 for any number. An operation moves up to 512 KiB."""

    bytes_per_second: int = 0
    iops: int = 0


@dataclass(frozen=True, slots=True)
class Ticket:
    """Permission to move about ``count`` bytes in one operation from the time ``start`` on."""

    start: float
    count: int
    version: int


class Budget:
    """The limits, and what was used of them. Every job's cell asks; the control thread changes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limits = Limits()
        #: Counts the changes: tickets of an earlier version say nothing.
        self._version = 0
        #: When the next byte and the next operation may go.
        self._bytes_from = float("-inf")
        self._operations_from = float("-inf")
        self._bytes = 0
        self._operations = 0

    # -- control thread ------------------------------------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        with self._lock:
            return self._limits

    @property
    def used(self) -> tuple[int, int]:
        """Bytes and operations so far, also of those that were not limited."""
        with self._lock:
            return self._bytes, self._operations

    def set(self, limits: Limits, now: float) -> None:
        """From now on these count; nobody has debts. Jobs that sleep must be woken to ask again."""
        with self._lock:
            self._limits = limits
            self._version += 1
            self._bytes_from = self._operations_from = now

    # -- jobs ----------------------------------------------------------------------------------------------------------

    @property
    def is_limited(self) -> bool:
        with self._lock:
            return self._limits != Limits()

    @property
    def portion(self) -> int:
        """How many bytes a piece should have at most."""
        with self._lock:
            return self._portion()

    def ticket(self, now: float, held: Ticket | None) -> Ticket | None:
        """When the next piece may go; ``held`` if that still says it, None for at once."""
        with self._lock:
            if self._limits == Limits():
                return None
            if held is not None and held.version == self._version:
                return held
            self._bytes_from = max(self._bytes_from, now - BURST)
            self._operations_from = max(self._operations_from, now - BURST)
            start, count = max(self._bytes_from, self._operations_from), self._portion()
            self._put_off(count, 1)
            return Ticket(start, count, self._version)

    def give_back(self, ticket: Ticket) -> None:
        """It will not be used."""
        with self._lock:
            if ticket.version == self._version:
                self._put_off(-ticket.count, -1)

    def charge(self, count: int, ticket: Ticket | None) -> None:
        """So many bytes were moved, with a ticket for a guess of it or without any."""
        with self._lock:
            operations = ceil_div(count, CHUNK)
            self._bytes += count
            self._operations += operations
            if ticket is not None and ticket.version == self._version:
                self._put_off(count - ticket.count, operations - 1)
            else:
                self._put_off(count, operations)

    def _portion(self) -> int:
        if not self._limits.bytes_per_second:
            return CHUNK
        share = align_down(int(self._limits.bytes_per_second * _SHARE), _LEAST)
        return min(max(share, _LEAST), CHUNK)

    def _put_off(self, count: int, operations: int) -> None:
        if self._limits.bytes_per_second:
            self._bytes_from += count / self._limits.bytes_per_second
        if self._limits.iops:
            self._operations_from += operations / self._limits.iops
