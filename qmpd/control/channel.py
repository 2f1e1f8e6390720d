"""A client's byte stream and what still waits to be written to it.

Both work on file descriptors rather than on trio's streams: a reply can then be handed to the kernel at once, from
plain code, and a task switch is needed only when the kernel will not take it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable
from typing import Final

import trio

READ_SIZE: Final = 1 << 16
"""Bytes asked of the kernel at once."""

SOFT_LIMIT: Final = 8 << 20
"""Bytes unread by a client above which none of its commands is started."""

HARD_LIMIT: Final = 64 << 20
"""Bytes unread by a client at which the next event costs it the connection."""


class Channel:
    """A duplex byte stream over one or two file descriptors, which are put into non-blocking mode."""

    def __init__(self, reader: int, writer: int, close: Callable[[], None], *, may_wait: bool = True) -> None:
        """Without ``may_wait``, the reader is always ready and refuses to be asked."""
        self._reader = reader
        self._writer = writer
        self._close = close
        for fd in {reader, writer}:
            os.set_blocking(fd, False)
        self._may_wait = may_wait

    @classmethod
    def of_socket(cls, sock: socket.socket) -> Channel:
        """The channel owns ``sock``."""
        return cls(sock.fileno(), sock.fileno(), sock.close)

    @classmethod
    def of_stdio(cls) -> Channel:
        """Standard input and output; closing leaves them open, with blocking mode restored."""

        def restore() -> None:
            for fd in (0, 1):
                with contextlib.suppress(OSError):
                    os.set_blocking(fd, True)

        return cls(0, 1, restore, may_wait=_pollable(0))

    async def receive(self) -> bytes:
        """What has arrived, at least one byte; nothing at the end of the stream, however it ended."""
        while True:
            if self._may_wait:
                await trio.lowlevel.wait_readable(self._reader)
            else:
                await trio.lowlevel.checkpoint()
            try:
                return os.read(self._reader, READ_SIZE)
            except BlockingIOError:
                continue
            except OSError:
                return b""

    def send(self, data: bytearray) -> int:
        """Number of bytes the kernel took, possibly none. Raises OSError if there is no one left to read."""
        try:
            return os.write(self._writer, data)
        except BlockingIOError:
            return 0

    async def wait_writable(self) -> None:
        """Until the kernel has room."""
        await trio.lowlevel.wait_writable(self._writer)

    def close(self) -> None:
        """Hang up. Nobody may be waiting in the other methods."""
        self._close()


def _pollable(fd: int) -> bool:
    """Whether readiness can be asked for; regular files and /dev/null are always ready and refuse to be asked."""
    with select.epoll() as poll:
        try:
            poll.register(fd, select.EPOLLIN)
        except PermissionError:
            return False
    return True


class Outbox:
    """Messages on their way to one client, in order.

    Replies are :meth:`put` and then flushed in one go; the client itself sets the pace (:meth:`wait_for_room`). Events
    are :meth:`publish`-ed and nobody waits, so a client that does not read them is given up at :data:`HARD_LIMIT`.
    """

    def __init__(self, channel: Channel, *, pretty: bool, on_lost: Callable[[str], None]) -> None:
        """``on_lost`` is told, with a reason, when the client can no longer be reached."""
        self.pretty = pretty
        self.lost = False
        self._channel = channel
        self._on_lost = on_lost
        self._pending = bytearray()
        self._wake = trio.Event()
        self._progress = trio.Event()

    def put(self, message: bytes) -> None:
        """Append, to be sent by the next :meth:`flush`."""
        if not self.lost:
            self._pending += message

    def publish(self, message: bytes) -> None:
        """Append and have it sent soon."""
        if len(self._pending) + len(message) > HARD_LIMIT:
            self._lose("it does not read its events")
        self.put(message)
        self._wake.set()

    def flush(self) -> None:
        """Hand to the kernel what it takes; :meth:`pump` sees to the rest."""
        if self._pending:
            self._send()
            if self._pending:
                self._wake.set()

    def wake(self) -> None:
        """Have everything sent when the calling task waits for something next."""
        if self._pending:
            self._wake.set()

    async def pump(self) -> None:
        """Send whatever flush() left over, for ever."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            self._send()
            while self._pending:
                await self._channel.wait_writable()
                self._send()

    async def wait_for_room(self) -> None:
        """Until the client has read enough for another command. Returns at once, without a checkpoint, if it has."""
        while len(self._pending) > SOFT_LIMIT:
            await self._next_progress()

    async def drain(self) -> None:
        """Until everything is with the kernel, or the client is lost; :meth:`pump` does it."""
        while self._pending:
            await self._next_progress()

    async def _next_progress(self) -> None:
        self._wake.set()
        if self._progress.is_set():
            self._progress = trio.Event()
        await self._progress.wait()

    def _send(self) -> None:
        try:
            sent = self._channel.send(self._pending) if self._pending else 0
        except OSError as error:
            self._lose(str(error.strerror))
        else:
            del self._pending[:sent]
        self._progress.set()

    def _lose(self, reason: str) -> None:
        self._pending.clear()
        self._progress.set()
        if not self.lost:
            self.lost = True
            self._on_lost(reason)
