"""Making images: the background job of blockdev-create.

Not a block job: no speed, no attachment to nodes but the one it writes to. It never dismisses itself, because the text
of its error is only in query-jobs. Whatever goes wrong is the job's error, never the command's; so ``start`` keeps what
it finds for the body. Source: spec/toolbox.md section 1.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar, Final

from qmpd.block.api import Perm, Role
from qmpd.block.drivers.qcow2.create import CreateOptions, check, create
from qmpd.block.storage.create import create_file
from qmpd.errors import QmpdError
from qmpd.graph import filename
from qmpd.graph.edit import Graph
from qmpd.graph.node import Backend, Edge, Node
from qmpd.graph.open import close_node, open_tree
from qmpd.graph.spec import NodeSpec
from qmpd.jobs.cell import Cell, Rest
from qmpd.jobs.header import name_seen_from
from qmpd.jobs.job import Body, Job, nothing
from qmpd.steps import Steps

_WRITES: Final = Perm.WRITE | Perm.RESIZE


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
    """An empty qcow2 image in a node, and perhaps a data file in another.

    They are existing ones by name, or opened for the job and closed again.
    """

    def __init__(
        self,
        job_id: str,
        graph: Graph,
        file: NodeSpec | str,
        options: CreateOptions,
        data_file: NodeSpec | str | None = None,
    ) -> None:
        super().__init__(job_id)
        self._graph = graph
        self._file = file
        self._data_file = data_file
        self._options = options if data_file is None else replace(options, data_file="")
        self._edges: list[Edge] = []
        #: Opened for this job, so to be closed with it.
        self._own: list[Node] = []

    def reserve(self) -> Steps[None]:
        node = yield from self._find(self._file)
        check(self._options)
        nodes = [node]
        if self._data_file is not None:
            data = yield from self._find(self._data_file)
            self._options = replace(self._options, data_file=_data_name(node, data))
            nodes.append(data)
        # The two must not be one and the same file.
        shared = Perm.ALL if len(nodes) == 1 else Perm.ALL & ~_WRITES
        with self._graph.edit() as edit:
            edges = [edit.attach(Backend(), "root", nodes[0], Role.NONE, perm=_WRITES, shared=shared)]
            edges += [edit.attach(Backend(), "root", data, Role.NONE, perm=_WRITES) for data in nodes[1:]]
        self._edges = edges  # not before the edit has happened: clean() takes them away

    def _find(self, wanted: NodeSpec | str) -> Steps[Node]:
        if isinstance(wanted, str):
            return self._graph.get(wanted, wanted)
        node = yield from open_tree(self._graph, wanted)
        self._own.append(node)
        return node

    def make(self) -> None:
        file, *data = (edge.device for edge in self._edges)
        create(file, self._options, *data)

    def clean(self) -> Steps[None]:
        with self._graph.edit() as edit:
            for edge in self._edges:
                edit.detach(edge)
        for node in self._own:
            yield from close_node(self._graph, node)


def _data_name(file: Node, data: Node) -> str:
    """What the header in ``file`` is to say of its data file; '' for one that no path leads to."""
    location = filename.image_location(data)
    if location is None or data.filename != filename.image_path(data):
        return ""
    return name_seen_from(filename.image_location(file), data.filename, location)
