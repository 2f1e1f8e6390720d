"""Rebuilding the refcounts of an image whose dirty bit is set (spec/qcow2.md section 1.1).

The old counts are not trusted at all: references are counted from the mapping, and a new refcount structure is written
behind everything in use before the header is pointed at it. A crash in between leaves the image as it was.
"""

from __future__ import annotations

import logging
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from qmpd.block.drivers.qcow2 import header as hdr
from qmpd.block.drivers.qcow2.cache import Array
from qmpd.block.drivers.qcow2.references import References
from qmpd.block.findings import Report
from qmpd.errors import Kind, QmpdError
from qmpd.units import ceil_div

if TYPE_CHECKING:
    from qmpd.block.drivers.qcow2.image import Image

_log = logging.getLogger(__name__)


def rebuild_refcounts(image: Image) -> None:
    """Count all references and store them. Lock held; nothing cached is dirty. The dirty bit stays for the caller.

    Raises CORRUPT, with nothing changed, for a mapping that makes no sense or holds more references than can be stored.
    """
    _log.warning("qcow2: image was not closed cleanly, rebuilding refcount structure")
    report = Report()
    references = References(image, report, pulse=lambda: None)
    references.count()
    if not report.sound:
        first = report.findings[0]
        raise _hopeless(f"{first.field} at {first.offset:#x} is {first.value:#x}: {first.text}")
    _store(image, references.counts)


def _store(image: Image, counts: Array) -> None:
    """Write ``counts`` as a new refcount structure behind the last cluster in use."""
    size, per_block = image.geometry.cluster_size, image.refcounts.per_block
    first = _first_free(image, counts)
    blocks, clusters = 1, 1
    while True:
        needed = ceil_div(first + clusters + blocks, per_block), ceil_div(blocks * 8, size)
        if needed == (blocks, clusters):
            break
        blocks, clusters = needed
    if clusters * size > hdr.MAX_REFCOUNT_TABLE:
        raise _hopeless("the refcount table would be too large")
    native = image.refcounts.codec.empty(blocks * per_block)
    native[: len(counts[:first])] = counts[:first]
    native[first : first + clusters + blocks] = 1
    codec, start = image.refcounts.codec, (first + clusters) * size
    for index in range(blocks):
        part = native[index * per_block : (index + 1) * per_block]
        image.file.write(start + index * size, codec.encode(part))
    table = np.zeros(clusters * size // 8, np.uint64)
    table[:blocks] = start + np.arange(blocks, dtype=np.uint64) * np.uint64(size)
    image.file.write(first * size, table.astype(">u8").tobytes())
    image.file.flush()
    image.write_header_field(48, struct.pack(">QI", first * size, clusters))
    image.header = replace(image.header, refcount_table_offset=first * size, refcount_table_clusters=clusters)
    image.meta.refcount_blocks.clear()
    image.meta.refcount_table.offset, image.meta.refcount_table.entries = first * size, table
    image.overlap.blocks = set(range(first + clusters, first + clusters + blocks))
    image.note_areas()
    image.alloc.virgin = max(image.alloc.virgin, first + clusters + blocks)


def _first_free(image: Image, counts: Array) -> int:
    """The first cluster behind all that is in use, and behind the old refcount table.

    As long as the header names that table, it must look like one, or nobody would open the image for another attempt.
    A device that cannot grow may have no room for such care.
    """
    used = np.flatnonzero(counts)
    first = int(used[-1]) + 1 if len(used) else 1
    if not getattr(image.file, "growable", False):
        return first
    header = image.header
    return max(first, header.refcount_table_offset // header.cluster_size + header.refcount_table_clusters)


def _hopeless(why: str) -> QmpdError:
    return QmpdError(f"qcow2: Image is dirty and cannot be repaired ({why}); use qemu-img check -r all", Kind.CORRUPT)
