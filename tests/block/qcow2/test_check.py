"""The consistency check agrees with qemu-img check: on the zoo, on damaged images, and about what is repaired."""

from __future__ import annotations

import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd.block.drivers.qcow2 import Qcow2
from qmpd.block.findings import MAX_FINDINGS, Severity
from qmpd.errors import QmpdError
from tests.block.qcow2.comparing import check, image, ours, status, theirs
from tests.block.qcow2.support import MemoryFile, new_image, read, run
from tests.fixtures import mkimages
from tests.tools import need

KIB, MIB = 1 << 10, 1 << 20

#: What is refused when it is opened, as for anything else: a header without a refcount table.
NOT_COMPARED = {"bad-rt-none"}

# -- agreement ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoo")
    assert mkimages.main([sys.argv[0], str(path)]) == 0
    return path


@pytest.mark.parametrize("name", [name for name, *_ in mkimages.zoo() if name not in NOT_COMPARED])
def test_the_zoo(zoo: Path, name: str) -> None:
    """Valid and malformed images: the same verdict, and every count the same."""
    need("qemu-img")
    path = zoo / f"{name}.qcow2"

    assert ours(path) == theirs(path)


def widths(order: int) -> Callable[[], mkimages.Img]:
    """Images with refcounts of ``2 ** order`` bits."""

    def make() -> mkimages.Img:
        if order < 2:
            return mkimages.basic(ro=order, cb=12, size=256 * KIB)
        made = mkimages.full(ro=order, cb=12, size=256 * KIB)
        made.snapshot("1", "one")
        made.data(9, b"into a table that the snapshot has too")
        return made

    return make


def extended() -> mkimages.Img:
    made = mkimages.Img(ext=True, cb=14, size=256 * KIB)
    made.data(0, b"a")
    made.zero(1)
    made.zero(2, alloc=True)
    made.compressed(3, b"\x33")
    made.snapshot("1", "x")
    made.data(5, b"q", bitmap=0xFF)
    return made


def small_clusters() -> mkimages.Img:
    made = mkimages.full(cb=9, size=64 * KIB)
    made.snapshot("1", "x")
    made.snapshot("2", "y")
    return made


def version_2() -> mkimages.Img:
    made = mkimages.full(version=2, cb=12, size=256 * KIB)
    made.snapshot("1", "x")
    return made


KINDS = [*(widths(order) for order in range(7)), extended, small_clusters, version_2, mkimages.basic]


