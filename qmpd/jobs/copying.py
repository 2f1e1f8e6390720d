"""What the commits have in common: a filter above top, a hold on the chain, a target to write to, errors to survive.

Source: spec/jobs-and-commit.md sections 4, 5.1 and 7. The control thread runs all but the parts of a body.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from dataclasses import asdict, replace
from functools import partial
from typing import Any, ClassVar, Final, Literal

from qmpd.block.api import BlockDevice, Driver, Perm
from qmpd.errors import QmpdError
from qmpd.graph import chain, filename
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Backend, Node
from qmpd.graph.spec import NodeSpec
from qmpd.jobs.chainjob import ChainJob
from qmpd.jobs.job import Action, Body, Failure, Merge, error_action
from qmpd.jobs.plan import CommitPlan
from qmpd.jobs.preflight import Preflight
from qmpd.jobs.siblings import left_behind
from qmpd.jobs.surgery import quietly
from qmpd.steps import Steps

WRITES: Final = Perm.WRITE | Perm.WRITE_UNCHANGED


class CopyJob(ChainJob):
    """A commit, of whichever kind."""

    job_type: ClassVar[str] = "commit"

    def __init__(self, graph: Graph, plan: CommitPlan) -> None:
        request = plan.request
        super().__init__(graph, request.job_id, auto_finalize=request.auto_finalize, auto_dismiss=request.auto_dismiss)
        self._plan = plan
        self._request = request
        self._base_was_read_only = plan.base.read_only
        #: What is looked at before the job begins; None: nothing, the job goes on where an earlier one was.
        self.preflight: Preflight | None = None
        self._target = Backend()
        self._layers: list[BlockDevice] = []
        self._length = plan.top.length
        #: Of the file itself, which need not be whole sectors.
        self._base_length = plan.base.opened.length
        #: Requests that fail are found in the peer's steps where nodes are there to make them fail.
        self._stepwise = any(node.is_filter for node in plan.top.subtree())

    # -- what outlives the daemon --------------------------------------------------------------------------------------

    #: How :mod:`qmpd.jobs.remake` knows this kind.
    kind: ClassVar[str] = "commit"

    def memory(self) -> dict[str, Any] | None:
        """The nodes by name, however the client named them."""
        plan = self._plan
        named = replace(self._request, top=None, base=None, top_node=plan.top.name, base_node=plan.base.name)
        return {"kind": self.kind, "request": {**asdict(named), "on_error": named.on_error.value}}

    @property
    def lent(self) -> list[Node]:
        return [self._plan.base] if self._base_was_read_only else []

    @property
    def merge(self) -> Merge | None:
        base = filename.image_path(self._plan.base)
        paths = [filename.image_path(node) for node in self._plan.intermediates]
        if base is None:
            return None
        return Merge(os.path.realpath(base), tuple(os.path.realpath(path) for path in paths if path is not None))

    # -- entering and leaving the graph --------------------------------------------------------------------------------

    def enter_graph(self, edit: Edit) -> None:
        """The change of the graph that the start makes: filter, permissions, frozen links."""
        raise NotImplementedError

    def _begin(self) -> Steps[None]:
        """Look whether the job may begin, then enter the graph. What QEMU says comes before what the preflight says."""
        refusal = None
        if self.preflight is not None:
            refusal = yield from self.preflight.run(self._graph, self._plan, self.visible_end)
        if refusal is not None:
            yield from quietly(self._graph, [self._plan.top], partial(self._graph.rehearse, self.enter_graph))
            raise refusal
        yield from quietly(self._graph, [self._plan.top], self._enter)

    def _enter(self) -> None:
        with self._graph.edit() as edit:
            self.enter_graph(edit)

    def _leave_behind(self, nodes: list[Node]) -> None:
        """Base has all that is in these images, and nobody uses them any more."""
        self._graph.overlays.leave_behind(left_behind(nodes))

    def _insert_filter(self, edit: Edit, spec: NodeSpec, open_driver: Callable[[BlockDevice], Driver]) -> Node:
        """Put a node above top that all users of top go through."""
        name = self._request.filter_node_name
        return self._put_filter_above(edit, self._plan.top, name, spec, "backing", open_driver)

    def _hold_intermediates(self, edit: Edit, nodes: list[Node]) -> None:
        """This is what refuses readers of nodes whose content goes stale."""
        for node in nodes:
            shows_base = chain.skip_filters(node) is chain.skip_filters(self._plan.base)
            shared = WRITES | Perm.CONSISTENT_READ if shows_base else WRITES
            self._hold(edit, "intermediate node", node, shared=shared)

    def _freeze(self, edit: Edit) -> None:
        """The links above the filter too: whoever cut them would cut the chain from under a running commit."""
        above = chain.overlays(self._the_filter)
        self._frozen = chain.freeze(edit, self._the_filter, self._plan.base) + above
        for edge in above:
            edit.freeze(edge)

    @property
    def visible_end(self) -> int:
        """Before the start: up to where, beyond top, base must come to read as zeros; 0 if there is nothing."""
        return self._visible_end(self._overlays(self._plan.top))

    def _overlays(self, node: Node) -> list[Node]:
        """All images backed by ``node``."""
        return [edge.parent for edge in chain.overlays(node) if isinstance(edge.parent, Node)]

    def _visible_end(self, overlays: list[Node]) -> int:
        """How far an overlay that is longer than top would look into base, 0 if none does."""
        end = min(self._base_length, max((node.length for node in overlays), default=0))
        return end if end > self._length else 0

    # -- parts of a body: worker thread --------------------------------------------------------------------------------

    @property
    def _device(self) -> BlockDevice:
        assert self._target.edge is not None
        return self._target.edge.device

    def _grow(self) -> None:
        if self._base_length < self._length:
            self._device.truncate(self._length)

    def _harden(self) -> Body:
        """Make base durable. Not retried: after a failed sync nobody knows what the next one would vouch for."""
        try:
            self._device.flush()
        except QmpdError as error:
            yield Failure("write", Action.REPORT, error)
            raise

    def _failed(self, operation: Literal["read", "write"], error: QmpdError) -> Generator[Failure, None, None]:
        """Have the policy's action carried out; returns if the request is to be tried again."""
        action = error_action(self._request.on_error, error.errno)
        yield Failure(operation, action, error)
        if action is Action.REPORT:
            raise error
        self._retrying = True


def as_errno(error: QmpdError) -> QmpdError:
    """``error`` as clients know a failed block job: by the text of its errno alone."""
    return QmpdError(error.strerror, error.kind, node=error.node, path=error.path, errno=error.errno)
