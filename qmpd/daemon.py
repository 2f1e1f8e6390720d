"""The composition root: every room is put together here and nowhere else."""

from __future__ import annotations

import gc
import logging
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import trio

from qmpd import commands, options
from qmpd.block.trust import Trust
from qmpd.commands import blockdev_options, throttle_groups
from qmpd.commands.block_exports import NbdServerOptions
from qmpd.control import chardev, exports, guard, queue
from qmpd.control.bridge import JOBS, run_steps
from qmpd.control.bus import Bus
from qmpd.control.durable import BUDGET, INTERVAL, DurableRecords
from qmpd.control.exports import Call, Exports
from qmpd.control.guard import Guard
from qmpd.control.manager import JobManager
from qmpd.control.objects import ObjectStore
from qmpd.control.process import PidFile, daemonize
from qmpd.control.qapi import WIRE, Source
from qmpd.control.queue import JobQueue
from qmpd.control.records import Records
from qmpd.control.registry import Context, lookup
from qmpd.control.revive import Revival
from qmpd.control.server import Server
from qmpd.errors import QmpdError
from qmpd.graph.drain import hurry
from qmpd.graph.edit import Graph
from qmpd.graph.open import close_nodes
from qmpd.jobs.siblings import SiblingPolicy
from qmpd.state.directory import Directory
from qmpd.state.store import Loaded, Store

_log = logging.getLogger(__name__)

PROGRAM: Final = "qmpd"

ENDING_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: Option -> what it makes, as the state calls that, and the argument that names it.
_NAMES: Final = {
    "blockdev": ("node", "node-name"),
    "object": ("object", "id"),
    "export": ("export", "id"),
}

#: Importing the families is what registers their commands.
FAMILIES: Final = commands

#: Option -> the command it is short for.
COMMANDS: Final = {
    "blockdev": "blockdev-add",
    "export": "block-export-add",
    "nbd-server": "nbd-server-start",
    "object": "object-add",
}

#: Pattern of a message -> what people are told beyond what clients are.
HINTS: Final = {
    r"Parameter 'id' expects an identifier": (
        "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
    ),
    r"UNIX socket path '.*' is too long": "Path must be less than 108 bytes",
}


@dataclass(frozen=True, slots=True)
class State:
    """An opened state. ``interval``: seconds between checkpoints. ``waits``: jobs do not go on by themselves."""

    store: Store
    loaded: Loaded
    interval: float = INTERVAL
    waits: bool = False

    @classmethod
    def open(cls, path: str, interval: float = INTERVAL, *, waits: bool = False) -> State:
        """Lock and read the directory. Raises QmpdError, with nothing changed, if it cannot be used."""
        store = Store(Directory(path))
        return cls(store, store.load(), interval, waits)


