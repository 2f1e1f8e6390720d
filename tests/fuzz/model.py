"""What an image means, spelled out one cluster at a time from the format's description, without the driver."""

from __future__ import annotations

import struct
import zlib
from typing import Final

import zstandard

OFFSET: Final = 0x00FFFFFFFFFFFE00
COMPRESSED: Final = 1 << 62
COPIED: Final = 1 << 63


class UnreadableError(Exception):
    """Reading this must fail."""


def _unzstd(stream: bytes, length: int) -> bytes:
    """Frame after frame, until there are enough bytes; what follows does not matter."""
    out = b""
    while len(out) < length:
        frame = zstandard.ZstdDecompressor(max_window_size=8 << 20).decompressobj()
        out += frame.decompress(stream)
        if not frame.eof:
            break
        stream = frame.unused_data
    return out


class Model:
    """One image, whose header has been accepted. Offsets in bytes."""

    def __init__(self, raw: bytes, data: bytes | None = None) -> None:
        """``data``: the data file, of an image that has one."""
        self.data = data
        self.raw = raw.ljust(-(-len(raw) // 512) * 512, b"\0")
        self.version, self.bits = struct.unpack_from(">I12xI", raw, 4)
        self.cs = 1 << self.bits
        (size, self.l1_size, self.l1, self.table, self.table_clusters, self.snapshots, self.snapshot_table) = (
            struct.unpack_from(">Q4xIQQIIQ", raw, 24)
        )
        self.size = size // 512 * 512
        self.incompatible, self.order = 0, 4
        self.codec = 0
        if self.version > 2:
            (self.incompatible,) = struct.unpack_from(">Q", raw, 72)
            self.order, length = struct.unpack_from(">II", raw.ljust(104, b"\0"), 96)
            self.codec = raw[104] if length > 104 and len(raw) > 104 else 0
        self.words = 2 if self.incompatible & 16 else 1
        self.per_table = self.cs // (8 * self.words)
        self.dirty = bool(self.incompatible & 1)

    def bytes_at(self, offset: int, length: int) -> bytes:
        """Of the file; zeros behind its end."""
        return self.raw[offset : offset + length].ljust(length, b"\0")

    def word(self, offset: int) -> int:
        return int.from_bytes(self.bytes_at(offset, 8), "big")

    def read(self, offset: int, length: int) -> bytes:
        """The guest's view, unallocated clusters being zeros."""
        out = bytearray()
        while length:
            inner = offset % self.cs
            step = min(length, self.cs - inner)
            out += self.cluster(offset // self.cs, inner, inner + step)
            offset, length = offset + step, length - step
        return bytes(out)

    def cluster(self, number: int, low: int, high: int) -> bytes:
        """Bytes ``[low, high)`` of a guest cluster. Raises UnreadableError where the entry breaks the format."""
        index, row = divmod(number, self.per_table)
        zeros = bytes(high - low)
        table = self.word(self.l1 + 8 * index) & OFFSET if index < self.l1_size else 0
        if table % self.cs:
            raise UnreadableError("L2 table unaligned")
        if not table:
            return zeros
        entry = self.word(table + 8 * self.words * row)
        if self.data is not None:
            return self._external(entry, number)[low:high]
        if entry & COMPRESSED:
            return self._decompress(entry)[low:high]
        host = entry & OFFSET
        if host % self.cs:
            raise UnreadableError("cluster unaligned")
        if self.words == 2:
            return self._subclusters(host, self.word(table + 16 * row + 8), low, high)
        if entry & 1:
            if self.version < 3:
                raise UnreadableError("zero flag in version 2")
            return zeros
        return self.bytes_at(host + low, high - low) if host else zeros

    def _external(self, entry: int, number: int) -> bytes:
        """A cluster of an image with a data file (and without sub-clusters)."""
        host, zeros = entry & OFFSET, bytes(self.cs)
        if entry & COMPRESSED:
            raise UnreadableError("compressed cluster with a data file")
        if host % self.cs:
            raise UnreadableError("cluster unaligned")
        if entry & 1 and not host:
            return zeros
        if not host and not entry & COPIED:
            return zeros
        if host != number * self.cs:
            raise UnreadableError("cluster elsewhere than the guest has it")
        assert self.data is not None
        return zeros if entry & 1 else self.data[host : host + self.cs].ljust(self.cs, b"\0")

    def _subclusters(self, host: int, bitmap: int, low: int, high: int) -> bytes:
        allocated, zero = bitmap & 0xFFFFFFFF, bitmap >> 32
        if allocated & zero or (allocated and not host):
            raise UnreadableError("sub-clusters contradict each other")
        unit = self.cs // 32
        data = b"".join(self.bytes_at(host + i * unit, unit) if allocated >> i & 1 else bytes(unit) for i in range(32))
        return data[low:high]

    def _decompress(self, entry: int) -> bytes:
        shift = 62 - (self.bits - 8)
        host = entry & ((1 << shift) - 1)
        sectors = (entry & (COMPRESSED - 1)) >> shift
        stream = self.bytes_at(host, (sectors + 1) * 512 - host % 512)
        try:
            if self.codec:
                out = _unzstd(stream, self.cs)
            else:
                out = zlib.decompressobj(-15).decompress(stream, self.cs)
        except (zlib.error, zstandard.ZstdError) as error:
            raise UnreadableError(str(error)) from None
        if len(out) < self.cs:
            raise UnreadableError("stream too short")
        return out[: self.cs]

    def refcount(self, cluster: int) -> int:
        """As stored."""
        per_block = self.cs * 8 >> self.order
        index, position = divmod(cluster, per_block)
        if index >= self.table_clusters * self.cs // 8:
            return 0
        block = self.word(self.table + 8 * index) & OFFSET
        if not block:
            return 0
        bit = position << self.order
        if self.order >= 3:
            return int.from_bytes(self.bytes_at(block + bit // 8, 1 << self.order - 3), "big")
        return self.bytes_at(block + bit // 8, 1)[0] >> bit % 8 & ((1 << (1 << self.order)) - 1)

    def metadata(self) -> set[int]:
        """Clusters that guest data must never be written to; found inside the file only."""
        end = len(self.raw)
        areas = [(0, self.cs), (self.l1, self.l1_size * 8), (self.table, self.table_clusters * self.cs)]
        areas += [(self.word(self.l1 + 8 * i) & OFFSET, self.cs) for i in range(min(self.l1_size, end // 8))]
        words = min(self.table_clusters * self.cs, end) // 8
        areas += [(self.word(self.table + 8 * i) & OFFSET, self.cs) for i in range(words)]
        return {
            cluster
            for offset, length in areas
            for cluster in range(offset // self.cs, -(-min(offset + length, end) // self.cs))
        }
