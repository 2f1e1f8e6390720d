"""What queries tell about nodes: QAPI types, and how they are filled in. Source: spec/block-graph.md section 7."""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from pydantic import Field

from qmpd.block.api import Role
from qmpd.commands.blockdev_options import BlockdevDetectZeroesOptions, BlockdevQcow2EncryptionFormat
from qmpd.control.qapi import WIRE, Bool, Int, QapiModel, Size, Str
from qmpd.errors import QmpdError
from qmpd.graph import chain
from qmpd.graph.filename import filenames_of, resolve_backing
from qmpd.graph.node import Node

# -- types -------------------------------------------------------------------------------------------------------------


class SnapshotInfo(QapiModel):
    id: Str
    name: Str
    vm_state_size: Int
    date_sec: Int
    date_nsec: Int
    vm_clock_sec: Int
    vm_clock_nsec: Int
    icount: Int | None = None


class Qcow2CompressionType(StrEnum):
    ZLIB = "zlib"
    ZSTD = "zstd"


class Qcow2BitmapInfoFlags(StrEnum):
    IN_USE = "in-use"
    AUTO = "auto"


class Qcow2BitmapInfo(QapiModel):
    name: Str
    granularity: Int
    flags: list[Qcow2BitmapInfoFlags]


class ImageInfoSpecificQCow2Encryption(QapiModel):
    format: BlockdevQcow2EncryptionFormat


class ImageInfoSpecificQCow2(QapiModel):
    compat: Str
    data_file: Str | None = None
    data_file_raw: Bool | None = None
    extended_l2: Bool | None = None
    lazy_refcounts: Bool | None = None
    corrupt: Bool | None = None
    refcount_bits: Int
    encrypt: ImageInfoSpecificQCow2Encryption | None = None
    bitmaps: list[Qcow2BitmapInfo] | None = None
    compression_type: Qcow2CompressionType


class ImageInfoSpecificFile(QapiModel):
    extent_size_hint: Size | None = None


class ImageInfoSpecificKind(StrEnum):
    QCOW2 = "qcow2"
    FILE = "file"


class ImageInfoSpecific(QapiModel, discriminator="type_"):
    type_: ImageInfoSpecificKind


class ImageInfoSpecificQCow2Wrapper(ImageInfoSpecific, branch="qcow2"):
    data: ImageInfoSpecificQCow2


class ImageInfoSpecificFileWrapper(ImageInfoSpecific, branch="file"):
    data: ImageInfoSpecificFile


class BlockNodeInfo(QapiModel):
    filename: Str
    format: Str
    dirty_flag: Bool | None = None
    actual_size: Int | None = None
    virtual_size: Int
    cluster_size: Int | None = None
    encrypted: Bool | None = None
    compressed: Bool | None = None
    backing_filename: Str | None = None
    full_backing_filename: Str | None = None
    backing_filename_format: Str | None = None
    snapshots: list[SnapshotInfo] | None = None
    format_specific: ImageInfoSpecific | None = None


class ImageInfo(BlockNodeInfo):
    backing_image: "ImageInfo | None" = None


class BlockdevCacheInfo(QapiModel):
    writeback: Bool
    direct: Bool
    no_flush: Bool


class BlockDirtyInfo(QapiModel):
    name: Str | None = None
    count: Int
    granularity: Int
    recording: Bool
    busy: Bool
    persistent: Bool
    inconsistent: Bool | None = None


def _spelled(name: str) -> Any:
    return Field(alias=name)


class BlockDeviceInfo(QapiModel):
    file: Str
    node_name: Str | None = None
    ro: Bool
    drv: Str
    backing_file: Str | None = Field(default=None, alias="backing_file")
    backing_file_depth: Int = _spelled("backing_file_depth")
    active: Bool
    encrypted: Bool
    detect_zeroes: BlockdevDetectZeroesOptions = _spelled("detect_zeroes")
    bps: Int
    bps_rd: Int = _spelled("bps_rd")
    bps_wr: Int = _spelled("bps_wr")
    iops: Int
    iops_rd: Int = _spelled("iops_rd")
    iops_wr: Int = _spelled("iops_wr")
    image: ImageInfo
    bps_max: Int | None = Field(default=None, alias="bps_max")
    bps_rd_max: Int | None = Field(default=None, alias="bps_rd_max")
    bps_wr_max: Int | None = Field(default=None, alias="bps_wr_max")
    iops_max: Int | None = Field(default=None, alias="iops_max")
    iops_rd_max: Int | None = Field(default=None, alias="iops_rd_max")
    iops_wr_max: Int | None = Field(default=None, alias="iops_wr_max")
    bps_max_length: Int | None = Field(default=None, alias="bps_max_length")
    bps_rd_max_length: Int | None = Field(default=None, alias="bps_rd_max_length")
    bps_wr_max_length: Int | None = Field(default=None, alias="bps_wr_max_length")
    iops_max_length: Int | None = Field(default=None, alias="iops_max_length")
    iops_rd_max_length: Int | None = Field(default=None, alias="iops_rd_max_length")
    iops_wr_max_length: Int | None = Field(default=None, alias="iops_wr_max_length")
    iops_size: Int | None = Field(default=None, alias="iops_size")
    group: Str | None = None
    cache: BlockdevCacheInfo
    write_threshold: Int = _spelled("write_threshold")
    dirty_bitmaps: list[BlockDirtyInfo] | None = None


