"""The driver contract, in prose and types.

A *driver* is one opened format, protocol or filter instance. It knows its children as :class:`BlockDevice` objects that
the graph hands in (each behind the checking wrapper of :mod:`qmpd.block.contract`), so nothing in ``block`` knows the
graph.

Thread domain: every I/O method may be called from any worker thread, several at a time; a driver serialises inside. The
``attach``, ``permissions_*`` and ``reopen_*`` methods are called on the control thread only, and must not block on I/O
for long (open(2), fcntl(2) and the like are fine; copying data or fsync is not).

Errors: drivers raise :class:`qmpd.errors.QmpdError` and nothing else. An OSError is converted at the edge where it
happens (:func:`qmpd.errors.from_oserror`), with errno kept.

Units: every offset and length is in bytes.
"""

# ruff: noqa: B027  hooks that most drivers leave empty

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import IntFlag
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from qmpd.errors import Kind, QmpdError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qmpd.block.batch import Batch
    from qmpd.block.extents import Runs
    from qmpd.block.findings import CheckResult
    from qmpd.block.storage.file import FileStorage

    Offsets = npt.NDArray[np.int64]

Buffer = bytes | bytearray | memoryview


class Perm(IntFlag):
    """What a parent does with a node (spec/block-graph.md section 2)."""

    NONE = 0
    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8
    ALL = 15

    def names(self) -> list[str]:
        """QMP names in bit order, e.g. ``["consistent-read", "write"]``."""
        return [name for bit, name in _PERM_QMP if self & bit]

    def text(self) -> str:
        """As QEMU's messages print it, e.g. ``consistent read, write``."""
        return ", ".join(name.replace("-", " ") for name in self.names())


_PERM_QMP = (
    (Perm.CONSISTENT_READ, "consistent-read"),
    (Perm.WRITE, "write"),
    (Perm.WRITE_UNCHANGED, "write-unchanged"),
    (Perm.RESIZE, "resize"),
)


class Role(IntFlag):
    """What a child is to its parent (spec/block-graph.md section 1)."""

    NONE = 0
    DATA = 1
    METADATA = 2
    FILTERED = 4
    COW = 8
    PRIMARY = 16


