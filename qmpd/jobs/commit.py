"""Intermediate commit: what top and the images below it hold above base goes into base, then they leave the chain.

The guest's view is the same at every instant. Wherever a chunk has been copied, the intermediates still shadow base;
the overlays' headers are rewritten only after base is durable; and only then the links change. A job that ends
otherwise leaves the old chain, with some of the data in base already.

Source: spec/jobs-and-commit.md sections 4 and 5. The control thread runs all but :meth:`CommitJob.run`.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from qmpd.block.api import BackingReference, Driver, Perm, Role
from qmpd.block.filters.commit_top import CommitTop
from qmpd.errors import QmpdError
from qmpd.graph import chain
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Backend, Node
from qmpd.graph.spec import NodeSpec
from qmpd.jobs import header
from qmpd.jobs.cell import Cell, Rest
from qmpd.jobs.copying import as_errno
from qmpd.jobs.job import Body, check_speed
from qmpd.jobs.plan import CommitPlan
from qmpd.jobs.regions import RegionJob
from qmpd.jobs.surgery import back_to_read_only, quietly
from qmpd.steps import Steps
from qmpd.units import GIB

ZERO_STEP: Final = GIB
"""Bytes of one zero request; between two of them the job can be paused or cancelled."""


class CommitJob(RegionJob):
    """One block-commit whose top is not the active layer."""

    def __init__(self, graph: Graph, plan: CommitPlan) -> None:
        super().__init__(graph, plan)
        request = plan.request
        self._new_backing = header.NewBacking(plan.base, request.backing_file, request.backing_mask_protocol)
        self._source = Backend()
        #: Headers that will be rewritten, as known at the start, and what they will say.
        self._headers: list[tuple[Driver, BackingReference | None]] = []
        #: Bytes of base beyond top's end, up to here, must read as zeros (section 5).
        self._blank_end = 0

    # -- start: section 4.1 --------------------------------------------------------------------------------------------

    def start(self, cell: Cell) -> Steps[None]:
        """Put the filter above top, take the permissions, freeze the chain; or leave no trace."""
        check_speed(self._request.speed)
        cell.set_speed(self._request.speed)
        self._set_goal(cell)
        overlays = self._overlays(self._plan.top)
        self._headers = [(node.opened, self._new_backing.reference(node)) for node in overlays]
        self._blank_end = self._visible_end(overlays)
        self._layers = chain.layers(self._plan.top, self._plan.base)
        yield from self._begin()

    def enter_graph(self, edit: Edit) -> None:
        """The change of the graph that the start makes."""
        spec = NodeSpec(CommitTop.format_name, read_only=True)
        edit.set_read_only(self._plan.base, False)
        self._insert_filter(edit, spec, lambda below: CommitTop.open({"backing": below}))
        self._attach_job(edit)
        self._attach_users(edit)
        self._freeze(edit)

    def _attach_job(self, edit: Edit) -> None:
        """The job as a parent: this is what refuses other jobs."""
        self._hold(edit, "main node", self._plan.device)
        self._hold_intermediates(edit, self._plan.intermediates)
        self._hold(edit, "base", self._plan.base)

    def _attach_users(self, edit: Edit) -> None:
        """The job's own I/O. Base first: it is the older of the two."""
        perm = Perm.CONSISTENT_READ | Perm.WRITE
        if self._base_length < self._length:
            perm |= Perm.RESIZE
        shared = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        self._edges.append(edit.attach(self._target, "root", self._plan.base, Role.NONE, perm=perm, shared=shared))
        self._edges.append(edit.attach(self._source, "root", self._plan.top, Role.NONE))

    # -- run: section 5, worker thread ---------------------------------------------------------------------------------

    def run(self, cell: Cell) -> Body:
        """Copy. The opening stretch finds out what makes the job fail before it has begun."""
        try:
            self._check_headers()
            self._grow()
            if self._length or self._blank_end:
                yield Rest()
                yield from self._copy(cell)
                yield from self._blank(cell)
                yield from self._harden()
                self._last_checkpoint()
        except QmpdError as error:
            raise as_errno(error) from error

    def _check_headers(self) -> None:
        for driver, reference in self._headers:
            driver.check_backing_reference(reference)

    def _blank(self, cell: Cell) -> Body:
        """Where an overlay is longer than top it has read zeros; base must not show older data there."""
        offset = self._length
        while offset < self._blank_end:
            yield from cell.pace()
            step = min(ZERO_STEP, self._blank_end - offset)
            try:
                self._device.write_zeroes(offset, step)
            except QmpdError as error:
                yield from self._failed("write", error)
                continue
            offset += step
            yield from self._succeeded()

    # -- end: section 4.2 ----------------------------------------------------------------------------------------------

    def prepare(self) -> Steps[None]:
        """Base is durable: let the headers name it, then the links lead to it. A failure undoes both."""
        try:
            overlays = self._overlays(self._the_filter)
            self._new_backing.check(overlays)
            yield from self._blank_more(overlays)
            done = yield from header.rewrite(self._graph, overlays, self._new_backing)
            try:
                yield from quietly(self._graph, [self._the_filter], self._pass)
            except Exception:
                yield from header.restore(self._graph, done)
                raise
        except QmpdError as error:
            raise as_errno(error) from error

    def abort(self) -> Steps[None]:
        """The old chain as it was."""
        yield from quietly(self._graph, [self._the_filter], partial(self._leave_chain, self._plan.top))

    def clean(self) -> Steps[None]:
        """Let go of all nodes."""
        with self._graph.edit() as edit:
            self._let_go(edit)
        if self._base_was_read_only:
            yield from back_to_read_only(self._graph, self._plan.base)

    def _blank_more(self, overlays: list[Node]) -> Steps[None]:
        """Overlays may have come or grown since the start."""
        start, end = max(self._length, self._blank_end), self._visible_end(overlays)
        if end > start:
            yield partial(self._device.write_zeroes, start, end - start)
            yield self._device.flush

    def _pass(self) -> None:
        self._leave_chain(self._plan.base)
        self.passed = True
        self._leave_behind(self._plan.intermediates)

    def _leave_chain(self, successor: Node) -> None:
        """Take the filter out; whoever was above it is on ``successor`` now, and may read there."""
        with self._graph.edit() as edit:
            chain.unfreeze(edit, self._frozen)
            for edge in self._edges:
                edit.set_perm(edge, Perm.NONE, Perm.ALL)
            edit.move_parents(self._the_filter, successor)
            edit.remove_node(self._the_filter)
