"""The consistency check of an image, and what it may repair (spec/qcow2.md section 11).

References are counted from the mapping and held against the counts stored; then the copied flags of the active layer
against the counts. Everything is read from the file, so the image must not be written meanwhile. Worker thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from qmpd.block.drivers.qcow2.cache import Array, L2Codec, read_padded
from qmpd.block.drivers.qcow2.references import References
from qmpd.block.drivers.qcow2.tables import COMPRESSED, COPIED, I64, OFFSET_MASK, U64, Bools, Geometry
from qmpd.block.findings import CheckResult, Report, Severity
from qmpd.errors import Kind, QmpdError
from qmpd.units import MIB, ceil_div

if TYPE_CHECKING:
    from qmpd.block.drivers.qcow2.image import Image

#: Refcount blocks kept while flags are compared, bytes as stored.
_BLOCKS_KEPT: Final = 4 * MIB
_MAX_OFFSET: Final = 1 << 63


def check(image: Image, *, fix_leaks: bool, pulse: Callable[[], None]) -> CheckResult:
    """Examine ``image``; with ``fix_leaks`` give back leaked clusters and set copied flags right.

    Repairs only what is certain: nothing is touched if anything else is wrong, for what looks leaked may then just be
    out of reach. The result describes the image as it is afterwards. ``pulse`` is called often and may raise to end
    the check, which leaves repairs undone, but nothing worse than it was. Raises the file's errors, and EFBIG or ENOMEM
    if the image is too large to be checked.
    """
    examination = Examination(image, pulse)
    leaks_fixed = flags_fixed = 0
    if fix_leaks and examination.leaked and examination.mapping_sound:
        leaks_fixed = _give_back(image, examination.leaked)
        examination = Examination(image, pulse)
    if fix_leaks and examination.flags and examination.mapping_sound and not examination.leaked:
        flags_fixed = _set_flags(image, pulse)
        examination = Examination(image, pulse)
    result = examination.result
    result.leaks_fixed, result.corruptions_fixed = leaks_fixed, flags_fixed
    return result


class Leaks(NamedTuple):
    """Neighbouring clusters from ``first`` on, by index, with the counts they should have where these are lower."""

    clusters: I64
    references: U64


class Examination:
    """One pass over everything."""

    def __init__(self, image: Image, pulse: Callable[[], None]) -> None:
        self._image = image
        self._pulse = pulse
        self._stored = StoredCounts(image)
        self._report = Report()
        #: Counts that are too high, in pieces.
        self.leaked: list[Leaks] = []
        self._end = 0
        references = References(image, self._report, pulse)
        references.count()
        references.count_refcounts()
        self._compare(references.counts)
        #: Do the stored counts cover the mapping, and does the mapping make sense?
        self.mapping_sound = self._report.sound
        before = self._report.counts[Severity.CORRUPTION]
        self._compare_flags()
        #: Copied flags that are wrong.
        self.flags = self._report.counts[Severity.CORRUPTION] - before
        usage = references.usage
        self.result = CheckResult(
            self._report,
            image_end_offset=(self._end + 1) * image.geometry.cluster_size,
            total_clusters=ceil_div(image.header.size, image.geometry.cluster_size),
            allocated_clusters=usage.allocated,
            fragmented_clusters=usage.fragmented,
            compressed_clusters=usage.compressed,
        )

    # -- counts ----------------------------------------------------------------------------------------------------

    def _compare(self, references: Array) -> None:
        per_block = self._image.refcounts.per_block
        for index in range(ceil_div(len(references), per_block)):
            self._pulse()
            start = index * per_block
            counted = references[start : start + per_block]
            try:
                stored = self._stored.block(index)[: len(counted)]
            except QmpdError as error:
                self._unreadable(index, len(counted), error)
                continue
            used = np.flatnonzero((stored != 0) | (counted != 0))
            if len(used):
                self._end = start + int(used[-1])
            self._judge(start, stored, counted)

    def _judge(self, start: int, stored: Array, counted: Array) -> None:
        wrong = np.flatnonzero(stored != counted)
        if not len(wrong):
            return
        have, want = stored[wrong], counted[wrong]
        high = have > want
        for severity, mask in ((Severity.CORRUPTION, ~high), (Severity.LEAK, high)):
            for position, count, uses in zip(
                wrong[mask].tolist(), have[mask].tolist(), want[mask].tolist(), strict=True
            ):
                cluster = start + position
                text = f"cluster {cluster} has refcount {count}, but {uses} references"
                self._report.note(severity, self._stored.offset_of(cluster), "refcount", count, text)
        if high.any():
            self.leaked.append(Leaks(start + wrong[high], want[high].astype(np.uint64)))

    def _unreadable(self, index: int, clusters: int, error: QmpdError) -> None:
        """As many errors as there are clusters whose counts are out of reach."""
        entry = self._image.header.refcount_table_offset + index * 8
        value = self._stored.pointer(index)
        self._report.note(Severity.ERROR, entry, "refcount-table-entry", value, error.desc, times=clusters)

    # -- flags -----------------------------------------------------------------------------------------------------

    def _compare_flags(self) -> None:
        """The copied flag of each active entry must say whether its cluster's count is 1."""
        for flaw in wrong_flags(self._image, self._stored, self._pulse):
            if flaw.table_wrong:
                text = "copied flag and refcount of the L2 table disagree"
                self._report.corruption(self._image.header.l1_offset + flaw.l1_index * 8, "l1-entry", flaw.entry, text)
            if len(flaw.rows):
                at = flaw.table + flaw.rows * (8 * self._image.geometry.words)
                text = "copied flag and refcount of the cluster disagree"
                self._report.corruptions("l2-entry", text, at, flaw.entries)


