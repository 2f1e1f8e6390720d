"""Images that keep the guest's data in a file of its own: to and fro with QEMU's tools, damage, and what is refused."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.api import BackingReference, BlockDevice
from qmpd.block.drivers.qcow2 import CreateOptions, Qcow2, create
from qmpd.block.extents import RunKind
from qmpd.block.storage.file import FileStorage
from qmpd.errors import QmpdError
from tests.block.qcow2.support import MemoryFile, check_clean, children, new_image, read, run
from tests.tools import need

KIB, MIB = 1 << 10, 1 << 20
FORMATS = ["cluster_size=64k", "cluster_size=512", "extended_l2=on,cluster_size=16k", "preallocation=metadata"]
RAW = [*(f"{options},data_file_raw=on" for options in FORMATS[:3])]


@pytest.fixture(autouse=True)
def _tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("qemu-img", "qemu-io")
    monkeypatch.chdir(tmp_path)  # from where QEMU looks for data files


@contextmanager
def opened(path: str, *, read_only: bool = False) -> Iterator[Qcow2]:
    """An image with the data file that it names."""
    file = FileStorage.open({}, {"filename": path}, read_only=read_only)
    name = Qcow2.named_data_file(file)
    assert name is not None
    data = FileStorage.open({}, {"filename": name}, read_only=read_only)
    image = Qcow2.open(children(file, data), {}, read_only=read_only)
    try:
        yield image
    finally:
        image.close()
        data.close()
        file.close()


def io(path: str, *commands: str) -> None:
    output = run("qemu-io", "-f", "qcow2", *(part for command in commands for part in ("-c", command)), path)
    assert "failed" not in output, output


def made_by_qemu(options: str, size: str = "8M") -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"{options},data_file=data.raw", "image.qcow2", size)


def flat() -> bytes:
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "image.qcow2", "flat.bin")
    return Path("flat.bin").read_bytes()


@pytest.mark.parametrize("options", [*FORMATS, *RAW])
def test_what_qemu_wrote_is_read(options: str) -> None:
    """Data at the places where the guest has it, the very first among them; zeros and holes."""
    made_by_qemu(options)
    io("image.qcow2", "write -P 17 0 70000", "write -P 34 3M 2M", "write -z 4M 100k", "discard 3M 64k")
    with opened("image.qcow2", read_only=True) as image:
        assert read(image, 0, image.length) == flat()
        for found in image.map(0, image.length):
            assert found.kind != RunKind.DATA or found.host == found.offset


@pytest.mark.parametrize("options", [*FORMATS, *RAW])
def test_what_qmpd_wrote_is_read_by_qemu(options: str) -> None:
    """Over data that is there already, and in a data file where there is none; a raw one is the disk by itself."""
    made_by_qemu(options)
    io("image.qcow2", "write -P 255 2M 4M")
    with opened("image.qcow2") as image:
        image.write(1000, b"\x11" * 70000)
        image.write(3 * MIB, b"\x22" * MIB)
        image.write_zeroes(3 * MIB + 5, 100 * KIB)
        image.discard(4 * MIB, 2 * MIB)
        with image.place(6 * MIB, 2 * MIB) as runs:
            for placed in runs:
                assert image.data_child is not None
                image.data_child.write(placed.host, b"\x44" * placed.length)
    check_clean(Path("image.qcow2"))
    io("image.qcow2", "read -P 17 1000 70000", "read -P 255 2M 1M", "read -P 0 4M 2M", "read -P 68 6M 2M")
    io("image.qcow2", f"read -P 0 {3 * MIB + 5} 100k", "read -P 34 3M 5")
    if "raw" in options:
        assert Path("data.raw").read_bytes() == flat()


@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=4k,data_file_raw=on"])
def test_size_changes_reach_the_data_file(options: str) -> None:
    """It ends where the disk does, and QEMU finds nothing wrong."""
    made_by_qemu(options, "1M")
    with opened("image.qcow2") as image:
        image.write(0, b"x" * MIB)
        for size in (MIB + 512, 3 * MIB, 700 * KIB, 2 * MIB):
            image.truncate(size)
            image.flush()
            assert Path("data.raw").stat().st_size == size
    check_clean(Path("image.qcow2"))
    assert flat() == b"x" * 700 * KIB + bytes(2 * MIB - 700 * KIB)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_qemu_finds_new_images_sound(raw: bool, preallocation: str) -> None:
    """A new disk is zeros whatever was in its data file; in a raw one what was there is the disk."""
    old = b"old" * 300_000
    Path("data.raw").write_bytes(old)
    Path("image.qcow2").touch()
    files = [FileStorage.open({}, {"filename": name}, read_only=False) for name in ("image.qcow2", "data.raw")]
    options = CreateOptions(MIB, data_file="data.raw", data_file_raw=raw, preallocation=preallocation)
    create(files[0], options, files[1])
    for file in files:
        file.close()

    check_clean(Path("image.qcow2"))
    assert flat() == (old.ljust(MIB, b"\0") if raw else bytes(MIB))
    found = json.loads(run("qemu-img", "info", "--output=json", "image.qcow2"))["format-specific"]["data"]
    assert (found["data-file"], found["data-file-raw"]) == ("data.raw", raw)
    assert Path("data.raw").stat().st_size == MIB


def new(*, raw: bool = False, backing: BlockDevice | None = None, size: int = MIB) -> tuple[Any, Any, Qcow2]:
    data = MemoryFile(journal=True)
    options = {"backing_file": "base.raw", "backing_fmt": "raw"} if backing else {}
    file, image = new_image(
        MemoryFile(journal=True),
        size=size,
        data=data,
        data_file="data",
        data_file_raw=raw,
        cluster_size=4096,
        **options,
    )
    image.attach("backing", backing)
    image.flush()
    return file, data, image


def test_no_data_goes_into_the_image_file() -> None:
    """Its clusters are tables, all of them."""
    file, data, image = new()
    image.write(0, b"guest" * 100_000)
    image.close()
    assert b"guestguest" not in file.content
    assert data.content[: 5 * 100_000] == b"guest" * 100_000


def test_data_is_durable_before_what_refers_to_it() -> None:
    """Entries that are on disk never refer to bytes in the data file that are not."""
    file, data, image = new()
    seen: list[bool] = []
    write = file.write

    def watch(offset: int, content: Any) -> None:
        if (1 << 63 | 8192).to_bytes(8, "big") in bytes(content):
            seen.append(bool(data.pending))
        write(offset, content)

    file.write = watch
    image.write(8192, b"data")
    image.flush()
    assert seen == [False]


def test_emptying_keeps_the_bytes_until_nothing_refers_to_them() -> None:
    """A crash on the way shows the old bytes or the backing file, which are the same, but no zeros."""
    file, data, image = new(backing=MemoryFile(b"b" * MIB))
    image.write(0, b"b" * MIB)
    image.flush()
    before = bytes(data.content)
    flush = file.flush

    def watch() -> None:
        assert data.content == before
        flush()

    file.flush = watch
    image.make_empty()
    file.flush = flush
    assert read(image, 0, MIB) == b"b" * MIB
    assert data.discarded == [(0, MIB)]
    assert all(found.kind == RunKind.UNALLOCATED for found in image.map(0, MIB))


def test_a_full_data_device_is_told_before_anything_is_written() -> None:
    """A device that cannot grow has no room behind its end."""

    class Device(MemoryFile):
        growable = False

    _, _, image = new()
    image.attach("data-file", Device(bytes(8192)))
    image.write(4096, b"fits")
    with pytest.raises(QmpdError, match="No space left on device"):
        image.write(8000, b"does not fit" * 100)
    with pytest.raises(QmpdError, match="Cannot grow device files"):
        image.truncate(2 * MIB)
    assert image.length == MIB


def test_a_raw_data_file_takes_no_backing_file() -> None:
    """It would not be the disk any more."""
    _, _, image = new(raw=True)
    with pytest.raises(QmpdError, match="Invalid argument"):
        image.check_backing_reference(BackingReference("base", "raw"))


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (
            5 * 4096 | 1 << 63,
            "External data file host cluster offset 0x5000 does not match guest cluster offset: 0x1000",
        ),
        (
            1 << 63,
            "External data file host cluster offset 0 does not match guest cluster offset: 0x1000, L2 index: 0x1",
        ),
        (1 << 62, "Compressed cluster entry found in image with external data file"),
    ],
)
def test_damaged_entries(entry: int, text: str) -> None:
    """Data is nowhere else than where the guest has it. QEMU says the same, and the check finds it."""
    file, data, image = new()
    image.write(0, b"x" * 3 * 4096)
    image.close()
    at = file.content.index((1 << 63 | 4096).to_bytes(8, "big"))
    file.content[at : at + 8] = struct.pack(">Q", entry)
    Path("image.qcow2").write_bytes(file.content)
    Path("data").write_bytes(data.content)

    for read_only in (True, False):
        damaged = Qcow2.open(children(MemoryFile(file.content), data), {}, read_only=read_only)
        with pytest.raises(QmpdError) as caught:
            read(damaged, 4096, 10)
        assert text in caught.value.desc
    with pytest.raises(QmpdError, match=r"does not match|Compressed"):
        Qcow2.open(children(MemoryFile(file.content), data), {}, read_only=False).write(4096, b"x")
    said = subprocess.run(["qemu-io", "-c", "read 4096 10", "image.qcow2"], capture_output=True, text=True)
    assert "Input/output error" in said.stdout + said.stderr
    assert text in said.stderr


def test_which_children_go_with_which_image() -> None:
    """An image with a data file needs it; another one takes none."""
    file, data, image = new()
    image.close()
    plain, other = new_image(size=MIB)
    other.close()
    with pytest.raises(QmpdError, match=r"^'data-file' is required for this image$"):
        Qcow2.open({"file": file}, {}, read_only=True)
    with pytest.raises(QmpdError, match=r"^'data-file' can only be set for images with an external data file$"):
        Qcow2.open(children(plain, data), {}, read_only=True)
    assert Qcow2.named_data_file(file) == "data"
    assert Qcow2.named_data_file(plain) is None


def test_there_are_no_internal_snapshots() -> None:
    """In QEMU's words, for those who look for one as for those who want to take one."""
    _, _, image = new()
    with pytest.raises(QmpdError, match=r"^Failed to get a snapshot list: Operation not supported$"):
        _ = image.snapshots
