"""blockdev-create: image files and qcow2 images, made by a background job. Source: spec/toolbox.md section 1."""

from enum import StrEnum
from typing import Any

from qmpd.block.drivers.qcow2.create import CreateOptions
from qmpd.commands.block_info import Qcow2CompressionType
from qmpd.commands.blockdev_options import BlockdevDriver, BlockdevRef, to_child
from qmpd.control.qapi import Bool, Int, QapiModel, Size, Str
from qmpd.control.registry import Context, command
from qmpd.errors import Kind, QmpdError
from qmpd.jobs.create import CreateFile, CreateJob, CreateQcow2


class PreallocMode(StrEnum):
    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


class BlockdevQcow2Version(StrEnum):
    V2 = "v2"
    V3 = "v3"


class QCryptoBlockFormat(StrEnum):
    QCOW = "qcow"
    LUKS = "luks"


class QCryptoBlockCreateOptions(QapiModel, discriminator="format"):
    """Encryption, which is refused; the members are there to be refused by name and not as unknown."""

    format: QCryptoBlockFormat


class QCryptoBlockOptionsQCow(QCryptoBlockCreateOptions, branch="qcow"):
    key_secret: Str | None = None


class QCryptoBlockCreateOptionsLUKS(QCryptoBlockCreateOptions, branch="luks"):
    key_secret: Str | None = None
    cipher_alg: Str | None = None
    cipher_mode: Str | None = None
    ivgen_alg: Str | None = None
    ivgen_hash_alg: Str | None = None
    hash_alg: Str | None = None
    iter_time: Int | None = None


class BlockdevCreateOptions(QapiModel, discriminator="driver"):
    driver: BlockdevDriver


class BlockdevCreateOptionsFile(BlockdevCreateOptions, branch="file"):
    """``size`` in bytes. ``nocow`` and ``extent-size-hint`` are hints to the file system and not passed on."""

    filename: Str
    size: Size
    preallocation: PreallocMode | None = None
    nocow: Bool | None = None
    extent_size_hint: Size | None = None


class BlockdevCreateOptionsQcow2(BlockdevCreateOptions, branch="qcow2"):
    """``size`` and ``cluster-size`` in bytes."""

    file: BlockdevRef
    data_file: BlockdevRef | None = None
    data_file_raw: Bool | None = None
    extended_l2: Bool | None = None
    size: Size
    version: BlockdevQcow2Version | None = None
    backing_file: Str | None = None
    backing_fmt: BlockdevDriver | None = None
    encrypt: QCryptoBlockCreateOptions | None = None
    cluster_size: Size | None = None
    preallocation: PreallocMode | None = None
    lazy_refcounts: Bool | None = None
    refcount_bits: Int | None = None
    compression_type: Qcow2CompressionType | None = None


class BlockdevCreate(QapiModel):
    job_id: Str
    options: BlockdevCreateOptions


@command("blockdev-create")
async def blockdev_create(ctx: Context, args: BlockdevCreate) -> None:
    """Start the job. What cannot be created is found out by the job; this fails only for what can never be."""
    if not isinstance(args.options, BlockdevCreateOptionsFile | BlockdevCreateOptionsQcow2):
        raise QmpdError("Driver does not support blockdev-create", Kind.UNSUPPORTED)
    await ctx.jobs.launch(lambda: _make_job(ctx, args))


def _make_job(ctx: Context, args: BlockdevCreate) -> CreateJob:
    options = args.options
    if isinstance(options, BlockdevCreateOptionsFile):
        preallocation = options.preallocation or PreallocMode.OFF
        return CreateFile(args.job_id, ctx.graph, options.filename, options.size, preallocation.value)
    assert isinstance(options, BlockdevCreateOptionsQcow2)
    file = to_child(options.file)
    assert file is not None
    data_file = None if options.data_file is None else to_child(options.data_file)
    return CreateQcow2(args.job_id, ctx.graph, file, _qcow2_options(options), data_file)


#: Members that CreateOptions has by the same name.
_SAME = (
    *("version", "cluster_size", "refcount_bits", "preallocation", "lazy_refcounts", "extended_l2"),
    *("compression_type", "backing_file", "backing_fmt", "data_file_raw", "encrypt"),
)


def _qcow2_options(options: BlockdevCreateOptionsQcow2) -> CreateOptions:
    """What was given; the defaults are those of CreateOptions."""
    given: dict[str, Any] = {name: value for name in _SAME if (value := getattr(options, name)) is not None}
    plain: dict[str, Any] = {
        name: value.value if isinstance(value, StrEnum) else value for name, value in given.items()
    }
    return CreateOptions(size=options.size, **plain)
