"""The bytes of NBD, as a client without manners needs them. Shares nothing with the program under test."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
CLIENT_FLAGS = struct.pack(">I", 3)  # fixed newstyle, no zeroes

EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = 1, 2, 3, 5, 6, 7, 8, 9, 10, 11
ACK, ERR_INVALID = 1, 0x80000003
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZERO, STATUS = range(8)

REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
EXTENDED_MAGIC = 0x21E41C71
SIMPLE_MAGIC, CHUNK_MAGIC, EXTENDED_REPLY_MAGIC = 0x67446698, 0x668E33EF, 0x6E8A278C
CHUNK_ERROR = 0x8001


def option(number: int, data: bytes = b"") -> bytes:
    """An option as a client sends it."""
    return struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data


def go(name: str, *infos: int) -> bytes:
    """Enter an export."""
    return option(GO, _string(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos))


def contexts(number: int, name: str, *queries: str, behind: bytes = b"") -> bytes:
    """LIST_META or SET_META, with bytes too many behind the queries if wanted."""
    listed = b"".join(_string(query) for query in queries)
    return option(number, _string(name) + struct.pack(">I", len(queries)) + listed + behind)


def request(command: int, offset: int, length: int, *, cookie: int = 1, flags: int = 0, payload: bytes = b"") -> bytes:
    """A request with a compact header."""
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length) + payload


def _string(text: str) -> bytes:
    return struct.pack(">I", len(text.encode())) + text.encode()


@dataclass
class Answer:
    """What the server says to one request: the errno of the protocol, and the bytes of a read."""

    cookie: int
    error: int
    data: bytes = b""


class Connection:
    """A socket to a server, past the greeting."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.structured = False
        assert self.exactly(len(GREETING)) == GREETING
        sock.sendall(CLIENT_FLAGS)

    def exactly(self, count: int) -> bytes:
        """So many bytes. Raises EOFError if the server has closed."""
        data = bytearray()
        while len(data) < count:
            try:
                piece = self.sock.recv(count - len(data))
            except ConnectionResetError:
                piece = b""
            if not piece:
                raise EOFError("the server closed the connection")
            data += piece
        return bytes(data)

    def ask(self, data: bytes) -> list[tuple[int, bytes]]:
        """Send an option; the types and texts of the replies, the last of which is ACK or an error."""
        self.sock.sendall(data)
        replies: list[tuple[int, bytes]] = []
        while not replies or (replies[-1][0] != ACK and replies[-1][0] < 1 << 31):
            magic, _, kind, length = struct.unpack(">QIII", self.exactly(20))
            assert magic == 0x0003E889045565A9
            replies.append((kind, self.exactly(length)))
        return replies

    def enter(self, name: str, *, structured: bool = False) -> None:
        """Be connected to an export."""
        if structured:
            assert self.ask(option(STRUCTURED))[-1][0] == ACK
            self.structured = True
        assert self.ask(go(name))[-1][0] == ACK

    def call(self, data: bytes, reads: int = 0) -> Answer:
        """Send a request and return its answer; a simple one to a read has so many bytes."""
        self.sock.sendall(data)
        return self.answer(reads)

    def answer(self, reads: int = 0) -> Answer:
        """The next answer, of one request in flight."""
        return self.answers(1, reads)[0]

    def answers(self, count: int, reads: int = 0) -> list[Answer]:
        """So many answers, in the order in which they end; a simple one to a read has ``reads`` bytes."""
        ended: list[Answer] = []
        parts: dict[int, tuple[int, bytearray]] = {}
        while len(ended) < count:
            (magic,) = struct.unpack(">I", self.exactly(4))
            if magic == SIMPLE_MAGIC:
                error, cookie = struct.unpack(">IQ", self.exactly(12))
                ended.append(Answer(cookie, error, self.exactly(0 if error else reads)))
                continue
            assert magic == CHUNK_MAGIC, hex(magic)
            flags, kind, cookie, length = struct.unpack(">HHQI", self.exactly(16))
            payload = self.exactly(length)
            if kind & 0x8000:
                ended.append(Answer(cookie, struct.unpack_from(">I", payload)[0]))
                continue
            if kind in (1, 2):
                (offset,) = struct.unpack_from(">Q", payload)
                start, data = parts.setdefault(cookie, (offset, bytearray(reads)))
                if kind == 1:
                    data[offset - start : offset - start + length - 8] = payload[8:]
            if flags & 1:
                ended.append(Answer(cookie, 0, bytes(parts.pop(cookie, (0, bytearray(reads)))[1])))
        return ended

    def closed(self) -> bool:
        """Read until the server closes, and say so. Raises TimeoutError if it does not."""
        with contextlib.suppress(ConnectionResetError):
            while self.sock.recv(1 << 20):
                pass
        return True


@contextlib.contextmanager
def connection(sock: socket.socket) -> Iterator[Connection]:
    """A connection over a fresh socket, closed on leaving."""
    with sock:
        yield Connection(sock)
