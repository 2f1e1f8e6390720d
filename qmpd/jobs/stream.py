"""Stream: what lies between an image and a base goes into the image, then the images between leave the chain.

The image stays in use. A copy-on-read filter above it takes over its users; the body copies through that filter, so
that a copy and a write never overlap: what is missing is looked up and filled in with writers kept out of the range,
and whatever a guest wrote before is not missing any more. So what is copied never changes what anybody reads, and a
job that ends early leaves a chain that is as good as before.

Only at the end, with the copies durable, does the image's header name the base, and then the links change.

Source: spec/toolbox.md section 5. The control thread runs all but :meth:`StreamJob.run`.

Deviations: the link to base is frozen like those above it; nobody but the users of the filter may write to the image;
what an intermediate image that is too short hides stays hidden.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any, ClassVar, Final

import numpy as np

from qmpd.block.api import BackingReference, BlockDevice, Perm, Role
from qmpd.block.copy import CopyEngine
from qmpd.block.extents import NO_LAYER, ChainRuns, RunKind, chain_runs
from qmpd.block.filters.copy_on_read import CopyOnRead
from qmpd.errors import QmpdError
from qmpd.graph import chain
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Backend, Node
from qmpd.graph.spec import NodeSpec
from qmpd.jobs import header
from qmpd.jobs.cell import Cell, Rest
from qmpd.jobs.chainjob import ChainJob
from qmpd.jobs.copying import WRITES, as_errno
from qmpd.jobs.job import Action, Body, Failure, check_speed, error_action
from qmpd.jobs.pieces import CHUNK, WINDOW, Piece, Pieces
from qmpd.jobs.regions import survey
from qmpd.jobs.stream_plan import StreamPlan
from qmpd.jobs.surgery import back_to_read_only, quietly
from qmpd.steps import Steps
from qmpd.units import MIB

STRETCH: Final = 4 * MIB
"""Bytes of data copied in one go, while guests cannot write there: some milliseconds."""
_READERS: Final = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
_USERS: Final = Perm.CONSISTENT_READ | WRITES
_ZEROES: Final = bytes(MIB)


class StreamJob(ChainJob):
    """One block-stream."""

    job_type: ClassVar[str] = "stream"

    def __init__(self, graph: Graph, plan: StreamPlan) -> None:
        request = plan.request
        super().__init__(graph, request.job_id, auto_finalize=request.auto_finalize, auto_dismiss=request.auto_dismiss)
        self._plan = plan
        self._request = request
        self._new_backing = _new_backing(plan)
        self._reference: BackingReference | None = None
        self._was_read_only = plan.device.read_only
        self._user = Backend()
        self._layers: list[BlockDevice] = []
        self._length = plan.device.length
        #: Up to here copies are made in the peer's steps, so that what fails is known exactly.
        self._stepwise_until = self._length if any(node.is_filter for node in plan.device.subtree()) else 0
        self._ignored: QmpdError | None = None

    # -- what outlives the daemon --------------------------------------------------------------------------------------

    def memory(self) -> dict[str, Any] | None:
        """Without a checkpoint: what was copied is in the image, and is not copied again."""
        base = self._plan.base
        named = replace(self._request, base=None, bottom=None, base_node=base.name if base else None)
        return {"kind": "stream", "request": {**asdict(named), "on_error": named.on_error.value}}

    @property
    def lent(self) -> list[Node]:
        return [self._plan.device] if self._was_read_only else []

    # -- start ---------------------------------------------------------------------------------------------------------

    def start(self, cell: Cell) -> Steps[None]:
        """Put the filter above the device, take the permissions, freeze the chain; or leave no trace."""
        check_speed(self._request.speed)
        cell.set_speed(self._request.speed)
        if not self._stepwise_until:
            cell.expect_survey()
        self._layers = chain.layers(self._plan.device, self._plan.base)
        self._reference = self._new_backing.reference(self._plan.image)
        yield from quietly(self._graph, [self._plan.device], self._enter_graph)

    def _enter_graph(self) -> None:
        plan = self._plan
        spec = NodeSpec(CopyOnRead.format_name, read_only=False, discard=plan.device.spec.discard)
        with self._graph.edit() as edit:
            edit.set_read_only(plan.device, False)
            name = self._request.filter_node_name
            above = self._put_filter_above(edit, plan.device, name, spec, CopyOnRead.slot, self._open_filter)
            self._attach(edit)
            self._frozen = chain.freeze(edit, above, plan.base or chain.bottom(above))

    def _open_filter(self, below: BlockDevice) -> CopyOnRead:
        driver = CopyOnRead(below, read_only=False)
        driver.bound(self._layers)
        return driver

    def _attach(self, edit: Edit) -> None:
        plan, above = self._plan, self._the_filter
        self._hold(edit, "main node", above)
        # The device itself, or from a filter down to the image that it shows.
        is_filled = True
        for node in (plan.device, *plan.intermediates):
            name = "active node" if node is plan.device else "intermediate node"
            held = self._hold(edit, name, node, shared=_USERS if is_filled else _READERS)
            if is_filled and above.chain_edge is not None:
                # A write that passes the filter by could lose to a copy of what was there before.
                edit.admit_writers(held, [above.chain_edge])
            is_filled = is_filled and node is not plan.image
            above = node
        perm = Perm.CONSISTENT_READ
        self._edges.append(edit.attach(self._user, "root", self._the_filter, Role.NONE, perm=perm, shared=_USERS))

    # -- run: worker thread --------------------------------------------------------------------------------------------

    def run(self, cell: Cell) -> Body:
        """Copy. Where nothing lies between the opening stretch is all there is."""
        if len(self._layers) < 2:
            return
        cell.set_total(self._length)
        yield Rest()
        try:
            self._plan.image.opened.check_backing_reference(self._reference)
            yield from self._copy(cell)
            yield from self._harden()
        except QmpdError as error:
            raise as_errno(self._ignored or error) from error
        if self._ignored is not None:
            raise as_errno(self._ignored)

    def _copy(self, cell: Cell) -> Body:
        if not self._stepwise_until:
            yield from survey(
                cell, 0, self._length, lambda offset, length: _missing(chain_runs(self._layers, offset, length))
            )
        with CopyEngine(self._layers, self._image) as engine:
            offset = 0
            while offset < self._length:
                pieces = yield from self._map(cell, offset)
                if pieces is None:
                    length = min(CHUNK, self._length - offset)
                    cell.advance(length)
                    offset += length
                    continue
                yield from self._copy_region(cell, engine, pieces)
                offset = pieces.end

    def _map(self, cell: Cell, offset: int) -> Generator[Rest | Failure, None, Pieces | None]:
        """What is missing in the device from ``offset`` on; None to skip a chunk that nobody knows about."""
        while True:
            window = CHUNK if offset < self._stepwise_until else WINDOW
            try:
                return Pieces(_missing(chain_runs(self._layers, offset, min(window, self._length - offset))))
            except QmpdError as error:
                if window > CHUNK:
                    self._stepwise_until = offset + CHUNK
                elif (yield from self._failed(error)):
                    return None
            yield from cell.checkpoint()

    def _copy_region(self, cell: Cell, engine: CopyEngine, pieces: Pieces) -> Body:
        offset = pieces.start
        while offset < pieces.end:
            yield from cell.pace()
            stepwise = cell.is_limited or offset < self._stepwise_until
            piece = pieces.step(offset, cell.portion) if stepwise else pieces.stretch(offset, STRETCH)
            try:
                if piece.allocated:
                    self._populate(engine, pieces.runs, offset, offset + piece.length)
            except QmpdError as error:
                if not stepwise:
                    self._stepwise_until = offset + piece.length
                    continue
                if not (yield from self._failed(error)):
                    continue
                piece = Piece(piece.length, 0)
            cell.advance(piece.length, charged=piece.allocated)
            offset += piece.length
            yield from self._succeeded()

    def _populate(self, engine: CopyEngine, runs: ChainRuns, start: int, end: int) -> None:
        """Copy what the device is still missing of ``[start, end)``."""
        with self._driver.undisturbed(start, end) as image:
            for part in _still(image, runs, start, end):
                engine.copy(part, part.start, part.end - part.start)
                if (part.kind == RunKind.ZERO).any():
                    _insist(image, part)

    def _harden(self) -> Body:
        """Make the copies durable. Not retried: after a failed sync nobody knows what the next one would vouch for."""
        try:
            self._image.flush()
        except QmpdError as error:
            yield Failure("read", Action.REPORT, error)
            raise

    def _failed(self, error: QmpdError) -> Generator[Failure, None, bool]:
        """Have the policy's action carried out; True if the chunk is to be skipped, False to try it again."""
        action = error_action(self._request.on_error, error.errno)
        yield Failure("read", action, error)
        if action is Action.REPORT:
            raise error
        if action is Action.IGNORE:
            self._ignored = self._ignored or error
            return True
        self._retrying = True
        return False

    @property
    def _driver(self) -> CopyOnRead:
        driver = self._the_filter.opened
        assert isinstance(driver, CopyOnRead)
        return driver

    @property
    def _image(self) -> BlockDevice:
        """The device as the filter may use it."""
        return self._the_filter.children[CopyOnRead.slot].device

    # -- end -----------------------------------------------------------------------------------------------------------

    def prepare(self) -> Steps[None]:
        """The image has everything durably: let its header name base, then its link lead there. A failure undoes both.

        An image without a link below keeps its header as it is.
        """
        image = self._plan.image
        try:
            done = yield from header.rewrite(self._graph, [image] if image.cow_edge else [], self._new_backing)
            try:
                yield from quietly(self._graph, [self._the_filter, image], self._pass)
            except Exception:
                yield from header.restore(self._graph, done)
                raise
        except QmpdError as error:
            raise as_errno(error) from error

    def abort(self) -> Steps[None]:
        """The old chain; what was copied does no harm."""
        yield from quietly(self._graph, [self._the_filter], partial(self._leave_graph, relink=False))

    def clean(self) -> Steps[None]:
        """A device that was read-only is so again."""
        if self._was_read_only:
            yield from back_to_read_only(self._graph, self._plan.device)

    def _pass(self) -> None:
        self._leave_graph(relink=True)
        self.passed = True

    def _leave_graph(self, *, relink: bool) -> None:
        """Let go of all nodes and take the filter out."""
        plan = self._plan
        with self._graph.edit() as edit:
            chain.unfreeze(edit, self._frozen)
            self._let_go(edit)
            edit.move_parents(self._the_filter, plan.device)
            edit.remove_node(self._the_filter)
            if relink and plan.image.cow_edge is not None:
                if plan.base is None:
                    edit.detach(plan.image.cow_edge)
                else:
                    edit.replace(plan.image.cow_edge, plan.base)


