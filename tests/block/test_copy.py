"""The copy engine: right bytes by the cheapest way that works, whatever the layers and the target; errors in place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import random
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd.block import transfer
from qmpd.block.api import Buffer, Perm
from qmpd.block.contract import Checked
from qmpd.block.copy import CopyEngine, CopyError
from qmpd.block.drivers.qcow2 import CreateOptions, Qcow2, create
from qmpd.block.drivers.raw import Raw
from qmpd.block.extents import Run, RunKind, Runs, chain_runs
from qmpd.block.storage import posix
from qmpd.block.storage.file import FileStorage, create_file
from qmpd.errors import Kind, QmpdError
from qmpd.units import KIB, MIB
from tests.block.conformance import checked, noise, read
from tests.tools import need

LENGTH = MIB + 1536
CLUSTER = 4096


def open_file(path: Path, content: bytes | None = None) -> FileStorage:
    """A file node, its file made if there is content for it."""
    if content is not None:
        path.write_bytes(content)
    return FileStorage.open({}, {"filename": str(path)}, read_only=False)


class Layer:
    """A made-up image: runs over a file, of which some can be read by the driver only."""

    placement_unit = None

    def __init__(self, file: FileStorage, rows: list[Run], content: bytes) -> None:
        self.file = file
        self.rows = rows
        self.content = content
        self.data_child = Checked(file, Perm.NONE, node="layer-file")
        self.length = len(content)
        self.reads: list[tuple[int, int]] = []
        self.fail_at: int | None = None

    def map(self, offset: int, length: int) -> Runs:
        parts = []
        for row in self.rows:
            start, end = max(row.offset, offset), min(row.offset + row.length, offset + length)
            if start < end:
                parts.append(Run(start, end - start, row.kind, row.host + start - row.offset if row.host >= 0 else -1))
        return Runs.of(parts)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self.reads.append((offset, len(buffer)))
        if self.fail_at is not None and offset <= self.fail_at < offset + len(buffer):
            raise QmpdError(os.strerror(errno.EIO), Kind.IO, errno=errno.EIO)
        buffer[:] = self.content[offset : offset + len(buffer)]

    def direct(self, offset: int, length: int) -> None:
        return None


def make_layer(directory: Path, seed: int, kinds: list[RunKind], length: int = LENGTH) -> Layer:
    """Runs of the given kinds with random borders; host offsets are shuffled and at odd places now and then."""
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, length // 512), len(kinds) - 1)) if len(kinds) > 1 else []
    bounds = [0, *[cut * 512 for cut in cuts], length]
    stored, content = bytearray(), bytearray(length)
    rows: list[Run] = []
    spans = list(zip(itertools.pairwise(bounds), kinds, strict=True))
    hosts = {}
    for (start, end), kind in sorted(spans, key=lambda _: rng.random()):
        if kind == RunKind.DATA:
            stored += bytes(rng.choice([0, 512, 4096, 100]))
            hosts[start] = len(stored)
            data = noise(end - start, rng.getrandbits(30))
            stored += data
            content[start:end] = data
        elif kind in (RunKind.COMPRESSED, RunKind.OPAQUE):
            content[start:end] = noise(end - start, rng.getrandbits(30))
    for (start, end), kind in spans:
        rows.append(Run(start, end - start, kind, hosts.get(start, -1)))
    return Layer(open_file(directory / f"layer{seed}", bytes(stored)), rows, bytes(content))


def merged(layers: list[Layer], base: bytes) -> bytes:
    """What base must be after everything was copied into it."""
    result = bytearray(base)
    for layer in reversed(layers):
        for row in layer.rows:
            if row.kind != RunKind.UNALLOCATED:
                result[row.offset : row.offset + row.length] = layer.content[row.offset : row.offset + row.length]
    return bytes(result)


class ThroughDriver(Raw):
    """A target that offers neither files nor places: everything has to be written."""

    def direct(self, offset: int, length: int) -> None:
        return None


def raw_target(directory: Path, length: int) -> Checked:
    create_file(str(directory / "target"), length)
    return checked(Raw.open({"file": checked(open_file(directory / "target"))}, {}, read_only=False))


def driver_target(directory: Path, length: int) -> Checked:
    create_file(str(directory / "target"), length)
    return checked(ThroughDriver.open({"file": checked(open_file(directory / "target"))}, {}, read_only=False))


def window_target(directory: Path, length: int) -> Checked:
    create_file(str(directory / "target"), length + 100)
    file = checked(open_file(directory / "target"))
    return checked(Raw.open({"file": file}, {"offset": 100, "size": length}, read_only=False))


def qcow2_target(directory: Path, length: int) -> Checked:
    create_file(str(directory / "target"), 0)
    file = checked(open_file(directory / "target"))
    create(file, CreateOptions(size=length, cluster_size=CLUSTER))
    return checked(Qcow2.open({"file": file}, {}, read_only=False))


TARGETS: dict[str, Callable[[Path, int], Checked]] = {
    "raw": raw_target,
    "window": window_target,
    "driver": driver_target,
    "qcow2": qcow2_target,
}


def copy_all(layers: list[Any], target: Checked, *, step: int = LENGTH, engine: CopyEngine | None = None) -> None:
    """Map and copy the whole device, ``step`` bytes at a time."""
    length = layers[0].length
    with engine or CopyEngine(layers, target) as copier:
        for start in range(0, length, step):
            runs = chain_runs(layers, start, min(step, length - start))
            assert runs.end == min(start + step, length)
            copier.copy(runs, start, runs.end - start)


# -- the right bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TARGETS)
@settings(max_examples=12, suppress_health_check=list(HealthCheck), deadline=None)
@given(
    st.integers(0, 1 << 30),
    st.lists(st.lists(st.sampled_from(list(RunKind)), min_size=1, max_size=12), min_size=1, max_size=3),
    st.sampled_from([LENGTH, 512 * KIB, 100 * KIB + 512]),
)
def test_base_becomes_what_the_layers_say(
    tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int, stack: list[list[RunKind]], step: int
) -> None:
    """Any layers, any target, any step: afterwards base reads as the chain did, and what no layer has is untouched."""
    directory = tmp_path_factory.mktemp("copy")
    layers = [make_layer(directory, seed + i, kinds) for i, kinds in enumerate(stack)]
    target = TARGETS[kind](directory, LENGTH)
    base = noise(LENGTH, seed)
    target.write(0, base)
    copy_all(layers, target, step=step)
    assert read(target, 0, LENGTH) == merged(layers, base)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("ways", ["no reflink", "no kernel copy", "no early writeback"])
def test_any_way_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, ways: str) -> None:
    """Whatever the system does not have."""
    if ways != "no early writeback":
        monkeypatch.setattr(posix, "clone_range", failing(errno.EOPNOTSUPP))
    if ways == "no kernel copy":
        monkeypatch.setattr(os, "copy_file_range", failing(errno.EXDEV))
    layers = [make_layer(tmp_path, 1, list(RunKind) * 4), make_layer(tmp_path, 2, [RunKind.DATA] * 9)]
    target = TARGETS[kind](tmp_path, LENGTH)
    copy_all(layers, target)
    assert read(target, 0, LENGTH) == merged(layers, bytes(LENGTH))


def test_qcow2_target_is_a_sound_image(tmp_path: Path) -> None:
    """qemu-img agrees with the metadata and the content."""
    need("qemu-img")
    layers = [make_layer(tmp_path, seed, list(RunKind) * 5) for seed in range(3)]
    target = qcow2_target(tmp_path, LENGTH)
    copy_all(layers, target)
    target._device.close()  # type: ignore[attr-defined]
    (tmp_path / "expected").write_bytes(merged(layers, bytes(LENGTH)))
    subprocess.run(["qemu-img", "check", "-q", "-U", str(tmp_path / "target")], check=True)
    files = [str(tmp_path / "target"), str(tmp_path / "expected")]
    subprocess.run(["qemu-img", "compare", "-q", "-U", "-f", "qcow2", "-F", "raw", *files], check=True)


def test_a_source_that_ends_early_is_zeros(tmp_path: Path) -> None:
    """Somebody cut the layer's file off: what is missing reads as zeros, in the target too."""
    layer = make_layer(tmp_path, 1, [RunKind.DATA])
    start = layer.rows[0].host
    os.truncate(layer.file.path, start + 10_000)
    target = raw_target(tmp_path, LENGTH)
    target.write(0, noise(LENGTH, 2))
    copy_all([layer], target)
    assert read(target, 0, LENGTH) == layer.content[:10_000] + bytes(LENGTH - 10_000)


