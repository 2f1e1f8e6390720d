"""What jobs that work on a chain have in common: a filter of their own, and a hold on the nodes.

Source: spec/jobs-and-commit.md sections 4 and 5.1. The control thread runs all but :meth:`ChainJob._succeeded`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from qmpd.block.api import BlockDevice, Driver, Perm, Role
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Edge, JobParent, Node
from qmpd.graph.permissions import child_role
from qmpd.graph.spec import NodeSpec
from qmpd.jobs.cell import Rest
from qmpd.jobs.job import Job


class ChainJob(Job):
    """A job that is a parent of nodes. What it holds is taken in one edit and let go in one edit."""

    def __init__(self, graph: Graph, job_id: str, *, auto_finalize: bool, auto_dismiss: bool) -> None:
        super().__init__(job_id, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        self._graph = graph
        self._parent = JobParent(self.job_type, self.id)
        self._busy = f"block device is in use by block job: {self.job_type}"
        self._edges: list[Edge] = []
        self._frozen: list[Edge] = []
        self._blocked: list[Node] = []
        self._filter: Node | None = None
        self._retrying = False

    @property
    def nodes(self) -> list[Node]:
        return list(self._blocked)

    @property
    def _the_filter(self) -> Node:
        assert self._filter is not None
        return self._filter

    def _put_filter_above(
        self,
        edit: Edit,
        node: Node,
        name: str | None,
        spec: NodeSpec,
        slot: str,
        open_driver: Callable[[BlockDevice], Driver],
    ) -> Node:
        """Put a filter above ``node`` that all users of it go through; without a name it hides in queries."""
        effective = spec.effective(None)
        above = Node(
            name if name is not None else self._graph.generate_name(),
            spec.driver,
            effective,
            read_only=bool(effective.read_only),
            implicit=name is None,
            never_freeze=True,
        )
        edit.add_node(above)
        below = edit.attach(above, slot, node, child_role(spec.driver, slot, {}))
        above.driver = open_driver(below.device)
        edit.move_parents(node, above)
        self._filter = above
        return above

    def _hold(self, edit: Edit, name: str, node: Node, *, perm: Perm = Perm.NONE, shared: Perm = Perm.ALL) -> Edge:
        """Make the job a parent of ``node``; nobody else may do anything to it."""
        edge = edit.attach(self._parent, name, node, Role.NONE, perm=perm, shared=shared)
        self._edges.append(edge)
        edit.block_ops(node, self._busy)
        self._blocked.append(node)
        return edge

    def _let_go(self, edit: Edit) -> None:
        """Take back what :meth:`_hold` and attaching took; the lists stay if the edit is taken back."""
        for node in self._blocked:
            edit.unblock_ops(node, self._busy)
        for edge in self._edges:
            edit.detach(edge)
        edit.on_commit(self._blocked.clear)
        edit.on_commit(self._edges.clear)

    # -- parts of a body: worker thread --------------------------------------------------------------------------------

    def _succeeded(self) -> Generator[Rest, None, None]:
        """A request went well. After a failure the client that asked for the retry waits for this."""
        if self._retrying:
            self._retrying = False
            yield Rest()
