"""The driver raw: windows, their limits, and that nothing but the shift happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmpd.block.api import Driver
from qmpd.block.drivers import DRIVERS
from qmpd.block.drivers.raw import Raw
from qmpd.block.extents import RunKind, Runs
from qmpd.block.storage.file import FileStorage, create_file
from qmpd.errors import QmpdError
from qmpd.units import MIB
from tests.block.conformance import Conformance, checked, noise, read


def open_file(path: Path) -> FileStorage:
    """The file, read-write."""
    return FileStorage.open({}, {"filename": str(path)}, read_only=False)


class TestConformance(Conformance):
    """Raw without a window."""

    options: dict[str, Any] = {}

    def create(self, directory: Path, length: int) -> Driver:
        create_file(str(directory / "raw.img"), length + self.options.get("offset", 0))
        return self.opened(directory, length)

    def opened(self, directory: Path, length: int) -> Driver:
        file = checked(open_file(directory / "raw.img"))
        return OwningRaw.open({"file": file}, {**self.options, **self.window(length)}, read_only=False)

    def window(self, length: int) -> dict[str, int]:
        return {}

    def reopen(self, directory: Path, driver: Driver) -> Driver:
        driver.close()
        return self.opened(directory, driver.length)


class TestShiftedConformance(TestConformance):
    """A window that begins at an odd byte and goes to the end."""

    options = {"offset": 1024}


class TestWindowConformance(TestConformance):
    """A window with both ends."""

    options = {"offset": 12345}
    resizes = False

    def window(self, length: int) -> dict[str, int]:
        return {"size": length}


class OwningRaw(Raw):
    """Closes its file as the graph would."""

    def close(self) -> None:
        self._file._device.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"offset": 8388608}, "Offset (8388608) cannot be greater than size of the containing file (4194304)"),
        (
            {"offset": 1048576, "size": 4194304},
            "The sum of offset (1048576) and size (4194304) has to be smaller or equal to the  actual size of the "
            "containing file (4194304)",
        ),
        ({"size": 1000}, "Specified size is not multiple of 512"),
        (
            {"offset": 8388608, "size": 1000},
            "Offset (8388608) cannot be greater than size of the containing file (4194304)",
        ),
        ({"offset": -1}, "Value '-1' is out of range for parameter 'offset'"),
        ({"size": -512}, "Value '-512' is out of range for parameter 'size'"),
    ],
)
def test_windows_outside_of_the_file(tmp_path: Path, options: dict[str, int], text: str) -> None:
    """The peer's texts, two blanks included."""
    create_file(str(tmp_path / "r"), 4 * MIB)
    with pytest.raises(QmpdError) as caught:
        Raw.open({"file": checked(open_file(tmp_path / "r"))}, options, read_only=False)
    assert str(caught.value) == text


@pytest.mark.parametrize(("options", "length"), [({"size": 0}, 0), ({"offset": MIB}, 0), ({"offset": 100}, MIB)])
def test_lengths(tmp_path: Path, options: dict[str, int], length: int) -> None:
    """Empty windows are fine, and what is left of the file is rounded up to sectors."""
    create_file(str(tmp_path / "r"), MIB)
    assert Raw.open({"file": checked(open_file(tmp_path / "r"))}, options, read_only=False).length == length


def test_a_window_does_not_resize(tmp_path: Path) -> None:
    """With a size the length is fixed; with an offset alone the file follows."""
    create_file(str(tmp_path / "r"), MIB)
    file = checked(open_file(tmp_path / "r"))
    with pytest.raises(QmpdError, match=r"^Cannot resize fixed-size raw disks$"):
        Raw.open({"file": file}, {"offset": 512, "size": 512}, read_only=False).truncate(512)
    Raw.open({"file": file}, {"offset": 512}, read_only=False).truncate(2 * MIB)
    assert file.length == 2 * MIB + 512


def test_writes_stay_inside_the_window(tmp_path: Path) -> None:
    """What surrounds the window is untouched."""
    path = tmp_path / "r"
    path.write_bytes(b"a" * 4096)
    raw = Raw.open({"file": checked(open_file(path))}, {"offset": 1000, "size": 1024}, read_only=False)
    checked(raw).write(0, b"b" * 1024)
    assert path.read_bytes() == b"a" * 1000 + b"b" * 1024 + b"a" * 2072


def test_seen_from_above_raw_is_not_there(tmp_path: Path) -> None:
    """Nested windows add up, and the innermost file is what map and direct speak of."""
    create_file(str(tmp_path / "r"), MIB)
    file = open_file(tmp_path / "r")
    file.write(0, noise(MIB, 1))
    inner = Raw.open({"file": checked(file)}, {"offset": 512}, read_only=False)
    outer = Raw.open({"file": checked(inner)}, {"offset": 1024}, read_only=False)
    assert outer.direct(0, 512) == (file, 1536)
    assert next(iter(outer.map(0, 512))).host == 1536
    assert read(outer.data_child, 1536, 100) == noise(MIB, 1)[1536:1636]  # type: ignore[arg-type]


def test_what_the_child_finds_below_itself_is_content_here(tmp_path: Path) -> None:
    """Over a format with a backing file nothing is unallocated: raw has no backing to fall through to."""

    class Overlay(FileStorage):
        def map(self, offset: int, length: int) -> Runs:
            return Runs.single(offset, length, RunKind.UNALLOCATED)

    create_file(str(tmp_path / "r"), MIB)
    overlay = Overlay.open({}, {"filename": str(tmp_path / "r")}, read_only=True)
    raw = Raw.open({"file": checked(overlay)}, {}, read_only=True)
    assert [run.kind for run in raw.map(0, MIB)] == [RunKind.OPAQUE]


def test_reopen_moves_the_window_or_leaves_it(tmp_path: Path) -> None:
    """Prepare checks, abort forgets, commit moves."""
    create_file(str(tmp_path / "r"), MIB)
    raw = Raw.open({"file": checked(open_file(tmp_path / "r"))}, {}, read_only=False)
    with pytest.raises(QmpdError, match="cannot be greater"):
        raw.reopen_prepare(read_only=True, options={"offset": 2 * MIB})
    raw.reopen_prepare(read_only=True, options={"offset": 512})
    raw.reopen_abort()
    assert (raw.length, raw.read_only) == (MIB, False)
    raw.reopen_prepare(read_only=True, options={"offset": 512})
    raw.reopen_commit()
    assert (raw.length, raw.read_only) == (MIB - 512, True)


def test_driver_table_knows_the_peers_names() -> None:
    """Names are known without importing anything; unknown ones are absent."""
    assert {"file", "host_device", "null-co", "null-aio", "raw", "qcow2"} <= set(DRIVERS)
    assert "commit_top" not in DRIVERS
    assert DRIVERS["raw"] is Raw
    with pytest.raises(KeyError):
        DRIVERS["vmdk"]