@st.composite
def damaged(draw: st.DrawFn) -> tuple[mkimages.Img, list[tuple[int, int]], int]:
    """An image, new 8-byte words for some fields of its metadata, and what to cut from its end."""
    made = draw(st.sampled_from(KINDS))().build()
    tables = [made.l1_off, made.rt_off, made.rb_off]
    tables += [offset for offset, _ in made.l2.values()] + [offset for offset, *_ in made.snaps]
    size = made.next * made.cs
    pointer = st.builds(lambda n, flags: n * made.cs | flags, st.integers(0, size // made.cs + 1), st.just(0))
    word = st.one_of(
        st.just(0),
        pointer,
        pointer.map(lambda value: value | mkimages.COPIED),
        st.integers(0, 63).map(lambda bit: 1 << bit),
        st.integers(0, 2**64 - 1),
    )
    index = st.one_of(st.integers(0, 5), st.integers(0, made.cs // 8 - 1))
    place = st.builds(lambda table, i: table + 8 * i, st.sampled_from(tables), index)
    patches = draw(st.lists(st.tuples(place, word), min_size=1, max_size=3))
    return made, patches, draw(st.sampled_from([0, 0, 0, 100, made.cs, 2 * made.cs]))


def write_damaged(path: Path, damage: tuple[mkimages.Img, list[tuple[int, int]], int]) -> None:
    made, patches, cut = damage
    made.write(str(path))
    with path.open("r+b") as file:
        for offset, word in patches:
            file.seek(offset)
            file.write(struct.pack(">Q", word))
        file.truncate(max(512, made.next * made.cs - cut))


Damage = tuple[mkimages.Img, list[tuple[int, int]], int]


@given(damaged())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_images(tmp_path: Path, damage: Damage) -> None:
    """Whatever is written over the metadata, both find the same."""
    compare_damaged(tmp_path, damage)


@pytest.mark.long
@given(damaged())
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_many_damaged_images(tmp_path: Path, damage: Damage) -> None:
    """The same for more of them."""
    compare_damaged(tmp_path, damage)


def compare_damaged(directory: Path, damage: Damage) -> None:
    need("qemu-img")
    path = directory / "damaged.qcow2"
    write_damaged(path, damage)

    assert ours(path) == theirs(path)


def test_persistent_bitmaps_are_counted(tmp_path: Path) -> None:
    """Their directory, tables and clusters; without the flag that vouches for them they are leaks."""
    need("qemu-img")
    path = tmp_path / "bitmaps.qcow2"
    run("qemu-img", "create", "-f", "qcow2", path, "64M")
    run("qemu-img", "bitmap", "--add", "-g", "4k", path, "b0")
    run("qemu-io", "-c", "write 1M 3M", path)
    run("qemu-img", "bitmap", "--add", "-g", "64k", path, "b1")

    assert ours(path) == theirs(path)
    assert ours(path)[0] == 0

    with path.open("r+b") as file:
        file.seek(88)
        file.write(bytes(8))
    assert ours(path) == theirs(path)
    assert ours(path)[0] == 3


# -- repair ------------------------------------------------------------------------------------------------------------


def leaky(path: Path, order: int, *, flags: bool) -> None:
    """An image with clusters that nobody uses, one that counts too much where counts can, perhaps a wrong flag."""
    made = (mkimages.basic if order < 2 else mkimages.full)(ro=order, cb=12, size=256 * KIB)
    made.alloc(2)
    used = made.data(10, b"later still")
    if order:
        made.ref[used // made.cs] += 1
    if flags:
        made.entry(10, used)
    made.build()
    made.write(str(path))


@pytest.mark.parametrize("order", range(7))
@pytest.mark.parametrize("flags", [False, True], ids=["leaks", "leaks and flags"])
def test_repairing_leaks(tmp_path: Path, order: int, *, flags: bool) -> None:
    """Afterwards both images are clean, and every byte of metadata and data is what qemu-img makes of it."""
    need("qemu-img")
    path, other = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    leaky(path, order, flags=flags)
    shutil.copy(path, other)
    assert theirs(path)[0] in (2, 3)

    with image(path, read_only=False) as driver:
        result = check(driver, fix_leaks=True)

    assert theirs(other, "-r", "leaks")[0] == status(result) == 0
    assert result.leaks_fixed >= 2
    assert theirs(path) == theirs(other)
    assert path.read_bytes() == other.read_bytes()


def test_nothing_is_given_back_while_anything_is_wrong(tmp_path: Path) -> None:
    """An L2 entry that cannot be followed may hide the owner of what looks leaked."""
    made = mkimages.basic().build()
    made.write(str(tmp_path / "a"))
    with (tmp_path / "a").open("r+b") as file:
        file.seek(made.l2[0][0])
        file.write(struct.pack(">Q", mkimages.COPIED | 1 << 40))
    before = (tmp_path / "a").read_bytes()

    with image(tmp_path / "a", read_only=False) as driver:
        result = check(driver, fix_leaks=True)

    assert (result.corruptions > 0, result.leaks, result.leaks_fixed) == (True, 1, 0)
    assert (tmp_path / "a").read_bytes() == before


def test_what_was_given_back_is_used_again() -> None:
    """The allocator knows of it, and what is written there is read again."""
    file, driver = new_image(size=4 * MIB)
    driver._image.alloc.allocate(3)
    driver.write(0, b"x" * 64 * KIB)
    end = len(file.content)
    assert check(driver, fix_leaks=True).leaks_fixed == 3

    driver.write(64 * KIB, b"y" * 192 * KIB)

    assert read(driver, 0, 256 * KIB) == b"x" * 64 * KIB + b"y" * 192 * KIB
    assert len(file.content) == end
    assert status(check(driver)) == 0


def test_a_read_only_image_is_not_repaired() -> None:
    """It says so before it looks."""
    file, driver = new_image(size=MIB)
    driver.close()
    driver = Qcow2.open({"file": file}, {}, read_only=True)

    with pytest.raises(QmpdError, match="Block node is read-only"):
        check(driver, fix_leaks=True)


# -- findings ----------------------------------------------------------------------------------------------------------


def test_a_finding_says_where_to_look() -> None:
    """Offset, field and value of the byte that is wrong."""
    made = mkimages.basic().build()
    made.poke(made.l2[0][0], struct.pack(">Q", mkimages.COPIED | 1 << 40))
    result = check(driver_of(made))

    first = result.report.findings[0]
    assert (first.severity, first.field) == (Severity.CORRUPTION, "l2-entry")
    assert (first.offset, first.value) == (made.l2[0][0], mkimages.COPIED | 1 << 40)


def driver_of(made: Any) -> Qcow2:
    """A built image, in memory."""
    file = MemoryFile(bytes(made.next * made.cs))
    for offset, data in [*made.chunks.items(), *made.patches]:
        file.write(offset, data)
    return Qcow2.open({"file": file}, {}, read_only=True)


def test_all_faults_are_counted_and_the_first_are_told() -> None:
    """A table full of nonsense does not make a message full of it."""
    made = mkimages.basic().build()
    made.poke(made.l2[0][0], struct.pack(">Q", mkimages.COPIED | 1 << 40) * 1000)
    result = check(driver_of(made))

    assert result.corruptions > 1000
    assert len(result.report.findings) == MAX_FINDINGS


def test_a_huge_sparse_file_takes_no_memory_for_its_holes() -> None:
    """Counts are kept for the whole file, but take memory only where something is counted."""

    class Sparse(MemoryFile):
        @property
        def length(self) -> int:
            return 1 << 40

    file = Sparse()
    made = mkimages.basic().build()
    for offset, data in made.chunks.items():
        file.write(offset, data)

    result = check(Qcow2.open({"file": file}, {}, read_only=True))

    assert (status(result), result.image_end_offset) == (0, made.next * made.cs)


def test_a_check_can_be_ended() -> None:
    """What the pulse raises comes through."""
    _, driver = new_image(size=MIB)

    class EndedError(Exception):
        pass

    def stop() -> None:
        raise EndedError

    driver.write(0, b"x")
    with pytest.raises(EndedError):
        driver.check(fix_leaks=False, pulse=stop)
