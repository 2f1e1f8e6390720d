"""The driver ``preallocate``: a file that grows gets more space than it needs, so that it grows seldom.

Source: spec/block-graph.md sections 2 and 4.

The space lies behind the end of the node, which alone knows where its data end; whoever looks at the file sees a longer
one. So the node keeps the permission to write and resize while it holds space, and gives the space back when the last
of its users that may write goes, or when it is closed. A crash leaves the file longer, with zeros at its end.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from qmpd.block.api import BlockDevice, Buffer, Perm
from qmpd.block.filters.base import Filter
from qmpd.errors import QmpdError
from qmpd.units import MIB, SECTOR, align_up

_log = logging.getLogger(__name__)

_CHANGES: Final = Perm.WRITE | Perm.RESIZE


@dataclass(frozen=True)
class Amount:
    """Space is taken up to ``size`` bytes behind what is written, and to the next multiple of ``align``."""

    align: int = MIB
    size: int = 128 * MIB

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Amount:
        """From a driver's options. Raises QmpdError."""
        amount = cls(options.get("prealloc-align", cls.align), options.get("prealloc-size", cls.size))
        for name, value in (("prealloc-align", amount.align), ("prealloc-size", amount.size)):
            if value < 0:
                raise QmpdError(f"Value '{value}' is out of range for parameter '{name}'")
        if amount.align % SECTOR:
            raise QmpdError("prealloc-align parameter of preallocate filter is not aligned to 512")
        return amount

    def end(self, written: int) -> int:
        """Up to where the file is to go when data up to ``written`` is about to be written."""
        return align_up(written + self.size, max(self.align, SECTOR))


class Preallocate(Filter):
    """Options: ``prealloc-align``, ``prealloc-size`` (bytes)."""

    format_name = "preallocate"

    def __init__(self, child: BlockDevice, amount: Amount, *, read_only: bool) -> None:
        super().__init__(child, read_only=read_only)
        self._amount = self._next_amount = amount
        self._lock = threading.Lock()
        #: Where the data end, once that may be before the end of the file.
        self._data_end: int | None = None
        #: The file system gave no space: not asked again until the permissions change.
        self._refused = False

    @classmethod
    def open(cls, children: Mapping[str, BlockDevice], options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Over ``children["file"]``. Raises QmpdError on options that make no sense."""
        return cls(children["file"], Amount.of(options), read_only=read_only)

    @property
    def length(self) -> int:
        return self._child.length if self._data_end is None else self._data_end

    @property
    def holds_preallocation(self) -> bool:
        """Is the file longer than its data?"""
        return self._data_end is not None and self._data_end < self._child.length

    # -- I/O -----------------------------------------------------------------------------------------------------------

    def write(self, offset: int, data: Buffer) -> None:
        self._provide(offset + len(data))
        self._child.write(offset, data)
        self._note(offset + len(data))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        end = offset + length
        self._provide(end)
        with self._lock:
            inside = min(end, self.length) if self.holds_preallocation else end
        if offset < inside:
            self._child.write_zeroes(offset, inside - offset, unmap=unmap)
        self._note(end)

    def truncate(self, length: int) -> None:
        with self._lock:
            if not self.holds_preallocation or length < self.length or length > self._child.length:
                self._child.truncate(length)
            if self._data_end is not None:
                self._data_end = align_up(length, SECTOR)

    def _provide(self, end: int) -> None:
        """Have space for data up to ``end``. Having none beforehand is no error: the write itself will tell."""
        if end <= self._child.length or self._refused or not self.growable:
            return
        with self._lock:
            start = self._child.length
            if end <= start:
                return
            if self._data_end is None:
                self._data_end = start
            try:
                self._child.write_zeroes(start, self._amount.end(end) - start, unmap=False)
            except QmpdError as error:
                self._refused = True
                _log.warning("preallocate: no space beforehand: %s", error)

    def _note(self, end: int) -> None:
        if self._data_end is not None and end > self._data_end:
            with self._lock:
                if self._data_end is not None:
                    self._data_end = max(self._data_end, align_up(end, SECTOR))

    # -- giving back ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        self._give_back()

    def _give_back(self) -> None:
        """Cut the file to its data. A failure leaves it longer, which is logged."""
        with self._lock:
            if not self.holds_preallocation or self._data_end is None:
                return
            try:
                self._child.truncate(self._data_end)
            except QmpdError as error:
                _log.error("preallocate: could not give back space: %s", error)

    def permissions_check(self, perm: Perm, shared: Perm) -> None:
        """Nobody will write: give back now, while the child is still ours. If the edit fails, only space is lost."""
        if not perm & _CHANGES:
            self._give_back()

    def permissions_commit(self, perm: Perm, shared: Perm) -> None:
        self._refused = False
        if not perm & _CHANGES and not self.holds_preallocation:
            self._data_end = None  # from now on others may change the file

    def reopen_prepare(self, *, read_only: bool, options: Mapping[str, Any] | None = None) -> None:
        super().reopen_prepare(read_only=read_only)
        self._next_amount = self._amount if options is None else Amount.of(options)

    def reopen_commit(self) -> None:
        super().reopen_commit()
        self._amount = self._next_amount
