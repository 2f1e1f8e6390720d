"""Monitors: every client that connects is greeted and served at once, in a small nursery of its own.

A client's requests are taken strictly in order. All that one read brought are answered with one write; between two
bounded batches the other clients get their turn. Control thread. Source: spec/qmp-protocol.md sections 8, 9, 12 and 13.
"""

from __future__ import annotations

import logging
from typing import Final

import trio

from qmpd.control.channel import Channel, Outbox
from qmpd.control.registry import Client, Context, lookup
from qmpd.errors import QmpdError
from qmpd.wire.session import Request, Session

_log = logging.getLogger(__name__)

BATCH: Final = 64
"""Requests handled before the other clients get a turn."""

DRAIN_SECONDS: Final = 2.0
"""How long the end of the daemon waits for a client to read its last replies."""


class Server:
    """All clients of all monitors. ``ctx`` is the daemon as its handlers see it."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._connections: set[Connection] = set()
        self._nursery: trio.Nursery | None = None
        self.stopping = False

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the clients' tasks until cancelled. Call :meth:`stop` before."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def attach(self, channel: Channel, client: Client, *, pretty: bool = False) -> None:
        """Serve one client from now on; the greeting is on its way when this returns."""
        if self.stopping or self._nursery is None:
            channel.close()
            return
        connection = Connection(self, channel, self._ctx, client, pretty=pretty)
        self._connections.add(connection)
        self._nursery.start_soon(self._serve_one, connection)

    async def _serve_one(self, connection: Connection) -> None:
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)

    @property
    def clients(self) -> int:
        """Number of clients being served."""
        return len(self._connections)

    def wind_down(self) -> None:
        """Start no further request."""
        self.stopping = True

    async def stop(self) -> None:
        """Give every client what is queued for it, and hang up."""
        self.wind_down()
        with trio.move_on_after(DRAIN_SECONDS):
            async with trio.open_nursery() as nursery:
                for connection in list(self._connections):
                    connection.hang_up()
                    nursery.start_soon(connection.finished.wait)
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()


class Connection:
    """One client, from greeting to goodbye."""

    def __init__(self, server: Server, channel: Channel, ctx: Context, client: Client, *, pretty: bool) -> None:
        self.finished = trio.Event()
        self._server = server
        self._channel = channel
        self._session = Session(pretty=pretty)
        self._outbox = Outbox(channel, pretty=pretty, on_lost=self._give_up)
        self._ctx = ctx.for_client(client, self._outbox)
        self._conversing = trio.CancelScope()
        self._hears_events = False
        self._backlog: trio.MemorySendChannel[Request | bytes] | None = None
        self._unflushed = 0
        self._outbox.put(self._session.greeting())
        self._outbox.flush()

    # -- life ----------------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Until the client hangs up, cannot be reached or the daemon stops."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._outbox.pump)
                with self._conversing:
                    async with trio.open_nursery() as workers:
                        await self._converse(workers)
                await self._outbox.drain()
                nursery.cancel_scope.cancel()
        finally:
            self._ctx.bus.leave(self._outbox)
            self._channel.close()
            self.finished.set()

    def hang_up(self) -> None:
        """Take no more requests; what is queued is still delivered."""
        self._conversing.cancel()

    def _give_up(self, reason: str) -> None:
        _log.info("%s: connection lost: %s", self._ctx.client.label, reason)
        self._conversing.cancel()

    async def _converse(self, workers: trio.Nursery) -> None:
        """Read and take requests, to the end of the input or of the daemon."""
        try:
            while data := await self._channel.receive():
                for item in self._session.receive(data):
                    # Replies that are ready lead up to negotiation, and the client must see them before any event.
                    if not self._hears_events and not isinstance(item, bytes):
                        self._enter_command_mode(workers)
                    await self._take(item)
                    if self._over:
                        return
                if self._session.negotiated and not self._hears_events:
                    self._enter_command_mode(workers)
                self._outbox.flush()
        finally:
            if self._backlog is not None:
                self._backlog.close()

    def _enter_command_mode(self, workers: trio.Nursery) -> None:
        self._hears_events = True
        self._ctx.bus.join(self._outbox)
        if self._session.oob:
            # The last one of those that may wait is in the hands of send().
            self._backlog, backlog = trio.open_memory_channel[Request | bytes](self._session.window - 1)
            workers.start_soon(self._work_off, backlog)

    @property
    def _over(self) -> bool:
        return self._server.stopping or self._outbox.lost

    # -- requests ------------------------------------------------------------------------------------------------------

    async def _take(self, item: Request | bytes) -> None:
        """Answer, or queue if the client may overtake itself with out-of-band requests."""
        if self._backlog is None:
            await self._answer(item)
        elif isinstance(item, bytes) or not item.oob:
            await self._backlog.send(item)
        else:
            self._outbox.put(self._refuse(item))
            self._outbox.flush()

    async def _work_off(self, backlog: trio.MemoryReceiveChannel[Request | bytes]) -> None:
        async for item in backlog:
            await self._answer(item)
            self._outbox.flush()
            if self._over:
                self.hang_up()

    async def _answer(self, item: Request | bytes) -> None:
        await self._outbox.wait_for_room()
        self._outbox.put(item if isinstance(item, bytes) else await self._execute(item))
        self._unflushed += 1
        if self._unflushed >= BATCH:
            self._unflushed = 0
            self._outbox.flush()
            await trio.lowlevel.checkpoint()

    async def _execute(self, request: Request) -> bytes:
        """Carry out one command; the reply. Whatever a handler raises costs this command, not the connection."""
        try:
            command = lookup(request.name)
            result = command.start(self._ctx, request.arguments)
            if command.is_async:
                self._outbox.wake()  # answers that are ready do not wait for this one
                result = await result
            if self._ctx.before_reply is not None:
                await self._ctx.before_reply(request.name, request.arguments)
            return self._session.reply(request, command.finish(result))
        except QmpdError as error:
            if self._ctx.before_reply is not None:
                await self._ctx.before_reply(None, {})
            details = error.told() if self._ctx.bus.is_subscribed(self._outbox) else None
            return self._session.fail(request, error.qmp_class, error.desc, details)
        except Exception:  # noqa: BLE001  a bug of ours
            _log.exception("%s: unexpected failure of %s", self._ctx.client.label, request.name)
            return self._session.fail(request, "GenericError", f"Internal error in command {request.name}")

    def _refuse(self, request: Request) -> bytes:
        try:
            lookup(request.name)
        except QmpdError as error:
            return self._session.fail(request, error.qmp_class, error.desc)
        return self._session.refuse(request)
