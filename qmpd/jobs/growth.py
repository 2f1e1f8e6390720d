"""How much a commit moves, and what that does to base. Nothing is changed. Worker thread.

Growth is found out by rehearsing the copy on an image whose writes go nowhere (:mod:`qmpd.block.rehearsal`), so it is
that of the real allocator. It holds as long as nobody writes to the chain meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from qmpd.block.api import BlockDevice, Driver
from qmpd.block.drivers.qcow2 import Qcow2
from qmpd.block.drivers.qcow2.rehearsal import Rehearsal
from qmpd.block.extents import ChainRuns, RunKind, chain_runs
from qmpd.block.rehearsal import CopyRehearsal
from qmpd.errors import QmpdError
from qmpd.graph import chain
from qmpd.jobs.files import storage_of
from qmpd.jobs.pieces import Pieces, Window
from qmpd.jobs.plan import CommitPlan
from qmpd.units import MIB, SECTOR, align_up

#: Bytes read to see how fast reading is.
_SAMPLE: Final = 16 * MIB
_SAMPLE_STEP: Final = MIB
#: Of a file system, in bytes: what a raw image grows by.
_BLOCK: Final = 4096


@dataclass(slots=True)
class Amount:
    """Bytes to copy, by kind. ``other`` can only be read through its driver."""

    data: int = 0
    zero: int = 0
    compressed: int = 0
    other: int = 0

    def add(self, runs: ChainRuns) -> None:
        for name, kind in _KINDS:
            setattr(self, name, getattr(self, name) + int(runs.length[runs.kind == kind].sum()))

    @property
    def bytes(self) -> int:
        """What takes space in base; zeros need none."""
        return self.data + self.compressed + self.other


_KINDS: Final = (
    ("data", RunKind.DATA),
    ("zero", RunKind.ZERO),
    ("compressed", RunKind.COMPRESSED),
    ("other", RunKind.OPAQUE),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What base's file gains, bytes and clusters. A raw image has no clusters; ``data`` there is what fills holes."""

    file_size: int
    data: int
    cluster_size: int | None = None
    clusters: int = 0
    data_clusters: int = 0
    l1_clusters: int = 0
    l2_clusters: int = 0
    refcount_blocks: int = 0
    refcount_table_clusters: int = 0


class TakesLongError(Exception):
    """There is no time to find it out."""


