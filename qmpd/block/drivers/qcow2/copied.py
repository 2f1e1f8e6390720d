"""The copied flags of the active tables: "this cluster has one user" (spec/qcow2.md section 2).

The flag allows writing in place, so it must be gone before a second user appears, and may come back when only one is
left. It says nothing that the counts do not say. Called with the image lock held, no request under way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from qmpd.block.drivers.qcow2.tables import COMPRESSED, COPIED, I64, OFFSET_MASK, U64, Bools

if TYPE_CHECKING:
    from qmpd.block.drivers.qcow2.image import Image

_FLAG = np.uint64(COPIED)


def clear_flags(image: Image) -> None:
    """Take the flag off every entry, durably."""
    _set_flags(image, lambda clusters: np.zeros(len(clusters), np.bool_))


def refresh_flags(image: Image) -> None:
    """Set every flag as the counts have it, durably."""
    _set_flags(image, lambda clusters: image.refcounts.get_many(clusters) == 1)


def _set_flags(image: Image, alone: Callable[[I64], Bools]) -> None:
    """``alone`` tells of host clusters whether they have the flag."""
    l1 = image.meta.l1
    offsets = (l1.entries & np.uint64(OFFSET_MASK)).astype(np.int64)
    used = np.flatnonzero(offsets)
    # A disk may have many tables: the cache is kept within its bounds on the way.
    for offset in offsets[used].tolist():
        table = image.meta.l2.get(offset)
        entries = table.data[:, 0]
        changed = np.flatnonzero(_flagged(image, entries, alone) != entries)
        if len(changed):
            entries[changed] ^= _FLAG
            image.meta.l2.touch(table, int(changed[0]), int(changed[-1]) + 1)
        image.settle()
    wanted = np.where(alone(offsets[used] // image.geometry.cluster_size), _FLAG, np.uint64(0))
    for index, entry in zip(used.tolist(), (offsets[used].astype(np.uint64) | wanted).tolist(), strict=True):
        if l1[index] != entry:
            l1[index] = entry
    image.meta.flush(image.alloc.release)


def _flagged(image: Image, entries: U64, alone: Callable[[I64], Bools]) -> U64:
    """The entries with the flags that they should have; compressed ones never have it."""
    compressed = (entries & np.uint64(COMPRESSED)) != 0
    host = np.where(compressed, np.uint64(0), entries & np.uint64(OFFSET_MASK)).astype(np.int64)
    mapped = np.flatnonzero(host)
    flags = np.zeros(len(entries), np.uint64)
    flags[mapped] = np.where(alone(host[mapped] // image.geometry.cluster_size), _FLAG, np.uint64(0))
    wanted: U64 = np.where(compressed, entries, entries & ~_FLAG | flags)
    return wanted
