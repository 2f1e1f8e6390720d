"""A daemon made of a script: it answers QMP commands over a real UNIX socket from a table of functions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

Answer = Callable[[dict[str, Any]], Any]

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "capabilities": []}}


class RefusalError(Exception):
    """Raised by an answer to become an error reply."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.error_class = error_class


class FakeDaemon:
    """Keeps what it was asked in ``asked``; :meth:`emit` sends an event to everybody."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.greeting = json.dumps(GREETING).encode() + b"\r\n"
        self.answers: dict[str, Answer] = {"qmp_capabilities": lambda _: {}}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._sending = trio.Lock()
        self._streams: list[trio.SocketStream] = []

    async def emit(self, name: str, number: int | None = None, /, **data: Any) -> None:
        """An event; underscores in the names of members stand for hyphens."""
        stamp = {"seconds": 1_700_000_000, "microseconds": 250_000}
        members = {key.replace("_", "-"): value for key, value in data.items()}
        numbered = {} if number is None else {"x-qmpd-number": number}
        for stream in self._streams:
            await self._send(stream, {"timestamp": stamp, "event": name, "data": members} | numbered)

    async def status(self, job: str, *statuses: str) -> None:
        """JOB_STATUS_CHANGE, one for each."""
        for status in statuses:
            await self.emit("JOB_STATUS_CHANGE", id=job, status=status)

    async def hang_up(self) -> None:
        """End every connection."""
        for stream in self._streams:
            await stream.aclose()

    async def serve(self, stream: trio.SocketStream) -> None:
        """One client."""
        self._streams.append(stream)
        await stream.send_all(self.greeting)
        buffered = b""
        try:
            while data := await stream.receive_some():
                *lines, buffered = (buffered + data).split(b"\n")
                for line in lines:
                    await self._answer(stream, json.loads(line))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._streams.remove(stream)
            await stream.aclose()

    async def _answer(self, stream: trio.SocketStream, command: dict[str, Any]) -> None:
        name, arguments = command["execute"], command.get("arguments", {})
        self.asked.append((name, arguments))
        try:
            if name not in self.answers:
                raise RefusalError(f"The command {name} has not been found", "CommandNotFound")
            result = self.answers[name](arguments)
            reply = {"return": await result if hasattr(result, "__await__") else result}
        except RefusalError as refusal:
            reply = {"error": {"class": refusal.error_class, "desc": str(refusal)}}
        await self._send(stream, {**reply, "id": command["id"]})

    async def _send(self, stream: trio.SocketStream, message: dict[str, Any]) -> None:
        async with self._sending:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # a client may leave when it likes
                await stream.send_all(json.dumps(message).encode() + b"\r\n")


@asynccontextmanager
async def fake_daemon(directory: Path) -> AsyncIterator[FakeDaemon]:
    """A running fake on a socket in ``directory``."""
    daemon = FakeDaemon(directory / "fake.sock")
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(daemon.path)
    listener.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, daemon.serve, [trio.SocketListener(listener)])
        yield daemon
        nursery.cancel_scope.cancel()


def raises(text: str) -> Answer:
    """An answer that refuses."""

    def refuse(_: dict[str, Any]) -> Any:
        raise RefusalError(text)

    return refuse
