"""The daemon as a process: pid file and daemonizing. Source: spec/qmp-protocol.md section 15."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from collections.abc import Callable
from typing import Final

from qmpd.errors import Kind, QmpdError, strerror

#: struct flock: type, whence, start, length, pid.
_FLOCK: Final = struct.Struct("hhqqi4x")


class PidFile:
    """A file with our pid, locked as long as we live; mode 0600."""

    def __init__(self, path: str) -> None:
        """Take ``path`` over. Raises QmpdError if it cannot be written or another process holds it."""
        self._path = os.path.abspath(path)
        while True:
            self._fd = _open(path)
            _lock(self._fd)
            if self._is_ours():
                break
            os.close(self._fd)  # its owner removed it between our two calls
        os.ftruncate(self._fd, 0)
        os.write(self._fd, b"%d\n" % os.getpid())

    def remove(self) -> None:
        """Remove the file and let go of the lock."""
        if self._is_ours():
            os.unlink(self._path)
        os.close(self._fd)

    def _is_ours(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self._path))
        except OSError:
            return False


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _failure(f"Could not create '{path}': {strerror(error.errno or 0)}", error) from None


def _lock(fd: int) -> None:
    """Lock the whole file, as the peer does, so that the two programs keep each other out. Closes ``fd`` on failure."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        os.close(fd)
        raise _failure(f"Cannot lock pid file: {strerror(error.errno or 0)}", error) from None


def _failure(reason: str, error: OSError) -> QmpdError:
    return QmpdError(f"cannot create PID file: {reason}", Kind.IO, errno=error.errno)


def daemonize() -> Callable[[], None]:
    """Go on in a child process of its own session; returns there, with what must be called when start-up is complete.

    The parent waits for that call and exits with status 0. If the child ends without it, the parent exits with 1: the
    child has said why on the standard error they share.
    """
    ready, report = os.pipe()
    child = os.fork()
    if child:
        os.close(report)
        _wait_for(ready, child)
    os.close(ready)
    os.setsid()
    os.umask(0o027)

    def complete() -> None:
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        if null > 2:
            os.close(null)
        os.write(report, b"\0")
        os.close(report)

    return complete


def _wait_for(ready: int, child: int) -> None:
    """In the parent: never returns."""
    succeeded = os.read(ready, 1) == b"\0"
    if not succeeded:
        os.waitpid(child, 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if succeeded else 1)
