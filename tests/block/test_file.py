"""Image files: opening, access mode, length, holes, what blockdev-create makes."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.api import Driver, Perm
from qmpd.block.drivers import DRIVERS
from qmpd.block.extents import RunKind
from qmpd.block.storage import posix
from qmpd.block.storage.aligned import Aligned
from qmpd.block.storage.file import FileStorage, create_file
from qmpd.errors import Kind, QmpdError
from qmpd.units import KIB, MIB
from tests.block.conformance import Conformance, checked, noise, read

WRITER = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
ALONE = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED


def opened(path: Path | str, *, driver: str = "file", read_only: bool = False, **options: Any) -> FileStorage:
    """Open with options in Python spelling (``auto_read_only``)."""
    named = {name.replace("_", "-"): value for name, value in options.items()}
    storage = DRIVERS[driver].open({}, {"filename": str(path), **named}, read_only=read_only)
    assert isinstance(storage, FileStorage)
    return storage


def grant(driver: Driver, perm: Perm, shared: Perm = Perm.ALL) -> None:
    """A permission change that goes through."""
    driver.permissions_check(perm, shared)
    driver.permissions_commit(perm, shared)


def access(storage: FileStorage) -> int:
    """O_RDONLY or O_RDWR, as the kernel sees the descriptor."""
    flags = Path(f"/proc/self/fdinfo/{storage.fd}").read_text().split("flags:")[1].split()[0]
    return int(flags, 8) & os.O_ACCMODE


class TestConformance(Conformance):
    """The suite over a plain file."""

    def create(self, directory: Path, length: int) -> Driver:
        create_file(str(directory / "file.img"), length)
        return opened(directory / "file.img")

    def reopen(self, directory: Path, driver: Driver) -> Driver:
        driver.close()
        return opened(directory / "file.img")


class TestConformanceWithoutFallocate(TestConformance):
    """The suite on a file system that can neither punch holes nor zero ranges."""

    @pytest.fixture(autouse=True)
    def _no_fallocate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(fd: int, mode: int, offset: int, length: int) -> None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(posix, "fallocate", refuse)


class TestConformanceAroundThePageCache(TestConformance):
    """The suite with cache.direct: unaligned requests through aligned blocks."""

    def create(self, directory: Path, length: int) -> Driver:
        create_file(str(directory / "file.img"), length)
        return direct(directory / "file.img")

    def reopen(self, directory: Path, driver: Driver) -> Driver:
        driver.close()
        return direct(directory / "file.img")


def direct(path: Path) -> FileStorage:
    """Open around the page cache, or skip where the file system cannot."""
    try:
        return opened(path, **{"cache.direct": True, "aio": "native"})
    except QmpdError as error:
        if "O_DIRECT" in error.desc:
            pytest.skip(error.desc)
        raise


# -- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "name", "options", "text"),
    [
        ("file", "nope", {}, "Could not open 'nope': No such file or directory"),
        ("file", "", {}, "The 'file' block driver requires a file name"),
        ("host_device", "", {}, "The 'host_device' block driver requires a file name"),
        ("file", "dir", {}, "Could not open 'dir': Is a directory"),
        ("file", "dir", {"read_only": True}, "'file' driver requires 'dir' to be a regular file"),
        ("file", "fifo", {"read_only": True}, "'file' driver requires 'fifo' to be a regular file"),
        ("file", "/dev/null", {}, "'file' driver requires '/dev/null' to be a regular file"),
        ("host_device", "r.img", {}, "'host_device' driver requires 'r.img' to be either a character or block device"),
        ("file", "/proc/cpuinfo", {"read_only": True}, "Could not refresh total sector count: Invalid argument"),
        ("file", "json:{}", {}, "Could not open 'json:{}': No such file or directory"),
        (
            "file",
            "r.img",
            {"aio": "native"},
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ),
        ("file", "dir", {"aio": "native"}, "Could not open 'dir': Is a directory"),
        (
            "file",
            "/proc/version",
            {"read_only": True, "cache.direct": True},
            "Could not open '/proc/version': filesystem does not support O_DIRECT",
        ),
        ("file", "r.img", {"pr_manager": "p0"}, "No persistent reservation manager with id 'p0'"),
    ],
)
def test_what_does_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, name: str, options: dict[str, Any], text: str
) -> None:
    """The peer's texts, and no descriptor left behind."""
    monkeypatch.chdir(tmp_path)
    create_file("r.img", 4096)
    Path("dir").mkdir()
    os.mkfifo("fifo")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(QmpdError) as caught:
        opened(name, driver=driver, **options)
    assert str(caught.value) == text
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("aio", ["threads", "io_uring"])
def test_accepted_options(tmp_path: Path, aio: str) -> None:
    """Options about how the peer does its I/O are accepted."""
    create_file(str(tmp_path / "r"), 4096)
    opened(tmp_path / "r", aio=aio, drop_cache=True, x_check_cache_dropped=False, aio_max_batch=0).close()


