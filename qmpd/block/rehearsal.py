"""Finding out what a copy would do to its target, without doing it.

The copy runs as ever, through the same code and in the same order, but the target is an image over a :class:`Shadow`,
which reads like the image's file and forgets what is written; and no data is read or moved. So what is found out is
what will happen, to the cluster, as long as nobody writes meanwhile. Worker thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from qmpd.block.api import BlockDevice, Buffer
from qmpd.block.copy import CopyEngine, _intersect, _Piece, _Place
from qmpd.block.extents import ChainRun, Runs
from qmpd.block.storage.posix import zero_fill
from qmpd.errors import Kind, QmpdError
from qmpd.units import SECTOR, align_up

if TYPE_CHECKING:
    from qmpd.block.api import Offsets
    from qmpd.block.batch import Batch
    from qmpd.block.storage.file import FileStorage


class Shadow:
    """The file of an image, as far as reading goes; of writes nothing but their ends is kept.

    Whoever writes metadata has to remember it.
    """

    placement_unit = None
    data_child = None

    def __init__(self, file: BlockDevice, end: int) -> None:
        """``end``: how long the file really is, in bytes, for a node's length is whole sectors."""
        self._file = file
        self._real = file.length
        self.length = self._real
        #: Where the file would end now, bytes.
        self.end = end

    @property
    def growable(self) -> bool:
        """Does a write past the end make it longer?"""
        return bool(getattr(self._file, "growable", False))

    def readinto(self, offset: int, buffer: memoryview) -> None:
        inside = min(len(buffer), max(0, self._real - offset))
        if inside:
            self._file.readinto(offset, buffer[:inside])
        zero_fill(buffer[inside:])

    def write(self, offset: int, data: Buffer) -> None:
        self.note_written(offset + len(data))

    def read_many(self, batch: Batch) -> Sequence[int]:
        return batch.indexes

    def write_many(self, batch: Batch) -> Sequence[int]:
        return batch.indexes

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self.note_written(offset + length)

    def discard(self, offset: int, length: int) -> None:
        """Space is given back; the length stays."""

    def flush(self) -> None:
        """There is nothing."""

    def note_written(self, end: int) -> None:
        self.end = max(self.end, end)
        self.length = max(self.length, align_up(end, SECTOR))

    def truncate(self, length: int) -> None:
        self.end, self.length = length, align_up(length, SECTOR)

    def map(self, offset: int, length: int) -> Runs:
        return self._file.map(offset, length)

    def direct(self, offset: int, length: int) -> tuple[FileStorage, int] | None:
        return None

    def place(self, offset: int, length: int) -> AbstractContextManager[Runs]:
        raise QmpdError("No placement in a rehearsal", Kind.UNSUPPORTED)

    def place_ranges(self, offset: Offsets, length: Offsets) -> AbstractContextManager[Runs]:
        raise QmpdError("No placement in a rehearsal", Kind.UNSUPPORTED)


class CopyRehearsal(CopyEngine):
    """A copy engine that leaves the data where it is. The target must be over a :class:`Shadow`."""

    def _fill(self, rows: Sequence[ChainRun], places: Sequence[_Place]) -> None:
        """Whole units are only said to be written; the ragged ends take the target's way of writing."""
        if places and places[0].device is self._target:
            super()._fill(rows, places)
            return
        for _, place, offset, length in _intersect(rows, places):
            place.device.note_written(place.host + offset + length - place.start)

    def _read_all(self, work: Sequence[tuple[_Piece, memoryview]]) -> None:
        """The content does not matter."""