class Core:
    """The daemon without its outside: no sockets, no options, no process. Make it inside ``trio.run``.

    ``state`` is what it writes down to come back with; without, it forgets all when it ends.
    """

    def __init__(self, state: State | None = None) -> None:
        self.bus = Bus()
        graph_lock = trio.Lock()
        graph = Graph()
        objects = ObjectStore()
        graph.parse_description = blockdev_options.parse_description
        graph.find_throttle_group = partial(throttle_groups.find, objects)
        durable = None if state is None else DurableRecords(self.bus, graph, state.store, state.loaded, state.interval)
        self._records = durable or Records(self.bus)
        self.jobs = JobManager(self.bus.publish, JOBS, graph, graph_lock, self._records)
        self.ctx = Context(graph, self.jobs, self.bus, objects, self.shutdown, graph_lock)
        self.exports = Exports(graph, graph_lock, self.bus.publish)
        self.ctx.rooms["records"] = self._records
        self.ctx.rooms[exports.ROOM] = self.exports
        self.queue = JobQueue(self.jobs, graph, graph_lock, self.bus.publish)
        self.queue.keep_result = self._records.keep_result
        self.queue.stand = lambda: (self.bus.last, self.bus.history.incarnation)
        self.ctx.rooms[queue.ROOM] = self.queue
        self.guard = Guard()
        self.ctx.rooms[guard.ROOM] = self.guard
        if durable is not None:
            durable.calls = self._calls
        self.durable = durable
        self.revival: Revival | None = None
        if state is not None and durable is not None:
            self.ctx.before_reply = durable.before_reply
            self.revival = Revival(self.ctx, durable, state.loaded, waits=state.waits)
        self.server = Server(self.ctx)
        self.stopping = trio.Event()
        self.finished = trio.Event()
        self._is_ending = False
        self._jobs_gone = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until :meth:`shutdown`, then part from the clients and close the nodes."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.jobs.serve)
            await nursery.start(self.queue.serve)
            await nursery.start(self.exports.serve)
            await nursery.start(self.server.serve)
            nursery.start_soon(self._records.tell_progress)
            if self.durable is not None:
                nursery.start_soon(self.durable.journal.serve)
            task_status.started()
            await self.stopping.wait()
            await self.server.stop()
            await self._close_nodes()
            if self.durable is not None:
                await self.durable.journal.settle()
            nursery.cancel_scope.cancel()
        self.finished.set()

    def _calls(self) -> dict[str, Call]:
        """What brings back, beside nodes and jobs, what there is."""
        limits = self.jobs.budget.limits
        budget = {"bytes-per-second": limits.bytes_per_second, "iops": limits.iops}
        kept = {f"{BUDGET}:": Call("x-qmpd-set-budget", budget)} if any(budget.values()) else {}
        return {**self.exports.calls(), **kept, **self.queue.calls()}

    def watch_over(self, line: options.CommandLine) -> None:
        """Take up what the command line says about jobs: how many, and what they may do to other images."""
        self.queue.limit = line.max_jobs
        self.guard.policy = SiblingPolicy(line.siblings)
        self.ctx.graph.overlays.directories = line.image_dirs

    async def shutdown(self) -> None:
        """End the daemon: returns when exports and jobs are gone, so that their events precede the reply to quit."""
        if not self._is_ending:
            self._is_ending = True
            hurry(self.ctx.graph.nodes)
            await self.exports.shutdown()
            self.queue.shutdown()
            await self.jobs.shutdown()
            if self.ctx.before_reply is not None:  # nothing is to wait for between the end and the reply to quit
                await self.ctx.before_reply(None, {})
            self._jobs_gone.set()
        await self._jobs_gone.wait()
        self.server.wind_down()
        self.stopping.set()

    def stop_silently(self) -> None:
        """Stop from outside: with a state, jobs are not cancelled but interrupted, to go on at the next start."""
        if self.durable is not None:
            self.durable.freeze()

    async def _close_nodes(self) -> None:
        async with self.ctx.graph_lock:
            try:
                await run_steps(close_nodes(self.ctx.graph, self.ctx.graph.nodes))
            except QmpdError as error:
                _log.error("while closing the nodes: %s", error)


class StartUp:
    """Carries out the options strictly left to right, so that things are defined before they are used."""

    def __init__(self, core: Core, line: options.CommandLine) -> None:
        self._core = core
        self._line = line
        self._pid_file: PidFile | None = None
        self.chardevs = chardev.Chardevs(core.ctx.objects.chardevs.content)
        #: Character devices with a monitor on them, and whether it is pretty.
        self.monitors: list[tuple[chardev.Chardev, bool]] = []

    async def run(self) -> int | None:
        """Everything up to the pid file; None, or the status to exit with at once. What went wrong has been said."""
        option, line = None, self._line
        try:
            # Wherever they stand: no file is opened before it is known which may be.
            self._core.ctx.graph.trust = Trust.make(line.allow_paths, image_names=line.trust_image_names)
            self._core.watch_over(line)
            if self._core.revival is not None:
                await self._core.revival.run()
            for option in line.options:
                meaning = options.interpret(option, partial(_warn, option))
                if isinstance(meaning, options.Show):
                    print(meaning.text, end="", flush=True)
                    return meaning.status
                await self._carry_out(option, meaning)
            option = None
            if line.pidfile is not None:
                self._pid_file = PidFile(line.pidfile)
        except QmpdError as error:
            _say(error.desc, option)
            return 1
        return None

    def undo(self) -> None:
        """Remove the sockets and the pid file."""
        self.chardevs.close()
        if self._pid_file is not None:
            self._pid_file.remove()

    async def _carry_out(self, option: options.Option, meaning: object) -> None:
        match meaning:
            case options.Arguments(tree=tree, source=source):
                if option.name == "nbd-server":
                    tree, source = NbdServerOptions.parse(tree, source).as_command(), WIRE
                if not self._is_back(option.name, tree):
                    await self._call(COMMANDS[option.name], tree, source)
            case options.Monitor():
                self._add_monitor(meaning)
            case options.Trace(pattern=pattern):
                if meaning.names_one:
                    _warn(option, f"trace event '{pattern}' does not exist")
            case options.StdioChardev() if self._line.daemonize:
                raise QmpdError("cannot use stdio with -daemonize")
            case options.SocketChardev() | options.StdioChardev() | options.NullChardev():
                await self.chardevs.add(_chardev(option, meaning))

    def _is_back(self, option: str, tree: Mapping[str, Any]) -> bool:
        """Did the state bring it back already? Then the state knows better what became of it."""
        if self._core.revival is None:
            return False
        kind, member = _NAMES.get(option, (option, ""))
        return f"{kind}:{tree.get(member, '')}" in self._core.revival.things

    async def _call(self, command: str, tree: dict[str, Any], source: Source) -> None:
        ctx = self._core.ctx
        await lookup(command).call(ctx, tree, source)
        if ctx.before_reply is not None:
            await ctx.before_reply(command, tree)

    def _add_monitor(self, monitor: options.Monitor) -> None:
        taken = self.chardevs.take(monitor.chardev)
        if monitor.mode is not options.MonitorMode.CONTROL:
            raise QmpdError("Only QMP is supported")
        self.monitors.append((taken, monitor.pretty))


