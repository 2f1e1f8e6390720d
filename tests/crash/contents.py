"""Looking into images that are only bytes: the guest's view by qmpd's own driver, and a check of the structure.

The check knows the format by itself, so that driver and check do not share their mistakes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qmpd.block.drivers.qcow2 import Qcow2
from tests.block.qcow2.support import MemoryFile, children, read

Images = dict[str, bytes]
Array = npt.NDArray[Any]

COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
OFFSET: Final = 0x00FFFFFFFFFFFE00
DIRTY: Final = 1
EXTERNAL: Final = 4


class DamageError(AssertionError):
    """A state that must not be."""


def chain(images: Images, name: str, **changed: bytes) -> Any:
    """The image ``name`` over what its header names, read-only."""
    raw = changed.get("raw", images[name])
    if name.endswith(".raw"):
        return MemoryFile(raw)
    image = open_image(images, raw, read_only=True)
    reference = image.backing_reference
    if reference is not None:
        if reference.filename not in images or not reference.filename.endswith(reference.format or ""):
            raise DamageError(f"{name}: the header names {reference}")
        image.attach("backing", chain(images, reference.filename))
    return image


def open_image(images: Images, raw: bytes, *, read_only: bool) -> Qcow2:
    """One image, with the data file that it names."""
    file = MemoryFile(raw)
    name = Qcow2.named_data_file(file)
    return Qcow2.open(children(file, MemoryFile(images[name]) if name else None), {}, read_only=read_only)


def view(images: Images, name: str, **changed: bytes) -> bytes:
    """All bytes that a guest reads from the image."""
    image = chain(images, name, **changed)
    return read(image, 0, image.length)


def backing_name(raw: bytes) -> str | None:
    """What the header says."""
    offset, length = struct.unpack_from(">QI", raw, 8)
    return raw[offset : offset + length].decode() if offset else None


def snapshots(raw: bytes) -> dict[str, bytes]:
    """Of each internal snapshot, by name: the image as it would be if that were its active state."""
    count, offset = struct.unpack_from(">IQ", raw, 60)
    found = {}
    for l1, l1_size, size, name, end in _snapshot_rows(raw, count, offset):
        changed = bytearray(raw)
        struct.pack_into(">Q", changed, 24, size)
        struct.pack_into(">IQ", changed, 36, l1_size, l1)
        found[name] = bytes(changed)
        offset = end
    return found


def _snapshot_rows(raw: bytes, count: int, offset: int) -> list[tuple[int, int, int, str, int]]:
    rows = []
    for _ in range(count):
        l1, l1_size, id_length, name_length = struct.unpack_from(">QIHH", raw, offset)
        (extra,) = struct.unpack_from(">I", raw, offset + 36)
        (size,) = struct.unpack_from(">Q", raw, offset + 48)
        start = offset + 40 + extra + id_length
        name = raw[start : start + name_length].decode()
        offset = (start + name_length + 7) // 8 * 8
        rows.append((l1, l1_size, size, name, offset))
    return rows


@dataclass
class Structure:
    """What a walk through one image found."""

    raw: bytes
    errors: list[str] = field(default_factory=list)
    leaks: int = 0
    #: Does an active entry share its cluster with another one? No writer does that, and none sets flags right then.
    ambiguous: bool = False

    def __post_init__(self) -> None:
        (self.version, self.bits) = struct.unpack_from(">I12xI", self.raw, 4)
        self.size = 1 << self.bits
        self.clusters = -(-len(self.raw) // self.size)
        self.references = np.zeros(self.clusters + 1, np.int64)
        self.words = 1
        self.order = 4
        self.dirty = self.external = False
        if self.version >= 3:
            (incompatible,) = struct.unpack_from(">Q", self.raw, 72)
            (self.order,) = struct.unpack_from(">I", self.raw, 96)
            self.words = 2 if incompatible & 16 else 1
            self.dirty = bool(incompatible & DIRTY)
            self.external = bool(incompatible & EXTERNAL)
            if incompatible & 2:
                self.errors.append("marked as corrupt")
        self._walk()

    def _walk(self) -> None:
        l1_size, l1, table, table_clusters, count, offset = struct.unpack_from(">IQQIIQ", self.raw, 36)
        self._refer("header", 0, self.size)
        active = self._words("L1 table", l1, l1_size * 8)
        maps = [self._map(active)]
        plain = np.concatenate((active, maps[0]))
        plain = plain[(plain & np.uint64(COMPRESSED) == 0) & (plain & np.uint64(OFFSET) != 0)] & np.uint64(OFFSET)
        own = np.minimum((plain // np.uint64(self.size)).astype(np.int64), self.clusters)
        self.ambiguous = not self.external and bool((self.references[own] > 1).any())
        rows = _snapshot_rows(self.raw, count, offset)
        if rows:
            self._refer("snapshot table", offset, rows[-1][4] - offset)
        maps += [self._map(self._words("snapshot's L1 table", row[0], row[1] * 8)) for row in rows]
        blocks = self._words("refcount table", table, table_clusters * self.size)
        if self.dirty:
            return
        counts = self._counts(blocks)
        low = np.flatnonzero(counts < self.references)
        if len(low):
            self.errors.append(
                f"cluster {low[0]}: {self.references[low[0]]} references, refcount {counts[low[0]]} ({len(low)} such)"
            )
        self.leaks = int((counts > self.references).sum())
        for kind, entries in (("L1", active), ("L2", maps[0])):
            self._check_copied(kind, entries, counts)

    def _check_copied(self, kind: str, entries: Array, counts: Array) -> None:
        plain = entries[(entries & np.uint64(COMPRESSED) == 0) & (entries & np.uint64(OFFSET) != 0)]
        where = (plain & np.uint64(OFFSET)).astype(np.int64) // self.size
        flagged = plain & np.uint64(COPIED) != 0
        alone = counts[np.minimum(where, self.clusters)] == 1
        wrong = ~flagged if self.external and kind == "L2" else flagged != alone
        if wrong.any():
            self.errors.append(f"{kind} entry {int(plain[wrong][0]):#x}: copied flag and refcount disagree")

    def _words(self, what: str, offset: int, length: int) -> Array:
        self._refer(what, offset, length)
        part = self.raw[offset : offset + length]
        return np.frombuffer(part.ljust(length, b"\0"), ">u8").astype(np.uint64)

    def _refer(self, what: str, offset: int, length: int) -> None:
        if length:
            self._refer_all(what, np.arange(offset // self.size, -(-(offset + length) // self.size)))
        if offset % self.size:
            self.errors.append(f"{what} at {offset:#x}: not aligned")

    def _refer_all(self, what: str, clusters: Array) -> None:
        if len(clusters) and int(clusters.max()) >= self.clusters:
            self.errors.append(f"{what}: cluster {int(clusters.max())} is behind the end of the file")
        np.add.at(self.references, np.minimum(clusters, self.clusters), 1)

    def _map(self, l1: Array) -> Array:
        """All L2 entries below an L1 table."""
        tables = [np.zeros(0, np.uint64)]
        for entry in l1[l1 != 0].tolist():
            words = self._words("L2 table", entry & OFFSET, self.size).reshape(-1, self.words)
            if self.words == 2 and (words[:, 1] & (words[:, 1] >> np.uint64(32)) & np.uint64(0xFFFFFFFF)).any():
                self.errors.append("a subcluster is both allocated and zero")
            tables.append(words[:, 0])
        entries: Array = np.concatenate(tables)
        compressed = entries & np.uint64(COMPRESSED) != 0
        if self.external:
            if compressed.any():
                self.errors.append("a compressed cluster with a data file")
            return entries
        hosts = (entries[~compressed] & np.uint64(OFFSET)).astype(np.int64)
        hosts = hosts[hosts != 0]
        if (hosts % self.size).any():
            self.errors.append("a data cluster is not aligned")
        self._refer_all("data", hosts // self.size)
        for entry in entries[compressed].tolist():
            self._refer_compressed(entry)
        return entries

    def _refer_compressed(self, entry: int) -> None:
        shift = 62 - (self.bits - 8)
        offset, sectors = entry & ((1 << shift) - 1), (entry & (COMPRESSED - 1)) >> shift
        if offset >= self.clusters * self.size:
            self.errors.append(f"compressed data at {offset:#x} begins behind the end of the file")
        end = min(offset // 512 * 512 + (sectors + 1) * 512, self.clusters * self.size)
        self._refer_all("compressed data", np.arange(offset // self.size, (end - 1) // self.size + 1))

    def _counts(self, blocks: Array) -> Array:
        per_block = self.size * 8 >> self.order
        counts = np.zeros(self.clusters + 1, np.int64)
        for index in np.flatnonzero(blocks).tolist():
            offset = int(blocks[index])
            self._refer("refcount block", offset, self.size)
            part = self.raw[offset : offset + self.size].ljust(self.size, b"\0")
            found = self._decode(part)[: max(0, self.clusters - index * per_block)]
            counts[index * per_block : index * per_block + len(found)] = found
        return counts

    def _decode(self, part: bytes) -> Array:
        if self.order >= 3:
            return np.frombuffer(part, f">u{1 << self.order - 3}").astype(np.int64)
        bits = np.unpackbits(np.frombuffer(part, np.uint8), bitorder="little").reshape(-1, 1 << self.order)
        return bits @ (1 << np.arange(1 << self.order))
