"""The copy engine: what the layers of a chain hold goes into a target, in as few and as large steps as possible.

Source: spec/jobs-and-commit.md section 5. Runs that lie in a file as they are go from file to file
(:mod:`qmpd.block.transfer`), zeros become zero requests, and what only a driver can read (compressed clusters) is read
by a few threads at once, since decompression runs without the interpreter lock.

A target that has whole placement units to give (qcow2) is asked for places, filled, and publishes them; the ragged
ends go through its write. A raw target is written in place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Literal, Self

import numpy as np

from qmpd.block.api import BlockDevice
from qmpd.block.extents import ChainRun, ChainRuns, RunKind, Runs
from qmpd.block.transfer import Transfer, TransferError
from qmpd.errors import QmpdError, from_oserror
from qmpd.units import MIB, align_down, align_up

if TYPE_CHECKING:
    from qmpd.block.storage.file import FileStorage

#: Bytes read by drivers before they are written; shared by the threads.
_BATCH: Final = 4 * MIB
#: The largest read handed to a driver in one go (bytes).
_READ: Final = MIB
#: Bytes placed by one transaction on the target.
_PLACEMENT: Final = 64 * MIB
#: Threads that read through drivers.
_READERS: Final = min(4, os.cpu_count() or 1)

Operation = Literal["read", "write"]


class CopyError(QmpdError):
    """A copy failed: ``operation`` says on which side, ``offset`` (bytes) where on the device."""

    def __init__(self, operation: Operation, error: QmpdError, offset: int) -> None:
        super().__init__(error.desc, error.kind, node=error.node, path=error.path, offset=offset, errno=error.errno)
        self.operation: Operation = operation


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a part ``[start, end)`` of the target is written.

    That is ``host`` of ``device``; ``position`` of ``file``, if that is the same and simpler.
    """

    start: int
    end: int
    device: BlockDevice
    host: int
    file: FileStorage | None = None
    position: int = 0

    def wrote(self, end: int) -> None:
        """The target's bytes before ``end`` were written to the file: let those know that it bypassed."""
        self.device.note_written(self.host + end - self.start)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of one run that has one place."""

    offset: int
    length: int
    layer: int
    place: _Place

    def continues(self, other: _Piece) -> bool:
        """Could both be written at once?"""
        return self.place is other.place and self.offset == other.offset + other.length


class CopyEngine:
    """Copies what ``layers`` (from the top to the last one above the base) hold into ``target``.

    Not for use by several threads at once. Nothing has to be closed; :meth:`close` ends idle threads at once.
    """

    def __init__(self, layers: Sequence[BlockDevice], target: BlockDevice) -> None:
        self._layers = list(layers)
        self._target = target
        self._transfer = Transfer()
        self._pool: ThreadPoolExecutor | None = None
        self._buffer: memoryview | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the helper threads end. Idempotent; the engine stays usable."""
        self._transfer.close()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def copy(self, runs: ChainRuns, start: int, length: int) -> None:
        """Move the allocated bytes of ``[start, start + length)``, described by ``runs``, into the target.

        At return the target's readers see them; they are durable after its flush. Worker thread. Raises CopyError with
        any part of the range copied (a place not filled is given back); copying it again is right.
        """
        direct = self._target.direct(start, length)
        whole = direct and _Place(start, start + length, self._target, start, *direct)
        scattered = []
        for stretch, is_zero in _stretches(runs.clip(start, start + length).allocated()):
            if is_zero:
                self._zero(stretch)
            elif whole is not None:
                self._fill(stretch, [whole])
            else:
                scattered.append(stretch)
        self._fill_through_driver(scattered)

    # -- zeros ---------------------------------------------------------------------------------------------------------

    def _zero(self, rows: Sequence[ChainRun]) -> None:
        start, end = _bounds(rows)
        try:
            self._target.write_zeroes(start, end - start)
        except QmpdError as error:
            raise CopyError("write", error, start) from error

    # -- where it goes -------------------------------------------------------------------------------------------------

    def _fill_through_driver(self, stretches: Sequence[Sequence[ChainRun]]) -> None:
        """Whole units get places, those of many stretches at once; the ragged ends are written by the driver."""
        unit = self._target.placement_unit
        batch: list[tuple[int, int]] = []
        rows: list[ChainRun] = []
        room = _PLACEMENT
        for stretch in stretches:
            start, end = _bounds(stretch)
            first, last = self._whole_units(start, end, unit)
            for ragged in ((start, first), (last, end)):
                if ragged[0] < ragged[1]:
                    self._fill(_cut(stretch, *ragged), [self._written(*ragged)])
            while first < last:
                stop = min(last, first + room)
                batch.append((first, stop))
                rows += _cut(stretch, first, stop)
                room -= stop - first
                first = stop
                if room <= 0:
                    self._fill_places(rows, batch)
                    batch, rows, room = [], [], _PLACEMENT
        if batch:
            self._fill_places(rows, batch)

    def _whole_units(self, start: int, end: int, unit: int | None) -> tuple[int, int]:
        """The part of the range that consists of placement units; an empty one at ``end`` if there is none."""
        if unit is None:
            return end, end
        first = align_up(start, unit)
        last = end if end == self._target.length else align_down(end, unit)
        return (first, last) if first < last else (end, end)

    def _fill_places(self, rows: Sequence[ChainRun], ranges: Sequence[tuple[int, int]]) -> None:
        """Fill all of the ranges in one transaction of the target."""
        try:
            with self._place_all(ranges) as runs:
                self._fill(rows, self._places(runs))
        except CopyError:
            raise
        except QmpdError as error:
            raise CopyError("write", error, ranges[0][0]) from error

    def _place_all(self, ranges: Sequence[tuple[int, int]]) -> AbstractContextManager[Runs]:
        if len(ranges) == 1:  # the common case, and a quicker one
            start, end = ranges[0]
            return self._target.place(start, end - start)
        table = np.array(ranges, np.int64)
        return self._target.place_ranges(table[:, 0], table[:, 1] - table[:, 0])

    def _places(self, runs: Runs) -> list[_Place]:
        child = self._target.data_child
        assert child is not None, "a device that places has a data child"
        places = []
        for offset, length, _, host in runs:
            places.append(_Place(offset, offset + length, child, host, *child.direct(host, length) or ()))
        return places

    def _written(self, start: int, end: int) -> _Place:
        return _Place(start, end, self._target, start)

    # -- filling -------------------------------------------------------------------------------------------------------

    def _fill(self, rows: Sequence[ChainRun], places: Sequence[_Place]) -> None:
        """Bring the rows, which lie within the places, there."""
        batch: list[_Piece] = []
        room = _BATCH
        for row, place, offset, length in _intersect(rows, places):
            source = self._in_file(row, offset, length) if place.file is not None else None
            if source is not None and place.file is not None:
                goal = place.position + offset - place.start
                self._move(source[0], source[1], place.file, goal, length, offset)
                place.wrote(offset + length)
                continue
            for at in range(offset, offset + length, _READ):
                piece = _Piece(at, min(_READ, offset + length - at), row.layer, place)
                if piece.length > room:
                    self._carry(batch)
                    batch, room = [], _BATCH
                batch.append(piece)
                room -= piece.length
        if batch:
            self._carry(batch)

    def _in_file(self, row: ChainRun, offset: int, length: int) -> tuple[FileStorage, int] | None:
        """The file that holds a part of this row as it is, and where."""
        if row.kind != RunKind.DATA:
            return None
        child = self._layers[row.layer].data_child or self._layers[row.layer]
        return child.direct(row.host + offset - row.offset, length)

    def _move(
        self, source: FileStorage, position: int, target: FileStorage, goal: int, length: int, offset: int
    ) -> None:
        try:
            self._transfer.move(source, position, target, goal, length)
        except TransferError as error:
            path = (source if error.operation == "read" else target).path
            raise CopyError(error.operation, from_oserror(error.cause, path=path), offset + error.done) from error

    # -- through drivers -----------------------------------------------------------------------------------------------

    def _carry(self, batch: Sequence[_Piece]) -> None:
        """Read a batch into the buffer, by several threads if there is more than one piece, and write it."""
        buffer = self._buffer
        if buffer is None:
            buffer = self._buffer = memoryview(bytearray(_BATCH))
        ends = np.cumsum([piece.length for piece in batch]).tolist()
        parts = [buffer[end - piece.length : end] for piece, end in zip(batch, ends, strict=True)]
        self._read_all(list(zip(batch, parts, strict=True)))
        first = 0
        for i, piece in enumerate(batch, 1):
            if i == len(batch) or not batch[i].continues(piece):
                head = batch[first]
                self._put(head.place, head.offset, buffer[ends[first] - head.length : ends[i - 1]])
                first = i

    def _read_all(self, work: Sequence[tuple[_Piece, memoryview]]) -> None:
        if len(work) == 1 or _READERS == 1:
            self._read_some(work)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="qmpd-read")
        shares = [work[i::_READERS] for i in range(min(_READERS, len(work)))]
        futures = [self._pool.submit(self._read_some, share) for share in shares]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise min(errors, key=lambda error: getattr(error, "offset", 0) or 0)

    def _read_some(self, work: Sequence[tuple[_Piece, memoryview]]) -> None:
        for piece, part in work:
            try:
                self._layers[piece.layer].readinto(piece.offset, part)
            except QmpdError as error:
                raise CopyError("read", error, piece.offset) from error

    def _put(self, place: _Place, offset: int, data: memoryview) -> None:
        shift = offset - place.start
        try:
            place.device.write(place.host + shift, data)
        except QmpdError as error:
            raise CopyError("write", error, offset) from error
        if place.file is not None:
            self._transfer.wrote(place.file, place.position + shift, len(data))


