"""Inside a daemon under test: sees every system call that changes an image, may record it, and may be killed at it.

Installed in the child process only, over the few calls through which the storage room changes files.
"""

from __future__ import annotations

import errno
import os
import pickle
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Final, NamedTuple

from qmpd.block.drivers.qcow2.cache import MetadataCache
from qmpd.block.drivers.qcow2.image import Image
from qmpd.block.storage import posix
from qmpd.control.bus import Bus

IMAGES: Final = (".qcow2", ".raw")
SECTOR: Final = 512


class Event(NamedTuple):
    """One change of the file ``name``: ``write``, ``zero`` and ``punch`` (which does not grow the file), ``truncate``
    to ``offset``, or ``flush``; bytes. ``told`` is no change: clients are told that the job is complete."""

    name: str
    kind: str
    offset: int = 0
    length: int = 0
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Orders:
    """What is to happen in the child. ``kill``: number of the call to die at, right before it or, if ``torn``, with
    half of it done. ``record``: a file for the events. ``reflink``: pretend that the file system can share blocks.
    ``sabotage``: one of :data:`SABOTAGE`."""

    kill: int | None = None
    torn: bool = False
    record: str | None = None
    reflink: bool = False
    sabotage: str | None = None


UNHARMED: Final = Orders()


class Instrument:
    """Stands between the daemon and its files. Thread-safe; one call at a time, so that their order is known."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._lock = threading.RLock()
        self._calls = 0
        self._trace: IO[bytes] | None = open(orders.record, "wb") if orders.record else None  # noqa: SIM115
        self._pwrite = os.pwrite

    def install(self) -> None:
        """Take the places of the real calls."""
        os.pwrite = self._around(os.pwrite, lambda fd, data, offset: self._write(fd, offset, data))
        os.ftruncate = self._around(os.ftruncate, lambda fd, length: Event(_name(fd), "truncate", length))
        os.copy_file_range = self._around(os.copy_file_range, self._copied)
        # A process that is killed leaves the page cache behind, so nothing has to be synced really.
        os.fdatasync = self._around(lambda fd: None, lambda fd: Event(_name(fd), "flush"))
        posix.fallocate = self._around(posix.fallocate, self._allocated)
        posix.clone_range = self._around(self._share, self._cloned)
        self._listen()
        if self._orders.sabotage:
            SABOTAGE[self._orders.sabotage]()

    def _around(self, call: Callable[..., Any], describe: Callable[..., Event]) -> Callable[..., Any]:
        def instead(*args: Any) -> Any:
            with self._lock:
                event = describe(*args)
                if not event.name.endswith(IMAGES):
                    return call(*args)
                if self._calls == self._orders.kill:
                    self._die(event)
                result = call(*args)
                self._calls += 1
                self._record(event)
                return result

        return instead

    def _listen(self) -> None:
        publish = Bus.publish

        def instead(bus: Bus, name: str, data: dict[str, Any] | None) -> None:
            if name == "BLOCK_JOB_COMPLETED":
                with self._lock:
                    self._record(Event("", "told"))
            publish(bus, name, data)

        Bus.publish = instead  # type: ignore[method-assign, assignment]

    def _record(self, event: Event) -> None:
        if self._trace is not None:
            pickle.dump(event, self._trace)
            self._trace.flush()

    def _die(self, event: Event) -> None:
        if self._orders.torn:
            half = event.length // 2 // SECTOR * SECTOR
            data = event.data if event.kind == "write" else bytes(event.length)
            if half and event.kind in ("write", "zero"):
                fd = os.open(event.name, os.O_WRONLY)
                self._pwrite(fd, data[:half], event.offset)
        os.kill(os.getpid(), signal.SIGKILL)

    # -- what a call does ----------------------------------------------------------------------------------------------

    def _write(self, fd: int, offset: int, data: Any) -> Event:
        content = bytes(data)
        return Event(_name(fd), "write", offset, len(content), content)

    def _copied(self, source: int, target: int, length: int, position: int, goal: int) -> Event:
        return self._write(target, goal, os.pread(source, length, position))

    def _cloned(self, source: int, position: int, length: int, target: int, goal: int) -> Event:
        if not self._orders.reflink:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))  # the same on every machine
        return self._write(target, goal, os.pread(source, length, position).ljust(length, b"\0"))

    def _share(self, source: int, position: int, length: int, target: int, goal: int) -> None:
        self._pwrite(target, os.pread(source, length, position).ljust(length, b"\0"), goal)

    def _allocated(self, fd: int, mode: int, offset: int, length: int) -> Event:
        return Event(_name(fd), "punch" if mode & posix.KEEP_SIZE else "zero", offset, length)


def _name(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


# -- broken ways of writing, to show that the harness would notice ----------------------------------------------------


def _mappings_before_counts() -> None:
    def flush(self: MetadataCache, release: Callable[[], None]) -> None:
        tables = self.l2.write_back()
        self._file.flush()
        self.l2.settle(tables)
        if self.l1.dirty:
            self.l1.write_back()
            self._file.flush()
            self.l1.settle()
        self.flush_refcounts()
        release()

    MetadataCache.flush = flush  # type: ignore[method-assign]


def _frees_before_mappings() -> None:
    whole = MetadataCache.flush

    def flush(self: MetadataCache, release: Callable[[], None]) -> None:
        release()
        whole(self, release)

    MetadataCache.flush = flush  # type: ignore[method-assign]


def _header_in_one_write() -> None:
    def write_header(self: Image, new: Any) -> None:
        self.file.write(0, new.serialise().ljust(self.header.areas[-1][1], b"\0"))
        self.file.flush()
        self.header = new.placed()

    Image.write_header = write_header  # type: ignore[method-assign]


def _no_flush() -> None:
    os.fdatasync = lambda fd: None


def _data_not_flushed() -> None:
    flush = os.fdatasync
    os.fdatasync = lambda fd: None if _name(fd).endswith("data.raw") else flush(fd)


SABOTAGE: Final[dict[str, Callable[[], None]]] = {
    "mappings before counts": _mappings_before_counts,
    "frees before mappings": _frees_before_mappings,
    "header in one write": _header_in_one_write,
    "no flush": _no_flush,
    "data not flushed": _data_not_flushed,
}
