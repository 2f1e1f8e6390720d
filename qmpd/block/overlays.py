"""Which image files on disk are overlays of which: what their headers say, seen from where they lie.

Looking takes no locks, opens nothing but regular files, never waits for one, and reads a bounded piece of each: headers
may be garbage, and may be changed by others meanwhile. What was read is kept as long as the file is the same (inode,
size, times), so a second look costs a ``stat`` a file. Any thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from qmpd.block.trust import Identity

_MAGIC: Final = b"QFI\xfb"
_VERSIONS: Final = (1, 2, 3)
_START: Final = struct.Struct(">4sIQI")
_MAX_NAME: Final = 1023
#: A backing file name ends in the first cluster, which is no larger.
_REACH: Final = 2 << 20
_OPEN: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
#: Nanoseconds; two changes that are closer together may leave the same time behind.
_TICK: Final = 50_000_000
_LEFT: Final = 1000


@dataclass(frozen=True, slots=True)
class Stamp:
    """What changes when a file is written to."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class OverlayFile:
    """A file whose header names a backing file."""

    path: str
    identity: Identity
    stamp: Stamp


#: Device, inode, size, and the times of change of content and inode.
_Key = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Seen:
    """A file as read last. ``names`` are paths its backing file may be at, none if it is no overlay.

    ``key`` changes with the file; None: it was changed just now, so that another change might not show.
    """

    key: _Key | None
    file: OverlayFile
    names: tuple[str, ...]


@dataclass(slots=True)
class _Directory:
    """One directory as read last: its files by name, and the names of the directories in it."""

    files: dict[str, _Seen] = field(default_factory=dict)
    below: list[str] = field(default_factory=list)


class View:
    """What was found at one look."""

    def __init__(self, named: Mapping[str, Sequence[OverlayFile]]) -> None:
        """``named``: path that headers may mean -> the files with such headers."""
        self._named = named
        self._paths: dict[Identity, list[str]] = {}
        for path in named:
            identity = _identity_at(path)
            if identity is not None:
                self._paths.setdefault(identity, []).append(path)

    def overlays_of(self, identity: Identity) -> Iterator[OverlayFile]:
        """The files that are backed by this one, by whatever name."""
        for path in self._paths.get(identity, ()):
            yield from self._named[path]


class Overlays:
    """An index of image files, and the memory of those that commits have made superfluous."""

    def __init__(self, directories: Sequence[str] = ()) -> None:
        """``directories`` are absolute, and looked through at each look with what is below them."""
        self.directories = tuple(directories)
        self._known: dict[str, _Directory] = {}
        self._lock = threading.Lock()
        #: Images whose content a commit has moved into their base, as they were then; the oldest first.
        self._left: dict[Identity, Stamp] = {}
        #: Called when there is one more.
        self.on_left: Callable[[], object] = lambda: None

    # -- looking: worker thread ----------------------------------------------------------------------------------------

    def look(self, beside: Iterable[str] = ()) -> View:
        """The overlays in the directories ``beside`` and in, and below, those of the index."""
        with self._lock:
            before, self._known = self._known, {}
            for place in beside:
                self._read(place, before)
            left = list(self.directories)
            for place in left:  # grows meanwhile
                left += [f"{place}/{name}" for name in self._read(place, before).below]
            places = list(self._known.values())
            self._known |= {place: known for place, known in before.items() if os.path.isdir(place)}
        named: dict[str, list[OverlayFile]] = {}
        for directory in places:
            for seen in directory.files.values():
                for name in seen.names:
                    named.setdefault(name, []).append(seen.file)
        return View(named)

    def _read(self, place: str, before: dict[str, _Directory]) -> _Directory:
        if place not in self._known:
            self._known[place] = _read(place, before.pop(place, _Directory()).files)
        return self._known[place]

    # -- what commits leave behind: control thread ---------------------------------------------------------------------

    def leave_behind(self, files: Mapping[Identity, Stamp]) -> None:
        """The content of these is in their base now: they matter to nobody until they are written to."""
        for identity, stamp in files.items():
            self._left.pop(identity, None)
            self._left[identity] = stamp
        while len(self._left) > _LEFT:
            del self._left[next(iter(self._left))]
        if files:
            self.on_left()

    def left_stamp(self, identity: Identity) -> Stamp | None:
        """The file as a commit has left it; None if none has."""
        return self._left.get(identity)

    def as_rows(self) -> list[list[int]]:
        """What was left behind, to be remembered."""
        return [[*identity, stamp.size, stamp.mtime_ns] for identity, stamp in self._left.items()]

    def remember(self, rows: Iterable[Sequence[int]]) -> None:
        """Take up again what :meth:`as_rows` told."""
        for device, inode, size, mtime_ns in rows:
            self._left[device, inode] = Stamp(size, mtime_ns)


