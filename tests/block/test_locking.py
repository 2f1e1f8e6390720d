"""The byte-range locks, against ourselves and against QEMU's own programs in both directions."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpd.block import locking
from qmpd.block.api import Perm
from qmpd.block.lockholders import find_holders
from qmpd.block.storage.file import FileStorage, create_file
from qmpd.errors import Kind, QmpdError
from qmpd.units import MIB
from tests.tools import need

CR, W, WU, R = Perm.CONSISTENT_READ, Perm.WRITE, Perm.WRITE_UNCHANGED, Perm.RESIZE
QCOW2_WRITER = (CR | W | R, CR | WU)
QCOW2_READER = (CR, CR | WU)
NOBODY = (Perm.NONE, Perm.ALL)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    create_file(str(path), MIB)
    return path


@pytest.fixture
def fd(image: Path) -> Iterator[int]:
    fd = os.open(image, os.O_RDONLY)
    yield fd
    os.close(fd)


def locked_bytes(path: Path) -> set[int]:
    """All bytes of the file that somebody holds a lock on, from the kernel's list."""
    inode = str(path.stat().st_ino)
    found: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[-3].split(":")[-1] == inode:
            found |= set(range(int(words[-2]), int(words[-1]) + 1))
    return found


def granted(path: Path, perm: Perm, shared: Perm, **options: object) -> FileStorage:
    """A file node whose users hold (perm, shared)."""
    storage = FileStorage.open({}, {"filename": str(path), **options}, read_only=False)
    storage.permissions_check(perm, shared)
    storage.permissions_commit(perm, shared)
    return storage


# -- the protocol ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (NOBODY, set()),
        (QCOW2_WRITER, {100, 101, 103, 201, 203}),
        (QCOW2_READER, {100, 201, 203}),
        ((CR, Perm.ALL), {100}),
        ((W | R, Perm.ALL & ~R), {101, 103, 203}),
        ((Perm.ALL, Perm.NONE), {100, 101, 102, 103, 200, 201, 202, 203}),
    ],
)
def test_bytes_of_a_state(image: Path, fd: int, state: tuple[Perm, Perm], expected: set[int]) -> None:
    """Held and unshared permissions have a byte each (spec/image-locking.md section 3)."""
    locking.acquire(fd, locking.mask(*state))
    assert locked_bytes(image) == expected
    locking.unlock(fd, locking.mask(*state))
    assert locked_bytes(image) == set()


@pytest.mark.parametrize("index", range(4))
def test_texts_and_order(image: Path, fd: int, index: int) -> None:
    """The lowest conflicting permission is named, held ones before shared ones; nothing is kept."""
    perm = Perm(1 << index)
    with open(image, "rb") as other:
        locking.acquire(other.fileno(), locking.mask(perm, Perm.ALL & ~perm))
        before = locked_bytes(image)
        for state, text in [
            ((Perm.ALL, Perm.NONE), f'Failed to get "{locking._NAMES[index]}" lock'),
            ((Perm.NONE, Perm.NONE), f'Failed to get shared "{locking._NAMES[index]}" lock'),
        ]:
            with pytest.raises(QmpdError) as caught:
                locking.acquire(fd, locking.mask(*state))
            assert (str(caught.value), caught.value.kind) == (text, Kind.LOCKED)
            assert locked_bytes(image) == before


def test_a_failed_change_keeps_the_old_locks(image: Path, fd: int) -> None:
    """A reader that cannot become a writer is still a reader."""
    with open(image, "rb") as other:
        locking.acquire(other.fileno(), locking.mask(*QCOW2_READER))
        locking.acquire(fd, locking.mask(CR, CR | WU))
        with pytest.raises(QmpdError, match="write"):
            locking.acquire(fd, locking.mask(*QCOW2_WRITER), kept=locking.mask(*QCOW2_READER))
    assert locked_bytes(image) == {100, 201, 203}


def test_asking_for_nothing_new_cannot_fail(image: Path, fd: int) -> None:
    """Even beside a program that should not be there."""
    mine = locking.mask(*QCOW2_WRITER)
    locking.acquire(fd, mine)
    with open(image, "rb") as intruder:
        locking.lock(intruder.fileno(), mine)
        locking.acquire(fd, locking.mask(*QCOW2_READER), kept=mine)
        locking.acquire(fd, mine, kept=mine)


