"""Block exports: ids and names, the NBD server, and the end of both.

An export is removed in two steps: it is closed to clients at once, and deleted, with an event, when the last request
has ended. Each export is deleted by a task of the room's own nursery, so no client that hangs up stops it. Control
thread. Source: spec/nbd-export.md sections 1-5.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import trio

from qmpd.block.api import Role
from qmpd.control.bridge import run_steps, to_worker
from qmpd.control.listen import Listener
from qmpd.control.nbdserver import Exported, NbdServer, Terms
from qmpd.control.registry import Context
from qmpd.errors import QmpdError
from qmpd.export.nbd import SHARED, NbdExport
from qmpd.graph import activity
from qmpd.graph.edit import Edit, Graph
from qmpd.graph.node import Backend, Node
from qmpd.graph.open import close_unreferenced
from qmpd.jobs.surgery import while_quiet
from qmpd.steps import Steps

_log = logging.getLogger(__name__)

ROOM: Final = "exports"
"""The service's name in :attr:`Context.rooms`."""

_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*", re.ASCII)
_LONGEST: Final = 4096

DELETED: Final = "BLOCK_EXPORT_DELETED"
"""The event."""

Publish = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be exported, and how."""

    id: str
    node_name: str
    name: str
    description: str = ""
    writable: bool = False
    writethrough: bool = False
    allocation_depth: bool = False
    allow_inactive: bool = False
    #: Names, or (node, name).
    bitmaps: Sequence[str | tuple[str, str]] = ()
    iothread: str | None = None
    #: Checks what the export is to be run by, in its place among the other checks. Raises QmpdError.
    check_place: Callable[[], object] = lambda: None
    #: The node as ``device`` in error texts: the legacy command's spelling.
    device: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """A command, or an event that is still to be told."""

    command: str
    arguments: dict[str, Any]


class Exports:
    """All exports, and the server through which clients reach them."""

    def __init__(self, graph: Graph, graph_lock: trio.Lock, publish: Publish) -> None:
        self._graph = graph
        self._graph_lock = graph_lock
        self._publish = publish
        self._door = trio.Event()
        self._door.set()
        #: Oldest first.
        self._all: list[Exported] = []
        self._server: NbdServer | None = None
        self._server_call: dict[str, Any] = {}
        #: Held while the server starts or stops.
        self._changing = trio.Lock()
        self._sweeping = False
        self._closed = False
        self._nursery: trio.Nursery | None = None

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the tasks of server and exports until cancelled. Call :meth:`shutdown` before."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                if self._server is not None:
                    self._server.close()

    # -- the server ----------------------------------------------------------------------------------------------------

    async def start(
        self, listen: Callable[[], Sequence[Listener]], terms: Callable[[], Terms], call: dict[str, Any]
    ) -> None:
        """Listen, then look at the ``terms``; if they are refused, nobody listens. ``listen`` runs in a worker thread.

        ``call``: arguments of nbd-server-start that do the same at another start. Raises QmpdError.
        """
        async with self._changing:
            if self._server is not None:
                raise QmpdError("NBD server already running")
            if self._closed or self._nursery is None:
                raise QmpdError("The daemon is shutting down")
            listeners = await to_worker(listen)
            try:
                self._server = NbdServer(listeners, terms(), self)
            except QmpdError:
                for listener in listeners:
                    listener.close()
                raise
            self._server_call = call
            self._nursery.start_soon(self._attend, self._server)

    async def _attend(self, server: NbdServer) -> None:
        await self._door.wait()
        await server.serve()

    @contextmanager
    def unattended(self) -> Iterator[None]:
        """Clients that connect in the block are greeted after it: nobody is told that an export is not there yet."""
        self._door = trio.Event()
        try:
            yield
        finally:
            self._door.set()

    async def stop(self) -> None:
        """Remove all exports, cut all clients; returns when requests in flight have ended. Raises QmpdError."""
        async with self._changing:
            if self._server is None:
                raise QmpdError("NBD server not running")
            with trio.CancelScope(shield=True):
                await self._stop(self._server)

    async def shutdown(self) -> None:
        """The same at the end of the daemon, if there is a server; there will be none any more."""
        async with self._changing:
            self._closed = True
            if self._server is not None:
                await self._stop(self._server)

    async def _stop(self, server: NbdServer) -> None:
        self._server = None
        used = [exported for exported in self._all if exported.connections]
        unused = [exported for exported in reversed(self._all) if not exported.connections]
        self._sweeping = True
        try:
            for exported in self._all:
                exported.shutting_down = True
                exported.export.hang_up()
            await server.stop()
            for exported in used + unused:
                await self._delete(exported)
        finally:
            self._sweeping = False

    # -- exports -------------------------------------------------------------------------------------------------------

    async def add(self, wanted: Wanted) -> Exported:
        """Export a node. Raises QmpdError; the order of the checks is the peer's."""
        async with self._graph_lock:
            return await run_steps(self._add(wanted))

    def _add(self, wanted: Wanted) -> Steps[Exported]:
        self._check_id(wanted.id)
        node = self._graph.get(wanted.node_name, wanted.device)
        if wanted.writable and node.read_only:
            raise QmpdError("Cannot export read-only node as writable", node=node.name)
        wanted.check_place()
        if not wanted.allow_inactive:
            yield from self._activate(node)
        export = NbdExport(
            wanted.id,
            wanted.name,
            description=wanted.description,
            writable=wanted.writable,
            writethrough=wanted.writethrough,
            allocation_depth=wanted.allocation_depth,
            allow_inactive=wanted.allow_inactive,
            multi_conn=self._server is None or self._server.terms.max_connections != 1,
        )
        if node.active:
            self._graph.rehearse(lambda edit: edit.attach(Backend(), "root", node, Role.NONE, perm=export.perm))
        self._check_wire(wanted)
        self._check_bitmaps(wanted, lambda edit: _attach(edit, export, node))
        with self._graph.edit() as edit:
            _attach(edit, export, node)
        export.begin()
        exported = Exported(export, wanted.iothread)
        self._all.append(exported)
        return exported

    def _activate(self, node: Node) -> Steps[None]:
        inactive = activity.activation([node])
        if inactive:
            yield from while_quiet(self._graph, inactive, lambda: activity.activate(self._graph, inactive))

    def _check_id(self, export_id: str) -> None:
        if not _ID.fullmatch(export_id):
            raise QmpdError("Invalid block export id")
        if self._find(export_id) is not None:
            raise QmpdError(f"Block export id '{export_id}' is already in use")

    def _check_wire(self, wanted: Wanted) -> None:
        """What clients will see."""
        if self._server is None:
            raise QmpdError("NBD server not running")
        for what, text in (("export name", wanted.name), ("description", wanted.description)):
            if len(text.encode("utf-8", "surrogatepass")) > _LONGEST:
                raise QmpdError(f"{what} '{text}' too long")
        if self.named(wanted.name) is not None:
            raise QmpdError(f"NBD server already has export named '{wanted.name}'")

    def _check_bitmaps(self, wanted: Wanted, attach: Callable[[Edit], object]) -> None:
        """No node has a bitmap."""
        for bitmap in wanted.bitmaps:
            self._graph.rehearse(attach)
            if isinstance(bitmap, str):
                raise QmpdError(f"Bitmap '{bitmap}' is not found")
            node, name = bitmap
            if self._graph.find(node) is None:
                raise QmpdError(f"Node '{node}' not found")
            raise QmpdError(f"Dirty bitmap '{name}' not found")

    async def remove(self, export_id: str, *, hard: bool) -> None:
        """Close an export; without clients it is gone at return. Raises QmpdError."""
        exported = self._find(export_id)
        if exported is None:
            raise QmpdError(f"Export '{export_id}' is not found")
        if exported.shutting_down:
            raise QmpdError(f"Export '{export_id}' is already shutting down")
        if exported.connections and not hard:
            raise QmpdError(f"export '{export_id}' still in use")
        exported.shutting_down = True
        exported.export.hang_up()
        for connection in exported.connections:
            connection.cut()
        if not exported.connections:
            self._start_deleting(exported)
            await exported.gone.wait()

    def parted(self, exported: Exported) -> None:
        """A connection has left it."""
        if exported.shutting_down and not exported.connections and not self._sweeping:
            self._start_deleting(exported)

    def _start_deleting(self, exported: Exported) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._delete, exported)

    async def _delete(self, exported: Exported) -> None:
        """Let go of the node, and tell."""
        async with self._graph_lock:
            if exported.gone.is_set():
                return
            edge = exported.export.edge
            assert edge is not None
            with self._graph.edit() as edit:
                edit.detach(edge)
            try:
                await run_steps(close_unreferenced(self._graph))
            except QmpdError as error:
                _log.error("export %s: while closing its node: %s", exported.export.id, error)
            self._all.remove(exported)
            exported.gone.set()
        self._publish(DELETED, {"id": exported.export.id})

    # -- for another start ---------------------------------------------------------------------------------------------

    def calls(self) -> dict[str, Call]:
        """Key -> the command that brings back what there is now, in an order in which it can."""
        calls: dict[str, Call] = {}
        if self._server is not None:
            calls["nbd-server:"] = Call("nbd-server-start", self._server_call)
        for exported in self._all:
            export = exported.export
            if exported.shutting_down:
                calls[f"deleted-export:{export.id}"] = Call(DELETED, {"id": export.id})
            else:
                calls[f"export:{export.id}"] = Call("block-export-add", exported.arguments())
        return calls

    # -- queries -------------------------------------------------------------------------------------------------------

    def _find(self, export_id: str) -> Exported | None:
        return next((exported for exported in self._all if exported.export.id == export_id), None)

    @property
    def newest_first(self) -> list[Exported]:
        """All of them, those that are shutting down included."""
        return self._all[::-1]

    def listed(self) -> list[Exported]:
        """Those that clients may enter, oldest first."""
        return [exported for exported in self._all if not exported.shutting_down]

    def named(self, name: str) -> Exported | None:
        """The one of that name, if clients may enter it."""
        return next((exported for exported in self.listed() if exported.export.name == name), None)


def _attach(edit: Edit, export: NbdExport, node: Node) -> None:
    perm, shared = activity.permissions(node, export.perm, SHARED)
    edit.attach(export, "root", node, Role.NONE, perm=perm, shared=shared)


def of(ctx: Context) -> Exports:
    """The daemon's exports."""
    room: Exports = ctx.rooms[ROOM]
    return room
