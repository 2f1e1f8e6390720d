"""A QMP client for trio programs.

::

    async with connect("/run/qmpd.sock") as client:
        nodes = await client.execute("query-named-block-nodes", {"flat": True})
        with client.events("JOB_STATUS_CHANGE") as events:
            await client.execute("block-commit", {"job-id": "j0", "device": "top"})
            async for event in events:
                ...

Any number of tasks may use one client at once. One background task, owned by the ``async with`` block, reads the
socket; replies find their callers by id. Errors::

    ClientError
    +-- ConnectError          no connection, or no QMP behind it
    +-- ConnectionLostError   the daemon hung up (also: was told to quit)
    +-- CommandError          the daemon answered with an error: error_class, desc
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Self

import trio

from qmpd.wire.dialect import DialectError, dumps
from qmpd.wire.stream import Framer

#: Seconds to wait for the greeting and for the end of the negotiation.
PATIENCE: Final = 5.0

_CHUNK: Final = 65536


class ClientError(Exception):
    """Root of everything this library raises; ``str(error)`` is meant for people."""


class ConnectError(ClientError):
    """There is no usable daemon at the address."""


class ConnectionLostError(ClientError):
    """The connection ended before the answer came."""


class CommandError(ClientError):
    """An error reply. ``desc`` is the daemon's text, ``error_class`` one of QMP's few classes."""

    def __init__(self, error_class: str, desc: str) -> None:
        super().__init__(desc)
        self.error_class = error_class
        self.desc = desc


@dataclass(frozen=True, slots=True)
class Event:
    """One event of the daemon. ``time`` counts seconds since the epoch, by the daemon's clock.

    ``number`` is there after :meth:`Client.subscribe`, but for progress, which has none.
    """

    name: str
    data: Mapping[str, Any]
    time: float
    number: int | None = None

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Self:
        """From the wire."""
        stamp = message.get("timestamp", {})
        seconds = stamp.get("seconds", 0) + stamp.get("microseconds", 0) / 1e6
        return cls(message["event"], message.get("data", {}), seconds, message.get("x-qmpd-number"))


class Events:
    """The events of one subscription, in order: ``async for`` or :meth:`next`. Ends when the connection does.

    Events are kept without a bound until they are taken; a subscription that nobody reads should be closed.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._send, self._receive = trio.open_memory_channel[Event](math.inf)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._receive.__aiter__()

    async def next(self) -> Event:
        """The next event. Raises ConnectionLostError when there will be no more."""
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise ConnectionLostError("the daemon closed the connection") from None

    def next_nowait(self) -> Event | None:
        """The next event if it has arrived already."""
        try:
            return self._receive.receive_nowait()
        except (trio.WouldBlock, trio.EndOfChannel):
            return None

    def _offer(self, event: Event) -> None:
        if not self._names or event.name in self._names:
            self._send.send_nowait(event)

    def _end(self) -> None:
        self._send.close()


