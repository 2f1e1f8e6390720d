"""Making a new image (spec/toolbox.md section 1.2)."""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from qmpd.block.api import BackingReference, BlockDevice
from qmpd.block.drivers.qcow2 import header as hdr
from qmpd.block.drivers.qcow2.driver import Qcow2
from qmpd.block.drivers.qcow2.header import Header
from qmpd.block.drivers.qcow2.refcounts import RefcountCodec
from qmpd.block.drivers.qcow2.tables import Geometry
from qmpd.errors import Kind, QmpdError, strerror
from qmpd.units import MAX_LENGTH, MIB, SECTOR, ceil_div

_V3_ONLY: Final = "(use version=v3 or greater)"
#: Bytes placed at once when clusters are allocated beforehand.
_STRIDE: Final = 1 << 30
_ZEROES: Final = bytes(1 * MIB)
#: Above this, extension 0x6803f857 would take too much of cluster 0.
_NAMES_FROM: Final = 4096


@dataclass(frozen=True, slots=True)
class CreateOptions:
    """Arguments of blockdev-create for qcow2, ``file`` aside; bytes."""

    size: int
    version: str = "v3"
    cluster_size: int = 65536
    refcount_bits: int = 16
    preallocation: str = "off"
    lazy_refcounts: bool = False
    extended_l2: bool = False
    compression_type: str = "zlib"
    backing_file: str | None = None
    backing_fmt: str | None = None
    #: What the header is to say; '' for an image that does not name its data file.
    data_file: str | None = None
    data_file_raw: bool = False
    encrypt: Any = None


def check(options: CreateOptions) -> None:
    """Everything that can be refused before the file is touched, in QEMU's order and words.

    The size and the backing name are part of it: the peer finds those too late and leaves an empty image behind.
    """
    old = options.version == "v2"
    size, bits = options.cluster_size, options.refcount_bits
    wants_data_file = options.data_file is not None
    rules = (
        (options.size % SECTOR != 0, "Image size must be a multiple of 512 bytes"),
        (
            options.extended_l2 and old,
            f"Extended L2 entries are only supported with compatibility level 1.1 and above {_V3_ONLY}",
        ),
        (
            not 512 <= size <= 2 * MIB or size & (size - 1) != 0,
            "Cluster size must be a power of two between 512 and 2048k",
        ),
        (
            options.extended_l2 and size < hdr.MIN_EXTENDED_CLUSTER,
            f"Extended L2 entries are only supported with cluster sizes of at least {hdr.MIN_EXTENDED_CLUSTER} bytes",
        ),
        (
            options.backing_file is not None and options.preallocation != "off" and not options.extended_l2,
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        ),
        (
            options.backing_fmt is not None and options.backing_file is None,
            "Backing format cannot be used without backing file",
        ),
        (
            options.lazy_refcounts and old,
            f"Lazy refcounts only supported with compatibility level 1.1 and above {_V3_ONLY}",
        ),
        (
            not 1 <= bits <= 64 or bits & (bits - 1) != 0,
            "Refcount width must be a power of two and may not exceed 64 bits",
        ),
        (
            old and bits != 16,
            f"Different refcount widths than 16 bits require compatibility level 1.1 or above {_V3_ONLY}",
        ),
        (options.data_file_raw and not wants_data_file, "data-file-raw requires data-file"),
        (
            options.data_file_raw and options.backing_file is not None,
            "Backing file and data-file-raw cannot be used at the same time",
        ),
        (
            wants_data_file and old,
            f"External data files are only supported with compatibility level 1.1 and above {_V3_ONLY}",
        ),
        (
            options.compression_type != "zlib" and old,
            f"Non-zlib compression type is only supported with compatibility level 1.1 and above {_V3_ONLY}",
        ),
        (not 0 <= options.size < 1 << 63, "Could not resize image: Image size cannot be negative"),
        (
            options.size > MAX_LENGTH,
            f"Could not resize image: offset({options.size}) exceeds maximum({MAX_LENGTH})",
        ),
        (options.encrypt is not None, "Encrypted images are not supported"),
    )
    for broken, text in rules:
        if broken:
            raise QmpdError(text)
    _header(options)