def _chardev(option: options.Option, described: options.Chardev) -> chardev.Chardev:
    match described:
        case options.SocketChardev(id=name, address=address, server=server, wait=wait):
            on_wait = partial(_say_waiting, option) if wait else None
            return chardev.SocketChardev(name, _address(address), server=server, on_wait=on_wait)
        case options.StdioChardev(id=name):
            return chardev.StdioChardev(name)
        case options.NullChardev(id=name):
            return chardev.NullChardev(name)


def _address(address: options.UnixAddress | options.InetAddress | options.FdAddress) -> chardev.SocketAddress:
    match address:
        case options.UnixAddress(path=path):
            return chardev.SocketAddress(path=path)
        case options.InetAddress(host=host, port=port):
            return chardev.SocketAddress(host=host, port=port)
        case options.FdAddress(fd=fd):
            return chardev.SocketAddress(fd=fd)


def _say(text: str, option: options.Option | None = None) -> None:
    """Tell standard error."""
    for pattern, hint in HINTS.items():
        if re.fullmatch(pattern, text):
            text = f"{text}\n{hint}"
    sys.stderr.write(options.complaint(PROGRAM, text, option))
    sys.stderr.flush()


def _warn(option: options.Option, text: str) -> None:
    _say(f"warning: {text}", option)


def _say_waiting(option: options.Option, where: str) -> None:
    _say(f"info: QEMU waiting for connection on: {where}", option)


class Daemon:
    """A core with the sockets, files and signals of a command line."""

    def __init__(self, line: options.CommandLine, state: State | None = None) -> None:
        self.core = Core(state)
        self._start_up = StartUp(self.core, line)

    async def run(self, ready: Callable[[], None]) -> int:
        """From the first option to the end; the exit status. ``ready`` is called when all is set up."""
        status = 0
        with trio.open_signal_receiver(*ENDING_SIGNALS) as signals:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.core.run)
                active = trio.CancelScope()
                nursery.start_soon(_cancel_on_signal, signals, active)
                with active:
                    status = await self._be_active(ready)
                if active.cancel_called:
                    self.core.stop_silently()
                with trio.CancelScope(shield=True):  # ends: jobs are cancelled, clients have seconds, files close
                    await self.core.shutdown()
                    await self.core.finished.wait()
                self._start_up.undo()
                nursery.cancel_scope.cancel()
        return status

    async def _be_active(self, ready: Callable[[], None]) -> int:
        with self.core.exports.unattended():
            failure = await self._start_up.run()
        if failure is not None:
            return failure
        ready()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.core.guard.warm, self.core.ctx.graph)
            for end, pretty in self._start_up.monitors:
                nursery.start_soon(end.serve, partial(self.core.server.attach, pretty=pretty))
            await self.core.stopping.wait()
            nursery.cancel_scope.cancel()
        return 0


async def _cancel_on_signal(signals: AsyncIterator[int], active: trio.CancelScope) -> None:
    """The first one ends the daemon; the others are harmless."""
    async for _number in signals:
        active.cancel()


def main(words: list[str]) -> int:
    """Be the daemon that a command line asks for; the exit status of the process."""
    try:
        line = options.scan(words, PROGRAM)
    except QmpdError as error:
        _say(error.desc)
        return 1
    if line.show is not None:
        print(line.show, end="")
        return 0
    ready = daemonize() if line.daemonize else _nothing
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=f"{PROGRAM}: %(levelname)s: %(message)s")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # What the imports have made stays; looking through it again and again would only cost time.
    gc.freeze()
    gc.enable()
    try:
        state = _open_state(line)
    except QmpdError as error:
        _say(error.desc)
        return 1
    try:
        return trio.run(_main, line, state, ready)
    finally:
        if state is not None:
            state.store.close()
            state.store.directory.close()


def _open_state(line: options.CommandLine) -> State | None:
    if line.state_dir is None:
        return None
    return State.open(line.state_dir, line.checkpoint_seconds, waits=line.jobs_wait)


async def _main(line: options.CommandLine, state: State | None, ready: Callable[[], None]) -> int:
    return await Daemon(line, state).run(ready)


def _nothing() -> None:
    pass