class Flaw(NamedTuple):
    """Wrong copied flags around one L1 entry: its own, and those in these rows of the L2 ``table`` (host offset)."""

    l1_index: int
    entry: int
    table_wrong: bool
    table: int
    rows: I64
    entries: U64


def wrong_flags(image: Image, stored: StoredCounts, pulse: Callable[[], None]) -> Iterator[Flaw]:
    """Every L1 entry of the active layer with flaws. Entries whose counts cannot be read are passed over."""
    size, codec = image.geometry.cluster_size, L2Codec(image.geometry.words)
    l1 = image.meta.l1.entries
    for index in np.flatnonzero(l1 & np.uint64(OFFSET_MASK)).tolist():
        pulse()
        entry = int(l1[index])
        offset = entry & OFFSET_MASK
        counts, known = stored.lookup(np.array([offset // size], np.int64))
        if not known[0]:
            continue
        table_wrong = (int(counts[0]) == 1) != bool(entry & COPIED)
        entries = codec.decode(read_padded(image.file, offset, size))[:, 0]
        rows = _rows_with_wrong_flag(image.geometry, entries, stored)
        if table_wrong or len(rows):
            yield Flaw(index, entry, table_wrong, offset, rows, entries[rows])


def _rows_with_wrong_flag(geometry: Geometry, entries: U64, stored: StoredCounts) -> I64:
    host = entries & np.uint64(OFFSET_MASK)
    rows = np.flatnonzero(((entries & np.uint64(COMPRESSED)) == 0) & (host != 0))
    copied = (entries[rows] & np.uint64(COPIED)) != 0
    if geometry.external:  # nobody else uses it
        alone: I64 = rows[~copied]
        return alone
    counts, known = stored.lookup((host[rows] >> np.uint64(geometry.cluster_bits)).astype(np.int64))
    wrong: I64 = rows[known & ((counts == 1) != copied)]
    return wrong


class StoredCounts:
    """The counts in the file, past the caches of the image: damage must not be noted where it is looked for."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._size = image.geometry.cluster_size
        self._per_block = image.refcounts.per_block
        self._blocks: OrderedDict[int, Array] = OrderedDict()
        self._nothing = image.refcounts.codec.empty(self._per_block)

    def pointer(self, index: int) -> int:
        """Entry ``index`` of the refcount table as it is, 0 behind its end."""
        table = self._image.meta.refcount_table
        return table[index] if index < len(table) else 0

    def offset_of(self, cluster: int) -> int:
        """Where the count of ``cluster`` is stored, bytes; or else the entry that should lead there."""
        index, position = divmod(cluster, self._per_block)
        block = self.pointer(index) & ~511
        if not block:
            return self._image.header.refcount_table_offset + index * 8
        return block + position * self._image.refcounts.codec.width // 8

    def block(self, index: int) -> Array:
        """All counts of one block. Raises if the pointer to it makes no sense, and the file's errors."""
        offset = self.pointer(index) & ~511
        if not offset:
            return self._nothing
        if offset % self._size:
            raise QmpdError("refcount block is not aligned to clusters", Kind.CORRUPT)
        if offset >= _MAX_OFFSET:
            raise QmpdError("refcount block lies outside of what a file can hold", Kind.CORRUPT)
        found = self._blocks.get(offset)
        if found is None:
            found = self._image.refcounts.codec.decode(read_padded(self._image.file, offset, self._size))
            self._blocks[offset] = found
            if len(self._blocks) > max(2, _BLOCKS_KEPT // self._size):
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(offset)
        return found

    def lookup(self, clusters: I64) -> tuple[U64, Bools]:
        """Counts of ``clusters`` in any order, and which of them could be read."""
        counts, known = np.zeros(len(clusters), np.uint64), np.ones(len(clusters), np.bool_)
        blocks = clusters // self._per_block
        for index in np.unique(blocks).tolist():
            mask = blocks == index
            try:
                counts[mask] = self.block(index)[clusters[mask] - index * self._per_block]
            except QmpdError:
                known[mask] = False
        return counts, known


# -- repairs -----------------------------------------------------------------------------------------------------------


def _give_back(image: Image, leaked: list[Leaks]) -> int:
    """Lower the counts of leaked clusters, durably. Returns how many there were."""
    with image.lock:
        for leaks in leaked:
            image.alloc.lower(leaks.clusters, leaks.references)
            image.settle()
    image.flush()
    return sum(len(leaks.clusters) for leaks in leaked)


def _set_flags(image: Image, pulse: Callable[[], None]) -> int:
    """Set all copied flags of the active layer by the counts, durably. Returns how many were wrong."""
    flaws = 0
    for flaw in wrong_flags(image, StoredCounts(image), pulse):
        with image.lock:
            if flaw.table_wrong:
                image.meta.l1[flaw.l1_index] = flaw.entry ^ COPIED
                flaws += 1
            if len(flaw.rows):
                table = image.meta.l2.get(flaw.table)
                table.data[flaw.rows, 0] ^= np.uint64(COPIED)
                image.meta.l2.touch(table, int(flaw.rows[0]), int(flaw.rows[-1]) + 1)
                flaws += len(flaw.rows)
            image.settle()
    image.flush()
    return flaws
