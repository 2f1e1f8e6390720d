"""The directory that holds the state: made if it is not there, and held by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import Final

from qmpd.errors import Kind, QmpdError, from_oserror

LOCK: Final = "lock"
DATABASE: Final = "state.db"
GIVEN_UP: Final = "state.db.given-up"

ROOM: Final = 8 << 20
"""Bytes that must be free when the daemon starts."""


class Directory:
    """An open and locked directory. Methods may be called on any thread."""

    def __init__(self, path: str) -> None:
        """Lock ``path``. Raises QmpdError, which says what to do, if it cannot be used."""
        self.path = os.path.abspath(path)
        try:
            os.makedirs(self.path, 0o700, exist_ok=True)
            self._fd = os.open(os.path.join(self.path, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self.failure(error) from None
        try:
            self._lock()
            self._check_room()
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def database(self) -> str:
        """Path of the database file."""
        return os.path.join(self.path, DATABASE)

    def give_up(self) -> None:
        """Put the database where no start looks for it. Works on a file system that is full."""
        for suffix in ("-wal", ""):  # without its log a database may be older than it looks
            with contextlib.suppress(OSError):
                os.rename(self.database + suffix, os.path.join(self.path, GIVEN_UP + suffix))

    def close(self) -> None:
        """Let others have it."""
        os.close(self._fd)

    def failure(self, error: OSError) -> QmpdError:
        """``error`` with what it was about."""
        hint = {
            errno.EROFS: "it must be writable",
            errno.EACCES: "it must be writable",
            errno.ENOTDIR: "it must be a directory",
            errno.EEXIST: "it must be a directory",
            errno.ENOSPC: "make room, or choose another directory",
        }.get(error.errno or 0)
        text = f"Cannot use state directory '{self.path}': {error.strerror}"
        return from_oserror(error, f"{text}; {hint}" if hint else text, path=self.path)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip()
            who = f"process {holder}" if holder else "another process"
            text = f"State directory '{self.path}' is in use by {who}; a daemon needs one of its own"
            raise QmpdError(text, Kind.LOCKED, path=self.path) from None
        except OSError as error:
            raise self.failure(error) from None
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)
        except OSError as error:
            raise self.failure(error) from None

    def _check_room(self) -> None:
        found = os.fstatvfs(self._fd)
        free = found.f_bavail * found.f_frsize
        if free < ROOM:
            raise self.failure(OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({free} bytes are free)"))
