"""Persistent dirty bitmaps: the directory is validated and reported, the bitmaps themselves are not kept up to date.

The first write therefore clears autoclear bit 0, which tells every later program that they are stale
(spec/qcow2.md section 4).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

from qmpd.block.api import BlockDevice
from qmpd.block.drivers.qcow2.cache import read_padded
from qmpd.block.drivers.qcow2.header import BITMAPS, EXT_BITMAPS, Header
from qmpd.errors import Kind, QmpdError

_EXTENSION: Final = struct.Struct(">IIQQ")
_ENTRY: Final = struct.Struct(">QIIBBHI")
_MAX_BITMAPS: Final = 65535
_MAX_DIRECTORY: Final = 1024 * _MAX_BITMAPS
_MAX_NAME: Final = 1023
_MAX_TABLE_ENTRIES: Final = 0x8000000
_FLAGS: Final = ((1, "in-use"), (2, "auto"))
_KNOWN_FLAGS: Final = 7
_EXTRA_COMPATIBLE: Final = 4


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One directory entry."""

    name: str
    granularity: int
    flags: int
    table_offset: int
    table_entries: int

    def info(self) -> dict[str, Any]:
        """As queries report it (QEMU's Qcow2BitmapInfo)."""
        return {
            "name": self.name,
            "granularity": self.granularity,
            "flags": [name for bit, name in _FLAGS if self.flags & bit],
        }


def load_bitmaps(file: BlockDevice, header: Header) -> list[Bitmap]:
    """The bitmaps that the header vouches for. Raises CORRUPT with QEMU's texts."""
    extension = header.extension(EXT_BITMAPS)
    if extension is None or not header.autoclear & BITMAPS:
        return []
    if len(extension) != _EXTENSION.size:
        raise _bad(f"bitmaps_ext: Invalid extension length {len(extension)}")
    count, reserved, size, offset = _EXTENSION.unpack(extension)
    rules = (
        (reserved != 0, "bitmaps_ext: Reserved field is not zero"),
        (
            count > _MAX_BITMAPS,
            f"bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {_MAX_BITMAPS}",
        ),
        (count == 0, "found bitmaps extension with zero bitmaps"),
        (offset % header.cluster_size != 0, "bitmaps_ext: invalid bitmap directory offset"),
        (
            size > _MAX_DIRECTORY,
            f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size ({_MAX_DIRECTORY})",
        ),
    )
    for broken, text in rules:
        if broken:
            raise _bad(text)
    # What the file does not have would be zeros, which are no entry: one look at them finds the words for it.
    size = min(size, max(0, file.length - offset) + _ENTRY.size)
    return _directory(bytes(read_padded(file, offset, size)), count, header)


def _directory(raw: bytes, count: int, header: Header) -> list[Bitmap]:
    found: list[Bitmap] = []
    position = 0
    while position < len(raw):
        if position + _ENTRY.size > len(raw):
            raise _bad("Broken bitmap directory")
        table, entries, flags, kind, bits, name_size, extra_size = _ENTRY.unpack_from(raw, position)
        start = position + _ENTRY.size + extra_size
        if start + name_size > len(raw):
            raise _bad("Broken bitmap directory")
        name = raw[start : start + name_size].decode(errors="replace")
        broken = (
            entries == 0
            or entries > _MAX_TABLE_ENTRIES
            or table == 0
            or table % header.cluster_size
            or flags & ~_KNOWN_FLAGS
            or kind != 1
            or not 9 <= bits <= 31
            or not 1 <= name_size <= _MAX_NAME
            or (extra_size and not flags & _EXTRA_COMPATIBLE)
        )
        if broken:
            raise _bad(f"Bitmap '{name}' doesn't satisfy the constraints")
        found.append(Bitmap(name, 1 << bits, flags, table, entries))
        position = start + name_size + -(name_size + extra_size) % 8
    if len(found) != count:
        raise _bad("bitmap directory contains less bitmaps than specified in the header")
    return found


def _bad(text: str) -> QmpdError:
    return QmpdError(text, Kind.CORRUPT)
