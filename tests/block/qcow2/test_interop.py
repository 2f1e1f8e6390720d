"""Images go back and forth between qmpd and the QEMU tools."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.api import BackingReference
from qmpd.block.drivers.qcow2 import Qcow2, header
from qmpd.block.storage.file import FileStorage
from qmpd.errors import QmpdError
from tests.block.qcow2.support import MemoryFile, check_clean, new_image, opened, read, run
from tests.tools import need

KIB, MIB = 1 << 10, 1 << 20

FORMATS = [
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=64k,refcount_bits=64",
    "cluster_size=2M",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "preallocation=metadata",
]


def io(path: Path, *commands: str) -> None:
    """Requests by qemu-io; it exits with 0 even if a read does not verify, but says so."""
    arguments = [part for command in commands for part in ("-c", command)]
    output = run("qemu-io", "-f", "qcow2", *arguments, path)
    assert "failed" not in output, output


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", path))
    return found


@pytest.fixture(autouse=True)
def tools() -> None:
    need("qemu-img", "qemu-io")


@pytest.mark.parametrize("options", FORMATS)
def test_what_qemu_wrote_is_read(tmp_path: Path, options: str) -> None:
    """Data, zeros and holes, aligned or not."""
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "8M")
    io(
        path,
        "write -P 17 1000 70000",
        "write -P 34 3M 2M",
        "write -z 4M 100k",
        "discard 3M 64k",
        "write -P 51 8191k 1k",
    )
    expected = bytearray(8 * MIB)
    expected[1000:71000] = b"\x11" * 70000
    expected[3 * MIB : 5 * MIB] = b"\x22" * (2 * MIB)
    expected[4 * MIB : 4 * MIB + 100 * KIB] = bytes(100 * KIB)
    expected[8191 * KIB :] = b"\x33" * KIB
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "raw")
    with opened(path, read_only=True) as image:
        content = read(image, 0, image.length)
    assert content == (tmp_path / "raw").read_bytes()
    assert content[3 * MIB + 2 * MIB - KIB :] == expected[5 * MIB - KIB :]
    assert content[:71000] == expected[:71000]


@pytest.mark.parametrize("options", FORMATS)
def test_what_qmpd_wrote_is_read_by_qemu(tmp_path: Path, options: str) -> None:
    """The same requests the other way round, over an image that QEMU has filled before."""
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "8M")
    io(path, "write -P 255 2M 4M")
    with opened(path) as image:
        image.write(1000, b"\x11" * 70000)
        image.write(3 * MIB, b"\x22" * MIB)
        image.write_zeroes(3 * MIB + 5, 100 * KIB)
        image.discard(4 * MIB, 2 * MIB)
        with image.place(6 * MIB, 2 * MIB) as runs:
            for placed in runs:
                assert image.data_child is not None
                image.data_child.write(placed.host, b"\x44" * placed.length)
    check_clean(path)
    io(
        path,
        "read -P 17 1000 70000",
        "read -P 255 2M 1M",
        "read -P 34 3M 5",
        f"read -P 0 {3 * MIB + 5} 100k",
        "read -P 0 4M 2M",
        "read -P 68 6M 2M",
    )


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("size", ["512", "64k", "2M"])
def test_compressed_clusters_are_read_and_replaced(tmp_path: Path, kind: str, size: str) -> None:
    """Overwriting a part of a compressed cluster keeps the rest of it, and frees its space."""
    content = random.Random(7).randbytes(1000) * 4300
    content = content[: 4 * MIB]
    (tmp_path / "raw").write_bytes(content)
    path = tmp_path / "image.qcow2"
    options = f"compression_type={kind},cluster_size={size}"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, tmp_path / "raw", path)
    with opened(path) as image:
        assert read(image, 0, image.length) == content
        image.write(100_000, b"new")
        image.write_zeroes(MIB, 300 * KIB)
        image.flush()
        expected = bytearray(content)
        expected[100_000:100_003] = b"new"
        expected[MIB : MIB + 300 * KIB] = bytes(300 * KIB)
        assert read(image, 0, image.length) == expected
    (tmp_path / "raw").write_bytes(expected)
    check_clean(path)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "raw", path)


@pytest.mark.parametrize("options", ["compat=1.1", "compat=0.10", "extended_l2=on", "cluster_size=512"])
def test_internal_snapshots_keep_what_they_hold(tmp_path: Path, options: str) -> None:
    """Shared clusters and tables are copied before they are changed; a snapshot applied brings the old bytes back."""
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "4M")
    io(path, "write -P 1 0 2M")
    run("qemu-img", "snapshot", "-c", "first", path)
    with opened(path) as image:
        image.write(70_000, b"\x02" * 1000)
        image.write(MIB, b"\x03" * (300 * KIB))
        image.discard(MIB + 512 * KIB, 256 * KIB)
        image.write(3 * MIB, b"\x04" * 100)
        snapshots = image.info().extra["snapshots"]
        assert [snapshot["name"] for snapshot in snapshots] == ["first"]
    check_clean(path)
    io(
        path,
        "read -P 1 0 70000",
        "read -P 2 70000 1000",
        "read -P 3 1M 300k",
        "read -P 0 1536k 256k",
        "read -P 4 3M 100",
    )
    run("qemu-img", "snapshot", "-a", "first", path)
    check_clean(path)
    io(path, "read -P 1 0 2M", "read -P 0 2M 2M")
    with opened(path) as image:
        assert read(image, 0, 2 * MIB) == b"\x01" * (2 * MIB)


def test_persistent_bitmaps_are_declared_stale_by_the_first_write(tmp_path: Path) -> None:
    """Opening for writing leaves them; writing clears the autoclear bit, so that nobody trusts them."""
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    run("qemu-img", "bitmap", "--add", path, "b0")
    with opened(path) as image:
        data = image.info().format_specific
        assert data is not None
        assert data["data"]["bitmaps"] == [{"name": "b0", "granularity": 65536, "flags": ["auto"]}]
    assert path.read_bytes()[88:96] == b"\0\0\0\0\0\0\0\1"
    with opened(path) as image:
        image.write(0, b"x")
    assert path.read_bytes()[88:96] == bytes(8)
    check_clean(path, leaks=True)
    assert "bitmaps" not in info(path)["format-specific"]["data"]


def test_unknown_autoclear_bits_go_at_read_write_open_only(tmp_path: Path) -> None:
    """Whoever wrote them made a promise that a writer who does not know it cannot keep."""
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    raw = bytearray(path.read_bytes())
    raw[88] = 0x80
    path.write_bytes(raw)
    with opened(path, read_only=True):
        pass
    assert path.read_bytes()[88] == 0x80
    with opened(path):
        pass
    assert path.read_bytes()[88] == 0


def test_the_backing_reference_is_changed_in_place(tmp_path: Path) -> None:
    """Name and format; everything else in the header stays, unknown extensions included."""
    path, base = tmp_path / "image.qcow2", tmp_path / "base.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "4M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", path)
    before = path.read_bytes()
    with opened(path) as image:
        assert image.backing_reference == BackingReference("base.qcow2", "qcow2")
        for reference in (BackingReference("./" * 500 + "base.qcow2", "qcow2"), BackingReference("base.qcow2", None)):
            image.change_backing_reference(reference)
            assert image.backing_reference == reference
        assert info_of(path).get("backing-filename-format") is None
        image.change_backing_reference(BackingReference("base.qcow2", "qcow2"))
    after = path.read_bytes()
    assert header.parse(after, read_only=True) == header.parse(before, read_only=True)
    assert after[65536:] == before[65536:]
    with opened(path) as image:
        image.change_backing_reference(None)
    assert "backing-filename" not in info(path)
    check_clean(path)


def info_of(path: Path) -> dict[str, Any]:
    """While it is open for writing here."""
    found: dict[str, Any] = json.loads(run("qemu-img", "info", "-U", "--output=json", path))
    return found


def test_a_backing_name_too_long_is_refused_before_anything_is_written() -> None:
    """1024 bytes: EINVAL. What does not fit the cluster: ENOSPC."""
    file, image = new_image(size=MIB, cluster_size=512)
    before = bytes(file.content)
    for length, text in ((1024, "Invalid argument"), (500, "No space left on device")):
        reference = BackingReference("x" * length, "raw")
        with pytest.raises(QmpdError, match=text):
            image.check_backing_reference(reference)
        with pytest.raises(QmpdError, match=text):
            image.change_backing_reference(reference)
    assert file.content == before
    image.check_backing_reference(BackingReference("x" * 300, "raw"))


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("attached", [True, False])
def test_growing_over_a_longer_backing_file_shows_zeros(version: str, attached: bool) -> None:
    """Old bytes of the backing file never come to light, not even when it is attached later."""
    below = MemoryFile(b"\xee" * (4 * MIB))
    old = MIB + 512 if attached else MIB
    _, image = new_image(size=old, version=version, backing_file="below", backing_fmt="raw")
    if attached:
        image.attach("backing", below)
    image.truncate(3 * MIB)
    image.attach("backing", below)
    if attached or version == "v3":
        assert read(image, old, 3 * MIB - old) == bytes(3 * MIB - old)
    assert read(image, 0, old) == b"\xee" * old


def test_shrinking_gives_the_space_back(tmp_path: Path) -> None:
    """The file gets shorter, and growing again shows zeros."""
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    with opened(path) as image:
        image.write(0, b"\x77" * (64 * MIB))
        image.truncate(MIB + 512)
        assert path.stat().st_size < 4 * MIB
        image.truncate(2 * MIB)
        assert read(image, MIB, MIB) == b"\x77" * 512 + bytes(MIB - 512)
    check_clean(path)


def test_many_threads_may_write_to_one_cluster(tmp_path: Path) -> None:
    """Copies-on-write into the same cluster are made one after the other: no sector is lost."""
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
    errors: list[BaseException] = []

    def write(image: Any, mine: int) -> None:
        try:
            order = list(range(mine, 2048, 4))
            random.Random(mine).shuffle(order)
            for sector in order:
                image.write(sector * 4096, bytes([mine + 1]) * 4096)
                if sector % 100 == 0:
                    image.flush()
        except BaseException as error:  # noqa: BLE001  reported by the main thread
            errors.append(error)

    with opened(path) as image:
        threads = [threading.Thread(target=write, args=(image, i)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        content = read(image, 0, image.length)
    assert content == b"".join(bytes([i % 4 + 1]) * 4096 for i in range(2048))
    check_clean(path)


def test_freed_space_is_not_reused_while_a_read_is_under_way() -> None:
    """A reader who has looked up where the bytes are still finds them there, whatever is discarded meanwhile."""
    reached, go_on = threading.Event(), threading.Event()

    class Slow(MemoryFile):
        slow = False

        def readinto(self, offset: int, buffer: memoryview) -> None:
            if self.slow and threading.current_thread() is reader:
                reached.set()
                assert go_on.wait(10)
            super().readinto(offset, buffer)

    file = Slow()
    reader = threading.Thread()
    _, image = new_image(file, size=MIB)
    image.write(0, b"old " * 16384)
    image.flush()
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(read(image, 0, 65536)))
    file.slow = True
    reader.start()
    assert reached.wait(10)
    image.discard(0, 65536)
    image.flush()
    image.write(65536, b"secret  " * 8192)
    go_on.set()
    reader.join()
    assert found == [b"old " * 16384]
    image.close()


def test_a_full_disk_fails_the_write_and_nothing_else() -> None:
    """Clusters taken for a write that failed are free again; what was there stays."""

    class Full(MemoryFile):
        growable = False

    file = MemoryFile()
    new_image(file, size=16 * MIB)[1].close()
    file.truncate(MIB)
    device = Full(bytes(file.content))
    image = Qcow2.open({"file": device}, {}, read_only=False)
    image.write(0, b"a" * 65536)
    with pytest.raises(QmpdError, match="No space left on device"):
        image.write(MIB, b"b" * (8 * MIB))
    assert read(image, 0, 65536) == b"a" * 65536
    image.write(2 * MIB, b"c" * 65536)
    image.flush()
    assert read(image, 2 * MIB, 65536) == b"c" * 65536


def test_pass_discard_punches_holes(tmp_path: Path) -> None:
    """Space that the guest gives up goes back to the file system, after the entry is durable."""
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "16M")
    file = FileStorage.open({}, {"filename": str(path)}, read_only=False)
    image = Qcow2.open({"file": file}, {}, read_only=False)
    image.write(0, b"x" * (8 * MIB))
    image.flush()
    full = path.stat().st_blocks
    image.discard(0, 8 * MIB)
    image.flush()
    assert path.stat().st_blocks < full - 8 * MIB // 512 // 2
    image.close()
    file.close()
    check_clean(path)
