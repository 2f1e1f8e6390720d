"""Making image files: what blockdev-create does for the driver ``file``."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from qmpd.block import locking
from qmpd.block.api import Perm
from qmpd.block.storage import posix
from qmpd.block.trust import OpenFile
from qmpd.errors import QmpdError, from_oserror
from qmpd.units import SECTOR, align_up

_PREALLOCATION = frozenset({"off", "falloc", "full"})
_PREALLOCATION_FAILED = {"falloc": "Could not preallocate new data", "full": "Could not write zeros for preallocation"}

#: What a creator holds against others for the moment: nobody else may write or change the length.
_CREATION_LOCKS = locking.mask(Perm.WRITE | Perm.RESIZE, Perm.ALL & ~Perm.RESIZE)


def create_file(path: str, size: int, preallocation: str = "off", *, open_file: OpenFile = os.open) -> None:
    """Create ``path``, or empty an existing file, with ``size`` bytes of zeros (rounded up to 512).

    Nothing of an existing file is touched when somebody holds it for writing or the size is more than the file system
    takes. When only the preallocation fails (no space), the file is left behind empty. Blocks; worker thread. Raises
    QmpdError with the texts of spec/toolbox.md section 1.1.
    """
    if preallocation not in _PREALLOCATION:
        raise QmpdError(f"Unsupported preallocation mode: {preallocation}")
    if "\0" in path:
        raise QmpdError(f"Could not create '{path}': {os.strerror(errno.EINVAL)}")
    length = align_up(size, SECTOR)
    with _opened(path, open_file) as (fd, existed):
        locking.acquire(fd, _CREATION_LOCKS)
        try:
            _resize(fd, length)
        except BaseException:
            if not existed:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            raise
        _preallocate(fd, length, preallocation)


@contextlib.contextmanager
def _opened(path: str, open_file: OpenFile) -> Iterator[tuple[int, bool]]:
    """The file read-write and unlocked, and whether it existed before."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        try:
            fd, existed = open_file(path, flags | os.O_CREAT | os.O_EXCL, 0o644), False
        except FileExistsError:
            fd, existed = open_file(path, flags, 0), True
    except OSError as error:
        raise from_oserror(error, f"Could not create '{path}': {error.strerror}", path=path) from error
    try:
        yield fd, existed
    finally:
        os.close(fd)


def _resize(fd: int, length: int) -> None:
    """Try the new length before the old content goes: a file system refuses what is too large without a change."""
    try:
        if length >= 1 << 63:
            number = errno.EINVAL if length > 1 << 63 else errno.EFBIG
            raise OSError(number, os.strerror(number))
        if length > os.fstat(fd).st_size:
            os.ftruncate(fd, length)
        os.ftruncate(fd, 0)
        os.ftruncate(fd, length)
    except OSError as error:
        raise from_oserror(error, f"Could not resize file: {error.strerror}") from error


def _preallocate(fd: int, length: int, mode: str) -> None:
    if length == 0 or mode == "off":
        return
    try:
        if mode == "falloc":
            os.posix_fallocate(fd, 0, length)
        else:
            done = 0
            for piece in posix.zeroes(length):
                posix.write_at(fd, done, piece)
                done += len(piece)
            os.fsync(fd)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
        raise from_oserror(error, f"{_PREALLOCATION_FAILED[mode]}: {error.strerror}") from error
