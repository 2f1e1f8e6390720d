"""Active commit: top is written to while it is copied into base, until base can take its place.

A filter above top marks what is written (:mod:`qmpd.block.filters.mirror_top`). The body marks all that is allocated
above base, then copies what is marked until nothing is; from then on the job is *ready* and keeps up. A granule's bit
is cleared before it is copied and set after it is written, so a write that races with the copy is copied again.

The pivot is where a write could get lost. Users are held, what they wrote last is copied, base is made durable, and
only then they go on, on base. A job that is pending does not hold anybody: what is written until it is finalised is
copied then. Whenever the job ends otherwise, top has everything, as before.

Base shows what was copied only where top, or an image between them, shadows it: the guest's view does not depend on
how far the job is. Headers are not touched: top keeps its link to base, and what is above an intermediate top its own.

Source: spec/jobs-and-commit.md section 7. The control thread runs all but :meth:`ActiveCommitJob.run`.
"""

from __future__ import annotations

from collections.abc import Generator
from enum import Enum
from functools import partial
from typing import Final

from qmpd.block.api import Perm, Role
from qmpd.block.copy import CopyEngine, CopyError
from qmpd.block.dirty import I64, DirtyMap
from qmpd.block.extents import RunKind, chain_runs
from qmpd.block.filters.mirror_top import MirrorTop
from qmpd.errors import QmpdError
from qmpd.graph import chain
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Edge, Node
from qmpd.graph.spec import NodeSpec
from qmpd.jobs.cell import Cell, Rest
from qmpd.jobs.copying import WRITES, CopyJob, as_errno
from qmpd.jobs.job import Body, Failure, Ready, check_speed
from qmpd.jobs.plan import CommitPlan
from qmpd.jobs.surgery import back_to_read_only, quietly, while_quiet
from qmpd.steps import Steps
from qmpd.units import GIB, KIB, MIB

SCAN: Final = 16 * GIB
"""Bytes of the device that are mapped at once when everything allocated is marked."""
STEP: Final = 16 * MIB
"""Bytes of one dirty stretch copied between two looks at the cell, when there is a speed limit."""
BATCH: Final = 64 * MIB
"""The same without a limit, of any number of stretches."""
HELD: Final = 16 * MIB
"""A rest of so many bytes is small enough to be copied while users are held: some tens of milliseconds."""
PATIENCE: Final = 8
"""After having copied so many times the rest, or that size, the job takes the writer to be faster than itself."""
NOTICE: Final = 0.1
"""Seconds after which a job that is ready looks for what has been written."""

_GRANULARITIES: Final = (4 * KIB, 64 * KIB)
_SHARED: Final = Perm.CONSISTENT_READ | WRITES


class Ending(Enum):
    """What a client wants of a job that is ready."""

    PIVOT = "users go on with base"
    STAY = "users stay on top, base is a copy"


