"""Index arithmetic and the vocabulary of L1 and L2 entries (spec/qcow2.md section 2). Pure; any thread.

In memory all tables are native ``uint64`` arrays. An L2 table has shape ``(entries, words)``: one word per entry, or
two with extended L2 entries. The *unit* is the smallest thing with a state of its own: the cluster, or with extended L2
entries the sub-cluster (1/32 of it).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from qmpd.block.extents import RunKind, Runs
from qmpd.errors import Kind, QmpdError
from qmpd.units import ceil_div

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
ZERO: Final = 1
OFFSET_MASK: Final = 0x00FFFFFFFFFFFE00
L1_RESERVED: Final = 0x7F000000000001FF
L2_RESERVED: Final = 0x3F000000000001FE
SUBCLUSTERS: Final = 32
ALL_ALLOCATED: Final = 0xFFFFFFFF
ALL_ZERO: Final = 0xFFFFFFFF << 32
#: L1 and L2 entries have room for host offsets below this.
MAX_HOST: Final = 1 << 56

_OFFSET = np.uint64(OFFSET_MASK)
_COMPRESSED = np.uint64(COMPRESSED)
_ZERO = np.uint64(ZERO)
_LOW = np.uint64(ALL_ALLOCATED)
_BITS = np.arange(SUBCLUSTERS, dtype=np.uint64)


@dataclass(frozen=True)
class Geometry:
    """Sizes that follow from the header and never change while an image is open."""

    cluster_bits: int
    extended: bool = False
    #: Is the guest's data in a file of its own? Every byte is where the guest has it there, also at offset 0.
    external: bool = False

    @cached_property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @cached_property
    def words(self) -> int:
        """64-bit words in an L2 entry."""
        return 2 if self.extended else 1

    @cached_property
    def l2_bits(self) -> int:
        return self.cluster_bits - (4 if self.extended else 3)

    @cached_property
    def l2_entries(self) -> int:
        return 1 << self.l2_bits

    @cached_property
    def _has_host(self) -> np.uint64:
        return np.uint64(OFFSET_MASK | COPIED if self.external else OFFSET_MASK)

    def mapped(self, first: U64) -> Bools:
        """Which of these words, none of a compressed cluster, give the guest's cluster a place."""
        found: Bools = (first & self._has_host) != 0
        return found

    @cached_property
    def units(self) -> int:
        """Units in a cluster."""
        return SUBCLUSTERS if self.extended else 1

    @cached_property
    def unit_size(self) -> int:
        return self.cluster_size // self.units

    @cached_property
    def span_bits(self) -> int:
        return self.cluster_bits + self.l2_bits

    @cached_property
    def span(self) -> int:
        """Guest bytes that one L2 table maps."""
        return 1 << self.span_bits

    def l1_entries(self, size: int) -> int:
        """L1 entries needed for a disk of ``size`` bytes."""
        return ceil_div(size, self.span)

    def touched(self, low: int, high: int) -> int:
        """Mask of the units that bytes ``[low, high)`` of a cluster fall into."""
        first, end = low // self.unit_size, ceil_div(high, self.unit_size)
        return ((1 << (end - first)) - 1) << first

    def compressed_span(self, entry: int) -> tuple[int, int]:
        """Host offset and number of bytes a compressed entry may use."""
        shift = 62 - (self.cluster_bits - 8)
        host = entry & ((1 << shift) - 1)
        sectors = ((entry & (COMPRESSED - 1)) >> shift) + 1
        return host, sectors * 512 - host % 512

    def compressed_spans(self, entries: U64) -> tuple[I64, I64]:
        """:meth:`compressed_span` of many entries."""
        shift = 62 - (self.cluster_bits - 8)
        host = (entries & np.uint64((1 << shift) - 1)).astype(np.int64)
        sectors = ((entries & np.uint64(COMPRESSED - 1)) >> np.uint64(shift)).astype(np.int64) + 1
        return host, sectors * 512 - host % 512


def bad_entries(geometry: Geometry, clusters: I64, entries: U64, *, version: int) -> tuple[int, str] | None:
    """The first entry of ``entries`` (n, words) that cannot be followed, with a word for why; or None.

    ``clusters`` are the guest's clusters that they are of. Reserved bits are not looked at: readers ignore them.
    """
    first = entries[:, 0]
    plain = (first & _COMPRESSED) == 0
    host = first & _OFFSET
    broken: list[tuple[int, str]] = []

    def note(mask: Bools, reason: str) -> None:
        if mask.any():
            broken.append((int(mask.argmax()), reason))

    note(plain & ((host & np.uint64(geometry.cluster_size - 1)) != 0), "unaligned")
    if geometry.external:
        note(~plain, "compressed")
        flagged = (first & _ZERO) != 0 if not geometry.extended else np.zeros(len(first), np.bool_)
        elsewhere = host != clusters.astype(np.uint64) << np.uint64(geometry.cluster_bits)
        note(plain & geometry.mapped(first) & elsewhere & ~(flagged & (host == 0)), "elsewhere")
    if geometry.extended:
        allocated = entries[:, 1] & _LOW
        zero = entries[:, 1] >> np.uint64(32)
        note(plain & (((allocated & zero) != 0) | ((allocated != 0) & ~geometry.mapped(first))), "invalid")
    elif version < 3:
        note(plain & ((first & _ZERO) != 0), "zero-v2")
    return min(broken) if broken else None


def c_hex(value: int) -> str:
    """As C prints ``%#x``: zero has no prefix."""
    return f"{value:#x}" if value else "0"


