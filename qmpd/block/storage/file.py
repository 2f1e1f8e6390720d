"""Image files and host block devices: the drivers ``file`` and ``host_device``.

Bytes past the end of the file read as zeros and a write there makes the file longer, so format drivers can let their
file grow. The node's length is the file's rounded up to 512. Source: spec/block-graph.md sections 1, 3 and 4,
spec/image-locking.md.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from qmpd.block import locking
from qmpd.block.api import BlockDevice, Buffer, Driver, ImageInfo, Perm
from qmpd.block.extents import Run, RunKind, Runs
from qmpd.block.storage import posix
from qmpd.block.storage.aligned import Aligned, Cached, FileIO, block_size
from qmpd.block.storage.create import create_file
from qmpd.block.storage.handle import FileHandle, Flags, cannot_open
from qmpd.block.trust import OpenFile
from qmpd.errors import Kind, QmpdError, from_oserror
from qmpd.units import SECTOR, align_up

if TYPE_CHECKING:
    from qmpd.block.batch import Batch

__all__ = ["FileStorage", "HostDevice", "create_file"]

_log = logging.getLogger(__name__)

#: Options that a reopen may not change, with the value they have when not given.
_FIXED_OPTIONS: Mapping[str, Any] = {"locking": "auto", "aio": "threads", "aio-max-batch": 0, "pr-manager": None}

_UNALIGNED_LENGTH = "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment"

#: Data-and-hole pairs that one map() looks up at most; each costs two system calls.
_MAP_PAIRS = 4096


class FileStorage(Driver):
    """A regular file.

    Options: ``filename``, ``locking``, ``aio``, ``aio-max-batch``, ``drop-cache``, ``x-check-cache-dropped``,
    ``pr-manager``, and of the common ones ``auto-read-only``, ``cache.direct``, ``cache.no-flush``, ``discard``
    ("unmap" if not given) and
    ``x-qmpd-share-write`` (let other programs write too while this node writes). ``open-file``, of the graph, is what
    the path is opened with, once; a reopen goes by the descriptor.
    """

    format_name = "file"
    is_protocol = True

    #: What the file must be, and how the error says so.
    _required: ClassVar[str] = "a regular file"

    def __init__(self, path: str, options: Mapping[str, Any], *, read_only: bool) -> None:
        """Opens the file; use :meth:`open`."""
        self.path = path
        self._location = os.path.abspath(path)
        self.read_only = read_only
        self._options: Mapping[str, Any] = dict(options)
        self._next_options: Mapping[str, Any] | None = None
        self._next_io: FileIO | None = None
        open_file: OpenFile = options.get("open-file", os.open)
        self._handle = FileHandle(path, _flags(options, read_only), locked=_wants_locks(options), open_file=open_file)
        self._growth = threading.Lock()
        #: fallocate modes that this file turned out not to have.
        self._refused: set[int] = set()
        #: errno of the first failed sync. The kernel reports a lost page once only, so later syncs prove nothing.
        self._sync_errno = 0
        #: Counters of query-blockstats.
        self.discard_nb_ok = self.discard_nb_failed = self.discard_bytes_ok = 0
        try:
            self._check_kind()
            _check_options(options)
            self._length = self._find_length()
            self._io = self._choose_io(options)
        except QmpdError:
            self._handle.close()
            raise

    @classmethod
    def open(cls, children: Mapping[str, BlockDevice], options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Open ``options["filename"]``. Worker thread."""
        path = options.get("filename", "")
        if not path:
            raise QmpdError(f"The '{cls.format_name}' block driver requires a file name")
        if "\0" in path:
            raise cannot_open(path, OSError(errno.EINVAL, os.strerror(errno.EINVAL)))
        return cls(path, options, read_only=read_only)

    @property
    def fd(self) -> int:
        """The descriptor: the same number until close, readable, writable while a user may write."""
        return self._handle.fd

    @property
    def filename(self) -> str:
        return self.path

    @property
    def location(self) -> str:
        return self._location

    @property
    def length(self) -> int:
        return self._length

    @property
    def growable(self) -> bool:
        return True

    def info(self) -> ImageInfo:
        try:
            used: int | None = os.fstat(self.fd).st_blocks * 512
        except OSError:
            used = None
        specific = {"type": self.format_name, "data": {}}
        return ImageInfo(self.format_name, self._length, actual_size=used, format_specific=specific)

    # -- I/O -----------------------------------------------------------------------------------------------------------

    def readinto(self, offset: int, buffer: memoryview) -> None:
        io = self._io
        try:
            io.read(self.fd, offset, buffer)
        except OSError as error:
            if error.errno != errno.EINVAL or io is self._io:
                raise self._failed(error, offset) from error
            self._io.read(self.fd, offset, buffer)  # a reopen changed cache.direct under this request

    def write(self, offset: int, data: Buffer) -> None:
        io = self._io
        try:
            io.write(self.fd, offset, data)
        except OSError as error:
            if error.errno != errno.EINVAL or io is self._io:
                raise self._failed(error, offset) from error
            self._io.write(self.fd, offset, data)
        self.note_written(offset + len(data))

    def read_many(self, batch: Batch) -> Sequence[int]:
        if isinstance(self._io, Aligned):
            return batch.indexes
        return posix.transfer_many(os.preadv, self.fd, batch)

    def write_many(self, batch: Batch) -> Sequence[int]:
        if isinstance(self._io, Aligned):
            return batch.indexes
        left = posix.transfer_many(os.pwritev, self.fd, batch)
        if batch.high > self._length:
            failed = set(left)
            for index in batch.indexes:
                if index not in failed:
                    self.note_written(batch.offsets[index] + len(batch.buffers[index]))
        return left

    def note_written(self, end: int) -> None:
        """Somebody wrote through :attr:`fd` up to ``end``: the node may be longer now. Any thread."""
        if end > self._length:
            with self._growth:
                self._length = max(self._length, align_up(end, SECTOR))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        punch = unmap and self._discards
        try:
            if punch and self._fallocate(posix.PUNCH_HOLE | posix.KEEP_SIZE, offset, length):
                self._reach(offset + length)
            elif not self._fallocate(posix.ZERO_RANGE, offset, length):
                self._write_plain_zeroes(offset, length)
        except OSError as error:
            raise self._failed(error, offset) from error
        self.note_written(offset + length)

    def discard(self, offset: int, length: int) -> None:
        if not self._discards:
            return
        try:
            done = self._fallocate(posix.PUNCH_HOLE | posix.KEEP_SIZE, offset, length)
        except OSError as error:
            self.discard_nb_failed += 1
            raise self._failed(error, offset) from error
        if done:
            self.discard_nb_ok += 1
            self.discard_bytes_ok += length

    def flush(self) -> None:
        if self._options.get("cache.no-flush", False):
            return
        if self._sync_errno:
            raise self._failed(OSError(self._sync_errno, os.strerror(self._sync_errno)))
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EROFS):  # nothing to sync in this kind of file
                return
            self._sync_errno = error.errno or errno.EIO
            raise self._failed(error) from error

    def map(self, offset: int, length: int) -> Runs:
        """DATA and ZERO (holes, and what lies past the end of the file)."""
        end = offset + length
        rows: list[Run] = []
        try:
            position = self._map_file(offset, min(end, self._file_end()), rows)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise self._failed(error, offset) from error
            return Runs.single(offset, length, RunKind.DATA, offset)  # a file that does not know its holes
        if len(rows) < 2 * _MAP_PAIRS and position < end:
            rows.append(Run(position, end - position, RunKind.ZERO, -1))
        return Runs.of(rows)

    def _map_file(self, position: int, end: int, rows: list[Run]) -> int:
        """Append the runs from ``position`` on, up to ``end`` or the limit; where it stopped."""
        while position < end and len(rows) < 2 * _MAP_PAIRS:
            try:
                data = min(os.lseek(self.fd, position, os.SEEK_DATA), end)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                data = end
            if data > position:
                rows.append(Run(position, data - position, RunKind.ZERO, -1))
            if data == end:
                return end
            try:
                hole = min(os.lseek(self.fd, data, os.SEEK_HOLE), end)
            except OSError as error:
                if error.errno != errno.ENXIO:  # somebody cut the file off just now
                    raise
                hole = end
            rows.append(Run(data, hole - data, RunKind.DATA, data))
            position = hole
        return position

    def direct(self, offset: int, length: int) -> tuple[FileStorage, int] | None:
        """This file; around the page cache there is no short cut, since the descriptor takes aligned blocks only."""
        return None if isinstance(self._io, Aligned) else (self, offset)

    def truncate(self, length: int) -> None:
        try:
            os.ftruncate(self.fd, length)
        except OSError as error:
            raise from_oserror(error, f"Could not resize file: {error.strerror}", path=self.path) from error
        with self._growth:
            self._length = align_up(length, SECTOR)

    def _write_plain_zeroes(self, offset: int, length: int) -> None:
        for piece in posix.zeroes(length):
            self._io.write(self.fd, offset, piece)
            offset += len(piece)

    def _reach(self, end: int) -> None:
        """Make the file at least ``end`` long without ever making it shorter (somebody may be writing behind)."""
        if end > self._file_end():
            self._io.write(self.fd, end - 1, b"\0")

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """Try one mode; False if this file does not have it."""
        if mode in self._refused:
            return False
        try:
            posix.fallocate(self.fd, mode, offset, length)
        except OSError as error:
            if error.errno in posix.UNSUPPORTED:
                self._refused.add(mode)
            elif error.errno != errno.EINVAL:  # which is about this range alone: unaligned on a device
                raise
            return False
        return True

    @property
    def _discards(self) -> bool:
        return bool(self._options.get("discard", "unmap") == "unmap")

    def _failed(self, error: OSError, offset: int | None = None) -> QmpdError:
        failure = from_oserror(error, path=self.path)
        failure.offset = offset
        return failure

    # -- opening and closing -------------------------------------------------------------------------------------------

    def _is_required_kind(self, mode: int) -> bool:
        return stat.S_ISREG(mode)

    def _choose_io(self, options: Mapping[str, Any]) -> FileIO:
        return Aligned(block_size(self.fd)) if options.get("cache.direct", False) else Cached()

    def _check_kind(self) -> None:
        if not self._is_required_kind(os.fstat(self.fd).st_mode):
            raise QmpdError(
                f"'{self.format_name}' driver requires '{self.path}' to be {self._required}", path=self.path
            )

    def _find_length(self) -> int:
        try:
            return align_up(self._file_end(), SECTOR)
        except OSError as error:
            text = f"Could not refresh total sector count: {error.strerror}"
            raise from_oserror(error, text, path=self.path) from error

    def reload(self) -> None:
        self._length = self._find_length()

    def _file_end(self) -> int:
        return os.lseek(self.fd, 0, os.SEEK_END)

    def close(self) -> None:
        if self.fd < 0:
            return
        try:
            if self._handle.writable:
                self.flush()
        finally:
            self._handle.close()

    # -- the graph's side ----------------------------------------------------------------------------------------------

    def permissions_check(self, perm: Perm, shared: Perm) -> None:
        io = self._next_io or self._io
        if isinstance(io, Aligned) and self._length % io.unit and perm & (Perm.WRITE | Perm.RESIZE) == Perm.WRITE:
            raise QmpdError(_UNALIGNED_LENGTH, path=self.path)
        self._handle.prepare_permissions(perm, self._shared_outside(perm, shared))

    def permissions_commit(self, perm: Perm, shared: Perm) -> None:
        self._handle.commit_permissions(perm, self._shared_outside(perm, shared))

    def permissions_abort(self) -> None:
        self._handle.abort_permissions()

    def _shared_outside(self, perm: Perm, shared: Perm) -> Perm:
        """What other programs may do. Two raw writers in one graph may be meant; two programs are an accident."""
        if perm & Perm.WRITE and not self._options.get("x-qmpd-share-write", False):
            return shared & ~Perm.WRITE
        return shared

    def reopen_prepare(self, *, read_only: bool, options: Mapping[str, Any] | None = None) -> None:
        coming = self._options if options is None else dict(options)
        for name, default in {"filename": self.path, **_FIXED_OPTIONS}.items():
            if coming.get(name, default) != self._options.get(name, default):
                raise QmpdError(f"Cannot change the option '{name}'")
        _check_options(coming)
        self._handle.prepare_flags(_flags(coming, read_only))
        self._next_options = coming
        if bool(coming.get("cache.direct", False)) != isinstance(self._io, Aligned):
            self._next_io = self._choose_io(coming)

    def reopen_commit(self) -> None:
        coming, self._next_options = self._next_options or self._options, None
        direct = bool(coming.get("cache.direct", False))
        if direct and self._next_io is not None:  # aligned requests suit the old descriptor too, others not the new one
            self._io = self._next_io
        self._handle.commit_flags()
        if not direct:
            self._io = self._next_io or self._io
        self._next_io = None
        self._options = coming
        self.read_only = self._handle.flags.read_only

    def reopen_abort(self) -> None:
        self._next_options = self._next_io = None
        self._handle.abort_flags()


