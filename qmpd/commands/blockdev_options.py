"""BlockdevOptions: how a client describes a node, as QAPI types and as the graph's plain form.

The types have all members that the peer's have, in its order, so that clients find what they look for in the schema;
what a driver cannot do with a member is that driver's error at open. Drivers that qmpd does not have are not in the
enum, as in a QEMU built without them. Source: spec/block-graph.md section 4.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from qmpd.block.debug import Event as BlkdebugEvent
from qmpd.block.debug import IoType as BlkdebugIoType
from qmpd.control.qapi import NULL, Alternate, Bool, Features, Int, NullType, QapiModel, Str, Uint64, wire_value
from qmpd.errors import QmpdError
from qmpd.graph.spec import NodeSpec
from qmpd.wire.dialect import DialectError
from qmpd.wire.stream import parse_only


class BlockdevDriver(StrEnum):
    """Drivers a node can be made of."""

    BLKDEBUG = "blkdebug"
    COPY_ON_READ = "copy-on-read"
    FILE = "file"
    HOST_DEVICE = "host_device"
    NULL_AIO = "null-aio"
    NULL_CO = "null-co"
    PREALLOCATE = "preallocate"
    QCOW2 = "qcow2"
    RAW = "raw"
    THROTTLE = "throttle"


class BlockdevDiscardOptions(StrEnum):
    IGNORE = "ignore"
    UNMAP = "unmap"


class BlockdevDetectZeroesOptions(StrEnum):
    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


class OnOffAuto(StrEnum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


class BlockdevAioOptions(StrEnum):
    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


class BlockdevCacheOptions(QapiModel):
    direct: Bool | None = None
    no_flush: Bool | None = None


class BlockdevOptions(QapiModel, discriminator="driver"):
    """What all drivers have in common; the branches follow."""

    driver: BlockdevDriver
    node_name: Str | None = None
    discard: BlockdevDiscardOptions | None = None
    cache: BlockdevCacheOptions | None = None
    active: Bool | None = None
    read_only: Bool | None = None
    auto_read_only: Bool | None = None
    force_share: Bool | None = None
    detect_zeroes: BlockdevDetectZeroesOptions | None = None


BlockdevRef = Annotated[BlockdevOptions | Str, Alternate("BlockdevRef")]
"""A child: described inline, or the name of a node."""

BlockdevRefOrNull = Annotated[BlockdevOptions | Str | NullType, Alternate("BlockdevRefOrNull")]


class BlockdevOptionsFile(BlockdevOptions, branch=("file", "host_device")):
    type_features = ("dynamic-auto-read-only",)

    filename: Str
    pr_manager: Str | None = None
    locking: OnOffAuto | None = None
    aio: BlockdevAioOptions | None = None
    aio_max_batch: Int | None = None
    drop_cache: Bool | None = None
    x_check_cache_dropped: Annotated[Bool, Features(("unstable",))] | None = None


class BlockdevOptionsNull(BlockdevOptions, branch=("null-aio", "null-co")):
    size: Int | None = None
    latency_ns: Uint64 | None = None
    read_zeroes: Bool | None = None


class BlockdevOptionsRaw(BlockdevOptions, branch="raw"):
    file: BlockdevRef
    offset: Int | None = None
    size: Int | None = None


class Qcow2OverlapCheckMode(StrEnum):
    NONE = "none"
    CONSTANT = "constant"
    CACHED = "cached"
    ALL = "all"


class Qcow2OverlapCheckFlags(QapiModel):
    template: Qcow2OverlapCheckMode | None = None
    main_header: Bool | None = None
    active_l1: Bool | None = None
    active_l2: Bool | None = None
    refcount_table: Bool | None = None
    refcount_block: Bool | None = None
    snapshot_table: Bool | None = None
    inactive_l1: Bool | None = None
    inactive_l2: Bool | None = None
    bitmap_directory: Bool | None = None


Qcow2OverlapChecks = Annotated[Qcow2OverlapCheckFlags | Qcow2OverlapCheckMode, Alternate("Qcow2OverlapChecks")]


class BlockdevQcow2EncryptionFormat(StrEnum):
    AES = "aes"
    LUKS = "luks"


class BlockdevQcow2Encryption(QapiModel, discriminator="format"):
    format: BlockdevQcow2EncryptionFormat


class QCryptoBlockOptions(BlockdevQcow2Encryption, branch=("aes", "luks")):
    key_secret: Str | None = None


class BlockdevOptionsQcow2(BlockdevOptions, branch="qcow2"):
    file: BlockdevRef
    backing: BlockdevRefOrNull | None = None
    lazy_refcounts: Bool | None = None
    pass_discard_request: Bool | None = None
    pass_discard_snapshot: Bool | None = None
    pass_discard_other: Bool | None = None
    discard_no_unref: Bool | None = None
    overlap_check: Qcow2OverlapChecks | None = None
    cache_size: Int | None = None
    l2_cache_size: Int | None = None
    l2_cache_entry_size: Int | None = None
    refcount_cache_size: Int | None = None
    cache_clean_interval: Int | None = None
    encrypt: BlockdevQcow2Encryption | None = None
    data_file: BlockdevRef | None = None


# -- filters -----------------------------------------------------------------------------------------------------------


class BlkdebugInjectErrorOptions(QapiModel):
    event: BlkdebugEvent
    state: Int | None = None
    iotype: BlkdebugIoType | None = None
    errno: Int | None = None
    sector: Int | None = None
    once: Bool | None = None
    immediately: Bool | None = None


class BlkdebugSetStateOptions(QapiModel):
    event: BlkdebugEvent
    state: Int | None = None
    new_state: Int = Field(alias="new_state")


class BlockPermission(StrEnum):
    CONSISTENT_READ = "consistent-read"
    WRITE = "write"
    WRITE_UNCHANGED = "write-unchanged"
    RESIZE = "resize"


class BlockdevOptionsBlkdebug(BlockdevOptions, branch="blkdebug"):
    image: BlockdevRef
    config: Str | None = None
    align: Int | None = None
    max_transfer: Int | None = None
    opt_write_zero: Int | None = None
    max_write_zero: Int | None = None
    opt_discard: Int | None = None
    max_discard: Int | None = None
    inject_error: list[BlkdebugInjectErrorOptions] | None = None
    set_state: list[BlkdebugSetStateOptions] | None = None
    take_child_perms: list[BlockPermission] | None = None
    unshare_child_perms: list[BlockPermission] | None = None


class BlockdevOptionsCopyOnRead(BlockdevOptions, branch="copy-on-read"):
    file: BlockdevRef
    bottom: Str | None = None


class BlockdevOptionsPreallocate(BlockdevOptions, branch="preallocate"):
    file: BlockdevRef
    prealloc_align: Int | None = None
    prealloc_size: Int | None = None


class BlockdevOptionsThrottle(BlockdevOptions, branch="throttle"):
    throttle_group: Str
    file: BlockdevRef


# -- to the graph's plain form -----------------------------------------------------------------------------------------

#: Members that describe children.
_CHILDREN = frozenset({"file", "backing", "data-file", "image"})

_COMMON = frozenset(BlockdevOptions.model_fields)


def to_spec(options: BlockdevOptions) -> NodeSpec:
    """The description as the graph takes it. Only members that were given appear in it."""
    cache = options.cache or BlockdevCacheOptions()
    return NodeSpec(
        driver=options.driver.value,
        node_name=options.node_name,
        read_only=options.read_only,
        auto_read_only=options.auto_read_only,
        force_share=options.force_share,
        cache_direct=cache.direct,
        cache_no_flush=cache.no_flush,
        discard=options.discard.value if options.discard else None,
        detect_zeroes=options.detect_zeroes.value if options.detect_zeroes else None,
        active=options.active,
        children={name: to_child(value) for name, value in _own(options) if name in _CHILDREN},
        options={name: wire_value(value) for name, value in _own(options) if name not in _CHILDREN},
    )


def parse_description(text: str) -> NodeSpec:
    """The description in a ``json:`` file name. Raises QmpdError."""
    try:
        tree = parse_only(text.encode("utf-8", "surrogateescape"))
    except DialectError as error:
        raise QmpdError(f"Could not parse the JSON options: {error.desc}") from None
    return to_spec(BlockdevOptions.parse(_nested(tree) if isinstance(tree, dict) else tree))


def _nested(tree: dict[str, Any]) -> dict[str, Any]:
    """Members such as ``file.filename``, as file names may have them, put into their objects."""
    nested: dict[str, Any] = {}
    for name, value in tree.items():
        first, dot, rest = name.partition(".")
        inner = nested.setdefault(first, {}) if dot else None
        if isinstance(inner, dict):
            inner[rest] = value
        else:
            nested[name] = value
    return {name: _nested(value) if isinstance(value, dict) else value for name, value in nested.items()}


def to_child(value: BlockdevOptions | str | NullType) -> NodeSpec | str | None:
    """A reference, an inline description, or explicitly none."""
    if value is NULL:
        return None
    if isinstance(value, BlockdevOptions):
        return to_spec(value)
    return str(value)


def root_spec(options: BlockdevOptions) -> NodeSpec:
    """As :func:`to_spec`, for a node that clients must be able to call by its name."""
    if options.node_name is None:
        raise QmpdError("'node-name' must be specified for the root node")
    return to_spec(options)


def _own(options: BlockdevOptions) -> Iterator[tuple[str, Any]]:
    """Wire name and value of the driver's own members that were given."""
    for name, field in type(options).model_fields.items():
        if name not in _COMMON and (value := getattr(options, name)) is not None:
            yield field.alias or name, value