def test_a_hole_in_the_source_is_zeros(tmp_path: Path) -> None:
    """A layer may call a hole of its file data."""
    layer = make_layer(tmp_path, 1, [RunKind.DATA])
    layer.file.write_zeroes(layer.rows[0].host + 65536, 512 * KIB)
    target = raw_target(tmp_path, LENGTH)
    target.write(0, noise(LENGTH, 2))
    copy_all([layer], target)
    assert read(target, 0, LENGTH) == layer.content[:65536] + bytes(512 * KIB) + layer.content[65536 + 512 * KIB :]


@pytest.mark.parametrize("shift", [-100_000, -4096, 4096, 100_000, 3 * MIB])
def test_within_one_file(tmp_path: Path, shift: int) -> None:
    """Source and target are the same file, through two nodes even, and overlap."""
    content = noise(8 * MIB, 1)
    source, target = open_file(tmp_path / "f", content), open_file(tmp_path / "f")
    start = MIB
    transfer.Transfer().move(source, start, target, start + shift, 3 * MIB)
    expected = bytearray(content)
    expected[start + shift : start + shift + 3 * MIB] = content[start : start + 3 * MIB]
    assert (tmp_path / "f").read_bytes() == expected


# -- the cheapest way ----------------------------------------------------------------------------------------------


