"""Which files may be opened, and the opening itself: one act, so that nothing changes between check and use.

A path is walked here, one component at a time, each opened relative to the one before and without following symbolic
links; links are read and walked the same way. The file at the end is held by an O_PATH descriptor, judged, and that
very file is then opened for I/O, whatever its names lead to by then. O_PATH opens neither wake a device nor wait for
the other end of a pipe.

Two kinds of names: what the operator says (options, commands) is bound by the allowed directories alone. What an image
says may have been written by a guest, and must be a regular file outside of the kernel's file systems besides, unless
names in images are trusted. Source: spec/block-graph.md section 9.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from qmpd.errors import Kind, QmpdError, from_oserror

#: As os.open: path, flags, mode of a new file; the descriptor. Raises OSError, or QmpdError where a rule forbids it.
OpenFile = Callable[[str, int, int], int]

Identity = tuple[int, int]
"""(device, inode) of a file."""

_LOOK: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LINKS: Final = 40


def advice(slot: str = "backing") -> str:
    """What can be done where a name in an image, of its child in ``slot``, is not followed."""
    return f"give '{slot}' explicitly, or start qmpd with --trust-image-names all"


#: Their "regular files" are views of the kernel and of processes, this one among them.
_KERNEL: Final = ("/proc", "/sys")


@dataclass(frozen=True, slots=True)
class Trust:
    """The operator's policy. Any thread."""

    #: Directories that everything must be in, as given; empty for anywhere.
    names: tuple[str, ...] = ()
    #: The same, as they were found at the start: another directory of that name is not meant.
    identities: frozenset[Identity] = frozenset()
    #: Whether a name in an image is as good as one that the operator gives.
    image_names: bool = False

    @classmethod
    def make(cls, directories: Sequence[str] = (), *, image_names: bool = False) -> Trust:
        """Look the directories up. They stay open for good, so that nothing else gets their identity.

        Raises QmpdError for what is not a directory.
        """
        found = set()
        for name in directories:
            try:
                found.add(identity(os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)))
            except (OSError, ValueError) as error:
                raise from_oserror(_os_error(error), f"Could not open '{name}': {_os_error(error).strerror}") from None
        return cls(tuple(directories), frozenset(found), image_names)

    def open(self, path: str, flags: int, mode: int = 0o644) -> int:
        """Open what the operator named. Raises as :data:`OpenFile`."""
        if not self.identities:
            return os.open(path, flags, mode)
        with _Walk(path) as walk:
            self._check_place(walk, path)
            return walk.open(flags, mode)

    def open_from_image(
        self,
        path: str,
        flags: int,
        avoid: frozenset[Identity] = frozenset(),
        *,
        slot: str = "backing",
        writable_in: frozenset[Identity] | None = None,
    ) -> int:
        """Open what an image named for its child in ``slot``: a regular file that is none of ``avoid``.

        With ``writable_in`` it is opened for writing only in, or below, one of these directories, unless the operator
        has said which directories are allowed. Raises as :data:`OpenFile`.
        """
        with _Walk(path) as walk:
            self._check_place(walk, path)
            status = walk.status()
            if not self.image_names:
                why = _distrust(walk, status)
                if not why and not self.identities and writable_in is not None and _writes(flags):
                    why = "" if walk.passed(writable_in) else "must not lead out of the image's directory to be written"
                if why:
                    raise QmpdError(f"a name found in an image {why}; {advice(slot)}", path=path)
            if (status.st_dev, status.st_ino) in avoid:
                raise QmpdError("the file is in this backing chain already", path=path)
            return walk.open(flags & ~os.O_CREAT)

    def _check_place(self, walk: _Walk, path: str) -> None:
        if self.identities and not walk.passed(self.identities):
            allowed = ", ".join(self.names)
            text = f"'{path}' is outside the directories allowed ({allowed}); qmpd needs another --allow-path for it"
            raise QmpdError(text, Kind.PERMISSION, path=path)