def test_length_is_rounded_up_and_the_tail_reads_zeros(tmp_path: Path) -> None:
    """A file of 1000 bytes is a node of 1024."""
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 1000)
    storage = opened(path)
    assert storage.length == 1024
    assert read(checked(storage), 998, 26) == b"xx" + bytes(24)
    assert [(r.offset, r.length, r.kind) for r in storage.map(0, 1024)][-1] == (1000, 24, RunKind.ZERO)


def test_a_file_cut_off_by_somebody_else_reads_zeros(tmp_path: Path) -> None:
    """Reads are never short and never stale."""
    path = tmp_path / "cut"
    path.write_bytes(b"x" * 8192)
    storage = opened(path)
    os.truncate(path, 100)
    assert read(checked(storage), 0, 8192) == b"x" * 100 + bytes(8092)
    assert sum(run.length for run in storage.map(0, 8192)) == 8192


def test_writing_past_the_end_needs_resize_and_grows(tmp_path: Path) -> None:
    """Formats let their file grow by writing; others may not."""
    create_file(str(tmp_path / "r"), 4096)
    storage = opened(tmp_path / "r")
    with pytest.raises(QmpdError) as caught:
        checked(storage, Perm.WRITE).write(4096, b"x")
    assert caught.value.kind is Kind.RANGE
    checked(storage, WRITER).write(8191, b"x")
    assert storage.length == 8192
    checked(storage, WRITER).write_zeroes(8192, 1024)
    assert (storage.length, os.path.getsize(tmp_path / "r")) == (9216, 9216)


# -- access mode -------------------------------------------------------------------------------------------------------


def test_auto_read_only_follows_the_users(tmp_path: Path) -> None:
    """Read-only until somebody needs more, read-write then, and back; the descriptor's number never changes."""
    create_file(str(tmp_path / "r"), 4096)
    storage = opened(tmp_path / "r", auto_read_only=True)
    fd = storage.fd
    assert (access(storage), storage.read_only) == (os.O_RDONLY, False)
    for perm, mode in [
        (Perm.CONSISTENT_READ, os.O_RDONLY),
        (Perm.WRITE, os.O_RDWR),
        (Perm.NONE, os.O_RDONLY),
        (Perm.RESIZE, os.O_RDWR),
        (Perm.WRITE_UNCHANGED, os.O_RDWR),
    ]:
        grant(storage, perm)
        assert (access(storage), storage.fd) == (mode, fd)