def failing(number: int, calls: list[int] | None = None) -> Callable[..., Any]:
    """A system call that fails, and counts."""

    def call(*_: Any, **__: Any) -> Any:
        if calls is not None:
            calls.append(1)
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.ENOSYS])
def test_what_a_pair_of_files_lacks_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Per pair, not for good: another file may have it."""
    reflinks: list[int] = []
    copies: list[int] = []
    monkeypatch.setattr(posix, "clone_range", failing(number, reflinks))
    monkeypatch.setattr(os, "copy_file_range", failing(number, copies))
    source = open_file(tmp_path / "s", noise(MIB, 1))
    one, two = open_file(tmp_path / "one", bytes(MIB)), open_file(tmp_path / "two", bytes(MIB))
    mover = transfer.Transfer()
    for target in (one, two, one, two):
        mover.move(source, 0, target, 0, MIB)
    assert (len(reflinks), len(copies)) == (2, 2)
    assert read(two, 0, MIB) == noise(MIB, 1)


def test_what_fails_for_one_range_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EINVAL is about a range (an end of file, say), not about the files."""
    calls: list[int] = []
    monkeypatch.setattr(posix, "clone_range", failing(errno.EINVAL, calls))
    source, target = open_file(tmp_path / "s", noise(MIB, 1)), open_file(tmp_path / "t", bytes(MIB))
    mover = transfer.Transfer()
    for _ in range(3):
        mover.move(source, 0, target, 0, MIB)
    assert len(calls) == 3


def test_reflinks_take_whole_blocks_and_the_edges_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where source and target lie the same way in their blocks."""
    shared: list[tuple[int, int, int]] = []

    def clone(source: int, position: int, length: int, target: int, goal: int) -> None:
        shared.append((position, length, goal))
        os.pwrite(target, os.pread(source, length, position), goal)

    monkeypatch.setattr(posix, "clone_range", clone)
    source, target = open_file(tmp_path / "s", noise(MIB, 1)), open_file(tmp_path / "t", bytes(MIB))
    block = os.fstatvfs(target.fd).f_bsize
    mover = transfer.Transfer()
    mover.move(source, block + 100, target, 3 * block + 100, 5 * block)
    assert shared == [(2 * block, 4 * block, 4 * block)]
    assert read(target, 3 * block + 100, 5 * block) == noise(MIB, 1)[block + 100 : 6 * block + 100]
    mover.move(source, 1, target, 0, 5 * block)
    mover.move(source, 0, target, 0, block - 1)
    assert len(shared) == 1


def test_reflinks_for_real(tmp_path: Path) -> None:
    """On XFS the target shares the source's blocks; only the ragged end was copied."""
    need("mkfs.xfs", "mount", "umount")
    image, mount = tmp_path / "xfs.img", tmp_path / "mnt"
    image.touch()
    os.truncate(image, 320 * MIB)
    mount.mkdir()
    subprocess.run(["mkfs.xfs", "-q", str(image)], check=True)
    if os.geteuid() or subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=False).returncode:
        pytest.skip("cannot mount a file system here")
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", str(mount)], check=True)
        source = stack.enter_context(contextlib.closing(open_file(mount / "s", noise(16 * MIB, 1))))
        target = stack.enter_context(contextlib.closing(open_file(mount / "t", bytes(512))))
        source.flush()
        transfer.Transfer().move(source, 4096, target, 64 * KIB, 15 * MIB + 100)
        target.flush()
        assert shared_bytes(target.fd) == 15 * MIB
        assert read(target, 64 * KIB, 15 * MIB + 100) == noise(16 * MIB, 1)[4096 : 4096 + 15 * MIB + 100]


