"""One wrapper above every driver that holds caller and driver to the contract of :mod:`qmpd.block.api`.

Callers get errors for ranges outside the device and for things they have no permission to do; drivers are caught giving
malformed answers. So drivers check none of it themselves. Costs about a microsecond a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from qmpd.block.api import BlockDevice, Buffer, Perm
from qmpd.block.debug import Announce, announcer
from qmpd.block.extents import RunKind, Runs
from qmpd.block.meter import WriteMeter
from qmpd.errors import Kind, QmpdError, from_oserror
from qmpd.units import MAX_LENGTH

if TYPE_CHECKING:
    from qmpd.block.api import Offsets
    from qmpd.block.batch import Batch
    from qmpd.block.storage.file import FileStorage

_WRITE: Final = Perm.WRITE
_WRITE_SAME: Final = Perm.WRITE | Perm.WRITE_UNCHANGED
_RESIZE: Final = Perm.RESIZE


class BrokenContractError(RuntimeError):
    """A driver answered nonsense: a bug in the driver, not a user's error."""


class Checked:
    """A :class:`BlockDevice` over another, with the permissions of one parent.

    ``perm`` is what the parent holds, or a callable that tells (it may change over time); ``node`` goes into errors;
    ``meter`` hears of all that is written, also of what fails.
    Requests raise QmpdError: kind RANGE outside ``[0, length)``, PERMISSION without the permission, and the driver's
    own errors with the node's name filled in. A device that is ``growable`` may be read past its end, and be written
    there with RESIZE permission. Thread domain: that of the device.
    """

    __slots__ = ("_device", "_held", "_meter", "_node")

    def __init__(
        self, device: BlockDevice, perm: Callable[[], Perm] | Perm, *, node: str, meter: WriteMeter | None = None
    ) -> None:
        self._device = device
        self._held: Callable[[], Perm] = perm if callable(perm) else lambda: perm
        self._node = node
        self._meter = meter or WriteMeter()

    # -- what needs no check -------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        return self._device.length

    @property
    def placement_unit(self) -> int | None:
        return self._device.placement_unit

    @property
    def data_child(self) -> BlockDevice | None:
        return self._device.data_child

    @property
    def growable(self) -> bool:
        """See :attr:`qmpd.block.api.Driver.growable`."""
        return bool(getattr(self._device, "growable", False))

    @property
    def debug_events(self) -> Announce:
        """See :mod:`qmpd.block.debug`."""
        return announcer(self._device)

    # -- requests ------------------------------------------------------------------------------------------------------

    def readinto(self, offset: int, buffer: memoryview) -> None:
        end = offset + len(buffer)
        if offset < 0 or (end > self._device.length and not self._may_pass_end(end)):
            raise self._out_of_range("read", offset, len(buffer))
        if buffer.itemsize != 1:
            raise TypeError("a read buffer counts in bytes")
        try:
            self._device.readinto(offset, buffer)
        except (QmpdError, OSError) as error:
            raise self._named(error) from None

    def write(self, offset: int, data: Buffer) -> None:
        self._check_write("write", offset, len(data), _WRITE_SAME)
        if isinstance(data, memoryview) and data.itemsize != 1:
            raise TypeError("data to write counts in bytes")
        if (end := offset + len(data)) > self._meter.alert:
            self._meter.passed(end)
        try:
            self._device.write(offset, data)
        except (QmpdError, OSError) as error:
            raise self._named(error) from None

    def read_many(self, batch: Batch) -> Sequence[int]:
        if batch.low < 0 or (batch.high > self._device.length and not self._may_pass_end(batch.high)):
            return batch.indexes
        return self._device.read_many(batch)

    def write_many(self, batch: Batch) -> Sequence[int]:
        held = self._held()
        inside = batch.high <= self._device.length or (held & _RESIZE and self._may_pass_end(batch.high))
        if batch.low < 0 or not inside or not held & _WRITE_SAME:
            return batch.indexes
        if batch.high > self._meter.alert:
            for offset, data in zip(batch.offsets, batch.buffers, strict=True):
                self._meter.passed(offset + len(data))
        return self._device.write_many(batch)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._check_write("write zeroes", offset, length, _WRITE_SAME)
        if length == 0:
            return
        if offset + length > self._meter.alert:
            self._meter.passed(offset + length)
        try:
            self._device.write_zeroes(offset, length, unmap=unmap)
        except (QmpdError, OSError) as error:
            raise self._named(error) from None

    def discard(self, offset: int, length: int) -> None:
        self._check_write("discard", offset, length, _WRITE)
        if length == 0:
            return
        try:
            self._device.discard(offset, length)
        except (QmpdError, OSError) as error:
            raise self._named(error) from None

    def flush(self) -> None:
        try:
            self._device.flush()
        except (QmpdError, OSError) as error:
            raise self._named(error) from None

    def truncate(self, length: int) -> None:
        self._need(_RESIZE)
        if not 0 <= length <= MAX_LENGTH:
            raise self._out_of_range("resize", 0, length)
        try:
            self._device.truncate(length)
        except (QmpdError, OSError) as error:
            raise self._named(error) from None

    def map(self, offset: int, length: int) -> Runs:
        end = offset + length
        if offset < 0 or length <= 0 or (end > self._device.length and not self._may_pass_end(end)):
            raise self._out_of_range("map", offset, length)
        try:
            runs = self._device.map(offset, length)
        except (QmpdError, OSError) as error:
            raise self._named(error) from None
        self._check_runs(runs, offset, end)
        return runs

    def direct(self, offset: int, length: int) -> tuple[FileStorage, int] | None:
        end = offset + length
        if offset < 0 or length < 0 or (end > self._device.length and not self._may_pass_end(end)):
            raise self._out_of_range("direct access", offset, length)
        return self._device.direct(offset, length)

    def note_written(self, end: int) -> None:
        if end > self._meter.alert:
            self._meter.passed(end)
        self._device.note_written(end)

    def place(self, offset: int, length: int) -> AbstractContextManager[Runs]:
        self._check_write("place", offset, length, _WRITE_SAME)
        unit, end = self._device.placement_unit, offset + length
        if unit is None:
            raise QmpdError("Operation not supported", Kind.UNSUPPORTED, node=self._node)
        if length == 0 or offset % unit or (end % unit and end != self._device.length):
            raise self._out_of_range(f"place in units of {unit}", offset, length)
        if end > self._meter.alert:
            self._meter.passed(end)
        return self._placement(partial(self._device.place, offset, length), np.array([offset]), np.array([length]))

    def place_ranges(self, offset: Offsets, length: Offsets) -> AbstractContextManager[Runs]:
        end = offset + length
        if len(offset) == 0 or (length <= 0).any() or (end[:-1] > offset[1:]).any():
            raise ValueError("ranges to place are ascending, disjoint and not empty")
        first, last = int(offset[0]), int(end[-1])
        self._check_write("place", first, last - first, _WRITE_SAME)
        unit = self._device.placement_unit
        if unit is None:
            raise QmpdError("Operation not supported", Kind.UNSUPPORTED, node=self._node)
        ragged = (offset % unit != 0) | ((end % unit != 0) & (end != self._device.length))
        if ragged.any():
            raise self._out_of_range(f"place in units of {unit}", first, last - first)
        if last > self._meter.alert:
            self._meter.passed(last)
        return self._placement(partial(self._device.place_ranges, offset, length), offset, length)

    @contextmanager
    def _placement(
        self, begin: Callable[[], AbstractContextManager[Runs]], offset: Offsets, length: Offsets
    ) -> Iterator[Runs]:
        from_caller: BaseException | None = None
        try:
            with begin() as runs:
                if not _fits(runs, offset, length):
                    raise self._broken("place gave malformed runs")
                try:
                    yield runs
                except BaseException as error:
                    from_caller = error
                    raise
        except (QmpdError, OSError) as error:
            if error is from_caller:
                raise
            raise self._named(error) from None

    # -- the checks ----------------------------------------------------------------------------------------------------

    def _may_pass_end(self, end: int) -> bool:
        return end <= MAX_LENGTH and self.growable

    def _need(self, perm: Perm) -> None:
        if not self._held() & perm:
            text = f"No '{perm.text()}' permission on node '{self._node}'"
            raise QmpdError(text, Kind.PERMISSION, node=self._node)

    def _check_write(self, what: str, offset: int, length: int, perm: Perm) -> None:
        held = self._held()
        if not held & perm:
            self._need(perm)
        end = offset + length
        if offset < 0 or length < 0 or (end > self._device.length and not (held & _RESIZE and self._may_pass_end(end))):
            raise self._out_of_range(what, offset, length)

    def _check_runs(self, runs: Runs, offset: int, end: int) -> None:
        ends = runs.offset + runs.length
        sound = (
            len(runs) > 0
            and int(runs.offset[0]) == offset
            and int(ends[-1]) <= end
            and bool((runs.length > 0).all())
            and bool((ends[:-1] == runs.offset[1:]).all())
            and bool((runs.kind <= RunKind.OPAQUE).all())
            and not bool(np.any((runs.kind == RunKind.DATA) & (runs.host < 0)))
        )
        if not sound:
            raise self._broken(f"map({offset}, {end - offset}) gave malformed runs")

    # -- errors --------------------------------------------------------------------------------------------------------

    def _out_of_range(self, what: str, offset: int, length: int) -> QmpdError:
        place = f"{what} of {length} bytes at {offset}, length is {self.length}"
        text = f"Request out of range on node '{self._node}': {place}"
        return QmpdError(text, Kind.RANGE, node=self._node, offset=offset)

    def _named(self, error: QmpdError | OSError) -> QmpdError:
        failure = from_oserror(error) if isinstance(error, OSError) else error
        if failure.node is None:
            failure.node = self._node
        return failure

    def _broken(self, what: str) -> BrokenContractError:
        return BrokenContractError(f"{type(self._device).__name__} of node '{self._node}': {what}")


def _fits(runs: Runs, offset: Offsets, length: Offsets) -> bool:
    """Are the runs places for all of the ranges and for nothing else?"""
    if not len(runs):
        return False
    run_end = runs.offset + runs.length
    # A run may go on from one range into the next where the two touch: count those as one.
    apart = offset[1:] != (offset + length)[:-1]
    start = offset[np.append(True, apart)]
    end = (offset + length)[np.append(apart, True)]
    index = np.searchsorted(start, runs.offset, "right") - 1
    return (
        bool((index >= 0).all() and (run_end <= end[index]).all())
        and bool((runs.length > 0).all() and (run_end[:-1] <= runs.offset[1:]).all())
        and int(runs.length.sum()) == int(length.sum())
        and bool((runs.kind == RunKind.DATA).all() and (runs.host >= 0).all())
    )
