"""Every filter is still a device: the conformance suite over a file, over qcow2, and below qcow2."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from qmpd.block.api import BlockDevice, Driver
from qmpd.block.batch import Batch
from qmpd.block.contract import Checked
from qmpd.block.dirty import DirtyMap
from qmpd.block.drivers.qcow2 import Qcow2
from qmpd.block.extents import RunKind
from qmpd.block.filters.commit_top import CommitTop
from qmpd.block.filters.mirror_top import MirrorTop
from tests.block.conformance import LENGTH, Conformance, checked
from tests.block.filters.rig import filter_over, new_file, new_qcow2, open_file, owning


class OverFile(Conformance):
    """A filter over a plain file."""

    filter: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}

    def create(self, directory: Path, length: int) -> Driver:
        return self.over(new_file(directory / "disk", length))

    def reopen(self, directory: Path, driver: Driver) -> Driver:
        driver.close()
        return self.over(open_file(directory / "disk"))

    def over(self, below: Driver) -> Driver:
        return owning(filter_over(self.filter, checked(below), **self.options), below)

    def test_no_batch_goes_past_it(self, device: Checked) -> None:
        """A filter sees every request for data."""
        device.write(0, bytes(range(256)) * 4)
        batch = Batch([0, 512], [memoryview(bytearray(512)), memoryview(bytearray(512))])
        assert list(device.write_many(batch)) == list(device.read_many(batch)) == [0, 1]


class TestBlkdebug(OverFile):
    """Without rules."""

    filter = "blkdebug"


class TestShapedBlkdebug(OverFile):
    """With every demand on the form of requests that it can make."""

    filter = "blkdebug"
    options: ClassVar = {
        "align": 512,
        "max_transfer": 65536,
        "opt_write_zero": 4096,
        "max_write_zero": 131072,
        "opt_discard": 8192,
        "max_discard": 65536,
    }


class TestThrottle(OverFile):
    """Without limits."""

    filter = "throttle"


class TestCopyOnRead(OverFile):
    """With nothing to copy."""

    filter = "copy-on-read"


class TestPreallocate(OverFile):
    """A file that has space to spare all the time."""

    filter = "preallocate"
    options: ClassVar = {"prealloc_size": 1 << 20, "prealloc_align": 65536}


class EmptyLayer(OverFile):
    """A filter whose child is in the backing slot: for map it has nothing of its own."""

    resizes = False

    def check_map(self, device: BlockDevice, offset: int, length: int) -> None:
        """The layer below has it all."""
        runs = device.map(offset, length)
        assert (runs.start, runs.end, runs.kind.tolist()) == (offset, offset + length, [RunKind.UNALLOCATED])


class TestMirrorTop(EmptyLayer):
    """Writing through it, while a job might look at what became dirty."""

    def over(self, below: Driver) -> Driver:
        return owning(MirrorTop(checked(below), DirtyMap(LENGTH, 65536)), below)

    def test_whatever_is_changed_is_dirty(self, driver: Driver, device: Checked) -> None:
        """And nothing else is."""
        assert isinstance(driver, MirrorTop)
        device.write(70_000, b"x")
        device.write_zeroes(3 * 65536, 65536)
        device.discard(5 * 65536, 65536)
        assert driver.dirty.bytes == 3 * 65536


class TestCommitTop(EmptyLayer):
    """Reading through it, while the image below is written."""

    def over(self, below: Driver) -> Driver:
        top = CommitTop.open({"backing": checked(below)})
        for verb in ("write", "write_zeroes", "discard", "flush"):
            setattr(top, verb, getattr(below, verb))
        return owning(top, below)


class OverQcow2(OverFile):
    """A filter over an image."""

    def create(self, directory: Path, length: int) -> Driver:
        return self.over(new_qcow2(directory / "disk", length))

    def reopen(self, directory: Path, driver: Driver) -> Driver:
        driver.close()
        return self.over(Qcow2.open({"file": checked(open_file(directory / "disk"))}, {}, read_only=False))


class TestCopyOnReadOverQcow2(OverQcow2):
    """An empty image without a backing file: reading fills it with zeros."""

    filter = "copy-on-read"


class TestThrottleOverQcow2(OverQcow2):
    """Without limits."""

    filter = "throttle"


class TestMirrorTopOverQcow2(TestMirrorTop, OverQcow2):
    """As it is in an active commit."""


class TestCommitTopOverQcow2(TestCommitTop, OverQcow2):
    """As it is in a commit."""


class TestBlkdebugOverQcow2(OverQcow2):
    """Compressed, zero and unallocated runs come through."""

    filter = "blkdebug"


class BelowQcow2(OverFile):
    """qcow2 over a filter over a file."""

    def create(self, directory: Path, length: int) -> Driver:
        below = self.over(new_file(directory / "disk"))
        return owning(new_qcow2(directory / "disk", length, checked(below)), below)

    def reopen(self, directory: Path, driver: Driver) -> Driver:
        driver.close()
        below = self.over(open_file(directory / "disk"))
        return owning(Qcow2.open({"file": checked(below)}, {}, read_only=False), below)

    def test_place_given_up_changes_nothing(self, device: Checked) -> None:
        """An image fills clusters of its own in place: its own suite has the case."""
        assert device.placement_unit is not None


class TestQcow2OverBlkdebug(BelowQcow2):
    """The image announces every moment it knows."""

    filter = "blkdebug"


class TestQcow2OverAlignedBlkdebug(BelowQcow2):
    """Requests of the image that are no multiples of 4 KiB are completed."""

    filter = "blkdebug"
    options: ClassVar = {"align": 4096}


class TestQcow2OverThrottle(BelowQcow2):
    """An image whose file is throttled, without limits."""

    filter = "throttle"


class TestQcow2OverPreallocate(BelowQcow2):
    """The image grows into space taken beforehand."""

    filter = "preallocate"
    options: ClassVar = {"prealloc_size": 1 << 20}