class Work:
    """The copying of one commit. What it is asked raises TakesLongError after :attr:`deadline`. Worker thread."""

    def __init__(self, plan: CommitPlan, layers: Sequence[BlockDevice], visible_end: int) -> None:
        self.plan = plan
        self._layers = layers
        self._length = plan.top.length
        self._visible_end = visible_end
        #: On the clock of time.monotonic(); None for all the time there is.
        self.deadline: float | None = None
        self._stepwise = bool(plan.request.speed) or any(node.is_filter for node in plan.top.subtree())

    def windows(self) -> Iterator[ChainRuns]:
        """All that lies above base, as the job maps it."""
        offset, window = 0, Window()
        while offset < self._length:
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise TakesLongError
            runs = chain_runs(self._layers, offset, min(window.length, self._length - offset))
            window.learn(len(runs))
            offset = runs.end
            yield runs

    def measure(self) -> Amount:
        amount = Amount()
        for runs in self.windows():
            amount.add(runs)
        return amount

    def most(self) -> int:
        """No less than what base can need for data, in bytes, whatever it holds already."""
        unit = chain.skip_filters(self.plan.base).opened.info().cluster_size or _BLOCK
        clusters = 0
        for runs in self.windows():
            data = runs.kind != RunKind.ZERO
            data &= runs.kind != RunKind.UNALLOCATED
            start, end = runs.offset[data], (runs.offset + runs.length)[data]
            clusters += int((-(-end // unit) - start // unit).sum())
        return clusters * unit

    def growth(self) -> Growth:
        """What the commit adds to base. Raises QmpdError where base cannot be written."""
        base = chain.skip_filters(self.plan.base).opened
        if isinstance(base, Qcow2):
            return self._qcow2_growth(base)
        return self._raw_growth(base)

    def _qcow2_growth(self, base: Qcow2) -> Growth:
        rehearsal = Rehearsal(base, self._file_end())
        before = rehearsal.inventory()
        self._rehearse(rehearsal.driver)
        added = rehearsal.inventory().since(before)
        size = base.placement_unit or base.info().cluster_size or 0
        data, grown = added.data_clusters * size, added.length
        if rehearsal.data is not None:  # as far as it has no data there yet
            data, grown = sum(_filling(base, runs) for runs in self.windows()), grown + rehearsal.data_growth
        return Growth(
            file_size=grown,
            data=data,
            cluster_size=size,
            clusters=added.file_clusters,
            data_clusters=added.data_clusters,
            l1_clusters=added.l1_clusters,
            l2_clusters=added.l2_tables,
            refcount_blocks=added.refcount_blocks,
            refcount_table_clusters=added.refcount_table_clusters,
        )

    def _file_end(self) -> int | None:
        """The exact length of base's file, if base is all there is in it."""
        storage = storage_of(self.plan.base)
        return os.fstat(storage.fd).st_size if storage is not None else None

    def _rehearse(self, target: Driver) -> None:
        """The steps of the job's body."""
        if target.length < self._length:
            target.truncate(self._length)
        with CopyRehearsal(self._layers, target) as engine:
            for runs in self.windows():
                pieces, offset = Pieces(runs), runs.start
                while offset < pieces.end:
                    piece = pieces.step(offset) if self._stepwise else pieces.stretch(offset)
                    if piece.allocated:
                        engine.copy(runs, offset, piece.length)
                    offset += piece.length
        if self._visible_end > self._length:
            target.write_zeroes(self._length, self._visible_end - self._length)
        target.flush()

    def _raw_growth(self, base: Driver) -> Growth:
        """Holes of base that data will fill; its length where top is longer."""
        data = 0
        for runs in self.windows():
            data += _filling(base, runs)
        begin, end = base.length, max(base.length, self._length)
        exact = self._file_end()
        if exact is not None and end > begin == align_up(exact, SECTOR):
            begin = exact
        return Growth(file_size=end - begin, data=data)

    def expected_seconds(self, amount: Amount) -> float | None:
        """From the time that reading the first data takes. Writing is taken to be as fast: an estimate."""
        speed = self.plan.request.speed
        with contextlib.suppress(QmpdError):
            rate = self._reading_rate()
            if rate is not None:
                return amount.bytes / (min(rate, speed) if speed else rate)
        return amount.bytes / speed if speed else None

    def _reading_rate(self) -> float | None:
        """Bytes a second."""
        buffer, done, begin = memoryview(bytearray(_SAMPLE_STEP)), 0, time.monotonic()
        for runs in self.windows():
            for run in runs.allocated():
                if run.kind == RunKind.ZERO:
                    continue
                for at in range(run.offset, run.offset + run.length, _SAMPLE_STEP):
                    size = min(_SAMPLE_STEP, run.offset + run.length - at)
                    self._layers[run.layer].readinto(at, buffer[:size])
                    done += size
                    if done >= _SAMPLE:
                        return done / max(time.monotonic() - begin, 1e-9)
        return done / max(time.monotonic() - begin, 1e-9) if done else None


def _filling(base: Driver, runs: ChainRuns) -> int:
    """Bytes of ``runs`` that hold data where base has none."""
    filled = 0
    for run in runs.allocated():
        if run.kind == RunKind.ZERO:
            continue
        position, end = run.offset, run.offset + run.length
        while position < min(end, base.length):
            known = base.map(position, min(end, base.length) - position)
            filled += int(known.length[known.kind != RunKind.DATA].sum())
            position = known.end
        filled += end - position
    return filled


def no_space(path: str, needed: int, free: int) -> str:
    return f"Not enough space for '{path}': the commit takes {needed} bytes there, {free} are free"
