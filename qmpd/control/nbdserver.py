"""The NBD server: it listens, haggles with each client on the event loop, and hands the socket to a worker thread.

A connection is a task. Until the client has chosen an export, reading and writing wait in trio, under a deadline; then
the task waits for the thread that serves it. Nobody is ever cancelled there: a connection is cut by shutting its socket
down, which any wait notices. Control thread. Source: spec/nbd-export.md sections 1, 6 and 11.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

import trio

from qmpd.control import tls
from qmpd.control.bridge import Bridge
from qmpd.control.channel import READ_SIZE
from qmpd.control.listen import Listener
from qmpd.errors import QmpdError
from qmpd.export.nbd import NbdExport
from qmpd.graph.remember import behind_filters
from qmpd.nbd.exportinfo import ExportInfo
from qmpd.nbd.handshake import Close, Enter, Handshake, Send, StartTls, Tls

T = TypeVar("T")
_log = logging.getLogger(__name__)

MOST: Final = 4096
"""Connections at once, whatever a client asks for: each has a thread."""

SERVING: Final = Bridge(MOST)
"""For the transmission phase: a thread for every connection."""


@dataclass(eq=False)
class Exported:
    """An export there is, or one that waits for its last requests."""

    export: NbdExport
    iothread: str | None = None
    connections: set[Connection] = field(default_factory=set)
    shutting_down: bool = False
    #: Its id is free again.
    gone: trio.Event = field(default_factory=trio.Event)

    def arguments(self) -> dict[str, Any]:
        """Of block-export-add, to make the same export of the node that it is of now."""
        export, edge = self.export, self.export.edge
        assert edge is not None
        node = behind_filters(edge.node)
        row: dict[str, Any] = {
            "type": "nbd",
            "id": export.id,
            "node-name": node.name,
            "name": export.name,
            "writable": export.writable,
            "writethrough": export.writethrough,
            "allocation-depth": export.allocation_depth,
            # A node that another program has is not to be taken away from it by making the export again.
            "allow-inactive": export.allow_inactive or not node.active,
        }
        more = {"description": export.description or None, "iothread": self.iothread}
        return row | {name: value for name, value in more.items() if value is not None}


class Exports(Protocol):
    """Where connections find exports."""

    def listed(self) -> Sequence[Exported]:
        """Those that clients may enter, oldest first."""

    def named(self, name: str) -> Exported | None:
        """The one of that name, if clients may enter it."""

    def parted(self, exported: Exported) -> None:
        """A connection has left it."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What is asked of clients. Zero is no limit."""

    handshake_seconds: int = 10
    max_connections: int = 100
    credentials: tls.Credentials | None = None
    #: Raises QmpdError unless who has a certificate of this name is let in.
    admit: Callable[[str], None] | None = None

    @property
    def most(self) -> int:
        """Connections at once."""
        return min(self.max_connections or MOST, MOST)


class NbdServer:
    """Listening sockets and the connections that came through them."""

    def __init__(self, listeners: Sequence[Listener], terms: Terms, exports: Exports) -> None:
        self.terms = terms
        self._listeners = listeners
        self._exports = exports
        self._connections: set[Connection] = set()
        self._accepting = trio.CancelScope()
        self._left = trio.Event()
        self._ended = trio.Event()

    async def serve(self) -> None:
        """Until :meth:`stop`."""
        try:
            async with trio.open_nursery() as connections:
                with self._accepting:
                    async with trio.open_nursery() as nursery:
                        for listener in self._listeners:
                            nursery.start_soon(self._accept, listener, connections)
                self.close()
        finally:
            self.close()
            self._ended.set()

    async def stop(self) -> None:
        """Listen no more, cut all connections; returns when the last one's requests are over."""
        self._accepting.cancel()
        await self._ended.wait()

    def close(self) -> None:
        """Stop listening, remove the socket file, cut all connections."""
        for listener in self._listeners:
            listener.close()
        self._listeners = ()
        for connection in self._connections:
            connection.cut()

    async def _accept(self, listener: Listener, nursery: trio.Nursery) -> None:
        while True:
            while not self._has_room:
                await self._left.wait()
            await listener.ready()
            if self._has_room and (sock := listener.take()) is not None:
                connection = Connection(sock, self.terms, self._exports)
                self._connections.add(connection)
                nursery.start_soon(self._serve_one, connection)

    @property
    def _has_room(self) -> bool:
        return len(self._connections) < self.terms.most

    async def _serve_one(self, connection: Connection) -> None:
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)
            self._left.set()
            self._left = trio.Event()


