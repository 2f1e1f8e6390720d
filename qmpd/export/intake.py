"""What a client says, taken off its socket and cut into requests (spec/nbd-export.md section 9). One thread.

Outside of the gate: waiting for a client holds nobody else. Offsets and lengths in bytes.
"""

from __future__ import annotations

from typing import Final, Protocol

from qmpd.export.replies import MOST
from qmpd.nbd.constants import MAX_PAYLOAD, Command, CommandFlag
from qmpd.nbd.exportinfo import ExportInfo
from qmpd.nbd.transmission import Buffer, Raw, Request, Wire, wire_errno
from qmpd.units import KIB, MIB

_BUFFER: Final = 1 * MIB
_WINDOW: Final = 16
"""Requests of a round."""

_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_FUA: Final = int(CommandFlag.FUA)
_EINVAL: Final = 22
_DROP: Final = 256 * KIB


class Transport(Protocol):
    """What is needed of a blocking socket, with or without TLS."""

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int: ...

    def sendall(self, data: Buffer, flags: int = 0, /) -> None: ...

    def shutdown(self, how: int, /) -> None: ...

    def close(self) -> None: ...


class EndError(Exception):
    """The client is gone, or nothing it says can be understood any more; ``last_words`` are sent to it."""

    def __init__(self, reason: str = "", last_words: bytes = b"") -> None:
        super().__init__(reason)
        self.last_words = last_words


class Intake:
    """The requests of one client, a round at a time.

    A round is one read's worth of plain requests, which have nothing wrong that can be known beforehand, in ``reads``
    and ``writes`` with their ``payloads``; or one of another kind. Payloads are good until the next round.
    """

    def __init__(self, transport: Transport, wire: Wire, info: ExportInfo, leftover: bytes) -> None:
        """``leftover``: what has been received already."""
        self._transport = transport
        self._wire = wire
        self._size = info.size
        self._writable = info.writable
        self._buffer = memoryview(bytearray(max(_BUFFER, 2 * len(leftover))))
        self._buffer[: len(leftover)] = leftover
        #: Received and not yet understood: ``_buffer[_start:_end]``.
        self._start = 0
        self._end = len(leftover)
        self.reads: list[Raw] = []
        self.writes: list[Raw] = []
        self.payloads: list[memoryview] = []
        self.other: tuple[Request, memoryview] | None = None

    def next(self) -> None:
        """Wait for the next round. Raises EndError, OSError if the connection breaks."""
        self.reads, self.writes, self.payloads, self.other = [], [], [], None
        self._wait_for(self._wire.request.size)
        if self._take_plain():
            return
        request = self._wire.unpack(self._buffer, self._start)
        self._check(request)
        length = self._payload_length(request)
        if request.command == _WRITE and self._wire.request.size + length <= len(self._buffer):
            self._wait_for(self._wire.request.size + length)
            if self._take_plain():
                return
        self._start += self._wire.request.size
        self.other = request, self._payload(request, length)

    def _take_plain(self) -> bool:
        """As many plain requests as are here whole and get answers that find room; are there any?"""
        buffer, start, end = self._buffer, self._start, self._end
        unpack, head, magic = self._wire.request.unpack_from, self._wire.request.size, self._wire.magic
        size, room, most = self._size, MOST, _WINDOW
        while end - start >= head and most:
            raw: Raw = unpack(buffer, start)
            mark, flags, command, _, offset, length = raw
            if mark != magic or not length or offset + length > size:
                break
            if command == _READ and not flags and length <= room:
                room -= length
                self.reads.append(raw)
                start += head
            elif command == _WRITE and flags <= _FUA and self._writable and head + length <= end - start:
                self.writes.append(raw)
                self.payloads.append(buffer[start + head : start + head + length])
                start += head + length
            else:
                break
            most -= 1
        self._start = start
        return most < _WINDOW

    def _check(self, request: Request) -> None:
        """Can what follows the request be understood? Raises EndError."""
        magic, _, command, cookie, offset, length = request
        if magic != self._wire.magic:
            text = f"invalid magic (got 0x{magic:x}, expected 0x{self._wire.magic:x})"
            raise EndError(last_words=self._wire.error(cookie, offset, _EINVAL, text))
        if command == Command.DISC:
            raise EndError
        if command == _WRITE and length > MAX_PAYLOAD:
            text = f"len ({length}) is larger than max len ({MAX_PAYLOAD})"
            raise EndError(last_words=self._wire.error(cookie, offset, wire_errno(_EINVAL), text))

    def _payload_length(self, request: Request) -> int:
        carries = request.command == _WRITE or (self._wire.extended and request.flags & CommandFlag.PAYLOAD_LEN)
        return request.length if carries else 0

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
                raise EndError("unexpected end of file" if self._end > self._start else "")
            self._end += got

    def _payload(self, request: Request, length: int) -> memoryview:
        """What follows the request. Nobody needs more of what only a write may have."""
        if length > _DROP and request.command != _WRITE:
            self._throw_away(length)
            length = 0
        if length <= len(self._buffer):
            self._wait_for(length)
            self._start += length
            return self._buffer[self._start - length : self._start]
        data = memoryview(bytearray(length))
        filled = self._end - self._start
        data[:filled] = self._buffer[self._start : self._end]
        self._start = self._end
        while filled < length:
            got = self._transport.recv_into(data[filled:])
            if not got:
                raise EndError("unexpected end of file in the payload")
            filled += got
        return data

    def _throw_away(self, count: int) -> None:
        while count:
            self._wait_for(1)
            taken = min(count, self._end - self._start)
            self._start += taken
            count -= taken
