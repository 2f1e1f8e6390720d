"""Numbers of the NBD protocol (its protocol document; spec/nbd-export.md sections 6-10)."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

from qmpd.units import MIB

GREETING: Final = b"NBDMAGICIHAVEOPT\x00\x03"
"""Fixed newstyle, and no zeroes behind the answer to EXPORT_NAME."""

OPTION_MAGIC: Final = int.from_bytes(b"IHAVEOPT", "big")
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

MAX_STRING: Final = 4096
"""Longest export name, description or query (bytes)."""

MAX_PAYLOAD: Final = 32 * MIB
"""Longest option, and longest READ, WRITE and CACHE (bytes)."""


class ClientFlag(IntFlag):
    """What a client answers to the greeting."""

    FIXED = 1
    NO_ZEROES = 2


class Option(IntEnum):
    """What a client asks for before it enters an export."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(IntEnum):
    """Types of answers to options."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
    ERR_TOO_BIG = 1 << 31 | 9
    ERR_EXT_HEADER_REQD = 1 << 31 | 10


class Info(IntEnum):
    """What INFO and GO tell."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class ExportFlag(IntFlag):
    """Transmission flags."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    FLUSH = 1 << 2
    FUA = 1 << 3
    TRIM = 1 << 5
    WRITE_ZEROES = 1 << 6
    DF = 1 << 7
    MULTI_CONN = 1 << 8
    CACHE = 1 << 10
    FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command(IntEnum):
    """Types of requests."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """Flags of requests."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class Chunk(IntEnum):
    """Types of structured replies."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 1 << 15 | 1


CHUNK_DONE: Final = 1
"""The only flag of a chunk: no further one follows."""

BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
"""In front of a bitmap's name."""