def _header(options: CreateOptions) -> Header:
    """The finished header but for the places of the tables. Raises what cannot be stored."""
    bits = options.cluster_size.bit_length() - 1
    external = options.data_file is not None
    geometry = Geometry(bits, options.extended_l2, external)
    entries = geometry.l1_entries(options.size)
    if entries > hdr.MAX_L1_ENTRIES:
        text = f"Could not resize image: Failed to grow the L1 table: {strerror(errno.EFBIG)}"
        raise QmpdError(text, Kind.IO, errno=errno.EFBIG)
    modern = options.version != "v2"
    compression = {name: kind for kind, name in hdr.COMPRESSION_NAMES.items()}[options.compression_type]
    header = Header(
        3 if modern else 2,
        bits,
        options.size,
        entries,
        0,
        options.cluster_size,
        1,
        incompatible=(hdr.EXTENDED_L2 if options.extended_l2 else 0)
        | (hdr.COMPRESSION if compression else 0)
        | (hdr.DATA_FILE if external else 0),
        compatible=hdr.LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        autoclear=hdr.RAW_DATA_FILE if options.data_file_raw else 0,
        refcount_order=options.refcount_bits.bit_length() - 1,
        tail=bytes([compression]) + bytes(7) if modern else b"",
        extensions=_extensions(options),
    )
    if options.backing_file:
        try:
            header = header.with_backing(BackingReference(options.backing_file, options.backing_fmt))
            header.serialise()
        except QmpdError as error:
            name, kind = options.backing_file, options.backing_fmt or "(null)"
            raise error.prefixed(f"Could not assign backing file '{name}' with format '{kind}': ") from None
    header.serialise()
    return header


def _extensions(options: CreateOptions) -> tuple[tuple[int, bytes], ...]:
    found = []
    if options.data_file:
        found.append((hdr.EXT_DATA_FILE, options.data_file.encode(errors="surrogateescape")))
    if options.version != "v2" and options.cluster_size > _NAMES_FROM:
        found.append((hdr.EXT_FEATURE_NAMES, hdr.feature_table()))
    return tuple(found)


def create(file: BlockDevice, options: CreateOptions, data: BlockDevice | None = None) -> None:
    """Write an empty image into ``file``, whose old content is gone. A worker thread; durable at return.

    ``data`` is its data file, of which a raw one keeps its content as far as the disk reaches.
    Raises QEMU's errors before anything is written, and the file's errors after.
    """
    check(options)
    header = _header(options)
    if data is not None:
        _prepare_data(data, options)
    if getattr(file, "growable", False):
        file.truncate(0)
    header = _write_tables(file, header)
    file.flush()
    file.write(0, header.serialise().ljust(header.cluster_size, b"\0"))
    file.flush()
    if options.preallocation != "off" or options.data_file_raw:
        _preallocate(file, options, data)


def _write_tables(file: BlockDevice, header: Header) -> Header:
    """Refcount table, refcount blocks, L1 table, in this order behind the header."""
    size = header.cluster_size
    codec = RefcountCodec(header.refcount_order)
    per_block = size * 8 >> header.refcount_order
    l1_clusters = ceil_div(header.l1_size * 8, size)
    table, blocks = 1, 1
    while True:
        needed = ceil_div(blocks * 8, size), ceil_div(1 + table + blocks + l1_clusters, per_block)
        if needed == (table, blocks):
            break
        table, blocks = needed
    first = 1 + table
    l1 = first + blocks
    counts = codec.empty(blocks * per_block)
    counts[: l1 + l1_clusters] = 1
    entries = np.zeros(table * size // 8, ">u8")
    entries[:blocks] = (first + np.arange(blocks)) * size
    file.write(size, entries.tobytes())
    file.write(first * size, codec.encode(counts))
    file.write(l1 * size, bytes(header.l1_size * 8))
    return replace(header, l1_offset=l1 * size, refcount_table_clusters=table)


def _prepare_data(data: BlockDevice, options: CreateOptions) -> None:
    """Give the data file the disk's length, and zeros where the guest would see them without having written any."""
    size, old = options.size, data.length
    if getattr(data, "growable", False):
        data.truncate(size)
    elif old < size:
        raise QmpdError("Could not resize image: Cannot grow device files", Kind.UNSUPPORTED)
    fresh = min(old, size)
    if fresh and not options.data_file_raw and options.preallocation != "off":
        data.write_zeroes(0, fresh)
    if options.preallocation == "falloc" and fresh < size:
        data.write_zeroes(fresh, size - fresh, unmap=False)
    elif options.preallocation == "full":
        for start in range(fresh, size, len(_ZEROES)):
            data.write(start, memoryview(_ZEROES)[: min(len(_ZEROES), size - start)])
    data.flush()


def _preallocate(file: BlockDevice, options: CreateOptions, data: BlockDevice | None) -> None:
    """Give every cluster its place; falloc and full also give it its space, which a data file has by then."""
    children = {"file": file} if data is None else {"file": file, "data-file": data}
    image = Qcow2.open(children, {}, read_only=False)
    for offset in range(0, options.size, _STRIDE):
        length = min(_STRIDE, options.size - offset)
        with image.place(offset, length) as runs:
            for run in runs if data is None else ():
                end = run.host + -(-run.length // options.cluster_size) * options.cluster_size
                if options.preallocation == "falloc":
                    file.write_zeroes(run.host, end - run.host, unmap=False)
                elif options.preallocation == "full":
                    for start in range(run.host, end, len(_ZEROES)):
                        file.write(start, memoryview(_ZEROES)[: min(len(_ZEROES), end - start)])
                elif end > file.length:
                    file.truncate(end)
    image.close()
