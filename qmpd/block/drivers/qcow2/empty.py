"""Forgetting everything that an image holds, so that all of it comes from the backing file (spec/qcow2.md section 8).

For an image whose content is durably in its backing file: then the guest's view stays the same, however much of this
survives a crash. Two ways lead there.

*Reset*: new, empty metadata at the front of the file, and the rest of it cut off. While that goes on the dirty bit is
set, so that the next writer counts references anew. The order, each step durable before the next one:

    dirty bit -> L1 table in its old place zeroed (the image is empty from here on)
    -> room for the new structures zeroed -> header names them -> refcount table names its block -> counts
    -> dirty bit off -> file cut

*Drop*: where something else than the guest's mapping lives in the file (snapshots, bitmaps), or where the counts do not
fit one block, all clusters are given up range by range, in the order of any discard.
"""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np

from qmpd.block.debug import Event
from qmpd.block.drivers.qcow2 import header as hdr
from qmpd.block.drivers.qcow2.image import Image
from qmpd.block.drivers.qcow2.writing import Writer
from qmpd.block.drivers.qcow2.zeroing import Eraser
from qmpd.errors import QmpdError
from qmpd.units import align_up, ceil_div


def make_empty(image: Image, writer: Writer, eraser: Eraser) -> None:
    """Make every cluster unallocated, durably at return. A worker thread; requests must be kept away by the caller.

    Raises the file's errors. A drop that fails leaves a part of the clusters. A reset that fails leaves an image that
    is empty for readers and takes no more writes until it is opened again.
    """
    with image.lock:
        writer.begin()
        claim = eraser.claim_everything()
    try:
        with image.lock:
            image.meta.flush(image.alloc.release)
            idle = not image.alloc.waiting and image.inflight.finished(image.inflight.now)
            if idle and _can_reset(image):
                _reset(image)
                return
        eraser.drop_range(0, align_up(image.header.size, image.geometry.cluster_size))
        image.flush()
        if image.geometry.external and (end := min(image.header.size, image.data.length)):
            image.data.discard(0, end)
    finally:
        with image.lock:
            image.inflight.unclaim(claim)


def _can_reset(image: Image) -> bool:
    """Is the guest's mapping all there is, and one refcount block enough for what will be left?"""
    header = image.header
    return (
        header.version >= 3
        and not header.nb_snapshots
        and header.extension(hdr.EXT_BITMAPS) is None
        and header.extension(hdr.EXT_CRYPTO) is None
        and not header.incompatible & hdr.DATA_FILE
        and _clusters_left(image) <= image.refcounts.per_block
    )


def _clusters_left(image: Image) -> int:
    """Header, refcount table, one refcount block, L1 table."""
    return 3 + ceil_div(image.header.l1_size * 8, image.geometry.cluster_size)


def _reset(image: Image) -> None:
    """Lock held, nothing cached is dirty, no request under way."""
    size, end = image.geometry.cluster_size, _clusters_left(image)
    image.set_dirty_bit(on=True)
    image.announce(Event.L1_UPDATE)
    try:
        image.file.write_zeroes(image.header.l1_offset, align_up(image.header.l1_size * 8, size), unmap=False)
        _forget_mapping(image)
        image.file.flush()
        image.announce(Event.EMPTY_IMAGE_PREPARE)
        image.file.write_zeroes(size, (end - 1) * size, unmap=False)
        image.file.flush()
        _place_structures(image, end)
    except QmpdError as error:
        image.meta.refcount_blocks.clear()
        image.meta.refcount_table.settle()
        image.take_no_more_writes(error)
        raise
    image.set_dirty_bit(on=False)
    _cut(image, end)


def _forget_mapping(image: Image) -> None:
    """What is in memory says the same as the zeroed L1 table."""
    image.meta.l1.entries = np.zeros_like(image.meta.l1.entries)
    image.meta.l2.clear()
    image.overlap.l2 = set()


def _place_structures(image: Image, end: int) -> None:
    """Refcount table, its block and the L1 table in clusters 1, 2 and from 3 on; the first ``end`` clusters counted."""
    size, meta = image.geometry.cluster_size, image.meta
    image.write_header_field(40, struct.pack(">QQI", 3 * size, size, 1))
    image.header = replace(image.header, l1_offset=3 * size, refcount_table_offset=size, refcount_table_clusters=1)
    meta.l1.offset = 3 * size
    meta.refcount_blocks.clear()
    meta.refcount_table.offset = size
    meta.refcount_table.entries = np.zeros(size // 8, np.uint64)
    meta.refcount_table[0] = 2 * size
    image.overlap.blocks = {2}
    image.note_areas()
    counts = image.refcounts.codec.empty(image.refcounts.per_block)
    counts[:end] = 1
    meta.refcount_table.write_back()
    image.file.flush()
    meta.refcount_table.settle()
    meta.refcount_blocks.create(2 * size, counts)
    meta.flush(image.alloc.release)


def _cut(image: Image, end: int) -> None:
    """Give the rest of the file back. Nothing refers to it any more: where a file cannot be cut that does no harm."""
    length = end * image.geometry.cluster_size
    image.alloc.start_over(end)
    if getattr(image.file, "growable", False) and image.file.length > length:
        image.file.truncate(length)
        image.alloc.rewind(end)
    image.file.flush()