def shared_bytes(fd: int) -> int:
    """How much of a file lies in blocks that other files use too (FIEMAP)."""
    room = 32
    answer = bytearray(struct.pack("=QQLLLL", 0, 1 << 62, 0, 0, room, 0).ljust(32 + 56 * room, b"\0"))
    fcntl.ioctl(fd, 0xC020660B, answer)
    extents = struct.iter_unpack("=QQQ16xL12x", answer[32 : 32 + 56 * struct.unpack_from("=L", answer, 20)[0]])
    return sum(length for _, _, length, flags in extents if flags & 0x2000)


def test_zeros_are_one_request(tmp_path: Path) -> None:
    """However many layers they come from."""
    rows = [Run(0, MIB, RunKind.ZERO, -1)]
    lower = Layer(open_file(tmp_path / "a", b""), rows, bytes(MIB))
    rows = [Run(i * 4096, 4096, RunKind.ZERO if i % 2 else RunKind.UNALLOCATED, -1) for i in range(256)]
    upper = Layer(open_file(tmp_path / "b", b""), rows, bytes(MIB))
    target = raw_target(tmp_path, MIB)
    requests: list[tuple[int, int]] = []
    device = target._device
    device.write_zeroes = lambda offset, length, **_: requests.append((offset, length))  # type: ignore[method-assign]
    copy_all([upper, lower], target)
    assert requests == [(0, MIB)]


def test_runs_next_to_each_other_share_one_placement(tmp_path: Path) -> None:
    """Many clusters, data and compressed, go to a qcow2 target in one transaction each way they are laid out."""
    kinds = [RunKind.DATA, RunKind.COMPRESSED] * 10
    layer = make_layer(tmp_path, 3, kinds)
    target = qcow2_target(tmp_path, LENGTH)
    driver = target._device
    calls: list[str] = []
    for name in ("place", "place_ranges", "write"):
        monkey(driver, name, calls)
    copy_all([layer], target)
    assert calls == ["place"]


def test_scattered_runs_share_one_placement(tmp_path: Path) -> None:
    """Clusters far apart are published together; metadata is written once for all."""
    rows = [
        Run(i * CLUSTER, CLUSTER, RunKind.DATA if i % 2 else RunKind.UNALLOCATED, i * CLUSTER if i % 2 else -1)
        for i in range(256)
    ]
    content = bytearray(noise(MIB, 1))
    layer = Layer(open_file(tmp_path / "a", bytes(content)), rows, bytes(content))
    target = qcow2_target(tmp_path, MIB)
    calls: list[str] = []
    for name in ("place", "place_ranges", "write"):
        monkey(target._device, name, calls)
    copy_all([layer], target)
    assert calls == ["place_ranges"]
    assert read(target, 0, MIB) == merged([layer], bytes(MIB))


def monkey(driver: Any, name: str, calls: list[str]) -> None:
    """Record calls of a method."""
    real = getattr(driver, name)

    def call(*arguments: Any) -> Any:
        calls.append(name)
        return real(*arguments)

    setattr(driver, name, call)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TARGETS)
