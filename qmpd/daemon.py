"""The composition root: every room is put together here and nowhere else."""

from __future__ import annotations

import gc
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Final

import trio

from qmpd import commands
from qmpd.control.bridge import JOBS, run_steps
from qmpd.control.bus import Bus
from qmpd.control.chardev import Chardev, Chardevs
from qmpd.control.manager import JobManager
from qmpd.control.objects import ObjectStore
from qmpd.control.process import PidFile, daemonize
from qmpd.control.registry import Context, lookup
from qmpd.control.server import Server
from qmpd.control.startup import AddChardev, AddMonitor, Plan, RunCommand, Step
from qmpd.errors import QmpdError
from qmpd.graph.edit import Graph
from qmpd.graph.open import close_nodes

_log = logging.getLogger(__name__)

PROGRAM: Final = "qmpd"

ENDING_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: Importing the families is what registers their commands.
FAMILIES: Final = commands


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
        self.finished = trio.Event()
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
        self.finished.set()

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


class StartError(Exception):
    """Start-up failed; the text is for standard error."""


class Daemon:
    """A core with the sockets, files and signals of a command line."""

    def __init__(self, plan: Plan) -> None:
        self.core = Core()
        self._plan = plan
        self._chardevs = Chardevs(self.core.ctx.objects.chardevs.content)
        self._monitors: list[tuple[Chardev, bool]] = []
        self._pid_file: PidFile | None = None
        self._failure: StartError | None = None

    async def run(self, started: Callable[[], None]) -> None:
        """From the first option to the end; ``started`` is called when the daemon is ready to serve.

        Raises StartError, with nothing left behind.
        """
        with trio.open_signal_receiver(*ENDING_SIGNALS) as signals:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.core.run)
                active = trio.CancelScope()
                nursery.start_soon(self._end_on_signal, signals, active)
                with active:
                    await self._be_active(started)
                with trio.CancelScope(shield=True):  # ends: jobs are cancelled, clients have seconds, files close
                    await self.core.shutdown()
                    await self.core.finished.wait()
                self._clean_up()
                nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def _end_on_signal(self, signals: AsyncIterator[int], active: trio.CancelScope) -> None:
        async for _number in signals:
            active.cancel()

    async def _be_active(self, started: Callable[[], None]) -> None:
        try:
            await self._start_up()
        except StartError as error:
            self._failure = error
            return
        started()
        await self._take_clients()

    # -- start-up ------------------------------------------------------------------------------------------------------

    async def _start_up(self) -> None:
        """Raises StartError."""
        for step in self._plan.steps:
            try:
                await self._take(step)
            except QmpdError as error:
                raise StartError(f"{step.option}: {error.desc}") from None
        if self._plan.pid_file is not None:
            try:
                self._pid_file = PidFile(self._plan.pid_file)
            except QmpdError as error:
                raise StartError(error.desc) from None

    async def _take(self, step: Step) -> None:
        match step:
            case AddChardev(chardev=chardev):
                await self._chardevs.add(chardev)
            case AddMonitor(chardev_id=chardev_id, pretty=pretty):
                self._monitors.append((self._chardevs.take(chardev_id), pretty))
            case RunCommand(command=name, arguments=arguments, source=source):
                await lookup(name).call(self.core.ctx, arguments, source)

    # -- service -------------------------------------------------------------------------------------------------------

    async def _take_clients(self) -> None:
        """Until the core ends."""
        async with trio.open_nursery() as nursery:
            for chardev, pretty in self._monitors:
                nursery.start_soon(chardev.serve, partial(self.core.server.attach, pretty=pretty))
            await self.core.stopping.wait()
            nursery.cancel_scope.cancel()

    def _clean_up(self) -> None:
        self._chardevs.close()
        if self._pid_file is not None:
            self._pid_file.remove()


def run(plan: Plan) -> int:
    """Be the daemon of a command line; the exit status of the process."""
    ready = daemonize() if plan.daemonize else _nothing
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=f"{PROGRAM}: %(levelname)s: %(message)s")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # What the imports have made stays; looking through it again and again would only cost time.
    gc.freeze()
    gc.enable()
    try:
        trio.run(_main, plan, ready)
    except StartError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


async def _main(plan: Plan, ready: Callable[[], None]) -> None:
    await Daemon(plan).run(ready)


def _nothing() -> None:
    pass
