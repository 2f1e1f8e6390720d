"""Reference counts of host clusters (spec/qcow2.md section 3), all widths from 1 to 64 bits.

In memory a refcount block is a native array with one element per cluster, whatever the width on disk. Called with the
image lock held.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from qmpd.block.drivers.qcow2.cache import Array, Codec, Table
from qmpd.block.drivers.qcow2.tables import I64, OFFSET_MASK, U64, c_hex

if TYPE_CHECKING:
    from qmpd.block.drivers.qcow2.image import Image

#: dtype in memory by refcount_order; widths below a byte are unpacked.
_NATIVE: Final = (np.uint8, np.uint8, np.uint8, np.uint8, np.uint16, np.uint32, np.uint64)


class RefcountCodec(Codec):
    """Packing of one refcount block: below a byte the lowest bits come first, above it is big-endian."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.width = 1 << order
        self.per_word = 64 >> order

    def decode(self, raw: bytearray) -> Array:
        if self.order >= 3:
            return np.frombuffer(raw, f">u{self.width // 8}").astype(_NATIVE[self.order])
        packed = np.frombuffer(raw, np.uint8)
        shifts = np.arange(0, 8, self.width, dtype=np.uint8)
        mask = np.uint8((1 << self.width) - 1)
        return ((packed[:, None] >> shifts) & mask).ravel()

    def encode(self, part: Array) -> bytes:
        if self.order >= 3:
            return bytes(part.astype(f">u{self.width // 8}").tobytes())
        shifts = np.arange(0, 8, self.width, dtype=np.uint8)
        groups: npt.NDArray[np.uint8] = part.reshape(-1, len(shifts)) << shifts
        packed: npt.NDArray[np.uint8] = np.bitwise_or.reduce(groups, axis=1)
        return packed.tobytes()

    def empty(self, entries: int) -> Array:
        return np.zeros(entries, _NATIVE[self.order])


def bad_block_pointer(offset: int, index: int) -> str:
    """What is wrong with a refcount table entry, in QEMU's words."""
    return f"Refblock offset {offset:#x} unaligned (reftable index: {c_hex(index)})"


class Refcounts:
    """Reads and changes counts. Clusters are given by index; arrays of them need not be sorted."""

    def __init__(self, image: Image, codec: RefcountCodec) -> None:
        self._image = image
        self.codec = codec
        #: Clusters whose counts one block holds.
        self.per_block = image.geometry.cluster_size * 8 >> codec.order
        self.maximum = (1 << codec.width) - 1

    def block(self, index: int) -> Table | None:
        """Block number ``index``, or None where all its counts are 0. Raises CORRUPT for a bad pointer."""
        table = self._image.meta.refcount_table
        if index >= len(table):
            return None
        offset = table[index] & OFFSET_MASK
        if not offset:
            return None
        if offset % self._image.geometry.cluster_size:
            raise self._image.corruption(bad_block_pointer(offset, index))
        if offset >= self._image.frontier:
            raise self._image.corruption(f"Refblock offset {offset:#x} behind the end of the file")
        return self._image.meta.refcount_blocks.get(offset)

    def get(self, cluster: int) -> int:
        index, position = divmod(cluster, self.per_block)
        block = self.block(index)
        return 0 if block is None else int(block.data[position])

    def cached_block(self, index: int) -> Table | None:
        """Block number ``index`` if it is in memory. Raises nothing."""
        table = self._image.meta.refcount_table.entries
        return self._image.meta.refcount_blocks.cached(table.item(index) & OFFSET_MASK) if index < len(table) else None

    def get_many(self, clusters: I64) -> U64:
        """Counts of several clusters."""
        out = np.zeros(len(clusters), np.uint64)
        for index, mask in self._by_block(clusters):
            block = self.block(index)
            if block is not None:
                out[mask] = block.data[clusters[mask] - index * self.per_block]
        return out

    def add(self, clusters: I64, delta: int) -> None:
        """Raise or lower counts by one; a cluster given twice counts twice.

        Raises CORRUPT, with nothing changed in that block, if a count would leave its range or has no block.
        """
        for index, mask in self._by_block(clusters):
            block = self.block(index)
            if block is None:
                raise self._image.corruption(f"Cluster {int(clusters[0])} in use has refcount 0")
            positions, times = np.unique(clusters[mask] - index * self.per_block, return_counts=True)
            old = block.data[positions].astype(np.uint64)
            times = times.astype(np.uint64)
            if (old < times).any() if delta < 0 else (old + times > np.uint64(self.maximum)).any():
                where = index * self.per_block + int(positions[0])
                raise self._image.corruption(f"Refcount of cluster {where} out of range")
            new = old - times if delta < 0 else old + times
            block.data[positions] = new.astype(block.data.dtype)
            self._image.meta.refcount_blocks.touch(block, int(positions[0]), int(positions[-1]) + 1)

    def lower_to(self, clusters: I64, counts: U64) -> None:
        """Store lower counts for ascending ``clusters`` that have blocks."""
        for index, mask in self._by_block(clusters):
            block = self.block(index)
            assert block is not None
            positions = clusters[mask] - index * self.per_block
            block.data[positions] = counts[mask].astype(block.data.dtype)
            self._image.meta.refcount_blocks.touch(block, int(positions[0]), int(positions[-1]) + 1)

    def _by_block(self, clusters: I64) -> list[tuple[int, slice | npt.NDArray[np.bool_]]]:
        if not len(clusters):
            return []
        index = clusters // self.per_block
        low, high = int(index.min()), int(index.max())
        if low == high:
            return [(low, slice(None))]
        return [(i, index == i) for i in np.unique(index).tolist()]
