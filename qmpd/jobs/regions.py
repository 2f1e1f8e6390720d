"""Copying what does not change meanwhile: all that lies above base, from front to end.

Source: spec/jobs-and-commit.md section 5. Worker thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from typing import Any

from qmpd.block.copy import CopyEngine, CopyError
from qmpd.block.extents import ChainRuns, chain_runs
from qmpd.errors import QmpdError
from qmpd.graph.node import Node
from qmpd.jobs.cell import Cell, Rest
from qmpd.jobs.copying import CopyJob
from qmpd.jobs.job import Action, Body, Failure
from qmpd.jobs.pieces import Pieces, Window


def survey(cell: Cell, offset: int, length: int, find: Callable[[int, int], ChainRuns]) -> Generator[Rest, None, None]:
    """Tell the cell, which expects it, how much there is to move between ``offset`` and ``length`` (bytes).

    ``find`` maps a range given by offset and length. What cannot be mapped now may be later, when it matters.
    """
    work, window = 0, Window()
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


def fingerprint(node: Node) -> list[int]:
    """Inode, size and time of change of the file under an image; nothing for what is in no file. Worker thread."""
    below = node
    while (edge := below.primary_edge) is not None:
        below = edge.node
    fd = getattr(below.driver, "fd", None)
    if not isinstance(fd, int) or fd < 0:
        return []
    found = os.fstat(fd)
    return [found.st_ino, found.st_size, found.st_mtime_ns]


class RegionJob(CopyJob):
    """A commit of images that nobody writes to."""

    def _set_goal(self, cell: Cell) -> None:
        """Say at the start how much there is to do."""
        cell.set_total(self._length)
        if not self._stepwise:
            cell.expect_survey()

    def _copy(self, cell: Cell) -> Body:
        offset = self._skip(cell)
        if not self._stepwise:
            yield from survey(cell, offset, self._length, lambda *where: chain_runs(self._layers, *where))
        window = Window()
        with CopyEngine(self._layers, self._device) as engine:
            while offset < self._length:
                pieces = yield from self._map(cell, offset, window.length)
                window.learn(len(pieces.runs))
                yield from self._copy_region(cell, engine, pieces)
                offset = pieces.end

    # -- checkpoints: docs/durable.md ----------------------------------------------------------------------------------

    def _skip(self, cell: Cell) -> int:
        """Where to begin: at the checkpoint, if the images are still what it was taken of."""
        if self.keeper is not None:
            self.keeper.begin()
        found = self.checkpoint
        if found is None or found["images"] != self._fingerprints() or found["offset"] > self._length:
            return 0
        offset = int(found["offset"])
        cell.advance(offset)
        return offset

    def _take_checkpoint(self, offset: int) -> Body:
        """Before ``offset`` all is in base: have that remembered if it is time to."""
        if self.keeper is not None and self.keeper.is_due:
            try:
                self.keeper.keep(self._device.flush, self._checkpoint_at(offset))
            except QmpdError as error:  # as in _harden
                yield Failure("write", Action.REPORT, error)
                raise

    def _last_checkpoint(self) -> None:
        """All is in base, durably."""
        if self.keeper is not None:
            self.keeper.keep(lambda: None, self._checkpoint_at(self._length))

    def _checkpoint_at(self, offset: int) -> dict[str, Any]:
        return {"offset": offset, "length": self._length, "images": self._fingerprints()}

    def _fingerprints(self) -> list[list[int]]:
        """What tells files apart, and whether they were written to: of the sources all of it, of base its identity."""
        return [*map(fingerprint, self._plan.intermediates), fingerprint(self._plan.base)[:1]]

    def _copy_region(self, cell: Cell, engine: CopyEngine, pieces: Pieces) -> Body:
        offset = pieces.start
        while offset < pieces.end:
            yield from cell.pace()
            piece = pieces.step(offset, cell.portion) if self._stepwise or cell.is_limited else pieces.stretch(offset)
            try:
                if piece.allocated:
                    engine.copy(pieces.runs, offset, piece.length)
            except CopyError as error:
                yield from self._failed(error.operation, error)
                continue
            cell.advance(piece.length, charged=piece.allocated)
            offset += piece.length
            yield from self._succeeded()
            yield from self._take_checkpoint(offset)

    def _map(self, cell: Cell, offset: int, length: int) -> Generator[Rest | Failure, None, Pieces]:
        """What lies above base from ``offset`` on, for at most ``length`` bytes."""
        while True:
            try:
                return Pieces(chain_runs(self._layers, offset, min(length, self._length - offset)))
            except QmpdError as error:
                yield from self._failed("read", error)
            yield from cell.checkpoint()