def identity(fd: int) -> Identity:
    """Of an open file."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _distrust(walk: _Walk, status: os.stat_result) -> str:
    """What rule forbids to follow a name found in an image, whatever for; '' if none does."""
    if not stat.S_ISREG(status.st_mode):
        return "must lead to a regular file"
    return "must not lead into /proc or /sys" if walk.passed(_kernel()) else ""


def _writes(flags: int) -> bool:
    return flags & os.O_ACCMODE != os.O_RDONLY


class _Walk:
    """The way to a path: descriptors of the directories from the root down to where it is, and of the file itself.

    ``..`` goes back on that way rather than to the parent that a directory has by now. A last component that does not
    exist is no error before it is looked at or opened without O_CREAT.
    """

    def __init__(self, path: str) -> None:
        self._way: list[int] = []
        self._file = -1
        self._last = "."
        try:
            if not path:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._way.append(os.open("/", _LOOK | os.O_DIRECTORY))
            self._go(path if path.startswith("/") else f"{os.getcwd()}/{path}")
        except (OSError, ValueError) as error:
            self._close()
            raise _os_error(error) from None

    def __enter__(self) -> _Walk:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def passed(self, places: frozenset[Identity]) -> bool:
        """Is the file in, or below, one of these directories?"""
        return any(identity(fd) in places for fd in self._way)

    def status(self) -> os.stat_result:
        """Of the file."""
        return os.fstat(self._found())

    def open(self, flags: int, mode: int = 0) -> int:
        """Open the file for I/O; only with O_CREAT may it not exist."""
        flags |= os.O_NOFOLLOW
        if self._file < 0 and flags & os.O_CREAT:
            return os.open(self._last, flags | os.O_EXCL, mode, dir_fd=self._way[-1])
        if flags & os.O_EXCL:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        found = self._found()
        try:
            return os.open(f"/proc/self/fd/{found}", flags & ~(os.O_CREAT | os.O_NOFOLLOW))
        except FileNotFoundError:  # there is no /proc
            fd = os.open(self._last, flags & ~os.O_CREAT, dir_fd=self._way[-1])
        if identity(fd) != identity(found):
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fd

    def _found(self) -> int:
        if self._file < 0:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return self._file

    def _go(self, path: str) -> None:
        """Walk an absolute path. Raises OSError."""
        rest, links = _components(path), 0
        while rest:
            name = rest.pop()
            if name == "..":
                self._back()
                continue
            fd = self._step(name, last=not rest)
            if fd < 0:
                return
            mode = os.fstat(fd).st_mode
            if stat.S_ISLNK(mode):
                links += 1
                target = _read_link(fd, links)
                if target.startswith("/"):
                    self._back(to=1)
                rest += _components(target)
            elif stat.S_ISDIR(mode):
                self._way.append(fd)
            elif rest:
                os.close(fd)
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            else:
                self._file, self._last = fd, name
                return
        self._file = os.dup(self._way[-1])

    def _step(self, name: str, *, last: bool) -> int:
        try:
            return os.open(name, _LOOK, dir_fd=self._way[-1])
        except FileNotFoundError:
            if not last:
                raise
            self._last = name
            return -1

    def _back(self, to: int | None = None) -> None:
        keep = max(len(self._way) - 1, 1) if to is None else to
        while len(self._way) > keep:
            os.close(self._way.pop())

    def _close(self) -> None:
        for fd in (*self._way, self._file):
            if fd >= 0:
                os.close(fd)


def _components(path: str) -> list[str]:
    """The names in a path, the first one last."""
    names = [name for name in path.split("/") if name not in ("", ".")]
    return names[::-1]


def _read_link(fd: int, links: int) -> str:
    """Where a symbolic link leads; closes ``fd``. Links of /proc are taken by their text, not by their magic."""
    try:
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        return os.readlink("", dir_fd=fd)
    finally:
        os.close(fd)


def _kernel() -> frozenset[Identity]:
    found = set()
    for name in _KERNEL:
        with contextlib.suppress(OSError):
            status = os.stat(name)
            found.add((status.st_dev, status.st_ino))
    return frozenset(found)


def _os_error(error: OSError | ValueError) -> OSError:
    """What the kernel would say; names with NUL or without bytes do not get that far."""
    return error if isinstance(error, OSError) else OSError(errno.EINVAL, os.strerror(errno.EINVAL))
