"""A device that stores nothing: the drivers ``null-co`` and ``null-aio`` (spec/block-graph.md section 4)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Self

from qmpd.block.api import BlockDevice, Buffer, Driver
from qmpd.block.extents import RunKind, Runs
from qmpd.block.storage.posix import zero_fill
from qmpd.errors import Kind, QmpdError
from qmpd.units import GIB, MAX_LENGTH, SECTOR, align_up


class NullStorage(Driver):
    """Writes vanish, reads give zeros (also without ``read-zeroes``, where the peer leaves the content undefined).

    Options: ``size`` (bytes, default 1 GiB), ``latency-ns`` (each request takes at least so long), ``read-zeroes``
    (say in map that the device is all zeros).
    """

    format_name = "null-co"
    is_protocol = True

    def __init__(self, size: int, latency_ns: int, *, known_zero: bool, read_only: bool) -> None:
        self.read_only = read_only
        self._default = size == GIB and not known_zero and latency_ns == 0
        self._length = align_up(size, SECTOR)
        self._latency = latency_ns / 1e9
        self._known_zero = known_zero

    @classmethod
    def open(cls, children: Mapping[str, BlockDevice], options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Raises on a negative size or latency."""
        size, latency = options.get("size", GIB), options.get("latency-ns", 0)
        if not 0 <= size <= MAX_LENGTH:
            raise QmpdError(f"Value '{size}' is out of range for parameter 'size'")
        if not 0 <= latency < 1 << 63:
            raise QmpdError("latency-ns is invalid")
        return cls(size, latency, known_zero=bool(options.get("read-zeroes", False)), read_only=read_only)

    @property
    def length(self) -> int:
        return self._length

    @property
    def filename(self) -> str:
        return f"{self.format_name}://" if self._default else ""

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._take_time()
        zero_fill(buffer)

    def write(self, offset: int, data: Buffer) -> None:
        self._take_time()

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._take_time()

    def discard(self, offset: int, length: int) -> None:
        self._take_time()

    def flush(self) -> None:
        self._take_time()

    def map(self, offset: int, length: int) -> Runs:
        return Runs.single(offset, length, RunKind.ZERO if self._known_zero else RunKind.OPAQUE)

    def truncate(self, length: int) -> None:
        raise QmpdError("Image format driver does not support resize", Kind.UNSUPPORTED)

    def close(self) -> None:
        """Nothing to release."""

    def _take_time(self) -> None:
        if self._latency:
            time.sleep(self._latency)


class NullAio(NullStorage):
    """The same under its other name."""

    format_name = "null-aio"