def test_an_exclusive_lock_of_a_foreign_program(image: Path, fd: int) -> None:
    """Names the byte, and gives back what was taken before it."""
    with open(image, "r+b") as other:
        flock = struct.pack("=hhxxxxqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 101, 1, 0)
        fcntl.fcntl(other.fileno(), 37, flock)
        with pytest.raises(QmpdError) as caught:
            locking.acquire(fd, locking.mask(*QCOW2_WRITER))
        assert str(caught.value) == "Failed to lock byte 101"
        assert locked_bytes(image) == {101}


def test_closing_another_descriptor_loses_nothing(image: Path, fd: int) -> None:
    """Unlike with classic record locks."""
    locking.acquire(fd, locking.mask(*QCOW2_WRITER))
    os.close(os.open(image, os.O_RDWR))
    assert locked_bytes(image) == {100, 101, 103, 201, 203}


# -- the file driver's use of it
# -----------------------------------------------------------------------------------------


def test_an_idle_node_holds_nothing(image: Path) -> None:
    """Only users make locks."""
    FileStorage.open({}, {"filename": str(image)}, read_only=False)
    assert locked_bytes(image) == set()


@pytest.mark.parametrize("auto", [True, False])
def test_locks_follow_the_permissions(image: Path, auto: bool) -> None:
    """Taken at check, what is not needed given up at commit, the old state back at abort; also across descriptors."""
    storage = FileStorage.open({}, {"filename": str(image), "auto-read-only": auto}, read_only=False)
    writer, reader = {100, 101, 103, 201, 203}, {100, 201, 203}
    storage.permissions_check(*QCOW2_READER)
    storage.permissions_commit(*QCOW2_READER)
    assert locked_bytes(image) == reader
    storage.permissions_check(*QCOW2_WRITER)
    assert locked_bytes(image) == writer
    storage.permissions_abort()
    assert locked_bytes(image) == reader
    storage.permissions_check(*QCOW2_WRITER)
    storage.permissions_commit(*QCOW2_WRITER)
    assert locked_bytes(image) == writer
    storage.permissions_check(*QCOW2_READER)
    assert locked_bytes(image) == writer
    storage.permissions_commit(*QCOW2_READER)
    assert locked_bytes(image) == reader
    storage.close()
    assert locked_bytes(image) == set()


def test_two_nodes_of_one_process_conflict_too(image: Path) -> None:
    """Locks belong to the open file, not to the process."""
    first = granted(image, *QCOW2_WRITER)
    second = FileStorage.open({}, {"filename": str(image)}, read_only=False)
    with pytest.raises(QmpdError, match='Failed to get "write" lock'):
        second.permissions_check(*QCOW2_WRITER)
    first.close()
    second.permissions_check(*QCOW2_WRITER)


def test_locking_off_neither_takes_nor_asks(image: Path) -> None:
    """The user said so."""
    granted(image, *QCOW2_WRITER)
    granted(image, *QCOW2_WRITER, locking="off")
    assert locked_bytes(image) == {100, 101, 103, 201, 203}


def test_raw_writers_keep_other_programs_out(image: Path) -> None:
    """A writer that shares writing inside the graph does not share it with other programs, unless told to."""
    writer = granted(image, CR | W, Perm.ALL & ~R)
    assert locked_bytes(image) == {100, 101, 201, 203}
    writer.close()
    granted(image, CR | W, Perm.ALL & ~R, **{"x-qmpd-share-write": True})
    assert locked_bytes(image) == {100, 101, 203}


# -- QEMU's programs
# -----------------------------------------------------------------------------------------------------


def qemu(image: Path, *command: str) -> str:
    """Run a tool on the image; what it complains about, '' if nothing."""
    words = [word.replace("IMAGE", str(image)) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    return (done.stderr or done.stdout) if done.returncode else ""


READING = [
    ("qemu-img", "info", "-f", "raw", "IMAGE"),
    ("qemu-img", "convert", "-f", "raw", "-O", "raw", "IMAGE", "IMAGE.copy"),
    ("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", "IMAGE"),
]
WRITING = [
    ("qemu-img", "resize", "-f", "raw", "IMAGE", "2M"),
    ("qemu-io", "-f", "raw", "-c", "write 0 512", "IMAGE"),
    ("qemu-img", "create", "-f", "raw", "IMAGE", "2M"),
]


@pytest.mark.parametrize("command", WRITING, ids=" ".join)
@pytest.mark.parametrize("state", [QCOW2_WRITER, QCOW2_READER, (CR | W, Perm.ALL & ~R)])
def test_our_locks_keep_qemus_writers_out(image: Path, state: tuple[Perm, Perm], command: tuple[str, ...]) -> None:
    """Whatever we do with the image, nobody else writes it."""
    need(command[0])
    storage = granted(image, *state)
    storage.write(0, b"content")
    assert 'Failed to get "write" lock' in qemu(image, *command)
    assert image.read_bytes()[:7] == b"content"
    assert image.stat().st_size == MIB


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_our_locks_keep_qemus_readers_out_while_we_write(tmp_path: Path, command: tuple[str, ...]) -> None:
    """Readers of a qcow2 image are refused beside a writer and welcome beside a reader, as among QEMU's own."""
    need("qemu-img", "qemu-io")
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"], check=True)
    command = tuple(word.replace("raw", "qcow2") if i < 4 else word for i, word in enumerate(command))
    storage = granted(image, *QCOW2_WRITER)
    assert 'Failed to get shared "write" lock' in qemu(image, *command)
    assert qemu(image, "qemu-img", "info", "-U", "IMAGE") == ""
    storage.permissions_check(*QCOW2_READER)
    storage.permissions_commit(*QCOW2_READER)
    assert qemu(image, *command) == ""


HOLDERS = {
    "writer": ([], 'Failed to get "write" lock', 'Failed to get shared "write" lock'),
    "reader": (["-r"], 'Failed to get "write" lock', None),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_qemus_locks_keep_us_out(tmp_path: Path, holder: str) -> None:
    """While qemu-io has a qcow2 image open we get what another QEMU would get."""
    need("qemu-img", "qemu-io")
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"], check=True)
    arguments, write_text, read_text = HOLDERS[holder]
    words = ["qemu-io", "-f", "qcow2", *arguments, str(image)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"q"  # the prompt: the image is open now
        storage = FileStorage.open({}, {"filename": str(image)}, read_only=False)
        with pytest.raises(QmpdError) as caught:
            storage.permissions_check(*QCOW2_WRITER)
        assert str(caught.value) == write_text
        if read_text is None:
            storage.permissions_check(*QCOW2_READER)
        else:
            with pytest.raises(QmpdError) as caught:
                storage.permissions_check(*QCOW2_READER)
            assert str(caught.value) == read_text
        storage.permissions_check(CR, Perm.ALL)
    finally:
        process.kill()
        process.communicate()


def test_racing_openers_never_both_win(image: Path) -> None:
    """Two processes taking a writer's locks over and over: never are both inside."""
    program = """
import os, sys
from qmpd.block import locking
from qmpd.errors import QmpdError
fd, mask, mark = os.open(sys.argv[1], os.O_RDWR), int(sys.argv[2]), sys.argv[1] + ".inside"
for _ in range(300):
    try:
        locking.acquire(fd, mask)
    except QmpdError:
        continue
    os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    os.unlink(mark)
    locking.unlock(fd, mask)
"""
    words = [sys.executable, "-c", program, str(image), str(locking.mask(*QCOW2_WRITER))]
    racers = [subprocess.Popen(words) for _ in range(2)]
    assert [racer.wait(60) for racer in racers] == [0, 0]


# -- whose lock it is --------------------------------------------------------------------------------------------------


def test_holders_are_found_by_byte(image: Path, fd: int) -> None:
    """Other processes, this one through another descriptor, but not the descriptor that asks."""
    program = f"""
import os, sys
from qmpd.block import locking
fd = os.open({str(image)!r}, os.O_RDONLY)
locking.lock(fd, 0b0010_0001)
print(flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        mine = os.open(image, os.O_RDONLY)
        locking.lock(mine, 0b0001)
        locking.lock(fd, 0b0010)
        found = {byte: {holder.pid for holder in find_holders(fd, byte)} for byte in (100, 101, 201, 203)}
        [named] = find_holders(fd, 201)
        assert named.command == Path(f"/proc/{other.pid}/comm").read_text().strip()
        os.close(mine)
        other.communicate(b"")
    assert found == {100: {other.pid, os.getpid()}, 101: set(), 201: {other.pid}, 203: set()}


def test_a_refusal_names_the_holder(image: Path, fd: int, caplog: pytest.LogCaptureFixture) -> None:
    """In the log and in the details; the text is QEMU's alone."""
    holder = granted(image, *QCOW2_WRITER)
    with pytest.raises(QmpdError) as caught:
        locking.acquire(fd, locking.mask(*QCOW2_READER))
    holder.close()
    assert caught.value.desc == 'Failed to get shared "write" lock'
    assert caught.value.details is not None
    assert [known["pid"] for known in caught.value.details["held-by"]] == [os.getpid()]
    assert caught.value.prefixed("x: ").details == caught.value.details
    assert f'{image}: Failed to get shared "write" lock; held by' in caplog.text


def test_a_file_that_nobody_locks_has_no_holders(fd: int) -> None:
    """And neither has a descriptor that is closed."""
    assert find_holders(fd, 100) == []
    assert find_holders(-1, 100) == []
