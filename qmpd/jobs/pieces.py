"""How much is mapped at once, and the pieces that a job moves between two looks at its cell. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from qmpd.block.extents import ChainRuns, RunKind
from qmpd.units import GIB, KIB, MIB, align_down

CHUNK: Final = 512 * KIB
"""Bytes of one of the peer's steps (spec/jobs-and-commit.md section 5): what a speed limit lets out at once."""
STRETCH: Final = 64 * MIB
"""Bytes moved without a look at the cell when there is no speed limit: some tens of milliseconds."""
ZERO_SHARE: Final = 16
"""So many bytes of zeros count like one of data, for zeros are written by metadata."""
BOUNDARY: Final = 2 * MIB
"""Pieces end at multiples of this, the largest cluster size, so that no cluster is written by halves."""
WINDOW: Final = 16 * GIB
"""Bytes of the device that are mapped at once: a quarter of a million runs at most, with clusters of 64 KiB."""
_WIDEST: Final = 16 * WINDOW
_FEW: Final = 1 << 12
"""Runs found in a window that is worth widening. Mapping 16 GiB of nothing costs half a millisecond, 256 GiB as much:
4 TiB that hold 200 MiB are through in 25 steps instead of 256."""


class Window:
    """How much to map at once: twice as much as long as little is found, and the least again where there is a lot."""

    def __init__(self) -> None:
        self.length = WINDOW

    def learn(self, runs: int) -> None:
        """The last answer had so many runs."""
        self.length = min(2 * self.length, _WIDEST) if runs < _FEW else WINDOW


@dataclass(frozen=True, slots=True)
class Piece:
    """``length`` bytes of the device, ``allocated`` of them above base."""

    length: int
    allocated: int


class Pieces:
    """The pieces of one mapped region ``[start, end)``."""

    def __init__(self, runs: ChainRuns) -> None:
        self.runs = runs
        self.start = runs.start
        self.end = runs.end
        kind = runs.kind
        self._is_allocated = kind != RunKind.UNALLOCATED
        #: Effort and allocated bytes that lie before each run, and per byte of it.
        self._rate = np.where(kind == RunKind.ZERO, 1, np.where(self._is_allocated, ZERO_SHARE, 0)).astype(np.int64)
        self._effort = _before(runs.length * self._rate)
        self._allocated = _before(np.where(self._is_allocated, runs.length, 0))
        #: Where another layer, or none, begins to answer.
        changes = np.flatnonzero(np.diff(runs.layer)) + 1
        self._turns = np.append(runs.offset[changes], self.end)

    def step(self, offset: int, size: int = CHUNK) -> Piece:
        """The peer's step: from one layer throughout; at most a chunk (``size``) if allocated, all there is if not."""
        length = int(self._turns[np.searchsorted(self._turns, offset, "right")]) - offset
        if not self._is_allocated[self._index(offset)]:
            return Piece(length, 0)
        length = min(length, size)
        return Piece(length, length)

    def stretch(self, offset: int, size: int = STRETCH) -> Piece:
        """As much as is moved in one go: ``size`` bytes of data, or more of what takes less effort."""
        index = self._index(offset)
        budget = self._effort[index] + (offset - self.runs.offset[index]) * self._rate[index] + size * ZERO_SHARE
        last = int(np.searchsorted(self._effort, budget, "left")) - 1
        room = int(self.runs.length[last])
        if self._rate[last]:  # else it takes no effort at all
            room = min(room, int((budget - self._effort[last]) // self._rate[last]))
        end = int(self.runs.offset[last]) + room
        if end < self.end:
            end = max(align_down(end, BOUNDARY), min(end, offset + BOUNDARY))
        return Piece(end - offset, self._allocated_until(end) - self._allocated_until(offset))

    def _index(self, offset: int) -> int:
        return int(np.searchsorted(self.runs.offset, offset, "right")) - 1

    def _allocated_until(self, offset: int) -> int:
        index = self._index(offset)
        into = offset - int(self.runs.offset[index])
        return int(self._allocated[index]) + (into if self._is_allocated[index] else 0)


def _before(amounts: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Running total, exclusive."""
    total = np.cumsum(amounts, dtype=np.int64)
    return total - amounts
