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


class OwningQcow2(Qcow2):
    """Closes its file with itself, since no graph does."""

    owned: FileStorage

    def close(self) -> None:
        super().close()
        self.owned.close()


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
        create(checked(file), CreateOptions(length, **self.options))
        file.close()
        return self.opened(directory)

    def reopen(self, directory: Path, driver: Driver) -> Driver:
        driver.close()
        return self.opened(directory)

    def opened(self, directory: Path) -> Driver:
        file = FileStorage.open({}, {"filename": str(directory / "image.qcow2")}, read_only=False)
        image = OwningQcow2.open({"file": checked(file)}, {}, read_only=False)
        image.owned = file
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