class ActiveCommitJob(CopyJob):
    """One block-commit whose top is the active layer, or has a writer."""

    def __init__(self, graph: Graph, plan: CommitPlan) -> None:
        super().__init__(graph, plan)
        self._dirty = DirtyMap(self._length, granularity(plan.base))
        #: Where the next copy begins.
        self._position = 0
        self._is_ready = False
        self._ending: Ending | None = None
        #: See :meth:`_gives_up`; 0 until it is asked, first about becoming ready, then about ending.
        self._enough = 0
        self._has_pivoted = False
        self._cell: Cell | None = None

    @property
    def lent(self) -> list[Node]:
        """After a pivot base has the users of top, and is theirs."""
        return [] if self._has_pivoted else super().lent

    # -- start ---------------------------------------------------------------------------------------------------------

    def start(self, cell: Cell) -> Steps[None]:
        """Put the filter above top, take the permissions, freeze the chain; or leave no trace."""
        check_speed(self._request.speed)
        cell.set_speed(self._request.speed)
        self._cell = cell
        self._layers = chain.layers(self._plan.top, self._plan.base)
        yield from self._begin()

    def enter_graph(self, edit: Edit) -> None:
        """The change of the graph that the start makes."""
        top = self._plan.top
        spec = NodeSpec(MirrorTop.format_name, read_only=False, discard=top.spec.discard)
        edit.set_read_only(self._plan.base, False)
        self._insert_filter(edit, spec, lambda below: MirrorTop(below, self._dirty))
        self._attach_job(edit)
        self._freeze(edit)

    def _attach_job(self, edit: Edit) -> None:
        plan = self._plan
        self._hold(edit, "main node", self._the_filter, perm=Perm.CONSISTENT_READ, shared=_SHARED)
        source = self._hold(edit, "source", plan.top, shared=_SHARED)
        target = self._hold(edit, "target", plan.base)
        self._hold_intermediates(edit, plan.intermediates[1:])
        user = self._attach_target(edit)
        # Writes to top that pass the filter by would be lost, writes to base would be overwritten or corrupt the copy.
        edit.admit_writers(source, [self._the_filter.children["backing"]])
        edit.admit_writers(target, [user])

    def _attach_target(self, edit: Edit) -> Edge:
        perm = Perm.WRITE | (Perm.RESIZE if self._base_length < self._length else Perm.NONE)
        edge = edit.attach(self._target, "root", self._plan.base, Role.NONE, perm=perm, shared=_SHARED)
        self._edges.append(edge)
        return edge

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def complete(self) -> None:
        """Pivot as soon as base has everything. Refused once the job was told to end without."""
        if self._ending is Ending.STAY:
            super().complete()
        self._ending = Ending.PIVOT

    def soft_cancel(self) -> bool:
        """End as soon as base has everything, and leave users where they are. A pivot asked for before stays."""
        self._ending = self._ending or Ending.STAY
        return True

    # -- run: worker thread --------------------------------------------------------------------------------------------

    def run(self, cell: Cell) -> Body:
        """Copy until told to end."""
        try:
            self._grow()
            if self._length:
                yield Rest()
                yield from self._scan(cell)
            yield from self._mirror(cell)
        except QmpdError as error:
            raise as_errno(error) from error
        if not self.auto_finalize:
            # Pending, and at rest like a paused job: what is written meanwhile waits for prepare.
            cell.pause()

    def _scan(self, cell: Cell) -> Body:
        """Mark everything that is allocated above base."""
        offset = 0
        while offset < self._length:
            yield from cell.checkpoint()
            try:
                runs = chain_runs(self._layers, offset, min(SCAN, self._length - offset))
            except QmpdError as error:
                yield from self._failed("read", error)
                continue
            allocated = runs.allocated()
            self._dirty.mark_ranges(allocated.offset, allocated.offset + allocated.length)
            offset = runs.end
            yield from self._succeeded()

    def _mirror(self, cell: Cell) -> Body:
        with CopyEngine(self._layers, self._device) as engine:
            while True:
                yield from cell.checkpoint()
                self._show_progress(cell)
                rest = self._dirty.bytes
                if self._ending is not None and (rest <= HELD or self._gives_up(cell)):
                    # What is written from here on is little, and copied where no policy can help if that fails.
                    if (yield from self._copy(cell, engine, HELD)):
                        return
                elif not self._is_ready and (rest == 0 or (rest <= HELD and self._gives_up(cell))):
                    # A limit holds the last piece as well: at "speed: 1" clients rely on a job that is not ready yet.
                    yield from cell.pace()
                    if self._dirty.bytes > rest:
                        continue
                    yield from self._harden()
                    self._is_ready, self._enough = True, 0
                    yield Ready()
                elif rest:
                    yield from cell.pace()
                    single = self._stepwise or cell.is_limited
                    yield from self._copy(cell, engine, self._step(cell) if single else BATCH, single=single)
                else:
                    yield Rest(NOTICE)

    def _step(self, cell: Cell) -> int:
        """Bytes of one stretch to copy where there is a limit: a budget is shared, and so kept to more closely."""
        return min(STEP, cell.portion) if cell.has_budget else STEP

    def _gives_up(self, cell: Cell) -> bool:
        """Has so much been copied since this was first asked that the writer must be faster?"""
        if not self._enough:
            self._enough = cell.progress.current + PATIENCE * max(self._dirty.bytes, HELD)
        return cell.progress.current >= self._enough

    def _copy(
        self, cell: Cell, engine: CopyEngine, limit: int, *, single: bool = False
    ) -> Generator[Rest | Failure, None, bool]:
        """Copy up to ``limit`` bytes of what is dirty, or of its first stretch; False if that must be tried again."""
        start, end = self._dirty.take(self._position, limit, single=single)
        if not len(start):
            return True
        try:
            charged = self._move(engine, start, end)
        except QmpdError as error:
            self._dirty.mark_ranges(start, end)
            yield from self._failed(error.operation if isinstance(error, CopyError) else "read", error)
            return False
        self._position = int(end[-1])
        cell.advance(int((end - start).sum()), charged=charged)
        self._show_progress(cell)
        yield from self._succeeded()
        return True

    def _move(self, engine: CopyEngine, start: I64, end: I64) -> int:
        """Copy what these ranges hold above base; how many bytes of data that was, zeros not counted.

        Host offsets are looked up without keeping writers out: one that gives a cluster up while it is copied has
        marked the granule by the time it is done.
        """
        offset, stop = int(start[0]), int(end[-1])
        data = 0
        while offset < stop:
            runs = chain_runs(self._layers, offset, stop - offset)
            part = runs.within(start, end).allocated()
            if len(part):
                engine.copy(part, part.start, part.end - part.start)
                data += int(part.length[part.kind != RunKind.ZERO].sum())
            offset = runs.end
        return data

    def _show_progress(self, cell: Cell) -> None:
        """The total follows what is written: done and dirty."""
        cell.set_total(cell.progress.current + self._dirty.bytes)

    # -- end -----------------------------------------------------------------------------------------------------------

    def prepare(self) -> Steps[None]:
        """Bring base up to date with users held, then lead them there, or leave them on top."""
        assert self._cell is not None
        self._cell.resume()
        try:
            yield self._catch_up
            yield from while_quiet(self._graph, [self._the_filter, self._plan.top], self._take_over)
        except QmpdError as error:
            raise as_errno(error) from error

    def _catch_up(self) -> None:
        """Worker thread: make the rest small while users go on."""
        assert self._cell is not None
        self._enough = 0
        with CopyEngine(self._layers, self._device) as engine:
            while self._dirty.bytes > HELD and not self._gives_up(self._cell):
                self._copy_at_once(engine)

    def _take_over(self) -> Steps[None]:
        yield partial(self._settle, self._visible_end(self._overlays(self._the_filter)))
        self._leave_graph(self._plan.base if self._ending is Ending.PIVOT else self._plan.top)
        self._has_pivoted = self._ending is Ending.PIVOT
        self.passed = True
        if self._has_pivoted:
            self._leave_behind(self._plan.intermediates)

    def _settle(self, visible_end: int) -> None:
        """Worker thread, nobody writes: copy the rest and make base durable.

        Overlays of an intermediate top may be longer than top. They read zeros there, up to ``visible_end`` (bytes, 0
        for none) base would show them its own old data.
        """
        with CopyEngine(self._layers, self._device) as engine:
            while self._dirty.bytes:
                self._copy_at_once(engine)
        if visible_end:
            self._device.write_zeroes(self._length, visible_end - self._length)
        self._device.flush()

    def _copy_at_once(self, engine: CopyEngine) -> None:
        """Copy a batch of what is dirty without asking anybody."""
        assert self._cell is not None
        start, end = self._dirty.take(self._position, BATCH)
        try:
            charged = self._move(engine, start, end)
        except QmpdError:
            self._dirty.mark_ranges(start, end)
            raise
        self._position = int(end[-1])
        self._cell.advance(int((end - start).sum()), charged=charged)
        self._show_progress(self._cell)

    def abort(self) -> Steps[None]:
        """Users are on top again, which has everything."""
        assert self._cell is not None
        self._cell.resume()
        leave = partial(self._leave_graph, self._plan.top)
        yield from quietly(self._graph, [self._the_filter, self._plan.top], leave)

    def clean(self) -> Steps[None]:
        """Base's flag: after a pivot that of top, after a failure that from before; a copy stays writable."""
        if self._has_pivoted:
            read_only = self._plan.top.read_only
        else:
            read_only = self._base_was_read_only and self.error is not None
        if read_only and not self._plan.base.read_only:
            yield from back_to_read_only(self._graph, self._plan.base)

    def _leave_graph(self, successor: Node) -> None:
        """Take the filter out; whoever used top uses ``successor`` now."""
        top = self._plan.top
        with self._graph.edit() as edit:
            chain.unfreeze(edit, self._frozen)
            self._let_go(edit)
            edit.move_parents(self._the_filter, successor)
            edit.remove_node(self._the_filter)
            if successor is not top:
                edit.move_parents(top, successor)


def granularity(base: Node) -> int:
    """Bytes of the device that a dirty bit stands for: a cluster of base, within limits."""
    low, high = _GRANULARITIES
    return min(max(base.opened.info().cluster_size or high, low), high)
