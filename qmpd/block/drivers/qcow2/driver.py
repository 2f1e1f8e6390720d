"""The qcow2 driver: what a node sees (spec/qcow2.md, spec/block-graph.md sections 4 and 7).

Threads: I/O from any worker, several at a time. ``attach`` and ``reopen_*`` on the control thread, while no I/O runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Self

from qmpd.block.api import BackingReference, BlockDevice, Buffer, Driver, ImageInfo, InternalSnapshot
from qmpd.block.batch import Batch
from qmpd.block.drivers.qcow2 import header as hdr
from qmpd.block.drivers.qcow2.cache import read_padded
from qmpd.block.drivers.qcow2.check import check
from qmpd.block.drivers.qcow2.clusters import Clusters
from qmpd.block.drivers.qcow2.empty import make_empty
from qmpd.block.drivers.qcow2.image import L2_CACHE, REFCOUNT_CACHE, Image
from qmpd.block.drivers.qcow2.many import Many
from qmpd.block.drivers.qcow2.reading import Reader
from qmpd.block.drivers.qcow2.resize import Resizer
from qmpd.block.drivers.qcow2.snapshotting import Snapshotter
from qmpd.block.drivers.qcow2.tables import I64
from qmpd.block.drivers.qcow2.writing import Writer
from qmpd.block.drivers.qcow2.zeroing import Eraser
from qmpd.block.extents import Runs
from qmpd.block.findings import CheckResult
from qmpd.errors import Kind, QmpdError
from qmpd.units import MIB, SECTOR

_DISCARD_OPTION: Final = "pass-discard-request"

#: What a driver has read, or knows, of its image.
_PARTS: Final = ("_image", "_clusters", "_reader", "_writer", "_many", "_eraser", "_resizer", "_snapshotter", "_length")


class Qcow2(Driver):
    """One qcow2 image. Children: ``file`` (required), ``data-file`` (required by images with an external data file),
    ``backing`` (attached by the graph).

    Options: ``cache-size``, ``l2-cache-size``, ``refcount-cache-size``, ``l2-cache-entry-size``,
    ``pass-discard-request``; the others of QEMU are accepted and have nothing to do here. ``encrypt`` is refused.
    """

    format_name = "qcow2"
    supports_backing = True
    supports_snapshots = True
    supports_data_file = True

    def __init__(self, image: Image, options: Mapping[str, Any]) -> None:
        """Use :meth:`open`."""
        self._image = image
        self.read_only = image.read_only
        self._clusters = Clusters(image)
        self._reader = Reader(image, self._clusters, image.header.size)
        self._writer = Writer(image, self._clusters, self._reader)
        self._many = Many(image, self._clusters, self._reader, self._writer)
        self._eraser = Eraser(image, self._clusters, self._reader, self._writer)
        self._resizer = Resizer(image, self._clusters, self._reader, self._writer, self._eraser)
        self._snapshotter = Snapshotter(image, self._clusters, self._writer, self._eraser)
        self._length = image.header.size
        self._next: tuple[bool, Mapping[str, Any]] | None = None
        self._closed = False
        self._apply(options)

    @classmethod
    def open(cls, children: Mapping[str, BlockDevice], options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Open an image. A worker thread.

        Raises CORRUPT and UNSUPPORTED errors with QEMU's texts. Read-write, unknown autoclear bits are cleared and
        the refcounts of a dirty image rebuilt before this returns.
        """
        l2_cache, refcount_cache = _cache_sizes(options)
        image = Image(
            children["file"],
            children.get("data-file"),
            read_only=read_only,
            l2_cache=l2_cache,
            refcount_cache=refcount_cache,
        )
        _check_options(options, image.geometry.cluster_size)
        driver = cls(image, options)
        driver._reader.backing = children.get("backing")
        if not read_only:
            with image.lock:
                driver._writer.prepare()
        return driver

    @classmethod
    def named_data_file(cls, file: BlockDevice, *, read_only: bool = True, thorough: bool = False) -> str | None:
        external = hdr.has_data_file(bytes(read_padded(file, 0, SECTOR)))
        if not external and not thorough:
            return None
        start = bytes(read_padded(file, 0, min(file.length, 2 * MIB)))
        return hdr.parse(start, read_only=read_only, data_file=external if thorough else None).data_file

    def _apply(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        l2_cache, refcount_cache = _cache_sizes(options)
        self._image.meta.l2.limit = l2_cache
        self._image.meta.refcount_blocks.limit = refcount_cache
        self._eraser.pass_discard = bool(options.get(_DISCARD_OPTION, True))

    # -- I/O -------------------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        return self._length

    @property
    def placement_unit(self) -> int | None:
        return None if self.read_only else self._image.geometry.cluster_size

    @property
    def map_unit(self) -> int:
        return self._image.geometry.unit_size

    @property
    def data_child(self) -> BlockDevice | None:
        return self._image.data

    def readinto(self, offset: int, buffer: memoryview) -> None:
        if len(buffer):
            self._reader.readinto(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        if len(data):
            self._writer.write(offset, memoryview(data))

    def read_many(self, batch: Batch) -> Sequence[int]:
        return self._many.read(batch)

    def write_many(self, batch: Batch) -> Sequence[int]:
        return self._many.write(batch)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        if length:
            self._eraser.write_zeroes(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        if length:
            self._eraser.discard(offset, length)

    def flush(self) -> None:
        if not self.read_only:
            self._image.flush()

    def map(self, offset: int, length: int) -> Runs:
        return self._reader.map(offset, length)

    def place(self, offset: int, length: int) -> AbstractContextManager[Runs]:
        """See :meth:`BlockDevice.place`. Clusters that are this image's alone already are handed out as they are: what
        the caller put there before an exception stays, as it would after a write that failed half way."""
        return self._writer.place_one(offset, length)

    def place_ranges(self, offset: I64, length: I64) -> AbstractContextManager[Runs]:
        """:meth:`place` for many ranges at once (ascending, disjoint, in bytes, whole clusters each).

        The runs have gaps where the ranges have; otherwise the contract is that of :meth:`BlockDevice.place`.
        """
        return self._writer.place(offset, length)

    def truncate(self, length: int) -> None:
        if self.read_only:
            raise QmpdError("Image is read-only", Kind.PERMISSION)
        self._resizer.check(length)
        # Requests to the part that goes stop now, those to the part that comes begin at the end.
        self._length = min(self._length, length)
        try:
            self._resizer.truncate(length)
        finally:
            self._length = self._reader.size

    # -- life cycle ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not self.read_only:
            self._image.flush()
        self._image.meta.l2.clear()
        self._image.meta.refcount_blocks.clear()

    def info(self) -> ImageInfo:
        header = self._image.header
        modern = header.version >= 3
        data: dict[str, Any] = {
            "compat": "1.1" if modern else "0.10",
            "compression-type": hdr.COMPRESSION_NAMES[header.compression_type],
        }
        if modern:
            data["lazy-refcounts"] = bool(header.compatible & hdr.LAZY_REFCOUNTS)
        data["refcount-bits"] = 1 << header.refcount_order
        if header.data_file is not None:
            data["data-file"] = header.data_file
        if header.external_data:
            data["data-file-raw"] = header.raw_data
        if modern:
            data["corrupt"] = bool(header.incompatible & hdr.CORRUPT)
            data["extended-l2"] = header.extended_l2
        if self._image.bitmaps:
            data["bitmaps"] = [bitmap.info() for bitmap in self._image.bitmaps]
        snapshots = [snapshot.info() for snapshot in self._image.snapshots]
        return ImageInfo(
            self.format_name,
            self._length,
            cluster_size=header.cluster_size,
            dirty=bool(header.incompatible & hdr.DIRTY),
            backing=header.backing,
            format_specific={"type": "qcow2", "data": data},
            extra={"snapshots": snapshots} if snapshots else {},
        )

    # -- the graph's side ------------------------------------------------------------------------------------------

    def attach(self, name: str, child: BlockDevice | None) -> None:
        if name == "backing":
            self._reader.backing = child
        elif name == "file" and child is not None:
            self._image.set_file(child)
        elif name == "data-file" and child is not None and self._image.geometry.external:
            self._image.set_data(child)
        else:
            super().attach(name, child)

    def reopen_prepare(self, *, read_only: bool, options: Mapping[str, Any] | None = None) -> None:
        if options is not None:
            _check_options(options, self._image.geometry.cluster_size)
        if not read_only and self._image.header.incompatible & hdr.CORRUPT:
            raise QmpdError("qcow2: Image is corrupt; cannot be opened read/write", Kind.CORRUPT)
        if not read_only and self.read_only:
            self._image.check_structure()  # refcounts are looked at before the first write
        self._next = read_only, self._options if options is None else options

    def reopen_commit(self) -> None:
        if self._next is None:
            return
        (read_only, options), self._next = self._next, None
        if read_only:
            self._writer.reset()
        self.read_only = self._image.read_only = read_only
        self._apply(options)

    def reopen_abort(self) -> None:
        self._next = None

    def reload(self) -> None:
        children = {"file": self._image.file}
        if self._reader.backing is not None:
            children["backing"] = self._reader.backing
        if self._image.geometry.external:
            children["data-file"] = self._image.data
        fresh = self.open(children, self._options, read_only=self.read_only)
        for part in _PARTS:
            setattr(self, part, getattr(fresh, part))

    def check(self, *, fix_leaks: bool, pulse: Callable[[], None]) -> CheckResult:
        """See :func:`qmpd.block.drivers.qcow2.check.check`. Read-write, what is cached is written first."""
        image = self._image
        if fix_leaks:
            if self.read_only:
                raise QmpdError("Block node is read-only", Kind.PERMISSION)
            image.check_alive()
            with image.lock:
                self._writer.prepare()
        self.flush()
        return check(image, fix_leaks=fix_leaks, pulse=pulse)

    def make_empty(self) -> None:
        """See :meth:`Driver.make_empty`; :mod:`qmpd.block.drivers.qcow2.empty` tells what a crash may leave."""
        make_empty(self._image, self._writer, self._eraser)

    # -- internal snapshots ----------------------------------------------------------------------------------------

    @property
    def snapshots(self) -> Sequence[InternalSnapshot]:
        if self._image.geometry.external:  # the counts that snapshots live by are those of the image file
            raise QmpdError("Failed to get a snapshot list: Operation not supported", Kind.UNSUPPORTED)
        return tuple(self._image.snapshots)

    def take_snapshot(self, name: str, nanoseconds: int) -> InternalSnapshot:
        """See :meth:`Snapshotter.take`."""
        return self._snapshotter.take(name, nanoseconds)

    def delete_snapshot(self, key: str) -> None:
        """See :meth:`Snapshotter.delete`."""
        self._snapshotter.delete(key)

    # -- backing reference -----------------------------------------------------------------------------------------

    @property
    def backing_reference(self) -> BackingReference | None:
        return self._image.header.backing

    def check_backing_reference(self, reference: BackingReference | None) -> None:
        self._image.header.with_backing(reference).serialise()

    def change_backing_reference(self, reference: BackingReference | None) -> None:
        image = self._image
        with image.lock:
            if self.read_only:
                raise QmpdError("Block node is read-only", Kind.PERMISSION)
            image.check_alive()
            self._writer.prepare()
            image.write_header(image.header.with_backing(reference))


def _cache_sizes(options: Mapping[str, Any]) -> tuple[int, int]:
    """Bounds of the L2 and the refcount cache, bytes, as the options ask for."""
    total, l2 = options.get("cache-size"), options.get("l2-cache-size")
    blocks = options.get("refcount-cache-size")
    if total is not None:
        if l2 is not None and blocks is not None:
            raise QmpdError("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")
        for name, size in (("l2-cache-size", l2), ("refcount-cache-size", blocks)):
            if size is not None and size > total:
                raise QmpdError(f"{name} may not exceed cache-size")
        if l2 is None:
            l2 = total - blocks if blocks is not None else total * 4 // 5
        if blocks is None:
            blocks = total - l2
    return L2_CACHE if l2 is None else int(l2), REFCOUNT_CACHE if blocks is None else int(blocks)


def _check_options(options: Mapping[str, Any], cluster_size: int) -> None:
    entry = options.get("l2-cache-entry-size")
    if entry is not None and (not 512 <= entry <= cluster_size or entry & (entry - 1)):
        raise QmpdError(f"L2 cache entry size must be a power of two between 512 and the cluster size ({cluster_size})")
    encrypt = options.get("encrypt")
    if encrypt is not None:
        kind = encrypt.get("format") if isinstance(encrypt, Mapping) else encrypt
        raise QmpdError(f"No encryption in image header, but options specified format '{kind}'")
    _cache_sizes(options)
