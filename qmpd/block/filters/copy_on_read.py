"""The driver ``copy-on-read``: what is read from further down the chain stays in the image (spec/block-graph.md
section 4).

Only what the image itself says nothing about is copied, with the permission to write unchanged content. ``bottom``
bounds it: what lies below that node is read but not copied.

A copy and a write through this node never overlap. A writer that uses the image beside this node can lose to a copy of
what was there before; it has to be kept out by whoever builds such a graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Self

from qmpd.block.api import BlockDevice, Buffer
from qmpd.block.debug import Event, announcer
from qmpd.block.extents import RunKind, chain_runs
from qmpd.block.filters.base import Filter
from qmpd.block.ranges import RangeLock
from qmpd.units import KIB, MIB, align_down, align_up

#: Bytes copied in one go.
_PIECE: Final = MIB
#: What is copied together where the image has no clusters to tell (bytes).
_UNIT: Final = 64 * KIB

Span = tuple[int, int]
"""(start, end)"""


class CopyOnRead(Filter):
    """Options: ``bottom`` (a node of the chain below; the graph looks it up and calls :meth:`bound`)."""

    format_name = "copy-on-read"
    reopens = False

    def __init__(self, child: BlockDevice, *, read_only: bool) -> None:
        super().__init__(child, read_only=read_only)
        self._layers: Sequence[BlockDevice] | None = None
        self._writing = RangeLock()

    @classmethod
    def open(cls, children: Mapping[str, BlockDevice], options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Over ``children["file"]``. Cannot fail."""
        return cls(children["file"], read_only=read_only)

    def bound(self, layers: Sequence[BlockDevice]) -> None:
        """Copy only what one of ``layers`` has: the image, then those below it down to ``bottom``."""
        self._layers = list(layers)

    @contextmanager
    def undisturbed(self, start: int, end: int) -> Iterator[BlockDevice]:
        """The image, for the block without anybody else writing to ``[start, end)`` of it through this node.

        For a caller who copies on its own account. Any worker thread; it must not use this node meanwhile.
        """
        with self._writing.hold(start, end):
            yield self._child

    # -- I/O -----------------------------------------------------------------------------------------------------------

    def readinto(self, offset: int, buffer: memoryview) -> None:
        end = min(offset + len(buffer), self._child.length)
        for start, stop in self._missing(offset, end):
            self._fetch(start, stop)
        self._child.readinto(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        with self._writing.hold(offset, offset + len(data)):
            self._child.write(offset, data)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        with self._writing.hold(offset, offset + length):
            self._child.write_zeroes(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        with self._writing.hold(offset, offset + length):
            self._child.discard(offset, length)

    def truncate(self, length: int) -> None:
        first, last = sorted((length, self._child.length))
        with self._writing.hold(first, last):
            self._child.truncate(length)

    # -- copying -------------------------------------------------------------------------------------------------------

    def _fetch(self, start: int, end: int) -> None:
        """Copy what is missing in the range, in whole units of the image."""
        unit = self._child.placement_unit or _UNIT
        start, end = align_down(start, unit), min(align_up(end, unit), self._child.length)
        step = max(unit, _PIECE)
        for at in range(start, end, step):
            stop = min(at + step, end)
            with self._writing.hold(at, stop):
                for span in self._missing(at, stop):
                    self._copy(*span)

    def _copy(self, start: int, end: int) -> None:
        content = bytearray(end - start)
        self._child.readinto(start, memoryview(content))
        announcer(self._child)(Event.COR_WRITE)
        if content == bytes(len(content)):
            self._child.write_zeroes(start, len(content), unmap=False)
        else:
            self._child.write(start, content)

    def _missing(self, offset: int, end: int) -> Iterator[Span]:
        """What of the range is to be copied into the image."""
        while offset < end:
            if self._layers is None:
                runs = self._child.map(offset, end - offset)
                yield from ((run.offset, run.offset + run.length) for run in runs if run.kind == RunKind.UNALLOCATED)
                offset = runs.end
            else:
                chain = chain_runs(self._layers, offset, end - offset)
                yield from ((run.offset, run.offset + run.length) for run in chain if run.layer > 0)
                offset = chain.end