def test_a_read_that_fails(tmp_path: Path, kind: str) -> None:
    """Direction read, the errno, and where on the device; a place begun is given up."""
    layer = make_layer(tmp_path, 1, [RunKind.OPAQUE])
    layer.fail_at = 700_000
    target = TARGETS[kind](tmp_path, LENGTH)
    before = noise(LENGTH, 9)
    target.write(0, before)
    with pytest.raises(CopyError) as caught:
        copy_all([layer], target)
    assert (caught.value.operation, caught.value.errno) == ("read", errno.EIO)
    assert caught.value.offset is not None
    assert caught.value.offset <= 700_000 < caught.value.offset + MIB
    if kind == "qcow2":
        assert read(target, 0, LENGTH) == before
    layer.fail_at = None
    copy_all([layer], target)
    assert read(target, 0, LENGTH) == layer.content


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize(("call", "operation"), [("preadv", "read"), ("pwrite", "write")])
def test_the_kernels_errors_get_their_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, call: str, operation: str
) -> None:
    """copy_file_range does not say which side failed; the buffer way finds out."""
    layer, target = make_layer(tmp_path, 1, [RunKind.DATA]), TARGETS[kind](tmp_path, LENGTH)
    real = getattr(os, call)
    suspects = {"read": os.stat(layer.file.path).st_ino, "write": os.stat(tmp_path / "target").st_ino}

    def fail(fd: int, *rest: Any) -> Any:
        size = len(rest[0][0]) if call == "preadv" else len(rest[0])
        if os.fstat(fd).st_ino == suspects[operation] and size > 64 * KIB:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, *rest)

    monkeypatch.setattr(os, "copy_file_range", failing(errno.EIO))
    monkeypatch.setattr(posix, "clone_range", failing(errno.EIO))
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CopyError) as caught:
        copy_all([layer], target)
    assert (caught.value.operation, caught.value.errno) == (operation, errno.EIO)
    monkeypatch.undo()
    assert kind == "raw" or read(target, 0, LENGTH) == bytes(LENGTH)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """ENOSPC comes through as itself, from whichever call meets it; qcow2 is as before and can go on later."""
    layer, target = make_layer(tmp_path, 1, [RunKind.DATA, RunKind.COMPRESSED] * 3), TARGETS[kind](tmp_path, LENGTH)
    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", failing(errno.ENOSPC))
        with pytest.raises(CopyError) as caught:
            copy_all([layer], target)
    assert (caught.value.operation, caught.value.errno, caught.value.kind) == ("write", errno.ENOSPC, Kind.NO_SPACE)
    assert kind == "raw" or read(target, 0, LENGTH) == bytes(LENGTH)
    copy_all([layer], target)
    assert read(target, 0, LENGTH) == layer.content


@pytest.mark.parametrize("request_name", ["write_zeroes", "place", "write"])
def test_a_target_that_refuses(tmp_path: Path, request_name: str) -> None:
    """Whatever it refuses is a write that failed, where it failed."""
    kind = {"write_zeroes": RunKind.ZERO, "place": RunKind.OPAQUE, "write": RunKind.OPAQUE}[request_name]
    target = (driver_target if request_name == "write" else qcow2_target)(tmp_path, LENGTH)

    def refuse(*_: Any, **__: Any) -> Any:
        raise QmpdError(os.strerror(errno.ENOSPC), Kind.NO_SPACE)

    setattr(target._device, request_name, refuse)
    with pytest.raises(CopyError) as caught:
        copy_all([make_layer(tmp_path, 1, [RunKind.UNALLOCATED, kind])], target)
    assert (caught.value.operation, caught.value.errno) == ("write", errno.ENOSPC)
    assert caught.value.node == "under-test"
    assert caught.value.offset is not None


def test_partial_transfers_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may do less than asked, in every call."""
    few = 70_001

    def copy_file_range(source: int, target: int, count: int, position: int, goal: int) -> int:
        return REAL_COPY(source, target, min(count, few), position, goal)

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        return REAL_PREADV(fd, [buffers[0][:few]], offset)

    def pwrite(fd: int, data: Buffer, offset: int) -> int:
        return REAL_PWRITE(fd, memoryview(data)[:few], offset)

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "pwrite", pwrite)
    layer = make_layer(tmp_path, 1, [RunKind.DATA, RunKind.COMPRESSED] * 3)
    target = raw_target(tmp_path, LENGTH)
    copy_all([layer], target)
    assert read(target, 0, LENGTH) == layer.content
    monkeypatch.setattr(os, "copy_file_range", failing(errno.EXDEV))
    monkeypatch.setattr(posix, "clone_range", failing(errno.EXDEV))
    target.write_zeroes(0, LENGTH)
    copy_all([layer], target)
    assert read(target, 0, LENGTH) == layer.content


REAL_COPY, REAL_PREADV, REAL_PWRITE = os.copy_file_range, os.preadv, os.pwrite


def test_helper_threads_end(tmp_path: Path) -> None:
    """close() leaves none, and the engine may be used again."""
    layer, target = make_layer(tmp_path, 1, [RunKind.OPAQUE] * 4), raw_target(tmp_path, LENGTH)
    engine = CopyEngine([layer], target)  # type: ignore[list-item]
    for _ in range(2):
        with contextlib.closing(engine):
            copy_all([layer], target, engine=engine)
        assert not any(name.startswith("qmpd-") for name in thread_names())


def thread_names() -> Iterator[str]:
    """Names of the threads that run."""
    return (thread.name for thread in threading.enumerate())
