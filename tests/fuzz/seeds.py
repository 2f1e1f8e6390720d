"""Small sound images with every structure of the format in them, and where each of their fields is."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tests.fixtures import mkimages

KIB: Final = 1 << 10


@dataclass(frozen=True)
class Seed:
    """An image as bytes; places in it are byte offsets."""

    name: str
    raw: bytes
    cluster_size: int
    #: Header fields: offset and struct format.
    fields: tuple[tuple[int, str], ...]
    #: Tables of 64-bit words (L1 tables, L2 tables, the refcount table): offset and number of words.
    tables: tuple[tuple[int, int], ...]
    #: Bytes of other structures: extensions, refcounts, the snapshot table, compressed streams, a bitmap directory.
    areas: tuple[tuple[int, int], ...]
    #: The data file, if the image has one.
    data: bytes | None = None


def _bitmaps(version: int = 3) -> Any:
    """With a bitmap directory that is sound, of one bitmap without a bit set."""
    entry = struct.pack(">QIIBBHI", 0, 1, 0, 1, 16, 2, 0) + b"b0" + bytes(6)
    made = mkimages.basic(cb=12, size=64 * KIB, names=False, autoclear=1)
    table, directory = made.alloc(1), made.alloc(1)
    made.put(table, struct.pack(">Q", 0))
    made.put(directory, struct.pack(">Q", table) + entry[8:])
    made.exts.append((mkimages.EXT_BITMAPS, struct.pack(">IIQQ", 1, 0, len(entry), directory)))
    return made


def _with_snapshots(**options: Any) -> Any:
    made = mkimages.full(**options)
    made.snapshot("1", "one")
    shared, table = made.l2[0]
    for row in range(0, made.cs, 8):
        (entry,) = struct.unpack_from(">Q", table, row)
        if entry & mkimages.COMPRESSED:
            shift = 62 - (made.cb - 8)
            start, sectors = entry & ((1 << shift) - 1), (entry & (mkimages.COMPRESSED - 1)) >> shift
            for cluster in range(start // made.cs, (start // 512 + sectors) * 512 // made.cs + 1):
                made.ref[cluster] += 1
    # What is written after a snapshot goes into a table of its own.
    own = made.alloc(1)
    made.put(shared, bytes(table))
    made.ref[shared // made.cs] -= 1
    made.l1[0], made.l2[0] = own | mkimages.COPIED, (own, bytearray(table))
    made.data(8, b"after the snapshot")
    return made


def _extended() -> Any:
    made = mkimages.Img(ext=True, cb=14, size=192 * KIB)
    made.data(0, b"a")
    made.zero(1)
    made.zero(2, alloc=True)
    made.compressed(3, b"\x33")
    made.data(5, b"q", bitmap=0xFF | 0xFF00 << 32)
    return made


def _zstd() -> Any:
    made = mkimages.Img(comp=1, cb=12, size=64 * KIB)
    for cluster, fill in enumerate((b"\x01", b"zstd", bytes(range(256)))):
        made.compressed(cluster, fill)
    made.data(6, b"plain")
    return made


def _external(**options: Any) -> Any:
    """With a data file, which is a little too short."""
    made = mkimages.Img(cb=12, size=64 * KIB, incompat=mkimages.DATAFILE, **options)
    made.exts.append((mkimages.EXT_DATA, b"data.raw"))
    for cluster in (0, 1, 2, 5, 15):
        made.entry(cluster, cluster * made.cs | mkimages.COPIED)
    made.zero(7)
    made.side = ("data.raw", b"".join(bytes([cluster + 1]) * made.cs for cluster in range(16))[: 63 * KIB])
    return made


_MAKERS: Final[tuple[tuple[str, Callable[[], Any]], ...]] = (
    ("plain", lambda: mkimages.full(cb=12, size=64 * KIB)),
    ("512", lambda: mkimages.full(cb=9, size=64 * KIB)),
    ("v2", lambda: _with_snapshots(version=2, cb=12, size=64 * KIB)),
    ("snapshots", lambda: _with_snapshots(cb=12, size=64 * KIB)),
    ("snapshots-512", lambda: _with_snapshots(cb=9, size=32 * KIB)),
    ("rc1", lambda: mkimages.basic(ro=0, cb=9, size=32 * KIB)),
    ("rc4", lambda: _with_snapshots(ro=2, cb=9, size=32 * KIB)),
    ("rc64", lambda: mkimages.full(ro=6, cb=9, size=32 * KIB)),
    ("extended", _extended),
    ("zstd", _zstd),
    ("bitmaps", _bitmaps),
    ("data-file", _external),
    ("raw-data-file", lambda: _external(autoclear=2)),
    ("dirty", lambda: mkimages.full(cb=12, size=64 * KIB, incompat=mkimages.DIRTY, compat=1)),
)


def _content(made: Any) -> bytes:
    raw = bytearray(made.next * made.cs)
    for offset, data in [*sorted(made.chunks.items()), *made.patches]:
        raw[offset : offset + len(data)] = data
    return bytes(raw[: made.next * made.cs])


def _seed(name: str, made: Any) -> Seed:
    made.build()
    cs, header = made.cs, 72 if made.v == 2 else 112
    fields = tuple(place for place in mkimages.H.values() if place[0] < header)
    tables = [(made.l1_off, made.l1n), (made.rt_off, 4)]
    tables += [(offset, min(cs // 8, 64)) for offset, _ in made.l2.values()]
    tables += [(offset, made.l1n) for offset, *_ in made.snaps]
    areas = [(header, 64), (made.rb_off, 64)]
    if made.snaps:
        areas.append((made.snap_off, 160))
    known = {0, made.l1_off, made.rt_off, made.rb_off, *(offset for offset, _ in tables)}
    areas += [(offset, min(len(data), 64)) for offset, data in made.chunks.items() if offset not in known]
    data = made.side[1] if hasattr(made, "side") else None
    return Seed(name, _content(made), cs, fields, tuple(tables), tuple(areas), data)


def seeds() -> list[Seed]:
    """All of them, the same every time."""
    return [_seed(name, make()) for name, make in _MAKERS]
