"""Ways to read and write an open file: through the host's page cache, or around it (O_DIRECT) in aligned blocks.

Both give the same bytes for any offset and length. Around the cache the kernel takes whole blocks in aligned memory
only, so requests go through page-aligned buffers, and a write that covers a block in part reads it first; such writes
are kept apart from all others, or two of them would undo each other.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from qmpd.block.api import Buffer
from qmpd.block.storage import posix
from qmpd.units import MIB, align_down, align_up

#: Bytes of one request around the page cache.
_BOUNCE: Final = MIB


class FileIO(Protocol):
    """Complete transfers at a position; OSError on failure. Any worker thread."""

    def read(self, fd: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``; zeros past the end of the file."""

    def write(self, fd: int, offset: int, data: Buffer) -> None:
        """Write all of ``data``."""


class Cached:
    """Through the page cache."""

    def read(self, fd: int, offset: int, buffer: memoryview) -> None:
        posix.read_at(fd, offset, buffer)

    def write(self, fd: int, offset: int, data: Buffer) -> None:
        posix.write_at(fd, offset, data)


class Aligned:
    """Around the page cache, in blocks of ``unit`` bytes. Works on any descriptor."""

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self._buffers: list[mmap.mmap] = []
        self._apart = _Apart()

    def read(self, fd: int, offset: int, buffer: memoryview) -> None:
        done = 0
        with self._bounce() as bounce:
            while done < len(buffer):
                start = align_down(offset + done, self.unit)
                skip = offset + done - start
                count = min(len(buffer) - done, _BOUNCE - skip)
                posix.read_at(fd, start, bounce[: align_up(skip + count, self.unit)])
                buffer[done : done + count] = bounce[skip : skip + count]
                done += count

    def write(self, fd: int, offset: int, data: Buffer) -> None:
        view, done = memoryview(data), 0
        with self._bounce() as bounce:
            while done < len(view):
                start = align_down(offset + done, self.unit)
                skip = offset + done - start
                count = min(len(view) - done, _BOUNCE - skip)
                self._write_blocks(fd, start, skip, view[done : done + count], bounce)
                done += count

    def _write_blocks(self, fd: int, start: int, skip: int, data: memoryview, bounce: memoryview) -> None:
        """Write ``data`` at ``start + skip``, with what else is in the first and last block around it."""
        end = skip + len(data)
        span = align_up(end, self.unit)
        partial = skip > 0 or span > end
        with self._apart.alone() if partial else self._apart.together():
            if skip:
                posix.read_at(fd, start, bounce[: self.unit])
            if span > end and (span > self.unit or not skip):
                posix.read_at(fd, start + span - self.unit, bounce[span - self.unit : span])
            bounce[skip:end] = data
            posix.write_at(fd, start, bounce[:span])

    @contextmanager
    def _bounce(self) -> Iterator[memoryview]:
        """A page-aligned buffer; kept for the next request, so there are as many as there were requests at a time."""
        try:
            memory = self._buffers.pop()
        except IndexError:
            memory = mmap.mmap(-1, _BOUNCE)
        with memoryview(memory) as view:
            yield view
        self._buffers.append(memory)


class _Apart:
    """Many may be in together, or one alone. Who wants to be alone is let in before further groups."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside = 0
        self._waiting = 0
        self._alone = False

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._alone and not self._inside)
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


def block_size(fd: int) -> int:
    """What offsets and lengths of requests around the page cache must be multiples of (bytes); 4096 if nobody knows."""
    told = posix.direct_alignment(fd)
    if told or not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        return told or 4096
    with memoryview(mmap.mmap(-1, _BOUNCE)) as view:
        for unit in (512, 1024, 2048):
            try:
                posix.read_at(fd, unit, view[:unit])
            except OSError:
                continue
            return unit
    return 4096
