"""A daemon core inside the test: no process, no socket file, no start-up; the real server over a socket pair.

Everything above the byte stream is the product: session, dispatch, handlers, jobs, events, outboxes. Usage::

    async def test_something(tmp_path):
        async with running() as core:
            client = await core.client()                       # negotiated
            assert await client.execute("query-jobs") == []
            raw = core.connect()                               # nothing read yet, not even the greeting
            await raw.send(b'{"execute":"qmp_capabilities"}')
            assert "QMP" in await raw.receive()

:meth:`Wire.receive` returns one parsed message, :meth:`Wire.receive_raw` its bytes; ``None`` means end of file.
:meth:`Wire.execute` sends a command and returns its result or raises :class:`CommandError`; events that come in between
are kept in :attr:`Wire.events`, oldest first, and :meth:`Wire.event` waits for one by name. Works under the
``autojump_clock`` fixture as long as no worker thread is busy.
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from qmpd.control.channel import Channel
from qmpd.control.registry import Client, Context
from qmpd.daemon import Core


class CommandError(Exception):
    """An error reply."""

    def __init__(self, error_class: str, desc: str) -> None:
        super().__init__(f"{error_class}: {desc}")
        self.error_class = error_class
        self.desc = desc


class Wire:
    """The client's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._buffer = bytearray()
        self._ids = 0
        self.events: list[dict[str, Any]] = []

    async def send(self, data: bytes) -> None:
        """Write raw bytes."""
        await self._stream.send_all(data)

    async def finish_sending(self) -> None:
        """Half-close."""
        await self._stream.send_eof()

    async def close(self) -> None:
        """Hang up without reading any more."""
        await self._stream.aclose()

    async def receive_raw(self) -> bytes | None:
        """The next line with its CR LF, or None at end of file."""
        while (end := self._buffer.find(b"\n")) < 0:
            try:
                data = await self._stream.receive_some()
            except trio.BrokenResourceError:
                data = b""
            if not data:
                return None
            self._buffer += data
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return line

    async def receive(self) -> Any:
        """The next message, parsed, or None at end of file."""
        line = await self.receive_raw()
        return None if line is None else json.loads(line)

    async def rest(self) -> list[Any]:
        """All messages up to end of file."""
        messages = []
        while (message := await self.receive()) is not None:
            messages.append(message)
        return messages

    async def execute(self, name: str, /, **arguments: Any) -> Any:
        """The result of a command; ``_`` in argument names stands for ``-``. Raises CommandError."""
        return await self.call(name, {key.replace("_", "-"): value for key, value in arguments.items()})

    async def call(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """The same with the arguments as they go over the wire."""
        self._ids += 1
        request = {"execute": name, "id": self._ids} | ({"arguments": arguments} if arguments else {})
        await self.send(json.dumps(request).encode())
        while (message := await self.receive()) is not None:
            if "event" in message:
                self.events.append(message)
            elif message.get("id") == self._ids:
                if "error" in message:
                    raise CommandError(message["error"]["class"], message["error"]["desc"])
                return message["return"]
        raise AssertionError(f"end of file instead of a reply to {name}")

    async def event(self, name: str, matching: Callable[[dict[str, Any]], bool] = lambda data: True) -> dict[str, Any]:
        """The data of the oldest unseen event called ``name`` that matches, which is taken out of :attr:`events`."""
        seen = 0
        while True:
            for event in self.events[seen:]:
                if event["event"] == name and matching(event["data"]):
                    self.events.remove(event)
                    data: dict[str, Any] = event["data"]
                    return data
            seen = len(self.events)
            message = await self.receive()
            assert message is not None, f"end of file instead of {name}"
            assert "event" in message, f"unexpected {message}"
            self.events.append(message)


class InProcess:
    """A running core. ``core.ctx`` is what handlers see."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._wires: list[Wire] = []

    @property
    def ctx(self) -> Context:
        """The handlers' view of the daemon."""
        return self.core.ctx

    def connect(self, *, pretty: bool = False, send_buffer: int | None = None) -> Wire:
        """A new client that has not read its greeting; ``send_buffer`` bytes are what the kernel keeps for it."""
        ours, theirs = socket.socketpair()
        if send_buffer is not None:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.core.server.attach(Channel.of_socket(ours), Client("test"), pretty=pretty)
        wire = Wire(theirs)
        self._wires.append(wire)
        return wire

    async def hang_up(self) -> None:
        """Close all clients' ends."""
        for wire in self._wires:
            await wire.close()

    async def client(self, *enable: str) -> Wire:
        """A new client in command mode."""
        wire = self.connect()
        assert "QMP" in await wire.receive()
        await wire.call("qmp_capabilities", {"enable": list(enable)} if enable else None)
        return wire


@asynccontextmanager
async def running() -> AsyncIterator[InProcess]:
    """A core with no nodes and no clients; at the end its jobs are cancelled and its clients hung up on."""
    core = Core()
    harness = InProcess(core)
    async with trio.open_nursery() as nursery:
        await nursery.start(core.run)
        try:
            yield harness
        finally:
            with trio.CancelScope(shield=True):
                await core.shutdown()
                await harness.hang_up()