@runtime_checkable
class BlockDevice(Protocol):
    """Bytes at offsets: what a driver sees of its children, and what jobs and exports see of a node."""

    @property
    def length(self) -> int:
        """Current length in bytes."""

    @property
    def placement_unit(self) -> int | None:
        """Alignment that :meth:`place` wants for offset and length (bytes), or None where place is not available."""

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the guest's view (backing data included). Never short."""

    def write(self, offset: int, data: Buffer) -> None:
        """Store ``data``; visible to readers at return, durable after :meth:`flush`."""

    def read_many(self, batch: Batch) -> Sequence[int]:
        """:meth:`readinto` for many at once, where there is a short way: the indexes of the requests left to do.

        A request that would fail is left, so that only :meth:`readinto` raises; its buffer holds anything.
        """

    def write_many(self, batch: Batch) -> Sequence[int]:
        """:meth:`write` for many at once, where there is a short way: the indexes of the requests left to do.

        A request that would fail is left, so that only :meth:`write` raises; some of it may be stored.
        """

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Make the range read as zeros, by metadata where possible; ``unmap`` allows giving up the space."""

    def discard(self, offset: int, length: int) -> None:
        """The content of the range is not needed any more; it never uncovers backing data."""

    def flush(self) -> None:
        """Everything acknowledged before is durable at return, metadata in the order of spec/qcow2.md section 5."""

    def map(self, offset: int, length: int) -> Runs:
        """Where the bytes of THIS layer are (backing not consulted).

        The runs are sorted, disjoint and cover ``[offset, offset + n)`` without gaps for some ``0 < n <= length``; a
        driver may stop early to bound its work, and the caller asks again. Host offsets count in the data child; ask
        ``child.direct`` to come down to a file.
        """

    def direct(self, offset: int, length: int) -> tuple[FileStorage, int] | None:
        """The file and position that hold exactly these bytes, if reading or writing there is the same as here.

        None for anything that computes, throttles, injects or remaps. Who writes there says so: :meth:`note_written`.
        """

    def note_written(self, end: int) -> None:
        """Bytes up to ``end`` were written in the file that :meth:`direct` gave."""

    def place(self, offset: int, length: int) -> AbstractContextManager[Runs]:
        """Make a range of whole placement units this device's own, and say where it is.

        Yields DATA runs with host offsets in the data child (use ``data_child.direct``); the caller fills them all. On
        normal exit the mapping is published (reads see the new bytes); on an exception nothing changed for readers and
        new space is given back. The end of the device may cut the last unit short.
        """

    def place_ranges(self, offset: Offsets, length: Offsets) -> AbstractContextManager[Runs]:
        """:meth:`place` for many ranges at once (ascending, disjoint), all published together or none.

        The runs have gaps where the ranges have.
        """

    @property
    def data_child(self) -> BlockDevice | None:
        """What host offsets of :meth:`map` and :meth:`place` count in; None for protocol drivers (themselves)."""

    def truncate(self, length: int) -> None:
        """Change the length; new bytes read as zeros (never as old or backing data)."""


@dataclass(frozen=True, slots=True)
class BackingReference:
    """What an image header says about its backing file. Both strings are untrusted."""

    filename: str
    format: str | None


@dataclass(slots=True)
class ImageInfo:
    """What a query reports of one driver instance (QEMU's ImageInfo without the chain)."""

    format: str
    virtual_size: int
    actual_size: int | None = None
    cluster_size: int | None = None
    dirty: bool = False
    encrypted: bool = False
    backing: BackingReference | None = None
    format_specific: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class InternalSnapshot(Protocol):
    """A state of the disk that an image keeps beside the current one. Both strings are untrusted."""

    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str: ...

    def info(self) -> dict[str, Any]:
        """As queries report it (QEMU's SnapshotInfo)."""


class Driver(ABC):
    """Base class of everything that can be a node. Implements :class:`BlockDevice`."""

    #: QEMU's driver name, e.g. ``qcow2``.
    format_name: ClassVar[str]
    is_filter: ClassVar[bool] = False
    #: True for drivers that hold a file themselves (file, host_device, null-co).
    is_protocol: ClassVar[bool] = False
    supports_backing: ClassVar[bool] = False
    #: Does the format keep internal snapshots?
    supports_snapshots: ClassVar[bool] = False
    #: Can the guest's data be in a file of its own, which the image names?
    supports_data_file: ClassVar[bool] = False

    #: Can blockdev-reopen give it other options?
    reopens: ClassVar[bool] = True

    #: May the driver write to its children? Changed by reopen only.
    read_only: bool = False

    # -- I/O: any worker thread ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def length(self) -> int: ...

    @property
    def placement_unit(self) -> int | None:
        return None

    @property
    def data_child(self) -> BlockDevice | None:
        return None

    @property
    def map_unit(self) -> int:
        """The bytes that are mapped as one: where :meth:`map` cuts within, the image file ends."""
        return 1

    @property
    def growable(self) -> bool:
        """Do bytes past the end read as zeros, and does a write there (with RESIZE permission) make it longer?"""
        return False

    @abstractmethod
    def readinto(self, offset: int, buffer: memoryview) -> None: ...

    @abstractmethod
    def write(self, offset: int, data: Buffer) -> None: ...

    def read_many(self, batch: Batch) -> Sequence[int]:
        return batch.indexes

    def write_many(self, batch: Batch) -> Sequence[int]:
        return batch.indexes

    @abstractmethod
    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None: ...

    @abstractmethod
    def discard(self, offset: int, length: int) -> None: ...

    @abstractmethod
    def flush(self) -> None: ...

    @abstractmethod
    def map(self, offset: int, length: int) -> Runs: ...

    def direct(self, offset: int, length: int) -> tuple[FileStorage, int] | None:
        return None

    def note_written(self, end: int) -> None:
        pass

    def place(self, offset: int, length: int) -> AbstractContextManager[Runs]:
        raise QmpdError(f"{self.format_name}: no placement", Kind.UNSUPPORTED)

    def place_ranges(self, offset: Offsets, length: Offsets) -> AbstractContextManager[Runs]:
        raise QmpdError(f"{self.format_name}: no placement", Kind.UNSUPPORTED)

    def truncate(self, length: int) -> None:
        raise QmpdError("Image format driver does not support resize", Kind.UNSUPPORTED)

    # -- life cycle: a worker thread, nobody else using the driver ---------------------------------------------------

    @abstractmethod
    def close(self) -> None:
        """Flush what is dirty (if writable) and release everything. Idempotent."""

    def info(self) -> ImageInfo:
        """For queries. Any thread; no data I/O."""
        return ImageInfo(self.format_name, self.length)

    @property
    def filename(self) -> str:
        """The path for protocol drivers, '' where a name follows from the children (the graph composes those)."""
        return ""

    @property
    def location(self) -> str:
        """Where :attr:`filename` leads from any working directory."""
        return self.filename

    # -- the graph's side: control thread ----------------------------------------------------------------------------

    def attach(self, name: str, child: BlockDevice | None) -> None:
        """Replace the child called ``name`` ('file', 'backing', ...)."""
        raise QmpdError(f"The {self.format_name} driver has no '{name}' child")

    def permissions_check(self, perm: Perm, shared: Perm) -> None:
        """May the node hold these cumulative permissions? Acquire what is needed, keep the old state until
        commit/abort.

        Raises QmpdError (e.g. 'Failed to get "write" lock') with nothing changed.
        """

    def permissions_commit(self, perm: Perm, shared: Perm) -> None:
        """The transaction succeeded: release what (perm, shared) no longer needs. Cannot fail."""

    def permissions_abort(self) -> None:
        """The transaction failed after a successful check: back to the old state. Cannot fail."""

    def drain_begin(self) -> None:
        """Somebody waits for the requests in flight: none may be delayed on purpose until :meth:`drain_end`. Nests."""

    def drain_end(self) -> None:
        """Requests may be delayed again."""

    def reopen_prepare(self, *, read_only: bool, options: Mapping[str, Any] | None = None) -> None:
        """Get ready to continue with other flags. The graph has flushed before. Raises with nothing changed."""

    def reopen_commit(self) -> None:
        """Switch over. Cannot fail."""

    def reopen_abort(self) -> None:
        """Forget what prepare did. Cannot fail."""

    def reload(self) -> None:
        """Read anew what other programs may have changed while the node was inactive. Worker thread, nothing in flight.

        Raises with nothing changed.
        """

    # -- formats with metadata of their own --------------------------------------------------------------------------

    def check(self, *, fix_leaks: bool, pulse: Callable[[], None]) -> CheckResult:
        """Is the image consistent? With ``fix_leaks``, space that nobody refers to is given back.

        Worker thread; nobody may write to the node meanwhile. ``pulse`` is called often and may raise to end it.
        """
        raise QmpdError("This image format does not support checks", Kind.UNSUPPORTED)

    # -- formats with internal snapshots -----------------------------------------------------------------------------

    @property
    def snapshots(self) -> Sequence[InternalSnapshot]:
        """Those in the image, oldest first. Raises UNSUPPORTED if this one cannot have any."""
        return ()

    def take_snapshot(self, name: str, nanoseconds: int) -> InternalSnapshot:
        """Keep the present content under ``name``, durably; ``nanoseconds`` since the epoch are noted beside it.

        Worker thread; the driver must be writable, and requests must be kept away meanwhile.
        """
        raise QmpdError("Operation not supported", Kind.UNSUPPORTED)

    def delete_snapshot(self, key: str) -> None:
        """Forget the first snapshot whose id is ``key``, durably. As :meth:`take_snapshot`."""
        raise QmpdError("Operation not supported", Kind.UNSUPPORTED)

    @classmethod
    def named_data_file(cls, file: BlockDevice, *, read_only: bool = True, thorough: bool = False) -> str | None:
        """The file beside ``file`` that keeps the data of the image in it, as its header says (untrusted), or None.

        Worker thread, before the driver is opened. Raises what opening would for an image with a data file;
        ``thorough``, for any, and does not mind if the name of a data file is missing.
        """
        return None

    # -- formats with a backing file ---------------------------------------------------------------------------------

    @property
    def backing_reference(self) -> BackingReference | None:
        """The header's backing file, or None."""
        return None

    def check_backing_reference(self, reference: BackingReference | None) -> None:
        """Would :meth:`change_backing_reference` fit? Raises EINVAL-errno QmpdError otherwise. No I/O."""
        raise QmpdError("Operation not supported", Kind.UNSUPPORTED)

    def change_backing_reference(self, reference: BackingReference | None) -> None:
        """Rewrite the header durably (returns after the sync). Worker thread; the driver must be writable."""
        raise QmpdError("Operation not supported", Kind.UNSUPPORTED)

    def make_empty(self) -> None:
        """Forget all content, durably, so that the backing file shows through everywhere; it has the same content.

        Worker thread; the driver must be writable, and requests must be kept away meanwhile.
        """
        raise QmpdError("Operation not supported", Kind.UNSUPPORTED)
