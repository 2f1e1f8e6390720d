"""Internal snapshots: each keeps what the disk held, qemu-img finds no fault, a power cut at any moment does no harm.

What a snapshot holds is told by qemu-img, which writes it to another file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd.block.drivers.qcow2 import CreateOptions, Qcow2, create
from qmpd.errors import QmpdError
from tests.block.qcow2.support import MemoryFile, check_clean, new_image, opened, read, run
from tests.block.qcow2.test_crash import Doomed, PowerCutError
from tests.tools import need

LAYOUTS: list[dict[str, Any]] = [
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 512, "version": "v2"},
    {"cluster_size": 4096, "refcount_bits": 4},
    {"cluster_size": 16384, "extended_l2": True},
]

SLOW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def listed(path: Path) -> list[tuple[str, str]]:
    """(id, name) as qemu-img sees them."""
    info = json.loads(run("qemu-img", "info", "--output=json", "-f", "qcow2", path))
    return [(entry["id"], entry["name"]) for entry in info.get("snapshots", [])]


def content(path: Path, name: str) -> bytes:
    """What a snapshot holds, by qemu-img."""
    out = path.with_suffix(".raw")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", f"snapshot.name={name}", path, out)
    return out.read_bytes()


def ids(image: Qcow2) -> list[str]:
    return [snapshot.id for snapshot in image.snapshots]


operations = st.lists(
    st.tuples(
        st.sampled_from(("write", "write", "zero", "discard", "take", "take", "delete", "reopen")),
        st.floats(0, 1),
        st.floats(0, 1),
        st.integers(1, 255),
    ),
    min_size=6,
    max_size=24,
)


class Disk:
    """An image file, and beside it what the disk and each snapshot should hold."""

    def __init__(self, file: MemoryFile, size: int) -> None:
        self.file = file
        self.image = Qcow2.open({"file": file}, {}, read_only=False)
        self.now = bytearray(size)
        self.kept: dict[str, bytes] = {}

    def act(self, number: int, kind: str, where: float, much: float, fill: int) -> None:
        offset = int(where * len(self.now))
        end = min(len(self.now), offset + 1 + int(much * len(self.now) / 3))
        if kind == "take":
            if len(self.kept) < 3:
                self.image.take_snapshot(f"s{number}", number)
                self.kept[f"s{number}"] = bytes(self.now)
        elif kind == "delete":
            if self.kept:
                name = sorted(self.kept)[fill % len(self.kept)]
                self.image.delete_snapshot(next(known.id for known in self.image.snapshots if known.name == name))
                del self.kept[name]
        elif kind == "reopen":
            self.image.close()
            self.image = Qcow2.open({"file": self.file}, {}, read_only=False)
        elif kind == "write":
            self.image.write(offset, bytes([fill]) * (end - offset))
            self.now[offset:end] = bytes([fill]) * (end - offset)
        else:
            (self.image.write_zeroes if kind == "zero" else self.image.discard)(offset, end - offset)
            if kind == "zero":
                self.now[offset:end] = bytes(end - offset)
            else:
                self.now[:] = read(self.image, 0, len(self.now))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda d: "-".join(str(v) for v in d.values()))
@given(operations=operations)
@SLOW
def test_each_snapshot_keeps_what_the_disk_held(
    tmp_path: Path, layout: dict[str, Any], operations: list[tuple[str, float, float, int]]
) -> None:
    need("qemu-img")
    size = 40 * layout["cluster_size"]
    file = MemoryFile()
    create(file, CreateOptions(size, **layout))
    disk = Disk(file, size)
    for number, operation in enumerate(operations):
        disk.act(number, *operation)
    assert read(disk.image, 0, size) == disk.now
    disk.image.close()
    path = tmp_path / "image.qcow2"
    path.write_bytes(bytes(file.content))
    check_clean(path)
    assert [name for _, name in listed(path)] == list(disk.kept)
    for name, held in disk.kept.items():
        assert content(path, name) == held
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "now.raw")
    assert (tmp_path / "now.raw").read_bytes() == disk.now


# -- power cuts --------------------------------------------------------------------------------------------------------


def prepared(layout: dict[str, Any], *, snapshots: int) -> tuple[bytes, bytes, int]:
    """(image file, content, cluster size): some data, rewritten in part after each of the snapshots."""
    unit = layout["cluster_size"]
    file, image = new_image(size=24 * unit, **layout)
    image.write(0, b"\x11" * 15 * unit)
    for number in range(snapshots):
        image.take_snapshot(f"old{number}", 0)
        image.write((2 + number) * unit, bytes([0x20 + number]) * 3 * unit)
    held = read(image, 0, image.length)
    image.close()
    return bytes(file.content), held, unit


def cut_at(raw: bytes, end: int, kind: str) -> tuple[Doomed, bool]:
    """The file after a take or delete whose power failed after ``end`` writes and flushes; did it survive?"""
    file = Doomed(raw, journal=True)
    image = Qcow2.open({"file": file}, {}, read_only=False)
    file.moments, file.end = 0, end
    try:
        if kind == "take":
            image.take_snapshot("new", 1)
        else:
            image.delete_snapshot(image.snapshots[0].id)
    except PowerCutError:
        return file, False
    return file, True


@pytest.mark.parametrize("kind", ["take", "delete"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda d: "-".join(str(v) for v in d.values()))
def test_a_power_cut_leaves_the_disk_and_the_snapshots(tmp_path: Path, layout: dict[str, Any], kind: str) -> None:
    """At every write and flush, with any of the writes since the last flush lost: the disk and the old snapshots hold
    what they held, and once the image was opened for writing qemu-img finds no fault but leaks."""
    need("qemu-img")
    raw, held, unit = prepared(layout, snapshots=2)
    (tmp_path / "before.qcow2").write_bytes(raw)
    old = {name: content(tmp_path / "before.qcow2", name) for _, name in listed(tmp_path / "before.qcow2")}
    random, path, end, survived = Random(5), tmp_path / "image.qcow2", 0, False
    while not survived:
        file, survived = cut_at(raw, end, kind)
        end += 1
        for odds in (0.0, 0.5, 1.0):
            left = file.after_crash(iter(lambda odds=odds: random.random() < odds, None))
            image = Qcow2.open({"file": (after := MemoryFile(left))}, {}, read_only=False)
            assert read(image, 0, image.length) == held
            for cluster in (7, 8):  # the second write may get what the first has given up
                image.write(cluster * unit, b"\x77" * unit)
                image.flush()
            image.close()
            path.write_bytes(bytes(after.content))
            if layout.get("version") == "v2":  # no dirty bit: the flags may be off where they could be on
                run("qemu-img", "check", "-q", "-r", "all", "-f", "qcow2", path)
            check_clean(path, leaks=True)
            names = [name for _, name in listed(path)]
            assert names in ([*old], [*old, "new"] if kind == "take" else [*old][1:])
            for name in names:
                assert content(path, name) == old.get(name, held)
    assert end > 8


# -- bounds and refusals -----------------------------------------------------------------------------------------------


def test_counts_of_one_bit_allow_no_snapshot() -> None:
    """Where a count cannot say two nothing can be shared; the image is as it was."""
    file, image = new_image(size=1 << 20, refcount_bits=1)
    image.write(0, b"\x11" * 65536)
    image.flush()
    before = bytes(file.content)
    with pytest.raises(QmpdError, match="Invalid argument"):
        image.take_snapshot("s", 0)
    image.flush()
    assert bytes(file.content) == before
    image.write(65536, b"still writable")


def test_two_bits_count_to_three() -> None:
    _, image = new_image(size=1 << 20, refcount_bits=2)
    image.write(0, b"\x11" * 65536)
    image.take_snapshot("a", 0)
    image.take_snapshot("b", 0)
    with pytest.raises(QmpdError, match="Invalid argument"):
        image.take_snapshot("c", 0)
    image.delete_snapshot("1")
    image.take_snapshot("c", 0)
    assert ids(image) == ["2", "3"]


def test_without_room_nothing_changes() -> None:
    """A device that cannot grow: the refusal comes before the first change of what was there."""

    class Full(MemoryFile):
        growable = False

    content = MemoryFile()
    create(content, CreateOptions(1 << 20, cluster_size=4096))
    image = Qcow2.open({"file": content}, {}, read_only=False)
    image.write(0, b"\x11" * 65536)
    image.close()
    file = Full(bytes(content.content))
    image = Qcow2.open({"file": file}, {}, read_only=False)
    with pytest.raises(QmpdError, match="No space left"):
        image.take_snapshot("s", 0)
    assert not image.snapshots
    image.write(0, b"still writable")
    image.close()
    assert not Qcow2.open({"file": file}, {}, read_only=True).snapshots


def test_names_that_could_not_be_read_back_are_refused() -> None:
    _, image = new_image(size=1 << 20)
    with pytest.raises(QmpdError, match="Snapshot name is too long: 256 bytes, at most 255 can be read back"):
        image.take_snapshot("ä" * 128, 0)
    image.take_snapshot("n" * 255, 0)


def test_a_file_that_fails_half_way_ends_all_writes() -> None:
    """Memory and file may differ: only opening the image again, which counts anew, makes it writable."""

    class Failing(MemoryFile):
        armed = False

        def write(self, offset: int, data: Any) -> None:
            if self.armed and offset == 60:
                raise QmpdError("Input/output error")
            super().write(offset, data)

    file = Failing()
    create(file, CreateOptions(1 << 20))
    image = Qcow2.open({"file": file}, {}, read_only=False)
    image.write(0, b"\x11" * 65536)
    file.armed = True
    with pytest.raises(QmpdError):
        image.take_snapshot("s", 0)
    file.armed = False
    with pytest.raises(QmpdError, match="takes no more writes"):
        image.write(0, b"x")
    again = Qcow2.open({"file": file}, {}, read_only=False)
    assert read(again, 0, 65536) == b"\x11" * 65536
    again.write(0, b"writable")


def test_a_snapshot_that_is_not_there_cannot_be_deleted() -> None:
    _, image = new_image(size=1 << 20)
    with pytest.raises(QmpdError, match="No such file or directory"):
        image.delete_snapshot("1")


@pytest.mark.parametrize("damage", ["table-behind-the-end", "unaligned-table", "uncounted-data"])
def test_a_damaged_snapshot_is_not_deleted(damage: str) -> None:
    """What its L1 table leads to cannot be given up, so nothing is."""
    file, image = new_image(size=1 << 20)
    image.write(0, b"\x11" * 65536)
    image.take_snapshot("s", 0)
    image.close()
    l1 = int.from_bytes(file.content[int.from_bytes(file.content[64:72], "big") :][:8], "big")
    l2 = int.from_bytes(file.content[l1 : l1 + 8], "big")
    if damage == "table-behind-the-end":
        file.content[l1 : l1 + 8] = (1 << 40).to_bytes(8, "big")
    elif damage == "unaligned-table":
        file.content[l1 : l1 + 8] = (l2 + 512).to_bytes(8, "big")
    else:
        file.content[l2 + 8 : l2 + 16] = (len(file.content) + 65535 & ~65535).to_bytes(8, "big")
    before = bytes(file.content)
    image = Qcow2.open({"file": file}, {}, read_only=False)
    with pytest.raises(QmpdError):
        image.delete_snapshot("1")
    assert bytes(file.content)[:72] == before[:72]
    assert bytes(file.content)[80:] == before[80:]


# -- with others -------------------------------------------------------------------------------------------------------


def test_snapshots_of_qemu_img(tmp_path: Path) -> None:
    """Those of qemu-img are deleted here, and those taken here are applied and deleted by qemu-img."""
    need("qemu-img", "qemu-io")
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x11 0 4M", path)
    run("qemu-img", "snapshot", "-c", "theirs", path)
    with opened(path) as image:
        image.write(0, b"\x22" * (1 << 20))
        image.take_snapshot("ours", 1_700_000_000_000_000_000)
        image.write(0, b"\x33" * (1 << 20))
        assert ids(image) == ["1", "2"]
    check_clean(path)
    copy = tmp_path / "copy.qcow2"
    shutil.copy(path, copy)
    run("qemu-img", "snapshot", "-a", "ours", copy)
    with opened(copy, read_only=True) as image:
        assert read(image, 0, 1 << 20) == b"\x22" * (1 << 20)
    run("qemu-img", "snapshot", "-d", "ours", path)
    check_clean(path)
    with opened(path) as image:
        image.delete_snapshot("1")
        assert read(image, 0, 2 << 20) == b"\x33" * (1 << 20) + b"\x11" * (1 << 20)
    check_clean(path)
    assert not listed(path)


def test_compressed_clusters_are_shared_too(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    path, plain = tmp_path / "image.qcow2", tmp_path / "plain.raw"
    random = Random(1)
    plain.write_bytes(b"".join(random.randbytes(16384) * 2 for _ in range(64)))
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", plain, path)
    with opened(path) as image:
        image.take_snapshot("s", 0)
        image.write(1000, b"\x22" * 300_000)
    check_clean(path)
    assert content(path, "s") == plain.read_bytes()
    with opened(path) as image:
        image.delete_snapshot("1")
    check_clean(path)


def test_space_comes_back(tmp_path: Path) -> None:
    """After the deletion the clusters that only the snapshot held are holes in the file, and are used again."""
    path = tmp_path / "image.qcow2"
    need("qemu-img")
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
    with opened(path) as image:
        image.write(0, b"\x11" * (4 << 20))
        image.take_snapshot("s", 0)
        image.write(0, b"\x22" * (4 << 20))
        image.flush()
        full = path.stat().st_blocks
        image.delete_snapshot("1")
        assert path.stat().st_blocks < full - (3 << 20) // 512
        end = path.stat().st_size
        image.write(4 << 20, b"\x33" * (3 << 20))
        image.flush()
        assert path.stat().st_size == end
    check_clean(path)