def _new_backing(plan: StreamPlan) -> header.NewBacking:
    if plan.base is None:
        return header.NewBacking(plan.image, given="")
    request = plan.request
    return header.NewBacking(chain.skip_filters(plan.base), request.backing_file, request.backing_mask_protocol)


def _missing(runs: ChainRuns) -> ChainRuns:
    """What the first layer lacks and one below it has; the rest counts as what nobody has."""
    below = runs.layer > 0
    kind = np.where(below, runs.kind, np.uint8(RunKind.UNALLOCATED))
    layer = np.where(below, runs.layer, np.int32(NO_LAYER))
    return ChainRuns(runs.offset, runs.length, kind, layer, runs.host)


def _still(image: BlockDevice, runs: ChainRuns, start: int, end: int) -> Iterator[ChainRuns]:
    """The allocated parts of ``runs`` that ``image`` says nothing about, as of now."""
    while start < end:
        known = image.map(start, end - start)
        free = known.kind == RunKind.UNALLOCATED
        part = runs.within(known.offset[free], (known.offset + known.length)[free]).allocated()
        if len(part):
            yield part
        start = known.end


def _insist(image: BlockDevice, part: ChainRuns) -> None:
    """Write zeros by force where a zero request found nothing to do, because what is below reads as zeros: for now."""
    for rest in _still(image, part, part.start, part.end):
        for run in rest:
            for at in range(run.offset, run.offset + run.length, len(_ZEROES)):
                image.write(at, memoryview(_ZEROES)[: min(len(_ZEROES), run.offset + run.length - at)])
