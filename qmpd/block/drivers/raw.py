"""The driver ``raw``: its child as it is, or a window of it (spec/block-graph.md section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from qmpd.block.api import BlockDevice, Buffer, Driver
from qmpd.block.debug import Announce, announcer
from qmpd.block.extents import RunKind, Runs
from qmpd.errors import Kind, QmpdError
from qmpd.units import MAX_LENGTH, SECTOR, align_up

if TYPE_CHECKING:
    from qmpd.block.api import Offsets
    from qmpd.block.batch import Batch
    from qmpd.block.storage.file import FileStorage


@dataclass(frozen=True, slots=True)
class Window:
    """What part of the child is shown: from ``offset``, ``size`` bytes or (None) whatever there is."""

    offset: int = 0
    size: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any], child: BlockDevice) -> Window:
        """The window that the options describe, checked against the child's length."""
        offset, size, available = options.get("offset", 0), options.get("size"), child.length
        for name, value in (("offset", offset), ("size", size)):
            if value is not None and value < 0:
                raise QmpdError(f"Value '{value}' is out of range for parameter '{name}'")
        if offset > available:
            raise QmpdError(f"Offset ({offset}) cannot be greater than size of the containing file ({available})")
        if size is not None and offset + size > available:
            raise QmpdError(
                f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the "
                f" actual size of the containing file ({available})"
            )
        if size is not None and size % SECTOR:
            raise QmpdError("Specified size is not multiple of 512")
        return cls(offset, size)


class Raw(Driver):
    """Everything passes through with a shift. Options: ``offset``, ``size`` (bytes).

    Host offsets in :meth:`map` and :meth:`place` are the child's own, and so is :attr:`data_child`: seen from above,
    raw is not there.
    """

    format_name = "raw"

    def __init__(self, file: BlockDevice, window: Window, *, read_only: bool) -> None:
        self._file = file
        self._window = window
        self._next_window: Window | None = None
        self.read_only = read_only

    @classmethod
    def open(cls, children: Mapping[str, BlockDevice], options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Show ``children["file"]``. Raises on a window outside of it."""
        return cls(children["file"], Window.of(options, children["file"]), read_only=read_only)

    @property
    def length(self) -> int:
        if self._window.size is not None:
            return self._window.size
        return align_up(max(self._file.length - self._window.offset, 0), SECTOR)

    @property
    def growable(self) -> bool:
        return self._window.size is None and bool(getattr(self._file, "growable", False))

    @property
    def debug_events(self) -> Announce:
        """See :mod:`qmpd.block.debug`."""
        return announcer(self._file)

    @property
    def placement_unit(self) -> int | None:
        unit = self._file.placement_unit
        return None if unit is None or self._window.offset % unit else unit

    @property
    def data_child(self) -> BlockDevice | None:
        return self._file.data_child or self._file

    # -- I/O -----------------------------------------------------------------------------------------------------------

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._file.readinto(offset + self._window.offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        self._file.write(offset + self._window.offset, data)

    def read_many(self, batch: Batch) -> Sequence[int]:
        return self._file.read_many(batch.moved(self._window.offset))

    def write_many(self, batch: Batch) -> Sequence[int]:
        return self._file.write_many(batch.moved(self._window.offset))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._file.write_zeroes(offset + self._window.offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self._file.discard(offset + self._window.offset, length)

    def flush(self) -> None:
        self._file.flush()

    def map(self, offset: int, length: int) -> Runs:
        """The child's runs, but nothing is unallocated: what the child finds below itself is this layer's content."""
        runs = self._shifted(self._file.map(offset + self._window.offset, length))
        below = runs.kind == RunKind.UNALLOCATED
        if not below.any():
            return runs
        return Runs(runs.offset, runs.length, np.where(below, np.uint8(RunKind.OPAQUE), runs.kind), runs.host)

    def direct(self, offset: int, length: int) -> tuple[FileStorage, int] | None:
        return self._file.direct(offset + self._window.offset, length)

    def note_written(self, end: int) -> None:
        self._file.note_written(end + self._window.offset)

    def place(self, offset: int, length: int) -> AbstractContextManager[Runs]:
        self._check_placing()
        return self._showing(self._file.place(offset + self._window.offset, length))

    def place_ranges(self, offset: Offsets, length: Offsets) -> AbstractContextManager[Runs]:
        self._check_placing()
        return self._showing(self._file.place_ranges(offset + self._window.offset, length))

    def _check_placing(self) -> None:
        if self.placement_unit is None:
            raise QmpdError("raw: no placement", Kind.UNSUPPORTED)

    @contextmanager
    def _showing(self, placement: AbstractContextManager[Runs]) -> Iterator[Runs]:
        with placement as runs:
            yield self._shifted(runs)

    def _shifted(self, runs: Runs) -> Runs:
        if self._window.offset == 0:
            return runs
        return Runs(runs.offset - self._window.offset, runs.length, runs.kind, runs.host)

    def truncate(self, length: int) -> None:
        if self._window.size is not None:
            raise QmpdError("Cannot resize fixed-size raw disks", Kind.UNSUPPORTED)
        if length > MAX_LENGTH - self._window.offset:
            raise QmpdError("Disk size too large for the chosen offset")
        self._file.truncate(length + self._window.offset)

    def close(self) -> None:
        """The child belongs to the graph."""

    # -- the graph's side ----------------------------------------------------------------------------------------------

    def attach(self, name: str, child: BlockDevice | None) -> None:
        if name != "file" or child is None:
            super().attach(name, child)
            return
        self._file = child

    def reopen_prepare(self, *, read_only: bool, options: Mapping[str, Any] | None = None) -> None:
        self._next_window = self._window if options is None else Window.of(options, self._file)
        self._next_read_only = read_only

    def reopen_commit(self) -> None:
        if self._next_window is not None:
            self._window, self._next_window = self._next_window, None
            self.read_only = self._next_read_only

    def reopen_abort(self) -> None:
        self._next_window = None
