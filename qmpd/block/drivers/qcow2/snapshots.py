"""The internal snapshot table: read and validated at open (spec/qcow2.md section 4). Snapshots are never changed."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

from qmpd.block.api import BlockDevice
from qmpd.block.drivers.qcow2.cache import read_padded
from qmpd.block.drivers.qcow2.header import Header
from qmpd.errors import Kind, QmpdError

_FIXED: Final = struct.Struct(">QIHHIIQII")
_MAX_EXTRA: Final = 1024
_MAX_TABLE: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry. Sizes in bytes, ``l1_size`` in entries; neither L1 field is validated until it is used."""

    l1_offset: int
    l1_size: int
    id: str
    name: str
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    icount: int | None
    entry_size: int
    extra_size: int

    def info(self) -> dict[str, Any]:
        """As queries report it (QEMU's SnapshotInfo)."""
        info: dict[str, Any] = {
            "id": self.id,
            "name": self.name,
            "vm-state-size": self.vm_state_size,
            "date-sec": self.date_sec,
            "date-nsec": self.date_nsec,
            "vm-clock-sec": self.vm_clock_nsec // 1_000_000_000,
            "vm-clock-nsec": self.vm_clock_nsec % 1_000_000_000,
        }
        if self.icount is not None:
            info["icount"] = self.icount
        return info


def load_snapshots(file: BlockDevice, header: Header) -> list[Snapshot]:
    """Read the table. Raises CORRUPT for entries beyond the limits."""
    snapshots: list[Snapshot] = []
    offset = header.snapshots_offset
    for index in range(header.nb_snapshots):
        if offset >= file.length:
            raise QmpdError(f"Snapshot table entry {index} lies behind the end of the file", Kind.CORRUPT)
        snapshot = _load(file, offset, index)
        snapshots.append(snapshot)
        offset += snapshot.entry_size
        if offset - header.snapshots_offset > _MAX_TABLE:
            raise QmpdError("Snapshot table is too big", Kind.CORRUPT)
    return snapshots


def _load(file: BlockDevice, offset: int, index: int) -> Snapshot:
    l1_offset, l1_size, id_size, name_size, sec, nsec, clock, state, extra_size = _FIXED.unpack(
        read_padded(file, offset, _FIXED.size)
    )
    if extra_size > _MAX_EXTRA:
        raise QmpdError(f"Too much extra metadata in snapshot table entry {index}", Kind.CORRUPT)
    rest = bytes(read_padded(file, offset + _FIXED.size, extra_size + id_size + name_size))
    extra, names = rest[:extra_size], rest[extra_size:]
    if extra_size >= 8:
        (state,) = struct.unpack_from(">Q", extra)
    icount = struct.unpack_from(">Q", extra, 16)[0] if extra_size >= 24 else (1 << 64) - 1
    size = _FIXED.size + len(rest)
    return Snapshot(
        l1_offset,
        l1_size,
        names[:id_size].decode(errors="replace"),
        names[id_size:].decode(errors="replace"),
        sec,
        nsec,
        clock,
        state,
        icount if icount != (1 << 64) - 1 else None,
        size + -size % 8,
        extra_size,
    )
