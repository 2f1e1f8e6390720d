"""Runs of bytes: where the content of a range lives.

:class:`Runs` is a small table of numpy columns, because a disk can hold hundreds of thousands of runs and Python
objects for each would cost more than copying them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from qmpd.units import MIB

if TYPE_CHECKING:
    from qmpd.block.api import BlockDevice


class RunKind(IntEnum):
    """What a run is made of."""

    UNALLOCATED = 0  # this layer says nothing: look below (zeros below the last layer)
    DATA = 1  # bytes at `host` in the layer's data child
    ZERO = 2  # reads as zeros, needs no bytes
    COMPRESSED = 3  # one compressed cluster (or part of it); only the driver can read it
    OPAQUE = 4  # allocated, but only readable through the driver


class Run(NamedTuple):
    """One row of :class:`Runs`; bytes."""

    offset: int
    length: int
    kind: RunKind
    host: int  # byte offset in the data child for DATA, else -1


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Sorted, gapless runs: ``offset[i] + length[i] == offset[i + 1]``. Columns have equal shape (n,), n >= 1."""

    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    kind: npt.NDArray[np.uint8]
    host: npt.NDArray[np.int64]

    @classmethod
    def single(cls, offset: int, length: int, kind: RunKind, host: int = -1) -> Runs:
        """One run."""
        return cls(
            np.array([offset], np.int64),
            np.array([length], np.int64),
            np.array([kind], np.uint8),
            np.array([host], np.int64),
        )

    @classmethod
    def of(cls, rows: list[Run]) -> Runs:
        """From Python rows (tests, small results)."""
        return cls(
            np.array([r.offset for r in rows], np.int64),
            np.array([r.length for r in rows], np.int64),
            np.array([r.kind for r in rows], np.uint8),
            np.array([r.host for r in rows], np.int64),
        )

    @property
    def start(self) -> int:
        return int(self.offset[0])

    @property
    def end(self) -> int:
        return int(self.offset[-1] + self.length[-1])

    def __len__(self) -> int:
        return len(self.offset)

    def __iter__(self) -> Iterator[Run]:
        for o, n, k, h in zip(
            self.offset.tolist(), self.length.tolist(), self.kind.tolist(), self.host.tolist(), strict=True
        ):
            yield Run(o, n, RunKind(k), h)


#: Layer index of bytes that no layer has.
NO_LAYER: Final = -1

#: Parts of a range that a layer is not asked about unless they are longer than this (bytes): answering for a little
#: more costs a driver less than another question does.
_WORTH_SKIPPING: Final = 64 * MIB


