"""What the commits have in common: a filter above top, a hold on the chain, a target to write to, errors to survive.

Source: spec/jobs-and-commit.md sections 4, 5.1 and 7. The control thread runs all but the parts of a body.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import ClassVar, Final, Literal

from qmpd.block.api import BlockDevice, Driver, Perm, Role
from qmpd.errors import QmpdError
from qmpd.graph import chain
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Backend, Edge, JobParent, Node
from qmpd.graph.permissions import child_role
from qmpd.graph.spec import NodeSpec
from qmpd.jobs.cell import Rest
from qmpd.jobs.job import Action, Body, Failure, Job, error_action
from qmpd.jobs.plan import CommitPlan

WRITES: Final = Perm.WRITE | Perm.WRITE_UNCHANGED
BUSY: Final = "block device is in use by block job: commit"


class CopyJob(Job):
    """A commit, of whichever kind."""

    job_type: ClassVar[str] = "commit"

    def __init__(self, graph: Graph, plan: CommitPlan) -> None:
        request = plan.request
        super().__init__(request.job_id, auto_finalize=request.auto_finalize, auto_dismiss=request.auto_dismiss)
        self._graph = graph
        self._plan = plan
        self._request = request
        self._parent = JobParent(self.job_type, self.id)
        self._edges: list[Edge] = []
        self._frozen: list[Edge] = []
        self._blocked: list[Node] = []
        self._base_was_read_only = plan.base.read_only
        self._target = Backend()
        self._filter: Node | None = None
        self._layers: list[BlockDevice] = []
        self._length = plan.top.length
        #: Of the file itself, which need not be whole sectors.
        self._base_length = plan.base.opened.length
        #: Requests that fail are found in the peer's steps where nodes are there to make them fail.
        self._stepwise = any(node.is_filter for node in plan.top.subtree())
        self._retrying = False

    # -- entering and leaving the graph --------------------------------------------------------------------------------

    def _insert_filter(self, edit: Edit, spec: NodeSpec, open_driver: Callable[[BlockDevice], Driver]) -> Node:
        """Put a node above top that all users of top go through."""
        top, name, effective = self._plan.top, self._request.filter_node_name, spec.effective(None)
        node = Node(
            name if name is not None else self._graph.generate_name(),
            spec.driver,
            effective,
            read_only=bool(effective.read_only),
            implicit=name is None,
            never_freeze=True,
        )
        edit.add_node(node)
        below = edit.attach(node, "backing", top, child_role(spec.driver, "backing", {}))
        node.driver = open_driver(below.device)
        edit.move_parents(top, node)
        self._filter = node
        return node

    def _hold(self, edit: Edit, name: str, node: Node, *, perm: Perm = Perm.NONE, shared: Perm = Perm.ALL) -> Edge:
        """Make the job a parent of ``node``; nobody else may do anything to it."""
        edge = edit.attach(self._parent, name, node, Role.NONE, perm=perm, shared=shared)
        self._edges.append(edge)
        edit.block_ops(node, BUSY)
        self._blocked.append(node)
        return edge

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

    def _let_go(self, edit: Edit) -> None:
        """Take back what :meth:`_hold` and attaching took; the lists stay if the edit is taken back."""
        for node in self._blocked:
            edit.unblock_ops(node, BUSY)
        for edge in self._edges:
            edit.detach(edge)
        edit.on_commit(self._blocked.clear)
        edit.on_commit(self._edges.clear)

    @property
    def _the_filter(self) -> Node:
        assert self._filter is not None
        return self._filter

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

    def _succeeded(self) -> Generator[Rest, None, None]:
        if self._retrying:
            self._retrying = False
            yield Rest()


def as_errno(error: QmpdError) -> QmpdError:
    """``error`` as clients know a failed commit: by the text of its errno alone."""
    return QmpdError(error.strerror, error.kind, node=error.node, path=error.path, errno=error.errno)
