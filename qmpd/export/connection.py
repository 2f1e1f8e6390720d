"""The transmission phase of one client, on one worker thread.

Requests are taken off the socket as many as one read brought, carried out together inside the gate, and answered
together. Reading and sending happen outside of the gate: a client that does not take its replies holds nobody else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Protocol

from qmpd.export.commands import Commands, Target
from qmpd.export.gate import Gate
from qmpd.export.replies import MOST, Replies
from qmpd.nbd.constants import MAX_PAYLOAD, Command, CommandFlag
from qmpd.nbd.transmission import Buffer, Request, Wire, wire_errno
from qmpd.units import KIB, MIB

_log = logging.getLogger(__name__)

_BUFFER: Final = 1 * MIB
_WINDOW: Final = 16
"""Requests that are carried out before their replies are sent."""

_EINVAL: Final = 22
_DROP: Final = 256 * KIB
_NOTHING: Final = memoryview(b"")


class Transport(Protocol):
    """What the loop needs of a blocking socket, with or without TLS."""

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int: ...

    def sendall(self, data: Buffer, flags: int = 0, /) -> None: ...

    def shutdown(self, how: int, /) -> None: ...

    def close(self) -> None: ...


class _EndError(Exception):
    """The client is gone, or nothing it says can be understood any more."""


class Connection:
    """One client. :meth:`run` returns when it has left or was cut off."""

    def __init__(
        self, transport: Transport, wire: Wire, commands: Commands, gate: Gate, target: Callable[[], Target]
    ) -> None:
        self._transport = transport
        self._wire = wire
        self._commands = commands
        self._gate = gate
        self._target = target
        self._replies = Replies(wire)
        self._buffer = memoryview(bytearray(_BUFFER))
        #: Received and not yet understood: ``_buffer[_start:_end]``.
        self._start = 0
        self._end = 0

    def run(self, leftover: bytes) -> None:
        """Serve until the client leaves. Raises OSError if the connection breaks."""
        if len(leftover) > _BUFFER:
            self._buffer = memoryview(bytearray(2 * len(leftover)))
        self._buffer[: len(leftover)] = leftover
        self._end = len(leftover)
        try:
            while True:
                self._wait_for(self._wire.request.size)
                self._serve_batch()
        except _EndError as end:
            if end.args:
                _log.info("NBD client disconnected: %s", end)

    # -- receiving -----------------------------------------------------------------------------------------------------

    def _wait_for(self, count: int) -> None:
        """Have ``count`` unread bytes at least, which the buffer has room for."""
        unread = self._end - self._start
        if unread < count and self._start:
            self._buffer[:unread] = self._buffer[self._start : self._end]
            self._start, self._end = 0, unread
        while self._end - self._start < count:
            got = self._transport.recv_into(self._buffer[self._end :])
            if not got:
                raise _EndError("unexpected end of file") if self._end > self._start else _EndError()
            self._end += got

    def _payload(self, count: int) -> memoryview:
        """The next ``count`` bytes, in the buffer if they are there already or may come there."""
        if count <= len(self._buffer):
            self._wait_for(count)
            self._start += count
            return self._buffer[self._start - count : self._start]
        data = memoryview(bytearray(count))
        filled = self._end - self._start
        data[:filled] = self._buffer[self._start : self._end]
        self._start = self._end
        while filled < count:
            got = self._transport.recv_into(data[filled:])
            if not got:
                raise _EndError("unexpected end of file in the payload")
            filled += got
        return data

    def _throw_away(self, count: int) -> None:
        while count:
            self._wait_for(1)
            taken = min(count, self._end - self._start)
            self._start += taken
            count -= taken

    # -- serving -------------------------------------------------------------------------------------------------------

    def _serve_batch(self) -> None:
        """Take what is there, up to the window, and answer it all at once."""
        batch: list[tuple[Request, memoryview]] = []
        last: list[Buffer] = []
        size, cost = self._wire.request.size, 0
        try:
            while len(batch) < _WINDOW:
                request = self._wire.unpack(self._buffer, self._start)
                payload = self._payload_length(request)
                cost += request.length if request.command == Command.READ else 0
                if batch and (cost > MOST or self._end - self._start < size + payload):
                    break  # answer the others before this one is read, or waited for
                self._start += size
                last = self._fatal(request)
                if last:
                    raise _EndError
                batch.append((request, self._read_payload(request, payload) if payload else _NOTHING))
                if self._end - self._start < size:
                    break
        finally:
            self._answer(batch, last)

    def _fatal(self, request: Request) -> list[Buffer]:
        """The last words to a client whose next bytes cannot be understood; nothing if they can."""
        magic, _, command, cookie, offset, length = request
        if magic != self._wire.magic:
            text = f"invalid magic (got 0x{magic:x}, expected 0x{self._wire.magic:x})"
            return [self._wire.error(cookie, offset, _EINVAL, text)]
        if command == Command.DISC:
            raise _EndError
        if command == Command.WRITE and length > MAX_PAYLOAD:
            text = f"len ({length}) is larger than max len ({MAX_PAYLOAD})"
            return [self._wire.error(cookie, offset, wire_errno(_EINVAL), text)]
        return []

    def _payload_length(self, request: Request) -> int:
        carries = request.command == Command.WRITE or (
            self._wire.extended and request.flags & CommandFlag.PAYLOAD_LEN and request.command != Command.DISC
        )
        return request.length if carries and request.magic == self._wire.magic else 0

    def _read_payload(self, request: Request, length: int) -> memoryview:
        if request.command == Command.WRITE or length <= _DROP:
            return self._payload(length)
        self._throw_away(length)
        return _NOTHING

    def _answer(self, batch: list[tuple[Request, memoryview]], last: list[Buffer]) -> None:
        if batch:
            with self._gate:
                self._commands.run_all(self._target(), batch, self._replies)
        self._replies.add(last)
        for piece in self._replies.take():
            self._transport.sendall(piece)
