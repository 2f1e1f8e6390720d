"""The system calls behind image files: complete transfers, and the Linux calls that Python has no name for.

Every function takes a descriptor and byte units, raises OSError, may be called from any worker thread, and holds no
state. The interpreter lock is released inside each call.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from qmpd.block.api import Buffer
from qmpd.units import MIB

if TYPE_CHECKING:
    from qmpd.block.batch import Batch

KEEP_SIZE: Final = 1
PUNCH_HOLE: Final = 2
ZERO_RANGE: Final = 16

_WRITEBACK_START: Final = 2
_FICLONERANGE: Final = 0x4020940D
_AT_EMPTY_PATH: Final = 0x1000
_STATX_DIOALIGN: Final = 0x2000
_STX_DIO_OFFSET_ALIGN: Final = 156

#: A transfer larger than this is cut by the kernel (MAX_RW_COUNT, rounded down to a friendlier number).
MAX_TRANSFER: Final = 1 << 30

#: Buffers of one transfer (UIO_MAXIOV).
MAX_PIECES: Final = 1024

#: The file system or device cannot do this at all, as opposed to "not now".
UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.ENODEV})

_ZEROES: Final = bytes(MIB)

_libc = ctypes.CDLL(None, use_errno=True)
_off = ctypes.c_int64
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, _off, _off)
_statx = _libc.statx
_statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
_sync_file_range = _libc.sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, _off, _off, ctypes.c_uint)


def read_at(fd: int, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer`` (bytes) from ``offset``; what lies past the end of the file is zeros."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done : done + MAX_TRANSFER]], offset + done)
        if count == 0:
            zero_fill(buffer[done:])
            return
        done += count


def write_at(fd: int, offset: int, data: Buffer) -> None:
    """Write all of ``data``."""
    count = os.pwrite(fd, data, offset)
    if count == len(data):
        return
    rest = memoryview(data)
    while True:
        if count == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rest, offset = rest[count:], offset + count
        if not rest:
            return
        count = os.pwrite(fd, rest, offset)


def transfer_many(call: Callable[[int, list[memoryview], int], int], fd: int, batch: Batch) -> list[int]:
    """preadv(2) or pwritev(2) for all requests, neighbours in one call; those that failed or came out short.

    Raises nothing.
    """
    offsets, buffers = batch.offsets, batch.buffers
    failed: list[int] = []
    count, first = len(offsets), 0
    while first < count:
        start = offsets[first]
        end, after = start + len(buffers[first]), first + 1
        while after < count and offsets[after] == end and after - first < MAX_PIECES:
            end += len(buffers[after])
            after += 1
        try:
            done = call(fd, buffers[first:after], start)
        except OSError:
            done = 0
        if done != end - start:
            failed += range(first, after)
        first = after
    return failed


def zeroes(length: int) -> Iterator[memoryview]:
    """``length`` zero bytes in pieces of a handy size."""
    whole = memoryview(_ZEROES)
    while length > 0:
        piece = whole[:length]
        yield piece
        length -= len(piece)


def zero_fill(buffer: memoryview) -> None:
    """Set a byte buffer to zeros."""
    done = 0
    for piece in zeroes(len(buffer)):
        buffer[done : done + len(piece)] = piece
        done += len(piece)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); ``mode`` is made of KEEP_SIZE, PUNCH_HOLE and ZERO_RANGE."""
    while _fallocate(fd, mode, offset, length) != 0:
        _raise_unless_interrupted()


def direct_alignment(fd: int) -> int:
    """Block size of O_DIRECT requests on this file as statx(2) tells (Linux 6.1), 0 if it does not."""
    answer = ctypes.create_string_buffer(256)
    if _statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) != 0:
        return 0
    (mask,) = struct.unpack_from("=I", answer, 0)
    (unit,) = struct.unpack_from("=I", answer, _STX_DIO_OFFSET_ALIGN)
    return int(unit) if mask & _STATX_DIOALIGN else 0


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Ask the kernel to begin writing dirty pages of the range; makes nothing durable. Failures are of no interest."""
    _sync_file_range(fd, offset, length, _WRITEBACK_START)


def clone_range(source: int, source_offset: int, length: int, target: int, target_offset: int) -> None:
    """Share the blocks of a range (reflink)."""
    fcntl.ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source, source_offset, length, target_offset))


def _raise_unless_interrupted() -> None:
    number = ctypes.get_errno()
    if number != errno.EINTR:
        raise OSError(number, os.strerror(number))
