"""The filter that a commit job puts above its top node (spec/block-graph.md sections 1 and 2).

It marks the place in the chain that the job works on and keeps others from writing below it. Reads pass through; for
map it is an empty layer, because its child takes the backing slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from qmpd.block.api import BlockDevice, Buffer, Driver
from qmpd.block.extents import RunKind, Runs
from qmpd.errors import Kind, QmpdError

if TYPE_CHECKING:
    from qmpd.block.storage.file import FileStorage


class CommitTop(Driver):
    """A read-only pass-through over its ``backing`` child."""

    format_name = "commit_top"
    is_filter = True
    supports_backing = True
    read_only = True

    def __init__(self, backing: BlockDevice) -> None:
        self._backing = backing

    @classmethod
    def open(
        cls, children: Mapping[str, BlockDevice], options: Mapping[str, Any] | None = None, *, read_only: bool = True
    ) -> Self:
        """Filter ``children["backing"]``. Cannot fail."""
        return cls(children["backing"])

    @property
    def length(self) -> int:
        return self._backing.length

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._backing.readinto(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        raise _read_only()

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        raise _read_only()

    def discard(self, offset: int, length: int) -> None:
        raise _read_only()

    def flush(self) -> None:
        """Nothing was written through here."""

    def map(self, offset: int, length: int) -> Runs:
        return Runs.single(offset, length, RunKind.UNALLOCATED)

    def direct(self, offset: int, length: int) -> tuple[FileStorage, int] | None:
        return self._backing.direct(offset, length)

    def truncate(self, length: int) -> None:
        raise _read_only()

    def close(self) -> None:
        """The child belongs to the graph."""

    def attach(self, name: str, child: BlockDevice | None) -> None:
        if name != "backing" or child is None:
            super().attach(name, child)
            return
        self._backing = child


def _read_only() -> QmpdError:
    return QmpdError("Block node is read-only", Kind.PERMISSION)
