"""The descriptor of an image file: one stable number, whatever access mode and locks lie behind it.

Workers read and write through ``fd`` at any moment. Switching between read-only and read-write therefore opens a second
description of the same file, gives it the locks, and puts it under the old number with dup2(2): a request in flight
ends on the old description, the next one starts on the new, and the image is never without its locks.

Changes come in two steps, prepare and then commit or abort, and may be about flags (reopen), permissions, or both in
one transaction. Control thread only.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass

from qmpd.block import locking
from qmpd.block.api import Perm
from qmpd.block.trust import OpenFile
from qmpd.errors import QmpdError, from_oserror

_WRITING = Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE


@dataclass(frozen=True, slots=True)
class Flags:
    """How the file is to be opened; QMP names with underscores."""

    read_only: bool = False
    auto_read_only: bool = False
    direct: bool = False

    def writable(self, perm: Perm) -> bool:
        """Must the descriptor allow writing while the node's users hold ``perm``?"""
        return not self.read_only and (not self.auto_read_only or bool(perm & _WRITING))

    def mode(self, perm: Perm) -> int:
        """Flags of open(2). O_NONBLOCK keeps a FIFO from blocking us; on files and disks it means nothing."""
        access = os.O_RDWR if self.writable(perm) else os.O_RDONLY
        return access | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | (os.O_DIRECT if self.direct else 0)


def cannot_open(path: str, error: OSError, *, direct: bool = False) -> QmpdError:
    """QEMU's text for a file that does not open."""
    if error.errno == errno.EINVAL and direct:
        return from_oserror(error, f"Could not open '{path}': filesystem does not support O_DIRECT", path=path)
    return from_oserror(error, f"Could not open '{path}': {error.strerror}", path=path)


class FileHandle:
    """An open image file with its locks. ``fd`` never changes until :meth:`close`."""

    def __init__(self, path: str, flags: Flags, *, locked: bool, open_file: OpenFile = os.open) -> None:
        self.path = path
        self.flags = flags
        self._mode = flags.mode(Perm.NONE)
        #: What says by name whether the file may be written too, for files that may perhaps only be read.
        self._recheck = open_file if getattr(open_file, "rechecks", False) else None
        try:
            self.fd = open_file(path, self._mode, 0)
        except OSError as error:
            raise cannot_open(path, error, direct=flags.direct) from error
        self._locked = locked
        self._perm = Perm.NONE
        #: Lock bytes on ``fd``, those of a change under way included.
        self._held = 0
        #: A change under way: what to become, the second description (-1: none needed), the locks to fall back to.
        self._next_flags: Flags | None = None
        self._next_perm: Perm | None = None
        self._next_fd = -1
        self._next_mode = self._mode
        self._kept = 0

    @property
    def writable(self) -> bool:
        """May ``fd`` be written to right now?"""
        return self._mode & os.O_ACCMODE == os.O_RDWR

    def close(self) -> None:
        """Give up file and locks. Idempotent."""
        self._drop_next()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    # -- permissions ---------------------------------------------------------------------------------------------------

    def prepare_permissions(self, perm: Perm, shared: Perm) -> None:
        """Get the locks for (perm, shared) beside those held, and write access if needed. Nothing changed on error."""
        wanted = locking.mask(perm, shared) if self._locked else 0
        kept = self._held
        if self._next_fd >= 0:
            locking.unlock(self._next_fd, kept)  # the test must not take our own second description for a stranger
        locking.acquire(self.fd, wanted, kept=kept)
        self._held |= wanted
        self._next_perm = perm
        try:
            if self._next_fd >= 0:
                locking.lock(self._next_fd, self._held)
            self._prepare_fd()
        except QmpdError:
            self._next_perm = None
            self._release(wanted & ~kept)
            raise
        self._kept = kept

    def commit_permissions(self, perm: Perm, shared: Perm) -> None:
        """Switch over, then give up the locks that (perm, shared) does not need."""
        self._switch()
        self._perm = perm
        self._next_perm = None
        self._release(self._held & ~locking.mask(perm, shared))

    def abort_permissions(self) -> None:
        """Back to the locks from before."""
        if self._next_perm is None:
            return
        self._next_perm = None
        self._release(self._held & ~self._kept)
        self._drop_next_unless_needed()

    def _release(self, locks: int) -> None:
        locking.unlock(self.fd, locks)
        if self._next_fd >= 0:
            locking.unlock(self._next_fd, locks)
        self._held &= ~locks

    # -- flags ---------------------------------------------------------------------------------------------------------

    def prepare_flags(self, flags: Flags) -> None:
        """Get ready to go on with ``flags``. Nothing changed on error."""
        self._next_flags = flags
        try:
            self._prepare_fd()
        except QmpdError:
            self._next_flags = None
            raise

    def commit_flags(self) -> None:
        """Go on with the flags prepared."""
        self._switch()
        if self._next_flags is not None:
            self.flags = self._next_flags
            self._next_flags = None

    def abort_flags(self) -> None:
        """Forget the flags prepared."""
        self._next_flags = None
        self._drop_next_unless_needed()

    # -- two descriptions under one number -----------------------------------------------------------------------------

    def _prepare_fd(self) -> None:
        """Have a second description at hand if the coming flags and permissions want another mode."""
        flags = self._next_flags or self.flags
        perm = self._perm if self._next_perm is None else self._next_perm
        mode = flags.mode(perm)
        if mode == (self._next_mode if self._next_fd >= 0 else self._mode):
            return
        if mode == self._mode:
            self._drop_next()
            return
        try:
            fd = self._open_again(mode)
        except OSError as error:
            if mode & os.O_ACCMODE == os.O_RDONLY and not flags.read_only:
                return  # auto-read-only going back is a courtesy; staying read-write is no error
            raise cannot_open(self.path, error, direct=flags.direct) from error
        try:
            locking.lock(fd, self._held)
        except QmpdError:
            os.close(fd)
            raise
        self._drop_next()
        self._next_fd, self._next_mode = fd, mode

    def _open_again(self, mode: int) -> int:
        """Another description of the file that is open, even if its path leads elsewhere by now."""
        if self._recheck is not None and mode & os.O_ACCMODE != os.O_RDONLY:
            os.close(self._recheck(self.path, mode, 0))
        try:
            return os.open(f"/proc/self/fd/{self.fd}", mode)
        except FileNotFoundError:
            fd = os.open(self.path, mode)
        if not os.path.sameopenfile(fd, self.fd):
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fd

    def _switch(self) -> None:
        if self._next_fd >= 0:
            # A request in flight keeps the old description, and with it its locks, which would stand in our own way.
            locking.unlock(self.fd, self._held)
            os.dup2(self._next_fd, self.fd, inheritable=False)
            self._mode = self._next_mode
            self._drop_next()
            if not locking.has_ofd_locks():  # process-bound locks went with the descriptor just closed
                locking.lock(self.fd, self._held)

    def _drop_next_unless_needed(self) -> None:
        if self._next_flags is None and self._next_perm is None:
            self._drop_next()

    def _drop_next(self) -> None:
        fd, self._next_fd = self._next_fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)
