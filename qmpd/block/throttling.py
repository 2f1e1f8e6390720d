"""A throttle group: the requests of all nodes in it share one set of limits.

A worker thread waits here before its request is made. The nodes of a group take turns, the requests of one node stay in
order. Nobody waits longer than needed: a change of the limits is seen by those who wait already, and a node that is
being drained lets all of its requests go. Source: spec/toolbox.md section 11.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Final

from qmpd.block.limits import Buckets, Direction, Limits
from qmpd.errors import QmpdError

#: Waits shorter than this are over; timers are no better (seconds).
_SOON: Final = 1e-6


class Member:
    """One node's place in a group."""

    def __init__(self) -> None:
        #: While above 0 its requests do not wait.
        self.draining = 0


class _Ticket:
    """One waiting request."""


class ThrottleGroup:
    """Any thread. ``clock`` gives seconds."""

    def __init__(self, name: str, limits: Limits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._clock = clock
        self._changed = threading.Condition()
        self._buckets = Buckets(limits or Limits(), clock())
        self._members: set[Member] = set()
        self._retired = False
        #: Who waits: by direction the nodes, that whose turn it is first, with their requests, oldest first.
        self._queues: dict[Direction, OrderedDict[Member, deque[_Ticket]]] = {each: OrderedDict() for each in Direction}

    # -- membership ----------------------------------------------------------------------------------------------------

    def join(self) -> Member:
        """A node's place. Raises QmpdError if the group has been deleted."""
        member = Member()
        with self._changed:
            if self._retired:
                raise unknown(self.name)
            self._members.add(member)
        return member

    def leave(self, member: Member) -> None:
        """The node is gone, or in another group."""
        with self._changed:
            self._members.discard(member)

    def retire(self) -> bool:
        """Delete the group; False, and nothing is changed, if a node is in it."""
        with self._changed:
            self._retired = not self._members
            return self._retired

    # -- limits --------------------------------------------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        return self._buckets.limits

    def change(self, values: Mapping[str, int]) -> None:
        """Change the limits that are named in ``values``; the buckets are empty afterwards. Raises QmpdError."""
        with self._changed:
            self._buckets = Buckets(self._buckets.limits.merged(values), self._clock())
            self._changed.notify_all()

    # -- requests ------------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        with self._changed:
            return sum(len(tickets) for queue in self._queues.values() for tickets in queue.values())

    def pass_through(self, member: Member, direction: Direction, length: int) -> None:
        """Return when a request of ``length`` bytes may go."""
        if not self._buckets.limits_anything(direction) or not length:
            return
        ticket = _Ticket()
        with self._changed:
            queue = self._queues[direction]
            queue.setdefault(member, deque()).append(ticket)
            try:
                while not member.draining:
                    if not self._is_next(queue, member, ticket):
                        self._changed.wait()
                        continue
                    delay = self._buckets.wait(direction, self._clock())
                    if delay < _SOON:
                        break
                    self._changed.wait(delay)
                self._buckets.pour(direction, length)
            finally:
                _leave_queue(queue, member, ticket)
                self._changed.notify_all()

    @staticmethod
    def _is_next(queue: OrderedDict[Member, deque[_Ticket]], member: Member, ticket: _Ticket) -> bool:
        return next(iter(queue)) is member and queue[member][0] is ticket

    def drain(self, member: Member, by: int) -> None:
        """With ``by`` = 1, requests of the node do not wait until this is called with -1."""
        with self._changed:
            member.draining += by
            self._changed.notify_all()


def _leave_queue(queue: OrderedDict[Member, deque[_Ticket]], member: Member, ticket: _Ticket) -> None:
    """The request goes; the other nodes come before this one's next."""
    tickets = queue.pop(member)
    tickets.remove(ticket)
    if tickets:
        queue[member] = tickets


def unknown(name: str) -> QmpdError:
    """There is no such group."""
    return QmpdError(f"Throttle group '{name}' does not exist")
