"""Requests and replies as bytes (spec/nbd-export.md sections 9 and 10). Offsets and lengths are in bytes."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from qmpd.nbd.constants import (
    CHUNK_DONE,
    CHUNK_MAGIC,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    Chunk,
    Command,
)

Buffer = bytes | bytearray | memoryview

#: errno of this machine -> number on the wire; all others are EINVAL's.
_WIRE_ERRNO: Final = {
    errno.EPERM: 1,
    errno.EROFS: 1,
    errno.EACCES: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.ENOSPC: 28,
    errno.EFBIG: 28,
    errno.EDQUOT: 28,
    errno.EOVERFLOW: 75,
    errno.ENOTSUP: 95,
    errno.ESHUTDOWN: 108,
}
_EINVAL: Final = 22

COMMAND_NAMES: Final = {
    Command.READ: "read",
    Command.WRITE: "write",
    Command.FLUSH: "flush",
    Command.TRIM: "trim",
    Command.CACHE: "cache",
    Command.WRITE_ZEROES: "write zeroes",
    Command.BLOCK_STATUS: "block status",
}
"""How error texts call them."""


def wire_errno(number: int) -> int:
    """The number that stands for an errno in replies."""
    return _WIRE_ERRNO.get(number, _EINVAL)


#: A :class:`Request` where there is no time for names.
Raw = tuple[int, int, int, int, int, int]


class Request(NamedTuple):
    """A request without its payload."""

    magic: int
    flags: int
    command: int
    cookie: int
    offset: int
    length: int


class Wire:
    """How requests and replies look on one connection."""

    def __init__(self, *, structured: bool, extended: bool) -> None:
        self.structured = structured or extended
        self.extended = extended
        self.magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
        self.request = struct.Struct(">IHHQQQ" if extended else ">IHHQQI")
        self._simple = struct.Struct(">IIQ")
        self._chunk = struct.Struct(">IHHQQQ" if extended else ">IHHQI")
        self._offset_data = struct.Struct(">IHHQQQQ" if extended else ">IHHQIQ")
        #: Bytes in front of the data of a read that is answered in one piece, and of the answer to a request without.
        self.data_head = self._offset_data.size if self.structured else self._simple.size
        self.done_size = self._chunk.size if extended else self._simple.size

    def unpack(self, buffer: Buffer, position: int) -> Request:
        """The request that begins there; it must be there whole."""
        return Request._make(self.request.unpack_from(buffer, position))

    def done(self, cookie: int, offset: int) -> bytes:
        """Success, no data."""
        if self.extended:
            return self.chunk(Chunk.NONE, cookie, offset, 0)
        return self._simple.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, offset: int, number: int, text: str) -> bytes:
        """Failure with a number as on the wire."""
        if not self.structured:
            return self._simple.pack(SIMPLE_REPLY_MAGIC, number, cookie)
        data = text.encode()
        head = self.chunk(Chunk.ERROR, cookie, offset, 6 + len(data))
        return head + struct.pack(">IH", number, len(data)) + data

    def data(self, cookie: int, offset: int, at: int, length: int, *, last: bool = True) -> bytes:
        """What comes before the ``length`` bytes read at ``at`` by the request of that ``offset``."""
        if not self.structured:
            return self._simple.pack(SIMPLE_REPLY_MAGIC, 0, cookie)
        if not length:
            return self.chunk(Chunk.NONE, cookie, offset, 0)
        return self.chunk(Chunk.OFFSET_DATA, cookie, offset, 8 + length, last=last) + at.to_bytes(8, "big")

    def put_data(self, buffer: bytearray, position: int, cookie: int, offset: int, length: int) -> None:
        """:meth:`data` for all of a read, ``length`` not 0, into a buffer."""
        if self.extended:
            head = (EXTENDED_REPLY_MAGIC, CHUNK_DONE, Chunk.OFFSET_DATA, cookie, offset)
            self._offset_data.pack_into(buffer, position, *head, 8 + length, offset)
        elif self.structured:
            kind = Chunk.OFFSET_DATA
            self._offset_data.pack_into(buffer, position, CHUNK_MAGIC, CHUNK_DONE, kind, cookie, 8 + length, offset)
        else:
            self._simple.pack_into(buffer, position, SIMPLE_REPLY_MAGIC, 0, cookie)

    def put_done(self, buffer: bytearray, position: int, cookie: int, offset: int) -> None:
        """:meth:`done` into a buffer."""
        if self.extended:
            self._chunk.pack_into(buffer, position, EXTENDED_REPLY_MAGIC, CHUNK_DONE, Chunk.NONE, cookie, offset, 0)
        else:
            self._simple.pack_into(buffer, position, SIMPLE_REPLY_MAGIC, 0, cookie)

    def hole(self, cookie: int, offset: int, at: int, length: int, *, last: bool = True) -> bytes:
        """``length`` zero bytes at ``at``; not in simple replies."""
        return self.chunk(Chunk.OFFSET_HOLE, cookie, offset, 12, last=last) + struct.pack(">QI", at, length)

    def status(
        self, cookie: int, offset: int, context: int, extents: Sequence[tuple[int, int]], *, last: bool
    ) -> bytes:
        """(length, flags) of the extents from the request's start."""
        flat = [number for extent in extents for number in extent]
        if self.extended:
            data = struct.pack(f">II{len(flat)}Q", context, len(extents), *flat)
            return self.chunk(Chunk.BLOCK_STATUS_EXT, cookie, offset, len(data), last=last) + data
        data = struct.pack(f">I{len(flat)}I", context, *flat)
        return self.chunk(Chunk.BLOCK_STATUS, cookie, offset, len(data), last=last) + data

    def chunk(self, kind: int, cookie: int, offset: int, length: int, *, last: bool = True) -> bytes:
        """The head of a chunk with ``length`` bytes behind it."""
        flags = CHUNK_DONE if last else 0
        if self.extended:
            return self._chunk.pack(EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, length)
        return self._chunk.pack(CHUNK_MAGIC, flags, kind, cookie, length)