def entry_error(geometry: Geometry, reason: str, entry: int, l2_offset: int, cluster: int) -> QmpdError:
    """The error for a verdict of :func:`bad_entries` on the entry of a guest cluster, in QEMU's words."""
    l2_index = cluster & (geometry.l2_entries - 1)
    where = f"(L2 offset: {c_hex(l2_offset)}, L2 index: {c_hex(l2_index)})"
    texts = {
        "compressed": f"Compressed cluster entry found in image with external data file {where}",
        "elsewhere": f"External data file host cluster offset {c_hex(entry & OFFSET_MASK)} does not match guest cluster"
        f" offset: {c_hex(cluster << geometry.cluster_bits)}, L2 index: {c_hex(l2_index)})",
        "unaligned": f"Cluster allocation offset {entry & OFFSET_MASK:#x} unaligned {where}",
        "invalid": f"Invalid cluster entry found  {where}",
        "zero-v2": f"Zero cluster entry found in pre-v3 image {where}",
    }
    return QmpdError(texts[reason], Kind.CORRUPT)


@dataclass(frozen=True, slots=True)
class Units:
    """States of units: guest unit number (ascending), :class:`RunKind` and host byte offset."""

    number: I64
    kind: npt.NDArray[np.uint8]
    host: I64


def units_of(geometry: Geometry, clusters: I64, entries: U64) -> Units:
    """States of all units of the guest ``clusters`` (n,) with these L2 ``entries`` (n, words)."""
    first = entries[:, 0]
    compressed = (first & _COMPRESSED) != 0
    host = (first & _OFFSET).astype(np.int64)
    if geometry.external:
        host = clusters << geometry.cluster_bits
    if not geometry.extended:
        kind = np.where(geometry.mapped(first), np.uint8(RunKind.DATA), np.uint8(RunKind.UNALLOCATED))
        kind[(first & _ZERO) != 0] = RunKind.ZERO
        kind[compressed] = RunKind.COMPRESSED
        return Units(clusters, kind, host)
    bitmap = entries[:, 1][:, None]
    one = np.uint64(1)
    kinds = np.zeros((len(clusters), SUBCLUSTERS), np.uint8)
    kinds[((bitmap >> _BITS) & one) != 0] = RunKind.DATA
    kinds[((bitmap >> (_BITS + np.uint64(32))) & one) != 0] = RunKind.ZERO
    kinds[compressed] = RunKind.COMPRESSED
    steps = np.arange(SUBCLUSTERS, dtype=np.int64)
    number = clusters[:, None] * SUBCLUSTERS + steps
    hosts = host[:, None] + steps * geometry.unit_size
    return Units(number.ravel(), kinds.ravel(), hosts.ravel())


def runs_of(geometry: Geometry, units: Units, start: int, end: int, file_end: int) -> Runs:
    """Coalesce unit states into gapless runs over the guest range ``[start, end)``, bytes.

    Units not listed are unallocated. Data past ``file_end`` (the length of its file) reads as zeros. Every
    compressed cluster stays a run of its own.
    """
    keep = units.kind != RunKind.UNALLOCATED
    number, kind, host = units.number[keep], units.kind[keep], units.host[keep]
    size = geometry.unit_size
    if not len(number):
        return Runs.single(start, end - start, RunKind.UNALLOCATED)
    fresh = np.empty(len(number), np.bool_)
    fresh[0] = True
    fresh[1:] = (
        (number[1:] != number[:-1] + 1)
        | (kind[1:] != kind[:-1])
        | ((kind[1:] == RunKind.DATA) & (host[1:] != host[:-1] + size))
        | ((kind[1:] == RunKind.COMPRESSED) & (number[1:] // geometry.units != number[:-1] // geometry.units))
    )
    head = np.flatnonzero(fresh)
    tail = np.append(head[1:], len(number)) - 1
    first = number[head] * size
    begin = np.maximum(first, start)
    stop = np.minimum((number[tail] + 1) * size, end)
    inside = stop > begin
    begin, stop, kind, host = begin[inside], stop[inside], kind[head][inside], (host[head] + begin - first)[inside]
    host[kind != RunKind.DATA] = -1
    return split_at_end(_with_gaps(begin, stop, kind, host, start, end), file_end)


def _with_gaps(begin: I64, stop: I64, kind: npt.NDArray[np.uint8], host: I64, start: int, end: int) -> Runs:
    """Put unallocated runs between the given ones."""
    count = len(begin)
    edge = np.empty(2 * count + 2, np.int64)
    edge[0], edge[-1] = start, end
    edge[1:-1:2], edge[2:-1:2] = begin, stop
    kinds = np.zeros(2 * count + 1, np.uint8)
    kinds[1::2] = kind
    hosts = np.full(2 * count + 1, -1, np.int64)
    hosts[1::2] = host
    length = np.diff(edge)
    keep = length > 0
    return Runs(edge[:-1][keep], length[keep], kinds[keep], hosts[keep])


def split_at_end(runs: Runs, file_end: int) -> Runs:
    """Turn the parts of DATA runs that lie past ``file_end`` into ZERO runs."""
    past = (runs.kind == RunKind.DATA) & (runs.host + runs.length > file_end)
    if not past.any():
        return runs
    inside = np.clip(file_end - runs.host, 0, runs.length)
    offset, length, kind, host = [], [], [], []
    for i in range(len(runs)):
        pieces = [(0, int(runs.length[i]), int(runs.kind[i]), int(runs.host[i]))]
        if past[i]:
            cut = int(inside[i])
            pieces = [(0, cut, RunKind.DATA, int(runs.host[i])), (cut, int(runs.length[i]) - cut, RunKind.ZERO, -1)]
        for shift, size, what, where in pieces:
            if size:
                offset.append(int(runs.offset[i]) + shift)
                length.append(size)
                kind.append(what)
                host.append(where)
    return Runs(
        np.array(offset, np.int64), np.array(length, np.int64), np.array(kind, np.uint8), np.array(host, np.int64)
    )
