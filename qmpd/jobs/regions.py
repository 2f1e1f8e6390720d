"""Copying what does not change meanwhile: all that lies above base, from front to end.

Source: spec/jobs-and-commit.md section 5. Worker thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Final

from qmpd.block.copy import CopyEngine, CopyError
from qmpd.block.extents import ChainRuns, chain_runs
from qmpd.errors import QmpdError
from qmpd.jobs.cell import Cell, Rest
from qmpd.jobs.copying import CopyJob
from qmpd.jobs.job import Body, Failure
from qmpd.jobs.pieces import Pieces
from qmpd.units import GIB

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


def survey(cell: Cell, length: int, find: Callable[[int, int], ChainRuns]) -> Generator[Rest, None, None]:
    """Tell the cell, which expects it, how much there is to move in the first ``length`` bytes.

    ``find`` maps a range given by offset and length. What cannot be mapped now may be later, when it matters.
    """
    offset, work, window = 0, 0, Window()
    while offset < length:
        yield from cell.checkpoint()
        try:
            runs = find(offset, min(window.length, length - offset))
        except QmpdError:
            cell.set_work(None)
            return
        window.learn(len(runs))
        work += int(runs.allocated().length.sum())
        offset = runs.end
    cell.set_work(work)


class RegionJob(CopyJob):
    """A commit of images that nobody writes to."""

    def _set_goal(self, cell: Cell) -> None:
        """Say at the start how much there is to do."""
        cell.set_total(self._length)
        if not self._stepwise:
            cell.expect_survey()

    def _copy(self, cell: Cell) -> Body:
        if not self._stepwise:
            yield from survey(cell, self._length, lambda *where: chain_runs(self._layers, *where))
        with CopyEngine(self._layers, self._device) as engine:
            offset, window = 0, Window()
            while offset < self._length:
                pieces = yield from self._map(cell, offset, window.length)
                window.learn(len(pieces.runs))
                yield from self._copy_region(cell, engine, pieces)
                offset = pieces.end

    def _copy_region(self, cell: Cell, engine: CopyEngine, pieces: Pieces) -> Body:
        offset = pieces.start
        while offset < pieces.end:
            yield from cell.pace()
            piece = pieces.step(offset) if self._stepwise or cell.speed else pieces.stretch(offset)
            try:
                if piece.allocated:
                    engine.copy(pieces.runs, offset, piece.length)
            except CopyError as error:
                yield from self._failed(error.operation, error)
                continue
            cell.advance(piece.length, charged=piece.allocated)
            offset += piece.length
            yield from self._succeeded()

    def _map(self, cell: Cell, offset: int, length: int) -> Generator[Rest | Failure, None, Pieces]:
        """What lies above base from ``offset`` on, for at most ``length`` bytes."""
        while True:
            try:
                return Pieces(chain_runs(self._layers, offset, min(length, self._length - offset)))
            except QmpdError as error:
                yield from self._failed("read", error)
            yield from cell.checkpoint()
