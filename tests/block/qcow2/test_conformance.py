"""The driver qcow2 keeps the contract that all drivers keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmpd.block.api import Driver
from qmpd.block.contract import Checked
from qmpd.block.drivers.qcow2 import CreateOptions, Qcow2, create
from qmpd.block.storage.file import FileStorage
from tests.block.conformance import Conformance, checked, read
from tests.block.qcow2.support import children


class OwningQcow2(Qcow2):
    """Closes its files with itself, since no graph does."""

    owned: list[FileStorage]

    def close(self) -> None:
        super().close()
        for file in self.owned:
            file.close()


class TestConformance(Conformance):
    """Version 3 as created by default."""

    options: dict[str, Any] = {}

    def test_place_given_up_changes_nothing(self, device: Checked) -> None:
        """Clusters that were nobody's are free again; one that was the image's own is filled in place."""
        unit = device.placement_unit
        assert unit is not None
        device.write(0, b"old" * unit)
        with pytest.raises(RuntimeError, match="no more"), device.place(0, 6 * unit) as runs:
            raise RuntimeError("no more")
        first = device.map(0, unit)
        assert runs.host[0] == first.host[0]
        assert read(device, 0, 6 * unit) == b"old" * unit + bytes(3 * unit)

    def create(self, directory: Path, length: int) -> Driver:
        path = directory / "image.qcow2"
        path.touch()
        file = FileStorage.open({}, {"filename": str(path)}, read_only=False)
        self.fill(checked(file), directory, CreateOptions(length, **self.options))
        file.close()
        return self.opened(directory)

    def fill(self, file: Checked, directory: Path, options: CreateOptions) -> None:
        """Make the image."""
        create(file, options)

    def data_file(self, directory: Path) -> FileStorage | None:
        """What the image keeps its data in, if not in itself."""
        return None

    def reopen(self, directory: Path, driver: Driver) -> Driver:
        driver.close()
        return self.opened(directory)

    def opened(self, directory: Path) -> Driver:
        file = FileStorage.open({}, {"filename": str(directory / "image.qcow2")}, read_only=False)
        data = self.data_file(directory)
        below = children(checked(file), data and checked(data))
        image = OwningQcow2.open(below, {}, read_only=False)
        image.owned = [file] if data is None else [file, data]
        return image


class TestSmallClusters(TestConformance):
    """Many tables, many refcount blocks."""

    options = {"cluster_size": 512, "refcount_bits": 64}


class TestExtended(TestConformance):
    """Sub-clusters."""

    options = {"extended_l2": True}


class TestVersion2(TestConformance):
    """No zero flag."""

    options = {"version": "v2"}


class TestDataFile(TestConformance):
    """The guest's data in a file that holds something else at first."""

    options = {"data_file": "data"}

    def fill(self, file: Checked, directory: Path, options: CreateOptions) -> None:
        (directory / "data").write_bytes(b"" if options.data_file_raw else b"\xee" * (8 << 20))
        data = self.data_file(directory)
        create(file, options, checked(data))
        data.close()

    def data_file(self, directory: Path) -> FileStorage:
        return FileStorage.open({}, {"filename": str(directory / "data")}, read_only=False)


class TestDataFileOfSmallClusters(TestDataFile):
    """Many tables."""

    options = {"cluster_size": 512, "data_file": "data"}


class TestExtendedDataFile(TestDataFile):
    """Sub-clusters."""

    options = {"extended_l2": True, "data_file": "data"}


class TestRawDataFile(TestDataFile):
    """A data file that is a raw image by itself; nothing in it can be left unpublished."""

    options = {"data_file": "data", "data_file_raw": True}

    def test_place_given_up_changes_nothing(self, device: Checked) -> None:
        """All clusters are the image's own: what was put there stays, as after a write that failed half way."""
        unit = device.placement_unit
        assert unit is not None
        with pytest.raises(RuntimeError, match="no more"), device.place(0, 2 * unit):
            raise RuntimeError("no more")
        device.write(unit, b"still")
        assert read(device, unit - 1, 6) == b"\0still"

    def test_the_data_file_is_the_disk(self, device: Checked, tmp_path: Path) -> None:
        """Byte for byte, whatever was done."""
        device.write(70_000, b"data" * 50_000)
        device.write_zeroes(131_072, 65_536)
        device.discard(196_608, 65_536)
        device.flush()
        assert (tmp_path / "data").read_bytes() == read(device, 0, device.length)
