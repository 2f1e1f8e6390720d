"""Making images: the background job of blockdev-create.

Not a block job: no speed, no attachment to nodes but the one it writes to. It never dismisses itself, because the text
of its error is only in query-jobs. Whatever goes wrong is the job's error, never the command's; so ``start`` keeps what
it finds for the body. Source: spec/toolbox.md section 1.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from qmpd.block.api import Perm, Role
from qmpd.block.drivers.qcow2.create import CreateOptions, check, create
from qmpd.block.storage.create import create_file
from qmpd.errors import QmpdError
from qmpd.graph.edit import Graph
from qmpd.graph.node import Backend, Edge, Node
from qmpd.graph.open import close_node, open_tree
from qmpd.graph.spec import NodeSpec
from qmpd.jobs.cell import Cell, Rest
from qmpd.jobs.job import Body, Job, nothing
from qmpd.steps import Steps


class CreateJob(Job):
    """What all drivers have in common."""

    job_type: ClassVar[str] = "create"
    is_block_job: ClassVar[bool] = False

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id, auto_dismiss=False)
        self._refusal: QmpdError | None = None

    def start(self, cell: Cell) -> Steps[None]:
        cell.set_total(1)
        try:
            yield from self.reserve()
        except QmpdError as error:
            self._refusal = error

    def run(self, cell: Cell) -> Body:
        """One step of one, whether it succeeds or not."""
        yield Rest()  # the command is answered now
        yield from cell.checkpoint()
        try:
            if self._refusal is not None:
                raise self._refusal
            self.make()
        finally:
            cell.advance(1)

    def reserve(self) -> Steps[None]:
        """Take what :meth:`make` needs of the graph. Control thread."""
        return nothing()

    @abstractmethod
    def make(self) -> None:
        """Create the image. Worker thread."""


class CreateFile(CreateJob):
    """A file of zeros; ``size`` in bytes. An existing file is emptied, unless some program is writing to it."""

    def __init__(self, job_id: str, graph: Graph, path: str, size: int, preallocation: str) -> None:
        super().__init__(job_id)
        self._trust = graph.trust
        self._path = path
        self._size = size
        self._preallocation = preallocation

    def make(self) -> None:
        create_file(self._path, self._size, self._preallocation, open_file=self._trust.open)


class CreateQcow2(CreateJob):
    """An empty qcow2 image in a node: an existing one by name, or one opened for the job and closed again."""

    def __init__(self, job_id: str, graph: Graph, file: NodeSpec | str, options: CreateOptions) -> None:
        super().__init__(job_id)
        self._graph = graph
        self._file = file
        self._options = options
        self._edge: Edge | None = None
        #: Opened for this job, so to be closed with it.
        self._own: Node | None = None

    def reserve(self) -> Steps[None]:
        if isinstance(self._file, str):
            node = self._graph.get(self._file, self._file)
        else:
            node = self._own = yield from open_tree(self._graph, self._file)
        check(self._options)
        with self._graph.edit() as edit:
            edge = edit.attach(Backend(), "root", node, Role.NONE, perm=Perm.WRITE | Perm.RESIZE)
        self._edge = edge  # not before the edit has happened: clean() takes it away

    def make(self) -> None:
        assert self._edge is not None
        create(self._edge.device, self._options)

    def clean(self) -> Steps[None]:
        if self._edge is not None:
            with self._graph.edit() as edit:
                edit.detach(self._edge)
        if self._own is not None:
            yield from close_node(self._graph, self._own)
