"""The driver ``blkdebug``: everything passes, except what its rules say is to fail (spec/block-graph.md section 4).

It announces to its own rules what every device does with a request (``pwritev`` and its kin, ``flush_to_disk``), hears
the inner moments of the format driver above it (:mod:`qmpd.block.debug`), and can insist on a form of requests. A fault
comes instead of the request: nothing of it has reached the child.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final, Self

from qmpd.block.api import BlockDevice, Buffer, Perm
from qmpd.block.debug import Breakpoints, Event, InjectError, IoType, Rules, SetState
from qmpd.block.debug_config import load
from qmpd.block.extents import Runs
from qmpd.block.filters.base import Filter
from qmpd.block.filters.shape import Shape
from qmpd.block.ranges import RangeLock
from qmpd.errors import QmpdError, from_oserror
from qmpd.units import align_down, align_up

_OPTIONS: Final = (
    *("config", "inject-error", "set-state", "take-child-perms", "unshare-child-perms"),
    *(name.replace("_", "-") for name in Shape.__dataclass_fields__),
)


class Blkdebug(Filter):
    """Options: ``inject-error``, ``set-state``, ``config``, ``align`` and the other members of :class:`Shape` (bytes),
    ``take-child-perms``, ``unshare-child-perms``.

    ``immediately`` makes no difference: requests are synchronous.
    """

    format_name = "blkdebug"
    slot = "image"

    def __init__(self, child: BlockDevice, rules: Rules, shape: Shape, *, read_only: bool) -> None:
        super().__init__(child, read_only=read_only)
        self._rules = rules
        self._shape = shape
        #: Nobody writes between the reading around an unaligned write and the writing of all of it.
        self._rewriting = RangeLock()
        self._options: Mapping[str, Any] = {}
        #: What of its child it asks, and does not share, beyond its parents' needs.
        self.take_child_perms = self.unshare_child_perms = Perm.NONE
        #: Where threads can be held by tests.
        self.breakpoints = Breakpoints()

    @classmethod
    def open(cls, children: Mapping[str, BlockDevice], options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Over ``children["image"]``. Worker thread. Raises on a bad config file or contradicting options."""
        errors, states = load(options["config"], options.get("open-file", os.open)) if "config" in options else ([], [])
        errors += [InjectError.of(rule) for rule in options.get("inject-error", ())]
        states += [SetState.of(rule) for rule in options.get("set-state", ())]
        driver = cls(children["image"], Rules(errors, states), Shape.of(options), read_only=read_only)
        driver._options = options
        driver.take_child_perms = _perms(options.get("take-child-perms", ()))
        driver.unshare_child_perms = _perms(options.get("unshare-child-perms", ()))
        driver.debug_events(Event.NONE)
        return driver

    @property
    def request_alignment(self) -> int:
        """Requests reach the child as multiples of this (bytes)."""
        return self._shape.align or 1

    def debug_events(self, event: Event) -> None:
        """Something happens here or in the driver above. Any thread; held here by a breakpoint for ``event``."""
        self._rules.announce(event)
        self.breakpoints.reach(event)

    # -- I/O -----------------------------------------------------------------------------------------------------------

    def readinto(self, offset: int, buffer: memoryview) -> None:
        start, end = self._aligned(offset, len(buffer))
        if end - start == len(buffer):
            self._read(offset, buffer)
            return
        whole = memoryview(bytearray(end - start))
        self._read(start, whole)
        buffer[:] = whole[offset - start : offset - start + len(buffer)]

    def _read(self, offset: int, buffer: memoryview) -> None:
        for start, length in self._shape.transfers(offset, len(buffer)):
            self._check(IoType.READ, start, length)
            part = buffer[start - offset : start - offset + length]
            inside = len(part) if self.growable else max(0, min(len(part), self._child.length - start))
            self._child.readinto(start, part[:inside])
            part[inside:] = bytes(len(part) - inside)

    def write(self, offset: int, data: Buffer) -> None:
        start, end = self._aligned(offset, len(data))
        if self._shape.align <= 1:
            self._write(offset, memoryview(data))
            return
        with self._rewriting.hold(start, end):
            ragged = end - start != len(data)
            self._write(start, self._completed(start, end, offset, data) if ragged else memoryview(data))

    def _completed(self, start: int, end: int, offset: int, data: Buffer) -> memoryview:
        """``data`` with what is around it in ``[start, end)``."""
        whole = memoryview(bytearray(end - start))
        tail = offset + len(data)
        if start < offset:
            self.debug_events(Event.PWRITEV_RMW_HEAD)
            self._read(start, whole[: self._shape.align])
            self.debug_events(Event.PWRITEV_RMW_AFTER_HEAD)
        if tail < end:
            last = end - self._shape.align
            self.debug_events(Event.PWRITEV_RMW_TAIL)
            self._read(last, whole[last - start :])
            self.debug_events(Event.PWRITEV_RMW_AFTER_TAIL)
        whole[offset - start : tail - start] = data
        return whole

    def _write(self, offset: int, data: memoryview) -> None:
        for start, length in self._shape.transfers(offset, len(data)):
            self.debug_events(Event.PWRITEV)
            self._check(IoType.WRITE, start, length)
            part = data[start - offset : start - offset + length]
            if not self.growable:
                part = part[: max(0, self._child.length - start)]
            self._child.write(start, part)
            self.debug_events(Event.PWRITEV_DONE)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        whole, ragged = self._shape.zeroing(offset, length)
        for start, count in ragged:
            self.write(start, bytes(count))
        for start, count in whole:
            self.debug_events(Event.PWRITEV_ZERO)
            self._check(IoType.WRITE_ZEROES, start, count)
            self._child.write_zeroes(start, count, unmap=unmap)
            self.debug_events(Event.PWRITEV_DONE)

    def discard(self, offset: int, length: int) -> None:
        for start, count in self._shape.discarding(offset, length):
            self._check(IoType.DISCARD, start, count)
            self._child.discard(start, count)

    def flush(self) -> None:
        self.debug_events(Event.FLUSH_TO_OS)
        self.debug_events(Event.FLUSH_TO_DISK)
        self._check(IoType.FLUSH, 0, 0)
        self._child.flush()

    def map(self, offset: int, length: int) -> Runs:
        self._check(IoType.BLOCK_STATUS, offset, length)
        return super().map(offset, length)

    def reopen_prepare(self, *, read_only: bool, options: Mapping[str, Any] | None = None) -> None:
        """Its own options are for life."""
        new = self._options if options is None else options
        for name in _OPTIONS:
            if new.get(name) != self._options.get(name):
                raise QmpdError(f"Cannot change the option '{name}'")
        super().reopen_prepare(read_only=read_only)

    def close(self) -> None:
        self.breakpoints.remove_all()

    def _aligned(self, offset: int, length: int) -> tuple[int, int]:
        """Start and end of the request as it has to be made."""
        unit = self._shape.align
        if unit <= 1 or not length:
            return offset, offset + length
        return align_down(offset, unit), align_up(offset + length, unit)

    def _check(self, iotype: IoType, offset: int, length: int) -> None:
        number = self._rules.error(iotype, offset, length)
        if number:
            failure = from_oserror(OSError(number, os.strerror(number)))
            failure.offset = offset
            raise failure


def _perms(names: list[str] | tuple[str, ...]) -> Perm:
    found = Perm.NONE
    for bit in (Perm.CONSISTENT_READ, Perm.WRITE, Perm.WRITE_UNCHANGED, Perm.RESIZE):
        if bit.names()[0] in names:
            found |= bit
    return found