@dataclass(frozen=True, slots=True, eq=False)
class ChainRuns:
    """What several layers make of a range: :class:`Runs` with the layer that each run comes from.

    ``layer`` is an index into the layers asked (0 is the top), NO_LAYER where ``kind`` is UNALLOCATED: nothing above
    the base. Sorted and gapless; may be empty.
    """

    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    kind: npt.NDArray[np.uint8]
    layer: npt.NDArray[np.int32]
    host: npt.NDArray[np.int64]

    @property
    def start(self) -> int:
        """First byte; of an empty table 0."""
        return int(self.offset[0]) if len(self.offset) else 0

    @property
    def end(self) -> int:
        """Behind the last byte; of an empty table 0."""
        return int(self.offset[-1] + self.length[-1]) if len(self.offset) else 0

    def __len__(self) -> int:
        return len(self.offset)

    def __iter__(self) -> Iterator[ChainRun]:
        columns = (self.offset, self.length, self.kind, self.layer, self.host)
        for o, n, k, i, h in zip(*(column.tolist() for column in columns), strict=True):
            yield ChainRun(o, n, RunKind(k), i, h)

    def clip(self, start: int, end: int) -> ChainRuns:
        """The part within ``[start, end)``."""
        first = int(np.searchsorted(self.offset, start, "right")) - 1
        last = int(np.searchsorted(self.offset, end, "left"))
        first = max(first, 0)
        offset, length = self.offset[first:last], self.length[first:last]
        kind, layer, host = self.kind[first:last], self.layer[first:last], self.host[first:last]
        if len(offset) and (offset[0] < start or offset[-1] + length[-1] > end):
            begin = np.maximum(offset, start)
            host = np.where(host >= 0, host + (begin - offset), host)
            length = np.minimum(offset + length, end) - begin
            offset = begin
        clipped = ChainRuns(offset, length, kind, layer, host)
        return clipped if (length > 0).all() else clipped._only(length > 0)

    def within(self, start: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> ChainRuns:
        """The parts in the ranges ``[start[i], end[i])``, which are sorted and disjoint (not gapless then)."""
        ends = self.offset + self.length
        first = np.searchsorted(ends, start, "right")
        count = np.maximum(np.searchsorted(self.offset, end, "left") - first, 0)
        span = np.repeat(np.arange(len(count)), count)
        row = np.arange(len(span)) + np.repeat(first - (np.cumsum(count) - count), count)
        begin = np.maximum(self.offset[row], start[span])
        host = np.where(self.host[row] >= 0, self.host[row] + (begin - self.offset[row]), self.host[row])
        length = np.minimum(ends[row], end[span]) - begin
        return ChainRuns(begin, length, self.kind[row], self.layer[row], host)

    def allocated(self) -> ChainRuns:
        """Only what some layer has (not gapless then)."""
        return self._only(self.kind != RunKind.UNALLOCATED)

    def _only(self, keep: npt.NDArray[np.bool_]) -> ChainRuns:
        return ChainRuns(self.offset[keep], self.length[keep], self.kind[keep], self.layer[keep], self.host[keep])

    @property
    def allocated_bytes(self) -> int:
        """Bytes that some layer has, zeros included."""
        return int(self.length[self.kind != RunKind.UNALLOCATED].sum())


class ChainRun(NamedTuple):
    """One row of :class:`ChainRuns`; bytes."""

    offset: int
    length: int
    kind: RunKind
    layer: int
    host: int


def merge(layers: Sequence[Runs]) -> ChainRuns:
    """The topmost word on each byte; ``layers`` from the top down, all about the same range."""
    chain = _Unresolved(layers[0].start, layers[0].end)
    for index, runs in enumerate(layers):
        chain.resolve(index, [runs])
    return chain.result()


def chain_runs(layers: Sequence[BlockDevice], offset: int, length: int) -> ChainRuns:
    """What the layers, from the top to the last one above the base, have in ``[offset, offset + length)``.

    Answers for ``[offset, offset + n)`` with ``0 < n <= length``: as far as the top layer answers at once (the caller
    asks again). Layers below it are asked about what is still open only. Beyond the end of a layer that is shorter than
    the top everything still open is ZERO, as if that layer had it: what it hides must not show through (see
    spec/jobs-and-commit.md section 5). Worker thread. Raises QmpdError (RANGE outside of the top layer).
    """
    if length == 0:
        return _Unresolved(offset, offset).result()
    top = layers[0].map(offset, length)
    chain = _Unresolved(offset, top.end)
    chain.resolve(0, [top])
    for index, layer in enumerate(layers[1:], 1):
        if not chain.open:
            break
        chain.resolve(index, _map_spans(layer, chain.spans()))
    return chain.result()


def _map_spans(layer: BlockDevice, spans: list[tuple[int, int]]) -> list[Runs]:
    """All that the layer says about the spans, to their ends; ZERO beyond its own end."""
    answers = []
    length = layer.length
    for start, end in spans:
        position = start
        while position < min(end, length):
            runs = layer.map(position, min(end, length) - position)
            answers.append(runs)
            position = runs.end
        if position < end:
            answers.append(Runs.single(position, end - position, RunKind.ZERO))
    return answers


class _Unresolved:
    """The parts of a range that no layer has spoken for yet, and what was said about the others.

    Each byte is settled once: a layer's runs are cut down to the gaps left by those above it, all at once.
    """

    def __init__(self, start: int, end: int) -> None:
        self._gap_start = np.array([start] if end > start else [], np.int64)
        self._gap_end = np.array([end] if end > start else [], np.int64)
        self._pieces: list[ChainRuns] = []

    @property
    def open(self) -> bool:
        """Is anything left to ask for?"""
        return len(self._gap_start) > 0

    def spans(self) -> list[tuple[int, int]]:
        """(start, end) of stretches to ask the next layer about: the gaps, with those close together joined."""
        far = np.flatnonzero(self._gap_start[1:] - self._gap_end[:-1] > _WORTH_SKIPPING)
        starts = self._gap_start[np.concatenate(([0], far + 1))]
        ends = self._gap_end[np.concatenate((far, [len(self._gap_end) - 1]))]
        return list(zip(starts.tolist(), ends.tolist(), strict=True))

    def resolve(self, layer: int, answers: Sequence[Runs]) -> None:
        """Let ``layer`` speak: sorted, disjoint runs that cover all gaps."""
        if not self.open:
            return
        start, length, kind, host = (
            np.concatenate([getattr(runs, column) for runs in answers])
            for column in ("offset", "length", "kind", "host")
        )
        first = np.searchsorted(start, self._gap_start, "right") - 1
        count = np.searchsorted(start, self._gap_end, "left") - first
        gap = np.repeat(np.arange(len(count)), count)
        row = np.arange(len(gap)) + np.repeat(first - (np.cumsum(count) - count), count)
        begin = np.maximum(self._gap_start[gap], start[row])
        end = np.minimum(self._gap_end[gap], (start + length)[row])
        kind, host = kind[row], host[row]
        said = kind != RunKind.UNALLOCATED
        if said.any():
            moved = np.where(kind == RunKind.DATA, host + (begin - start[row]), -1)
            self._add(begin[said], end[said], kind[said], layer, moved[said])
        self._gap_start, self._gap_end = _joined(begin[~said], end[~said])

    def result(self) -> ChainRuns:
        """Everything in order; what is still open is UNALLOCATED."""
        if self.open:
            none = np.full(len(self._gap_start), -1, np.int64)
            kind = np.full(len(none), RunKind.UNALLOCATED, np.uint8)
            self._add(self._gap_start, self._gap_end, kind, NO_LAYER, none)
        if not self._pieces:
            return _EMPTY
        names = ("offset", "length", "kind", "layer", "host")
        columns = [np.concatenate([getattr(piece, name) for piece in self._pieces]) for name in names]
        if len(self._pieces) > 1:
            order = np.argsort(columns[0], kind="stable")
            columns = [column[order] for column in columns]
        return _coalesced(ChainRuns(*columns))

    def _add(
        self,
        begin: npt.NDArray[np.int64],
        end: npt.NDArray[np.int64],
        kind: npt.NDArray[np.uint8],
        layer: int,
        host: npt.NDArray[np.int64],
    ) -> None:
        self._pieces.append(ChainRuns(begin, end - begin, kind, np.full(len(begin), layer, np.int32), host))


def _joined(
    start: npt.NDArray[np.int64], end: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The same intervals, with those that touch made one."""
    if len(start) == 0:
        return start, end
    fresh = np.concatenate(([True], start[1:] != end[:-1]))
    last = np.concatenate((fresh[1:], [True]))
    return start[fresh], end[last]


def _coalesced(runs: ChainRuns) -> ChainRuns:
    """Neighbours that continue each other made one. Compressed clusters stay apart: each is a unit of work."""
    same = (runs.kind[1:] == runs.kind[:-1]) & (runs.layer[1:] == runs.layer[:-1])
    same &= (runs.host[1:] == runs.host[:-1] + runs.length[:-1]) | ((runs.host[1:] < 0) & (runs.host[:-1] < 0))
    same &= runs.kind[1:] != RunKind.COMPRESSED
    if not same.any():
        return runs
    fresh = np.flatnonzero(np.concatenate(([True], ~same)))
    ends = np.append(runs.offset[fresh[1:]], runs.offset[-1] + runs.length[-1])
    start = runs.offset[fresh]
    return ChainRuns(start, ends - start, runs.kind[fresh], runs.layer[fresh], runs.host[fresh])


_EMPTY: Final = ChainRuns(
    np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8), np.zeros(0, np.int32), np.zeros(0, np.int64)
)