class _Pending:
    """A command that waits for its reply; no reply at all means that the connection was lost."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.reply: Mapping[str, Any] | None = None


class Client:
    """A negotiated connection; made by :func:`connect`."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self._stream = stream
        self._framer = Framer()
        self._sending = trio.Lock()
        self._pending: dict[int, _Pending] = {}
        self._subscriptions: list[Events] = []
        self._greeted = trio.Event()
        self._last_id = 0
        self._lost: str | None = None
        self.greeting: Mapping[str, Any] = {}

    # -- for everyone ----------------------------------------------------------------------------------------------

    async def execute(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run a command and return its result.

        Raises CommandError with the daemon's own text, or ConnectionLostError. Cancelling the wait does not cancel the
        command.
        """
        self._last_id += 1
        number = self._last_id
        command: dict[str, Any] = {"execute": name, "id": number}
        if arguments:
            command["arguments"] = dict(arguments)
        waiting = self._pending[number] = _Pending()
        try:
            await self._transmit(dumps(command) + b"\r\n")
            await waiting.done.wait()
        finally:
            del self._pending[number]
        if waiting.reply is None:
            raise ConnectionLostError(self._lost or "the daemon closed the connection")
        if (error := waiting.reply.get("error")) is not None:
            raise CommandError(error["class"], error["desc"])
        return waiting.reply["return"]

    async def subscribe(self, *, progress: bool = False, since: int | None = None) -> Mapping[str, Any] | None:
        """Ask for numbered events, those after ``since`` first, and for the progress of jobs.

        What the daemon says about its log; None if it has no such thing, as other daemons than qmpd.
        """
        arguments = {"progress": progress} | ({} if since is None else {"since": since})
        try:
            log: Mapping[str, Any] = await self.execute("x-qmpd-subscribe", arguments)
        except CommandError as error:
            if error.error_class != "CommandNotFound":
                raise
            return None
        return log

    @contextmanager
    def events(self, *names: str) -> Iterator[Events]:
        """Subscribe to the events with these names, or to all; counts from the moment of the call."""
        subscription = Events(frozenset(names))
        self._subscriptions.append(subscription)
        if self._lost is not None:
            subscription._end()
        try:
            yield subscription
        finally:
            self._subscriptions.remove(subscription)

    # -- the connection ----------------------------------------------------------------------------------------------

    async def _transmit(self, data: bytes) -> None:
        if self._lost is not None:
            raise ConnectionLostError(self._lost)
        async with self._sending:
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                raise ConnectionLostError(self._lost or "the daemon closed the connection") from None

    async def _read(self) -> None:
        """The background task. Ends quietly; what it met is told to those who wait."""
        reason = "the daemon closed the connection"
        try:
            while data := await self._stream.receive_some(_CHUNK):
                for message in self._framer.feed(bytes(data)):
                    self._dispatch(message)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except _NotQmpError as error:
            reason = str(error)
        finally:
            self._hang_up(reason)

    def _dispatch(self, message: Any) -> None:
        if isinstance(message, DialectError) or not isinstance(message, dict):
            raise _NotQmpError("what answers on the socket does not speak QMP")
        if "event" in message:
            event = Event.of(message)
            for subscription in self._subscriptions:
                subscription._offer(event)
        elif "QMP" in message:
            self.greeting = message["QMP"]
            self._greeted.set()
        elif (waiting := self._pending.get(message.get("id", 0))) is not None:
            waiting.reply = message
            waiting.done.set()

    def _hang_up(self, reason: str) -> None:
        self._lost = reason
        self._greeted.set()
        for waiting in self._pending.values():
            waiting.done.set()
        for subscription in self._subscriptions:
            subscription._end()

    async def _negotiate(self) -> None:
        with trio.move_on_after(PATIENCE) as patience:
            await self._greeted.wait()
            if not self.greeting:
                raise ConnectError(self._lost or "the daemon closed the connection")
            try:
                await self.execute("qmp_capabilities")
            except ClientError as error:
                raise ConnectError(f"the negotiation failed: {error}") from error
        if patience.cancelled_caught:
            raise ConnectError("no greeting: the daemon hangs, or it serves one client at a time and has one already")


class _NotQmpError(Exception):
    """Bytes that no QMP server sends."""


@asynccontextmanager
async def connect(path: str) -> AsyncIterator[Client]:
    """Connect to the UNIX socket at ``path`` and negotiate.

    Raises ConnectError. An exception of the block comes out as it is, not wrapped in a group.
    """
    try:
        stream = await trio.open_unix_socket(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConnectError(f"cannot connect to {path}: {reason}") from None
    client = Client(stream)
    async with stream:
        with _ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client._read)
                await client._negotiate()
                yield client
                nursery.cancel_scope.cancel()


@contextmanager
def _ungrouped() -> Iterator[None]:
    """Undo the wrapping of a lone exception by the nursery, which is a detail of this module."""
    try:
        yield
    except BaseExceptionGroup as group:
        lone: BaseException = group
        while isinstance(lone, BaseExceptionGroup) and len(lone.exceptions) == 1:
            lone = lone.exceptions[0]
        raise lone from lone.__cause__
