"""The transmission phase of one client, on one worker thread.

Requests are taken off the socket as many as one read brought, carried out in order inside the gate, and answered
together. Reading and sending happen outside of the gate: a client that does not take its replies holds nobody else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Protocol

from qmpd.export.commands import Commands, Pieces, Target
from qmpd.export.gate import Gate
from qmpd.nbd.constants import MAX_PAYLOAD, Command, CommandFlag
from qmpd.nbd.transmission import Buffer, Request, Wire, wire_errno
from qmpd.units import KIB, MIB

_log = logging.getLogger(__name__)

_BUFFER: Final = 1 * MIB
_WINDOW: Final = 16
"""Requests that are carried out before their replies are sent."""

_REPLY_BYTES: Final = 1 * MIB
"""Nor are more bytes of replies collected, as far as one request does not bring them by itself."""

_EINVAL: Final = 22
_DROP: Final = 256 * KIB


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
        """Have ``count`` unread bytes at least."""
        if self._end - self._start < count and self._start:
            rest = bytes(self._buffer[self._start : self._end])
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        while self._end - self._start < count:
            got = self._transport.recv_into(self._buffer[self._end :])
            if not got:
                raise _EndError("unexpected end of file") if self._end > self._start else _EndError()
            self._end += got

    def _take(self, count: int) -> memoryview:
        taken = self._buffer[self._start : self._start + count]
        self._start += count
        if self._start == self._end:
            self._start = self._end = 0
        return taken

    def _payload(self, count: int) -> Buffer:
        """The next ``count`` bytes, in place if they are all here already."""
        if self._end - self._start >= count:
            return self._take(count)
        data = memoryview(bytearray(count))
        filled = self._end - self._start
        data[:filled] = self._take(filled)
        while filled < count:
            got = self._transport.recv_into(data[filled:])
            if not got:
                raise _EndError("unexpected end of file in the payload")
            filled += got
        return data

    def _throw_away(self, count: int) -> None:
        while count:
            if self._start == self._end:
                self._wait_for(1)
            count -= len(self._take(min(count, self._end - self._start)))

    # -- serving -------------------------------------------------------------------------------------------------------

    def _serve_batch(self) -> None:
        """Take what is there, up to the window, and answer it all at once."""
        batch: list[tuple[Request, Buffer]] = []
        last: Pieces = []
        cost = 0
        try:
            while len(batch) < _WINDOW and cost < _REPLY_BYTES:
                request = self._wire.unpack(self._buffer, self._start)
                payload_length = self._payload_length(request)
                here = self._end - self._start - self._wire.request.size
                if batch and here < payload_length:
                    break  # answer the others before waiting for the rest of this one
                self._start += self._wire.request.size
                last = self._fatal(request)
                if last:
                    raise _EndError
                batch.append((request, self._read_payload(request, payload_length)))
                cost += request.length if request.command == Command.READ else 0
                if self._end - self._start < self._wire.request.size or self._start == 0:
                    break
        finally:
            self._answer(batch, last)

    def _fatal(self, request: Request) -> Pieces:
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

    def _read_payload(self, request: Request, length: int) -> Buffer:
        if not length:
            if self._start == self._end:
                self._start = self._end = 0
            return b""
        kept = request.command == Command.WRITE or length <= _DROP
        if kept:
            return self._payload(length)
        self._throw_away(length)
        return b""

    def _answer(self, batch: list[tuple[Request, Buffer]], last: Pieces) -> None:
        pieces: Pieces = []
        if batch:
            with self._gate:
                target = self._target()
                for request, payload in batch:
                    pieces += self._commands.run(target, request, payload)
        pieces += last
        if pieces:
            self._transport.sendall(b"".join(pieces) if len(pieces) > 1 else pieces[0])