def _stretches(runs: ChainRuns) -> Iterator[tuple[list[ChainRun], bool]]:
    """Rows that follow each other without a gap and are all zeros or all bytes; and which of the two."""
    if not len(runs):
        return
    zero = runs.kind == RunKind.ZERO
    breaks = (runs.offset[1:] != runs.offset[:-1] + runs.length[:-1]) | (zero[1:] != zero[:-1])
    firsts = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(runs)]
    rows = list(runs)
    for first, last in pairwise(firsts):
        yield rows[first:last], rows[first].kind == RunKind.ZERO


def _bounds(rows: Sequence[ChainRun]) -> tuple[int, int]:
    return rows[0].offset, rows[-1].offset + rows[-1].length


def _cut(rows: Sequence[ChainRun], start: int, end: int) -> list[ChainRun]:
    """The rows' parts within ``[start, end)``."""
    parts = []
    for row in rows:
        begin, stop = max(row.offset, start), min(row.offset + row.length, end)
        if stop - begin == row.length:
            parts.append(row)
        elif begin < stop:
            host = row.host + begin - row.offset if row.kind == RunKind.DATA else -1
            parts.append(ChainRun(begin, stop - begin, row.kind, row.layer, host))
    return parts


def _intersect(rows: Sequence[ChainRun], places: Sequence[_Place]) -> Iterator[tuple[ChainRun, _Place, int, int]]:
    """(row, place, offset, length) of each part that lies in one row and one place; both lists are sorted."""
    index = 0
    for row in rows:
        offset, end = row.offset, row.offset + row.length
        while offset < end:
            while places[index].end <= offset:
                index += 1
            stop = min(end, places[index].end)
            yield row, places[index], offset, stop - offset
            offset = stop