class HostDevice(FileStorage):
    """A block or character device of the host."""

    format_name = "host_device"
    _required = "either a character or block device"

    @property
    def growable(self) -> bool:
        return False

    def _is_required_kind(self, mode: int) -> bool:
        return stat.S_ISBLK(mode) or stat.S_ISCHR(mode)

    def _find_length(self) -> int:
        if stat.S_ISCHR(os.fstat(self.fd).st_mode):
            return 0
        return super()._find_length()

    def truncate(self, length: int) -> None:
        if length > self._length:
            raise QmpdError("Cannot grow device files", Kind.INVALID, path=self.path)


def _flags(options: Mapping[str, Any], read_only: bool) -> Flags:
    return Flags(read_only, bool(options.get("auto-read-only", False)), bool(options.get("cache.direct", False)))


def _wants_locks(options: Mapping[str, Any]) -> bool:
    choice = options.get("locking", "auto")
    if choice == "on" and not locking.has_ofd_locks():
        _log.warning("File lock requested but this kernel only has process-bound locks: %s", options.get("filename"))
        return True
    return choice == "on" or (choice == "auto" and locking.has_ofd_locks())


def _check_options(options: Mapping[str, Any]) -> None:
    """Options that the peer accepts and this driver cannot honour are refused by name; the others need no action."""
    if options.get("aio") == "native" and not options.get("cache.direct", False):
        raise QmpdError("aio=native was specified, but it requires cache.direct=on, which was not specified.")
    if options.get("pr-manager") is not None:
        raise QmpdError(f"No persistent reservation manager with id '{options['pr-manager']}'")
