"""The composition root: every room is put together here and nowhere else."""

from __future__ import annotations

import logging

import trio

from qmpd import commands
from qmpd.control.bridge import JOBS, run_steps
from qmpd.control.bus import Bus
from qmpd.control.manager import JobManager
from qmpd.control.objects import ObjectStore
from qmpd.control.registry import Context
from qmpd.control.server import Server
from qmpd.errors import QmpdError
from qmpd.graph.edit import Graph
from qmpd.graph.open import close_nodes

_log = logging.getLogger(__name__)

#: Importing the families is what registers their commands.
FAMILIES = commands


class Core:
    """The daemon without its outside: no sockets, no options, no process. Make it inside ``trio.run``."""

    def __init__(self) -> None:
        self.bus = Bus()
        graph_lock = trio.Lock()
        graph = Graph()
        self.jobs = JobManager(self.bus.publish, JOBS, graph, graph_lock)
        self.ctx = Context(graph, self.jobs, self.bus, ObjectStore(), self.shutdown, graph_lock)
        self.server = Server(self.ctx)
        self.stopping = trio.Event()
        self._is_ending = False
        self._jobs_gone = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until :meth:`shutdown`, then part from the clients and close the nodes."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.jobs.serve)
            await nursery.start(self.server.serve)
            task_status.started()
            await self.stopping.wait()
            await self.server.stop()
            await self._close_nodes()
            nursery.cancel_scope.cancel()

    async def shutdown(self) -> None:
        """End the daemon: returns when the jobs are gone, so that their events precede the reply to quit."""
        if not self._is_ending:
            self._is_ending = True
            await self.jobs.shutdown()
            self._jobs_gone.set()
        await self._jobs_gone.wait()
        self.server.wind_down()
        self.stopping.set()

    async def _close_nodes(self) -> None:
        async with self.ctx.graph_lock:
            try:
                await run_steps(close_nodes(self.ctx.graph, self.ctx.graph.nodes))
            except QmpdError as error:
                _log.error("while closing the nodes: %s", error)
