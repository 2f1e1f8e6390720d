"""Offline commit: an image that nobody writes to goes into its backing file and is emptied.

What ``qemu-img commit`` does, as a job. The chain is the same before and after, and so is the guest's view at every
instant: while data are copied the image shadows what changes in base, and it is emptied only after base is durable.

Source: spec/jobs-and-commit.md section 9. The control thread runs all but :meth:`OfflineCommitJob.run`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from qmpd.block.api import Perm, Role
from qmpd.errors import Kind, QmpdError
from qmpd.graph import chain
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Backend, Node
from qmpd.jobs.cell import Cell, Rest
from qmpd.jobs.copying import as_errno
from qmpd.jobs.job import Body, check_speed
from qmpd.jobs.plan import CommitPlan, CommitRequest
from qmpd.jobs.regions import RegionJob
from qmpd.jobs.surgery import back_to_read_only, while_quiet
from qmpd.steps import Steps

_SHARED = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED


def plan_offline(graph: Graph, request: CommitRequest) -> CommitPlan:
    """The image that ``request.device`` shows and its immediate backing image, filters skipped. Changes nothing."""
    device = graph.get(request.device, request.device)
    device.check_op("commit-source")
    image = chain.skip_filters(device)
    base = chain.next_image(image)
    if base is None:
        raise QmpdError("Image does not have a backing file")
    image.check_op("commit-source")
    base.check_op("commit-target")
    return CommitPlan(replace(request, device=image.name), image, image, base)


class OfflineCommitJob(RegionJob):
    """One commit of an image that has no writers into its immediate backing image."""

    def __init__(self, graph: Graph, plan: CommitPlan, *, keep: bool = False) -> None:
        """``keep`` leaves the image as it is."""
        super().__init__(graph, plan)
        self._keep = keep
        self._was_read_only = plan.top.read_only
        self._source = Backend()

    # -- what outlives the daemon --------------------------------------------------------------------------------------

    kind: ClassVar[str] = "offline"

    def memory(self) -> dict[str, Any] | None:
        return {**(super().memory() or {}), "keep": self._keep}

    @property
    def lent(self) -> list[Node]:
        return super().lent + ([self._plan.top] if self._was_read_only and not self._keep else [])

    # -- start ---------------------------------------------------------------------------------------------------------

    def start(self, cell: Cell) -> Steps[None]:
        """Take the permissions, freeze the link; or leave no trace. A writer on the image or on base is refused."""
        check_speed(self._request.speed)
        cell.set_speed(self._request.speed)
        self._set_goal(cell)
        self._layers = chain.layers(self._plan.top, self._plan.base)
        yield from self._begin()

    def enter_graph(self, edit: Edit) -> None:
        """The change of the graph that the start makes."""
        image, base = self._plan.top, self._plan.base
        edit.set_read_only(base, False)
        if not self._keep:
            edit.set_read_only(image, False)
        # Writes to the image would be lost. Not sharing them would forbid this job to write to base as well.
        edit.admit_writers(self._hold(edit, "main node", image), [])
        self._hold(edit, "base", base)
        self._attach_users(edit)
        self._frozen = chain.freeze(edit, image, base)

    def _attach_users(self, edit: Edit) -> None:
        perm = Perm.CONSISTENT_READ | Perm.WRITE
        if self._base_length < self._length:
            perm |= Perm.RESIZE
        self._edges.append(edit.attach(self._target, "root", self._plan.base, Role.NONE, perm=perm, shared=_SHARED))
        perm = Perm.CONSISTENT_READ if self._keep else Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
        self._edges.append(edit.attach(self._source, "root", self._plan.top, Role.NONE, perm=perm))

    # -- run: worker thread --------------------------------------------------------------------------------------------

    def run(self, cell: Cell) -> Body:
        """Copy."""
        try:
            self._grow()
            yield Rest()
            yield from self._copy(cell)
            yield from self._harden()
            self._last_checkpoint()
        except QmpdError as error:
            raise as_errno(error) from error

    # -- end -----------------------------------------------------------------------------------------------------------

    def prepare(self) -> Steps[None]:
        """Base has everything, durably: the image can go without. A format that cannot be emptied stays full."""
        if self._keep:
            return
        try:
            yield from while_quiet(self._graph, [self._plan.top], self._empty)
        except QmpdError as error:
            if error.kind is not Kind.UNSUPPORTED:
                raise as_errno(error) from error

    def _empty(self) -> Steps[None]:
        yield self._plan.top.opened.make_empty

    def clean(self) -> Steps[None]:
        """Let go of both images; what was read-only is so again."""
        with self._graph.edit() as edit:
            chain.unfreeze(edit, self._frozen)
            self._let_go(edit)
        if self._was_read_only and not self._keep:
            yield from back_to_read_only(self._graph, self._plan.top)
        if self._base_was_read_only:
            yield from back_to_read_only(self._graph, self._plan.base)