def test_auto_read_only_gives_way_on_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """The node opens; the first writer is refused, with the old state kept."""
    path = tmp_path / "busy"
    path.write_bytes(Path("/bin/true").read_bytes())
    path.chmod(0o755)
    storage = opened(path, auto_read_only=True)
    holder = os.open(path, os.O_RDONLY)
    real = os.open

    def refuse(name: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(name, flags, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(QmpdError) as caught:
            storage.permissions_check(Perm.WRITE, Perm.ALL)
    assert str(caught.value) == f"Could not open '{path}': Permission denied"
    assert (access(storage), len(read(checked(storage), 0, 16))) == (os.O_RDONLY, 16)
    os.close(holder)


def test_an_aborted_check_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """Mode, locks and open files."""
    create_file(str(tmp_path / "r"), 4096)
    storage = opened(tmp_path / "r", auto_read_only=True)
    before = os.listdir("/proc/self/fd")
    storage.permissions_check(WRITER, ALONE)
    storage.permissions_abort()
    assert access(storage) == os.O_RDONLY
    assert os.listdir("/proc/self/fd") == before
    grant(opened(tmp_path / "r"), WRITER, ALONE)


@pytest.mark.parametrize("permissions_first", [True, False])
def test_reopen_and_permissions_in_one_transaction(tmp_path: Path, permissions_first: bool) -> None:
    """A read-only node becomes writable and gets its writer at once, in whatever order the graph commits."""
    create_file(str(tmp_path / "r"), 4096)
    storage = opened(tmp_path / "r", read_only=True)
    storage.reopen_prepare(read_only=False)
    storage.permissions_check(WRITER, ALONE)
    assert (access(storage), storage.read_only) == (os.O_RDONLY, True)
    steps = [storage.reopen_commit, lambda: storage.permissions_commit(WRITER, ALONE)]
    for step in reversed(steps) if permissions_first else steps:
        step()
    assert (access(storage), storage.read_only) == (os.O_RDWR, False)
    checked(storage, WRITER).write(0, b"written")
    storage.reopen_prepare(read_only=True)
    storage.permissions_check(Perm.NONE, Perm.ALL)
    storage.permissions_abort()
    storage.reopen_abort()
    assert (access(storage), storage.read_only) == (os.O_RDWR, False)


def test_the_same_file_is_opened_again_even_if_its_name_moved(tmp_path: Path) -> None:
    """Somebody renames the image and puts another in its place: the writer still gets the one that is open."""
    path = tmp_path / "r"
    path.write_bytes(b"mine" * 128)
    storage = opened(path, auto_read_only=True)
    path.rename(tmp_path / "moved")
    path.write_bytes(b"else" * 128)
    grant(storage, Perm.WRITE)
    checked(storage, Perm.WRITE).write(0, b"MINE")
    assert (tmp_path / "moved").read_bytes()[:8] == b"MINEmine"
    assert path.read_bytes()[:4] == b"else"


def test_workers_read_on_while_the_mode_changes(tmp_path: Path) -> None:
    """A thousand switches under two readers: not one read fails or is wrong."""
    data = noise(64 * KIB, 1)
    (tmp_path / "r").write_bytes(data)
    storage = opened(tmp_path / "r", auto_read_only=True)
    stop, wrong = threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            if read(checked(storage), 0, len(data)) != data:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(500):
            grant(storage, WRITER, ALONE)
            grant(storage, Perm.NONE)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", ["filename", "locking", "aio", "aio-max-batch", "pr-manager"])
def test_options_that_a_reopen_cannot_change(tmp_path: Path, name: str) -> None:
    """By name, with nothing changed."""
    create_file(str(tmp_path / "r"), 4096)
    storage = opened(tmp_path / "r")
    options = {"filename": str(tmp_path / "r"), name: "io_uring"}
    with pytest.raises(QmpdError) as caught:
        storage.reopen_prepare(read_only=True, options=options)
    assert str(caught.value) == f"Cannot change the option '{name}'"
    storage.reopen_prepare(read_only=True, options={"filename": str(tmp_path / "r"), "cache.no-flush": True})
    storage.reopen_commit()
    assert storage.read_only


def test_reopen_goes_around_the_page_cache_and_back_under_readers(tmp_path: Path) -> None:
    """cache.direct changes while workers read and write at odd places; no request fails."""
    data = noise(64 * KIB, 1)
    (tmp_path / "r").write_bytes(data)
    direct(tmp_path / "r").close()
    storage = opened(tmp_path / "r")
    stop, wrong = threading.Event(), []

    def work() -> None:
        try:
            while not stop.is_set():
                storage.write(1001, data[1001:9000])
                if read(storage, 1, 20_000) != data[1:20_001]:
                    wrong.append("content")
        except QmpdError as error:
            wrong.append(error.desc)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(60):
            options = {"filename": str(tmp_path / "r"), "cache.direct": turn % 2 == 0}
            storage.reopen_prepare(read_only=False, options=options)
            storage.reopen_commit()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize("unit", [512, 4096])
def test_partial_blocks_are_kept_apart(tmp_path: Path, unit: int) -> None:
    """Writers of neighbouring bytes in one block, around the page cache: nobody's bytes are lost."""
    (tmp_path / "r").write_bytes(bytes(8192))
    storage = direct(tmp_path / "r")
    storage._io = Aligned(unit)

    def work(worker: int) -> None:
        for turn in range(12):
            for index in range(worker, 128, 4):
                storage.write(index * 64, bytes([turn + 1]) * 64)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert read(storage, 0, 8192) == bytes([12]) * 8192


def test_a_length_between_blocks_cannot_be_written_around_the_page_cache(tmp_path: Path) -> None:
    """The last block could not be written without making the file longer."""
    (tmp_path / "r").write_bytes(bytes(5 * 512))
    storage = direct(tmp_path / "r")
    storage._io = Aligned(4096)
    with pytest.raises(QmpdError) as caught:
        storage.permissions_check(Perm.WRITE, Perm.ALL)
    assert str(caught.value) == (
        "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment"
    )
    grant(storage, WRITER)


# -- durability --------------------------------------------------------------------------------------------------------


def test_a_failed_sync_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of lost pages once; a later flush must not pretend that all is well."""
    create_file(str(tmp_path / "r"), 4096)
    storage = opened(tmp_path / "r")

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(QmpdError):
            storage.flush()
    with pytest.raises(QmpdError) as caught:
        storage.flush()
    assert caught.value.errno == errno.EIO
    with pytest.raises(QmpdError):
        storage.close()
    assert storage.fd == -1


def test_no_flush_means_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cache.no-flush is for those who know that they can throw the image away."""
    create_file(str(tmp_path / "r"), 4096)
    storage = opened(tmp_path / "r", **{"cache.no-flush": True})
    monkeypatch.delattr(os, "fdatasync")
    storage.flush()
    storage.close()


# -- space -------------------------------------------------------------------------------------------------------------


def test_holes_are_found_and_made(tmp_path: Path) -> None:
    """Writing fills a hole, zeroing and discarding with unmap make one."""
    create_file(str(tmp_path / "r"), MIB)
    storage = opened(tmp_path / "r")
    storage.write(256 * KIB, noise(512 * KIB, 1))
    kinds = [(run.offset, run.length, run.kind) for run in storage.map(0, MIB)]
    assert kinds == [
        (0, 256 * KIB, RunKind.ZERO),
        (256 * KIB, 512 * KIB, RunKind.DATA),
        (768 * KIB, 256 * KIB, RunKind.ZERO),
    ]
    storage.write_zeroes(256 * KIB, 256 * KIB)
    storage.discard(512 * KIB, 256 * KIB)
    assert [run.kind for run in storage.map(0, MIB)] == [RunKind.ZERO]
    assert (storage.discard_nb_ok, storage.discard_bytes_ok) == (1, 256 * KIB)


def test_discard_ignore_keeps_the_space(tmp_path: Path) -> None:
    """Nothing is given up on a node that ignores discards."""
    path = tmp_path / "r"
    path.write_bytes(b"x" * MIB)
    storage = opened(path, discard="ignore")
    storage.discard(0, MIB)
    assert read(storage, 0, 4) == b"xxxx"
    storage.write_zeroes(0, MIB)
    assert os.stat(path).st_blocks * 512 >= MIB
    assert read(storage, 0, MIB) == bytes(MIB)


def test_map_of_a_file_full_of_holes_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One answer is bounded; asking again goes on where it stopped."""
    monkeypatch.setattr("qmpd.block.storage.file._MAP_PAIRS", 2)
    create_file(str(tmp_path / "r"), MIB)
    storage = opened(tmp_path / "r")
    for offset in range(64 * KIB, MIB, 128 * KIB):
        storage.write(offset, noise(64 * KIB, 1))
    device, offset, kinds = checked(storage), 0, []
    while offset < MIB:
        runs = device.map(offset, MIB - offset)
        kinds += [run.kind for run in runs]
        assert len(runs) <= 4
        offset = runs.end
    assert kinds == [RunKind.ZERO, RunKind.DATA] * 8


def test_running_out_of_space_has_its_errno(tmp_path: Path) -> None:
    """ENOSPC keeps its identity: job policies decide on it."""
    storage = opened("/dev/full", driver="host_device")
    with pytest.raises(QmpdError) as caught:
        storage.write(0, b"x")
    assert (caught.value.kind, caught.value.errno) == (Kind.NO_SPACE, errno.ENOSPC)


def test_devices_do_not_grow() -> None:
    """A character device is a node of length 0."""
    null = opened("/dev/null", driver="host_device")
    assert (null.length, null.growable) == (0, False)
    with pytest.raises(QmpdError, match=r"^Cannot grow device files$"):
        null.truncate(512)


# -- making files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "blocks"), [("off", 0), ("falloc", 2048), ("full", 2048)])
def test_create(tmp_path: Path, mode: str, blocks: int) -> None:
    """Lengths are rounded up; preallocation takes the space."""
    path = tmp_path / "new"
    create_file(str(path), MIB - 100, mode)
    assert os.path.getsize(path) == MIB
    assert os.stat(path).st_blocks >= blocks
    assert path.read_bytes() == bytes(MIB)


def test_create_empties_what_was_there(tmp_path: Path) -> None:
    """No old byte shows through, shorter or longer."""
    path = tmp_path / "old"
    path.write_bytes(b"x" * 10_000)
    create_file(str(path), 4096)
    assert path.read_bytes() == bytes(4096)


@pytest.mark.parametrize(
    ("name", "size", "mode", "text"),
    [
        ("nodir/a", 512, "off", "Could not create 'nodir/a': No such file or directory"),
        ("", 512, "off", "Could not create '': No such file or directory"),
        ("dir", 512, "off", "Could not create 'dir': Is a directory"),
        ("a", 512, "metadata", "Unsupported preallocation mode: metadata"),
        ("a", (1 << 64) - 1, "off", "Could not resize file: Invalid argument"),
        ("a", (1 << 63) - 1, "off", "Could not resize file: File too large"),
        ("a", (1 << 63) - 1024, "full", "Could not resize file: File too large"),
    ],
)
def test_what_is_not_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int, mode: str, text: str
) -> None:
    """The peer's texts, and no file left behind."""
    monkeypatch.chdir(tmp_path)
    Path("dir").mkdir()
    with pytest.raises(QmpdError) as caught:
        create_file(name, size, mode)
    assert str(caught.value) == text
    assert os.listdir() == ["dir"]


def test_a_size_that_cannot_be_leaves_the_old_file_alone(tmp_path: Path) -> None:
    """Refused before the content is touched."""
    path = tmp_path / "old"
    path.write_bytes(b"precious")
    with pytest.raises(QmpdError, match="File too large"):
        create_file(str(path), (1 << 63) - 1024)
    assert path.read_bytes() == b"precious"


def test_a_file_that_somebody_writes_is_not_emptied(tmp_path: Path) -> None:
    """The lock is asked before anything is done."""
    path = tmp_path / "held"
    path.write_bytes(b"precious" * 512)
    holder = opened(path)
    grant(holder, WRITER, ALONE)
    with pytest.raises(QmpdError) as caught:
        create_file(str(path), 512)
    assert str(caught.value) == 'Failed to get "write" lock'
    assert path.read_bytes() == b"precious" * 512