class Connection:
    """One client, from its greeting to its end."""

    def __init__(self, sock: socket.socket, terms: Terms, exports: Exports) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._terms = terms
        self._exports = exports
        self._is_cut = False
        self._found: Exported | None = None

    async def serve(self) -> None:
        """Haggle, then serve. Whatever the client does ends this connection only."""
        try:
            entered = None
            with trio.move_on_after(self._terms.handshake_seconds or math.inf):
                entered = await self._negotiate()
            if entered is not None and self._found is not None:
                await self._transmit(self._found, entered)
        except Exception:  # noqa: BLE001  a bug of ours
            _log.exception("unexpected failure of an NBD connection")
        finally:
            self._sock.close()

    def cut(self) -> None:
        """Shut the socket: whoever reads from it finds its end."""
        self._is_cut = True
        with contextlib.suppress(OSError):  # the client was faster
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    # -- exports, as the handshake looks at them -----------------------------------------------------------------------

    def exports(self) -> Sequence[ExportInfo]:
        """All of them, oldest first."""
        return [exported.export.info() for exported in self._exports.listed()]

    def find(self, name: str) -> ExportInfo | None:
        """The one of that name."""
        self._found = self._exports.named(name)
        return self._found.export.info() if self._found is not None else None

    # -- the handshake -------------------------------------------------------------------------------------------------

    async def _negotiate(self) -> Enter | None:
        """What the client has chosen; None if it leaves, or must."""
        handshake = Handshake(self, tls=Tls.OFF if self._terms.credentials is None else Tls.REQUIRED)
        try:
            return await self._haggle(handshake)
        except OSError as error:
            self._complain(handshake.lost() and str(error))
        except QmpdError as error:
            self._complain(error.desc)
        return None

    async def _haggle(self, handshake: Handshake) -> Enter | None:
        await self._send(handshake.greeting())
        while data := await self._receive():
            for action in handshake.receive(data):
                match action:
                    case Send(data=answer):
                        await self._send(answer)
                    case StartTls():
                        await self._start_tls()
                    case Enter():
                        return action
                    case Close(reason=reason):
                        self._complain(reason)
                        return None
        self._complain(handshake.lost())
        return None

    def _complain(self, reason: str | None) -> None:
        if reason and not self._is_cut:
            _log.error("option negotiation failed: %s", reason)

    async def _start_tls(self) -> None:
        """Raises QmpdError if the client does not get through."""
        credentials = self._terms.credentials
        assert credentials is not None
        self._sock = credentials.context.wrap_socket(self._sock, server_side=True, do_handshake_on_connect=False)
        try:
            await self._when_ready(self._sock.do_handshake)
        except OSError as error:
            raise QmpdError(f"TLS handshake failed: {tls.reason(error)}") from None
        if self._terms.admit is not None:
            certificate = self._sock.getpeercert()
            if not certificate:
                raise QmpdError("TLS x509 authz check is not possible: the client has shown no verified certificate")
            self._terms.admit(tls.distinguished_name(certificate))

    async def _receive(self) -> bytes:
        """What has arrived; nothing at the end."""
        return await self._when_ready(lambda: self._sock.recv(READ_SIZE))

    async def _send(self, data: bytes) -> None:
        unsent = memoryview(data)
        while unsent:
            sent = await self._when_ready(lambda: self._sock.send(unsent), trio.lowlevel.wait_writable)  # noqa: B023
            unsent = unsent[sent:]

    async def _when_ready(
        self, call: Callable[[], T], wait: Callable[[socket.socket], Awaitable[None]] = trio.lowlevel.wait_readable
    ) -> T:
        while True:
            try:
                return call()
            except BlockingIOError:
                await wait(self._sock)
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self._sock)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self._sock)

    # -- transmission --------------------------------------------------------------------------------------------------

    async def _transmit(self, exported: Exported, entered: Enter) -> None:
        if exported is not self._exports.named(exported.export.name):
            return  # removed while the last answer was sent
        exported.connections.add(self)
        try:
            self._sock.setblocking(True)
            await SERVING.to_worker(exported.export.serve, self._sock, entered.negotiated, entered.leftover)
        finally:
            exported.connections.discard(self)
            self._exports.parted(exported)
