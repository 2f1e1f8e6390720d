"""QEMU's byte-range locks on image files: how programs keep out of each other's disks.

Four permissions, two bytes of the image file each: one says "I hold it" (100 + bit), the other "I do not share it"
(200 + bit). All locks taken are shared ones, so taking them never waits; a conflict is found by asking whether anybody
else holds the opposite byte. The caller locks first and tests then, so of two racing openers both may lose but never
both win. Source: spec/image-locking.md.

Functions over a descriptor (read-only is enough). A set of locks is a mask of eight bits: the low four are
permissions held, the high four permissions not shared. All raise QmpdError. Any thread, though two threads must not
change one descriptor's locks at a time.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import struct
from typing import Final

from qmpd.block.api import Perm
from qmpd.block.lockholders import find_holders
from qmpd.errors import Kind, QmpdError, from_oserror

_log = logging.getLogger(__name__)

#: Lock commands of open file descriptions, which belong to the open file and not to the process.
_OFD_GETLK: Final = 36
_OFD_SETLK: Final = 37

_HELD_BYTE: Final = 100
_UNSHARED_BYTE: Final = 200
_NAMES: Final = ("consistent read", "write", "write unchanged", "resize")

_FLOCK: Final = struct.Struct("=hhxxxxqqi4x")


def mask(perm: Perm, shared: Perm) -> int:
    """The locks that say: ``perm`` is held, all but ``shared`` is refused to others."""
    return int(perm) | int(~shared & Perm.ALL) << 4


@functools.cache
def has_ofd_locks() -> bool:
    """Does this kernel know locks of open file descriptions (Linux 3.15)?"""
    try:
        fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:  # no descriptor left
        raise from_oserror(error, f"Could not open '{os.devnull}': {error.strerror}", path=os.devnull) from error
    try:
        fcntl.fcntl(fd, _OFD_GETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 1, 0))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def lock(fd: int, locks: int) -> None:
    """Take the locks in the mask. On failure (a foreign program locks exclusively) none of them is kept."""
    taken = 0
    for bit, byte in _bytes_of(locks):
        try:
            _apply(fd, fcntl.F_RDLCK, byte)
        except OSError as error:
            unlock(fd, taken)
            raise _named(_cannot_lock(byte, error), fd, byte) from error
        taken |= bit


def unlock(fd: int, locks: int) -> None:
    """Give up the locks in the mask. Cannot fail in a way that matters: closing the file drops them too."""
    for _, byte in _bytes_of(locks):
        try:
            _apply(fd, fcntl.F_UNLCK, byte)
        except OSError:
            continue


def test(fd: int, locks: int) -> None:
    """Raise if another open file holds a lock that contradicts ``locks`` (kind LOCKED, QEMU's text).

    Who that is goes to the log and into the error's details, where the kernel tells.
    """
    for index, name in enumerate(_NAMES):
        byte = _UNSHARED_BYTE + index
        if locks >> index & 1 and _held_elsewhere(fd, byte):
            error = QmpdError(f'Failed to get "{name}" lock', Kind.LOCKED, errno=errno.EAGAIN)
            raise _named(error, fd, byte)
    for index, name in enumerate(_NAMES):
        byte = _HELD_BYTE + index
        if locks >> (index + 4) & 1 and _held_elsewhere(fd, byte):
            error = QmpdError(f'Failed to get shared "{name}" lock', Kind.LOCKED, errno=errno.EAGAIN)
            raise _named(error, fd, byte)


def acquire(fd: int, locks: int, *, kept: int = 0) -> None:
    """Go from the locks ``kept`` to ``kept | locks``: lock what is new, test, and on failure go back.

    Asking for nothing new cannot fail.
    """
    new = locks & ~kept
    if not new:
        return
    lock(fd, new)
    try:
        test(fd, locks)
    except QmpdError:
        unlock(fd, new)
        raise


def _bytes_of(locks: int) -> list[tuple[int, int]]:
    """(bit of the mask, byte of the file), in the order QEMU takes them."""
    return [(1 << bit, (_HELD_BYTE if bit < 4 else _UNSHARED_BYTE) + bit % 4) for bit in range(8) if locks >> bit & 1]


def _apply(fd: int, kind: int, byte: int) -> None:
    command = _OFD_SETLK if has_ofd_locks() else fcntl.F_SETLK
    fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _held_elsewhere(fd: int, byte: int) -> bool:
    """Would an exclusive lock be refused? Reading the answer takes no lock."""
    command = _OFD_GETLK if has_ofd_locks() else fcntl.F_GETLK
    try:
        answer = fcntl.fcntl(fd, command, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        raise _cannot_lock(byte, error) from error
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _named(error: QmpdError, fd: int, byte: int) -> QmpdError:
    """The error with the names of those who hold the byte."""
    holders = find_holders(fd, byte)
    if holders:
        error.details = {"held-by": [{"pid": holder.pid, "command": holder.command} for holder in holders]}
        _log.warning("%s: %s; held by %s", _path(fd), error.desc, ", ".join(map(str, holders)))
    return error


def _path(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return "?"


def _cannot_lock(byte: int, error: OSError) -> QmpdError:
    """Somebody's exclusive lock needs no explanation; a file system without locks does."""
    busy = error.errno in (errno.EAGAIN, errno.EACCES)
    text = f"Failed to lock byte {byte}" + ("" if busy else f": {error.strerror}")
    return QmpdError(text, Kind.LOCKED, errno=error.errno)
