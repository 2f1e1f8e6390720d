"""The filter that an active commit puts above its top node (spec/jobs-and-commit.md section 7).

All requests pass through; what they may have changed is marked in the map of the job. For map it is an empty layer,
because its child takes the backing slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpd.block.api import BlockDevice, Buffer, Driver, ImageInfo
from qmpd.block.dirty import DirtyMap
from qmpd.block.extents import RunKind, Runs

if TYPE_CHECKING:
    from qmpd.block.storage.file import FileStorage


class MirrorTop(Driver):
    """A pass-through over its ``backing`` child that notes changes in ``dirty``.

    A change is marked when it has been made, also if it failed half-way: whoever cleared the bit and copied before has
    copied old bytes, or some of both, and learns that it must be done again. Marked earlier, the bit could be cleared
    and the old bytes copied while the request is still on its way, and nobody would ever know.
    """

    format_name = "mirror_top"
    is_filter = True
    supports_backing = True
    #: For the permission rule: unlike other mirrors it writes to what its own child reads.
    active_commit = True

    def __init__(self, backing: BlockDevice, dirty: DirtyMap) -> None:
        self._backing = backing
        self.dirty = dirty

    @property
    def length(self) -> int:
        return self._backing.length

    @property
    def growable(self) -> bool:
        return bool(getattr(self._backing, "growable", False))

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._backing.readinto(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        try:
            self._backing.write(offset, data)
        finally:
            self.dirty.mark(offset, len(data))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        try:
            self._backing.write_zeroes(offset, length, unmap=unmap)
        finally:
            self.dirty.mark(offset, length)

    def discard(self, offset: int, length: int) -> None:
        try:
            self._backing.discard(offset, length)
        finally:
            self.dirty.mark(offset, length)

    def flush(self) -> None:
        self._backing.flush()

    def map(self, offset: int, length: int) -> Runs:
        return Runs.single(offset, length, RunKind.UNALLOCATED)

    def direct(self, offset: int, length: int) -> tuple[FileStorage, int] | None:
        """None: writes must come through here."""
        return None

    def info(self) -> ImageInfo:
        bitmap = {
            "count": self.dirty.bytes,
            "granularity": self.dirty.granularity,
            "recording": False,
            "busy": False,
            "persistent": False,
        }
        return ImageInfo(self.format_name, self.length, extra={"dirty-bitmaps": [bitmap]})

    def close(self) -> None:
        """The child belongs to the graph."""

    def attach(self, name: str, child: BlockDevice | None) -> None:
        if name != "backing" or child is None:
            super().attach(name, child)
            return
        self._backing = child