def identity_of(status: os.stat_result) -> Identity:
    """Of a file; devices are the same whatever the node that leads to them."""
    if stat.S_ISBLK(status.st_mode):
        return -1, status.st_rdev
    return status.st_dev, status.st_ino


def stamp_of(status: os.stat_result) -> Stamp:
    """As the file is now."""
    return Stamp(status.st_size, status.st_mtime_ns)


def _identity_at(path: str) -> Identity | None:
    try:
        return identity_of(os.stat(path))
    except (OSError, ValueError):
        return None


def _read(place: str, known: Mapping[str, _Seen]) -> _Directory:
    """One directory as it is now; ``known`` are its files as of the last time."""
    found = _Directory()
    try:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return found
    try:
        for name in os.listdir(fd):
            with contextlib.suppress(OSError):  # what is gone by now, or cannot be read, says nothing
                _look_at(place, name, fd, known.get(name), found)
    except OSError:  # the directory went away
        pass
    finally:
        os.close(fd)
    return found


def _look_at(place: str, name: str, directory: int, seen: _Seen | None, found: _Directory) -> None:
    """Add what is called ``name`` to ``found``. Raises OSError."""
    status = os.stat(name, dir_fd=directory)
    if stat.S_ISREG(status.st_mode):
        is_known = seen is not None and seen.key == _key(status)
        found.files[name] = seen if seen is not None and is_known else _read_header(place, name, directory)
    elif stat.S_ISDIR(status.st_mode) and not os.path.islink(f"{place}/{name}"):
        found.below.append(name)


def _read_header(place: str, name: str, directory: int) -> _Seen:
    fd = os.open(name, _OPEN, dir_fd=directory)
    try:
        status = os.fstat(fd)
        backing = _backing_name(fd) if stat.S_ISREG(status.st_mode) else None
    finally:
        os.close(fd)
    is_fresh = max(status.st_mtime_ns, status.st_ctime_ns) > time.time_ns() - _TICK
    file = OverlayFile(f"{place}/{name}", identity_of(status), stamp_of(status))
    return _Seen(None if is_fresh else _key(status), file, tuple(dict.fromkeys(_candidates(place, name, backing))))


def _key(status: os.stat_result) -> _Key:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


# -- headers -----------------------------------------------------------------------------------------------------------


def _backing_name(fd: int) -> str | None:
    """What the header of a qcow2 (or qcow) image says, None if it is none or says nothing that makes sense."""
    start = os.pread(fd, 4096, 0)
    if len(start) < _START.size:
        return None
    magic, version, offset, length = _START.unpack_from(start)
    if magic != _MAGIC or version not in _VERSIONS or not 0 < length <= _MAX_NAME or not 0 < offset <= _REACH:
        return None
    name = start[offset : offset + length] if offset + length <= len(start) else os.pread(fd, length, offset)
    return os.fsdecode(name.split(b"\0", 1)[0]) or None


def _candidates(place: str, entry: str, name: str | None) -> Iterator[str]:
    """Paths that the name may mean: from the image's directory, and for descriptions from the working directory."""
    if name is None:
        return
    described = list(_described(name))
    places = [place]
    path = f"{place}/{entry}"
    if os.path.islink(path):
        places.append(os.path.dirname(os.path.realpath(path)))
    for one in described or [name]:
        for where in [*places, *([os.getcwd()] if described else [])]:
            yield os.path.join(where, one)


def _described(name: str) -> Iterator[str]:
    """File names in ``file:NAME`` and ``json:{...}``."""
    if name.startswith("file:"):
        yield name.removeprefix("file:")
    elif name.startswith("json:"):
        with contextlib.suppress(ValueError, RecursionError):
            yield from _file_names(json.loads(name.removeprefix("json:")))


def _file_names(tree: Any) -> Iterator[str]:
    """The file names of a block device description, but for those of its backing files."""
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if key.split(".")[-1] == "filename" and isinstance(value, str) and not key.startswith("backing."):
            yield value.removeprefix("file:")
        elif key != "backing":
            yield from _file_names(value)
