"""What filters have in common: one child, whose content they show (spec/block-graph.md section 1).

A filter sees every byte that passes: it offers no file to read or write directly and no places to fill, and what its
child maps to places in a file can only be read through the filter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from qmpd.block.api import BlockDevice, Buffer, Driver
from qmpd.block.debug import Announce, announcer
from qmpd.block.extents import RunKind, Runs


class Filter(Driver):
    """Everything passes through to the child called :attr:`slot`. Subclasses override what they do otherwise."""

    is_filter = True
    #: Name of the child.
    slot: ClassVar[str] = "file"

    def __init__(self, child: BlockDevice, *, read_only: bool) -> None:
        self._child = child
        self._next_read_only = self.read_only = read_only

    @property
    def length(self) -> int:
        return self._child.length

    @property
    def growable(self) -> bool:
        return bool(getattr(self._child, "growable", False))

    @property
    def debug_events(self) -> Announce:
        """See :mod:`qmpd.block.debug`."""
        return announcer(self._child)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._child.readinto(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        self._child.write(offset, data)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._child.write_zeroes(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self._child.discard(offset, length)

    def flush(self) -> None:
        self._child.flush()

    def map(self, offset: int, length: int) -> Runs:
        """The child's layer, without telling where its bytes are."""
        runs = self._child.map(offset, length)
        data = runs.kind == RunKind.DATA
        if not data.any():
            return runs
        kind = np.where(data, np.uint8(RunKind.OPAQUE), runs.kind)
        return Runs(runs.offset, runs.length, kind, np.full(len(runs), -1, np.int64))

    def truncate(self, length: int) -> None:
        self._child.truncate(length)

    def close(self) -> None:
        """The child belongs to the graph."""

    def attach(self, name: str, child: BlockDevice | None) -> None:
        if name != self.slot or child is None:
            super().attach(name, child)
            return
        self._child = child

    def reopen_prepare(self, *, read_only: bool, options: Mapping[str, Any] | None = None) -> None:
        self._next_read_only = read_only

    def reopen_commit(self) -> None:
        self.read_only = self._next_read_only