# -- filling them in ---------------------------------------------------------------------------------------------------


def device_infos(nodes: Iterable[Node], *, flat: bool) -> list[BlockDeviceInfo]:
    """BlockDeviceInfo of each node, in the order given; ``flat`` leaves the images below out."""
    wanted = list(nodes)
    below = [each for node in wanted for each in chain.walk(node)]
    names = filenames_of(reversed(below))
    images = {node: _image(node, name) for node, name in names.items()}
    deep: dict[Node, ImageInfo] = {}
    return [_device_info(node, images[node] if flat else _chained(node, images, deep), names) for node in wanted]


def _device_info(node: Node, image: ImageInfo, names: Mapping[Node, str]) -> BlockDeviceInfo:
    spec, backing = node.spec, node.backing
    return BlockDeviceInfo(
        file=image.filename,
        node_name=node.name,
        ro=node.read_only,
        drv=node.driver_name,
        backing_file=names[backing] if backing else None,
        backing_file_depth=_depth(image),
        active=node.active,
        encrypted=bool(image.encrypted),
        detect_zeroes=BlockdevDetectZeroesOptions(spec.detect_zeroes or "off"),
        bps=0,
        bps_rd=0,
        bps_wr=0,
        iops=0,
        iops_rd=0,
        iops_wr=0,
        image=image,
        cache=BlockdevCacheInfo(writeback=True, direct=bool(spec.cache_direct), no_flush=bool(spec.cache_no_flush)),
        write_threshold=_signed(node.written.threshold),
        dirty_bitmaps=_dirty_bitmaps(node),
    )


def _signed(number: int) -> int:
    """An unsigned 64-bit value as the signed type of the schema shows it."""
    return number - (1 << 64) if number >> 63 else number


def _dirty_bitmaps(node: Node) -> list[BlockDirtyInfo] | None:
    bitmaps = node.opened.info().extra.get("dirty-bitmaps")
    return [BlockDirtyInfo.parse(bitmap, WIRE) for bitmap in bitmaps] if bitmaps else None


def _depth(image: ImageInfo) -> int:
    depth = 0
    while image.backing_image is not None:
        depth, image = depth + 1, image.backing_image
    return depth


def _chained(node: Node, images: Mapping[Node, ImageInfo], deep: dict[Node, ImageInfo]) -> ImageInfo:
    """The node's image with all images below it; ``deep`` shares what several nodes have below them."""
    below: ImageInfo | None = None
    for each in reversed(list(chain.walk(node))):
        if each not in deep:
            deep[each] = images[each].model_copy(update={"backing_image": below})
        below = deep[each]
    return deep[node]


def _image(node: Node, name: str) -> ImageInfo:
    info = node.opened.info()
    image = ImageInfo(
        filename=name,
        format=node.driver_name,
        virtual_size=node.length,
        actual_size=_actual_size(node),
        encrypted=True if info.encrypted else None,
    )
    source = _layout_source(node)
    if source is not None:
        layout = source.opened.info()
        image.dirty_flag = layout.dirty
        image.cluster_size = layout.cluster_size or None
    if info.format_specific is not None:
        image.format_specific = ImageInfoSpecific.parse(info.format_specific, WIRE)
    if info.backing is not None:
        image.backing_filename = info.backing.filename
        image.full_backing_filename = _full_backing_filename(node)
        image.backing_filename_format = info.backing.format
    snapshots = info.extra.get("snapshots")
    if snapshots:
        image.snapshots = [SnapshotInfo.parse(snapshot, WIRE) for snapshot in snapshots]
    return image


def _full_backing_filename(node: Node) -> str | None:
    reference = node.opened.backing_reference
    try:
        return resolve_backing(node, reference) if reference else None
    except QmpdError:
        return None


#: Drivers that can tell of clusters and dirt themselves.
_HAVE_LAYOUT = frozenset({"qcow2", "file", "host_device"})


def _layout_source(node: Node) -> Node | None:
    """The node whose cluster size and dirty flag are shown: raw and filters show those of their child."""
    current: Node | None = node
    while current is not None and current.driver_name not in _HAVE_LAYOUT:
        edge = current.primary_edge if current.is_filter or current.driver_name == "raw" else None
        current = edge.node if edge else None
    return current


def _actual_size(node: Node) -> int | None:
    """Bytes that the files hold which this node's own data are in (backing not counted)."""
    if node.opened.is_protocol:
        return node.opened.info().actual_size or 0
    if node.driver_name == "blkdebug":
        return None
    children = (edge.node for edge in node.children.values() if not edge.role & Role.COW)
    return sum(_actual_size(child) or 0 for child in children)
