"""Inner moments of drivers, and the rules by which ``blkdebug`` turns them into faults.

A driver that is about to do something worth failing, such as updating an L2 table, *announces* the moment to its file
child; a blkdebug there hears of it, nobody else does. A device that listens has an attribute ``debug_events``; ask
:func:`announcer` for it once, when the child is attached: without a listener, announcing is then a call of a function
that does nothing.

Rules (spec/block-graph.md section 4; the ``Blkdebug*`` types of the schema):

* An event puts into force the inject-error rules that name it and whose ``state`` is 0 or the current one. They replace
  those in force before; an event without such rules leaves things as they are.
* A request fails with the first rule in force, in the order given, that is about its type and (``sector``) touches that
  sector. ``once`` retires the rule.
* After that the event's set-state rules for the old state change the state; the last one wins.

Any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Any

from qmpd.units import SECTOR


class Event(StrEnum):
    """Every moment that has a name, in the peer's order. NONE is announced once, when a blkdebug has been opened."""

    L1_UPDATE = auto()
    L1_GROW_ALLOC_TABLE = auto()
    L1_GROW_WRITE_TABLE = auto()
    L1_GROW_ACTIVATE_TABLE = auto()
    L2_LOAD = auto()
    L2_UPDATE = auto()
    L2_UPDATE_COMPRESSED = auto()
    L2_ALLOC_COW_READ = auto()
    L2_ALLOC_WRITE = auto()
    READ_AIO = auto()
    READ_BACKING_AIO = auto()
    READ_COMPRESSED = auto()
    WRITE_AIO = auto()
    WRITE_COMPRESSED = auto()
    VMSTATE_LOAD = auto()
    VMSTATE_SAVE = auto()
    COW_READ = auto()
    COW_WRITE = auto()
    REFTABLE_LOAD = auto()
    REFTABLE_GROW = auto()
    REFTABLE_UPDATE = auto()
    REFBLOCK_LOAD = auto()
    REFBLOCK_UPDATE = auto()
    REFBLOCK_UPDATE_PART = auto()
    REFBLOCK_ALLOC = auto()
    REFBLOCK_ALLOC_HOOKUP = auto()
    REFBLOCK_ALLOC_WRITE = auto()
    REFBLOCK_ALLOC_WRITE_BLOCKS = auto()
    REFBLOCK_ALLOC_WRITE_TABLE = auto()
    REFBLOCK_ALLOC_SWITCH_TABLE = auto()
    CLUSTER_ALLOC = auto()
    CLUSTER_ALLOC_BYTES = auto()
    CLUSTER_FREE = auto()
    FLUSH_TO_OS = auto()
    FLUSH_TO_DISK = auto()
    PWRITEV_RMW_HEAD = auto()
    PWRITEV_RMW_AFTER_HEAD = auto()
    PWRITEV_RMW_TAIL = auto()
    PWRITEV_RMW_AFTER_TAIL = auto()
    PWRITEV = auto()
    PWRITEV_ZERO = auto()
    PWRITEV_DONE = auto()
    EMPTY_IMAGE_PREPARE = auto()
    L1_SHRINK_WRITE_TABLE = auto()
    L1_SHRINK_FREE_L2_CLUSTERS = auto()
    COR_WRITE = auto()
    CLUSTER_ALLOC_SPACE = auto()
    NONE = auto()


class IoType(StrEnum):
    """What a request does."""

    READ = "read"
    WRITE = "write"
    WRITE_ZEROES = "write-zeroes"
    DISCARD = "discard"
    FLUSH = "flush"
    BLOCK_STATUS = "block-status"


Announce = Callable[[Event], None]


def silence(event: Event) -> None:
    """Nobody listens."""


def announcer(device: object) -> Announce:
    """What to call with the name of a moment, for a driver whose file child is ``device``."""
    announce: Announce = getattr(device, "debug_events", silence)
    return announce


@dataclass(frozen=True, slots=True)
class InjectError:
    """``sector``: -1 is any. ``iotype``: None is every request that carries or keeps data."""

    event: Event
    state: int = 0
    iotype: IoType | None = None
    errno: int = 5
    sector: int = -1
    once: bool = False
    immediately: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> InjectError:
        """From the members of QMP's BlkdebugInjectErrorOptions."""
        values = {**options, "event": Event(options["event"])}
        if "iotype" in options:
            values["iotype"] = IoType(options["iotype"])
        return cls(**values)

    def hits(self, iotype: IoType, offset: int, length: int) -> bool:
        """Is a request of that type for ``[offset, offset + length)`` the one that this is about?"""
        if iotype is not self.iotype and (self.iotype is not None or iotype is IoType.BLOCK_STATUS):
            return False
        return self.sector == -1 or offset <= self.sector * SECTOR < offset + length


@dataclass(frozen=True, slots=True)
class SetState:
    """``state``: 0 is any."""

    event: Event
    new_state: int
    state: int = 0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> SetState:
        """From the members of QMP's BlkdebugSetStateOptions."""
        return cls(**{**options, "event": Event(options["event"])})


class Rules:
    """The rules of one blkdebug and how far they have got."""

    def __init__(self, errors: Iterable[InjectError] = (), states: Iterable[SetState] = ()) -> None:
        self._lock = threading.Lock()
        self._errors = list(errors)
        self._states = list(states)
        self._in_force: list[InjectError] = []
        self.state = 1

    def announce(self, event: Event) -> None:
        """Something happens."""
        with self._lock:
            errors = [rule for rule in self._errors if rule.event == event and rule.state in (0, self.state)]
            if errors:
                self._in_force = errors
            states = [rule for rule in self._states if rule.event == event and rule.state in (0, self.state)]
            if states:
                self.state = states[-1].new_state

    def error(self, iotype: IoType, offset: int, length: int) -> int:
        """The errno that a request is to fail with, 0 for none."""
        if not self._in_force:
            return 0
        with self._lock:
            rule = next((rule for rule in self._in_force if rule.hits(iotype, offset, length)), None)
            if rule is None or rule.errno <= 0:
                return 0
            if rule.once:
                self._in_force = [other for other in self._in_force if other is not rule]
                self._errors = [other for other in self._errors if other is not rule]
            return rule.errno


class Breakpoints:
    """Moments at which the thread that announces them is held, for tests of races and crashes.

    A breakpoint has a tag and holds one thread, once.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        #: Tag -> event, not reached yet.
        self._set: dict[str, Event] = {}
        #: Tags of threads being held.
        self._reached: set[str] = set()

    def set(self, event: Event, tag: str) -> None:
        """Hold the next thread that announces ``event``."""
        with self._changed:
            self._set[tag] = event

    def remove(self, tag: str) -> None:
        """Forget a breakpoint; a thread held by it goes on."""
        with self._changed:
            self._set.pop(tag, None)
            self._reached.discard(tag)
            self._changed.notify_all()

    def remove_all(self) -> None:
        """Forget all of them."""
        with self._changed:
            self._set.clear()
            self._reached.clear()
            self._changed.notify_all()

    def wait(self, tag: str, timeout: float = 30.0) -> bool:
        """Until a thread is held by ``tag``; False if none came within ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: tag in self._reached, timeout)

    def reach(self, event: Event) -> None:
        """A thread announces ``event``: hold it if somebody asked for that."""
        if not self._set:
            return
        with self._changed:
            tag = next((tag for tag, wanted in self._set.items() if wanted == event), None)
            if tag is None:
                return
            del self._set[tag]
            self._reached.add(tag)
            self._changed.notify_all()
            self._changed.wait_for(lambda: tag not in self._reached)
