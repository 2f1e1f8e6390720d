"""The internal snapshot table: read and validated at open, packed for writing (spec/qcow2.md section 4)."""

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
#: Longest table that may be read or written, bytes.
MAX_TABLE: Final = 64 << 20
#: In the extra data of new entries: size of the VM state, size of the disk, instruction count (none).
_EXTRA: Final = struct.Struct(">QQQ")
_NO_ICOUNT: Final = (1 << 64) - 1


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
    #: The entry as stored, with its padding: what nobody here knows of it is kept.
    raw: bytes

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
        if offset - header.snapshots_offset > MAX_TABLE:
            raise QmpdError("Snapshot table is too big", Kind.CORRUPT)
    return snapshots


def new_entry(number: int, name: str, l1: tuple[int, int], disk_size: int, nanoseconds: int) -> Snapshot:
    """An entry without VM state. ``l1`` is (host offset, entries), ``nanoseconds`` the time since the epoch."""
    key, label = str(number).encode(), name.encode()
    sec, nsec = divmod(nanoseconds, 1_000_000_000)
    extra = _EXTRA.pack(0, disk_size, _NO_ICOUNT)
    fixed = _FIXED.pack(*l1, len(key), len(label), sec & 0xFFFFFFFF, nsec, 0, 0, len(extra))
    raw = fixed + extra + key + label
    raw += bytes(-len(raw) % 8)
    return Snapshot(*l1, str(number), name, sec, nsec, 0, 0, None, len(raw), len(extra), raw)


def _load(file: BlockDevice, offset: int, index: int) -> Snapshot:
    fixed = bytes(read_padded(file, offset, _FIXED.size))
    l1_offset, l1_size, id_size, name_size, sec, nsec, clock, state, extra_size = _FIXED.unpack(fixed)
    if extra_size > _MAX_EXTRA:
        raise QmpdError(f"Too much extra metadata in snapshot table entry {index}", Kind.CORRUPT)
    rest = bytes(read_padded(file, offset + _FIXED.size, extra_size + id_size + name_size))
    extra, names = rest[:extra_size], rest[extra_size:]
    if extra_size >= 8:
        (state,) = struct.unpack_from(">Q", extra)
    icount = struct.unpack_from(">Q", extra, 16)[0] if extra_size >= 24 else _NO_ICOUNT
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
        icount if icount != _NO_ICOUNT else None,
        size + -size % 8,
        extra_size,
        fixed + rest + bytes(-size % 8),
    )
