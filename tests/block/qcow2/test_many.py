"""Batches see the mapping as it is, whatever has happened to it, and go nowhere that single requests would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qmpd.block.batch import Batch
from qmpd.block.drivers.qcow2 import Qcow2
from qmpd.block.drivers.qcow2.many import Many
from qmpd.block.drivers.qcow2.tables import COMPRESSED, COPIED, ZERO
from tests.block.conformance import checked, noise
from tests.block.qcow2.support import MemoryFile, new_image, read

K64 = 65536
SIZE = 16 * K64
DATA = noise(SIZE, 1)


def get(image: Qcow2, *offsets: int, length: int = 4096) -> list[bytes]:
    """By one batch, with single reads for what it leaves."""
    buffers = [bytearray(length) for _ in offsets]
    for index in image.read_many(Batch(list(offsets), [memoryview(buffer) for buffer in buffers])):
        image.readinto(offsets[index], memoryview(buffers[index]))
    return [bytes(buffer) for buffer in buffers]


def put(image: Qcow2, data: bytes, *offsets: int) -> int:
    """By one batch, with single writes for what it leaves; how much that was."""
    left = image.write_many(Batch(list(offsets), [memoryview(data)] * len(offsets)))
    for index in left:
        image.write(offsets[index], data)
    return len(left)


def filled(**options: Any) -> tuple[MemoryFile, Qcow2]:
    """An image full of data that batches have read and written."""
    file, image = new_image(MemoryFile(), size=SIZE, **options)
    image.write(0, DATA)
    assert put(image, DATA[:4096], 0, K64) == 0
    image.write(K64, DATA[K64 : K64 + 4096])
    assert get(image, 0, 3 * K64, 15 * K64) == [DATA[at : at + 4096] for at in (0, 3 * K64, 15 * K64)]
    return file, image


def place(image: Qcow2) -> None:
    with image.place(2 * K64, 2 * K64) as runs:
        for run in runs:
            image.data_child.write(run.host, b"p" * run.length)  # type: ignore[union-attr]


def resize(image: Qcow2) -> None:
    image.truncate(2 * K64)
    image.truncate(SIZE)


def give_away(image: Qcow2) -> None:
    """The cluster's old place gets another user."""
    image.discard(3 * K64, K64)
    image.flush()
    image.truncate(SIZE + 8 * K64)
    image.write(SIZE, b"n" * 8 * K64)


def forget_and_fill(image: Qcow2) -> None:
    """All tables are dropped and read again."""
    image.flush()
    image._image.meta.l2.clear()
    image.write(3 * K64, b"f" * 512)


#: What may happen to a mapping while nobody tells those who read and write.
CHANGES: dict[str, Callable[[Qcow2], None]] = {
    "discard": lambda image: image.discard(3 * K64, K64),
    "zero": lambda image: image.write_zeroes(3 * K64, K64),
    "zero without unmap": lambda image: image.write_zeroes(3 * K64, K64, unmap=False),
    "place": place,
    "resize": resize,
    "empty": lambda image: image.make_empty(),
    "give away": give_away,
    "forget": forget_and_fill,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("extended", [False, True])
def test_a_batch_finds_the_mapping_of_now(change: str, extended: bool) -> None:
    """After every change of the mapping, batches read what single reads read, and write where those look."""
    _, image = filled(extended_l2=extended)
    CHANGES[change](image)

    places = (3 * K64, 3 * K64 + 4096, 2 * K64, 0)
    assert get(image, *places) == [read(image, at, 4096) for at in places]
    before = read(image, 0, image.length)
    put(image, b"w" * 4096, 3 * K64 + 4096, 2 * K64)
    expected = bytearray(before)
    for at in (3 * K64 + 4096, 2 * K64):
        expected[at : at + 4096] = b"w" * 4096
    assert read(image, 0, image.length) == expected
    image.flush()
    result = image.check(fix_leaks=False, pulse=lambda: None)
    assert result.corruptions == result.check_errors == 0


def test_a_driver_that_remembered_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases above fail with translations that are kept."""
    kept: dict[tuple[int, int], int] = {}
    find = Many._find

    def remember(many: Many, tables: Any, start: int, length: int, file_end: int) -> int:
        if (id(many), start) not in kept:
            kept[id(many), start] = find(many, tables, start, length, file_end)
        return kept[id(many), start]

    monkeypatch.setattr(Many, "_find", remember)
    caught = 0
    for change in CHANGES.values():
        kept.clear()
        _, image = filled()
        change(image)
        caught += get(image, 3 * K64) != [read(image, 3 * K64, 4096)]
    assert caught >= 4


def test_another_program_has_changed_the_image() -> None:
    """A node that was inactive reads its tables anew, for batches too."""
    file, image = filled()
    image.flush()
    copy = MemoryFile(bytes(file.content))
    other = Qcow2.open({"file": checked(copy)}, {}, read_only=False)
    other.write_zeroes(3 * K64, K64)
    other.close()
    file.content[:] = copy.content
    image.reload()
    assert get(image, 3 * K64) == [bytes(4096)]


#: Damage to the L2 entry of cluster 3, or to the refcount of its place, as what single writes refuse or remap.
DAMAGE: dict[str, Callable[[Qcow2, int, int], None]] = {
    "behind the end of the file": lambda image, row, _: set_entry(image, row, COPIED | 1 << 40),
    "unaligned": lambda image, row, host: set_entry(image, row, COPIED | host + 512),
    "no copied flag": lambda image, row, host: set_entry(image, row, host),
    "reserved bits": lambda image, row, host: set_entry(image, row, COPIED | host | 1 << 60),
    "zero": lambda image, row, host: set_entry(image, row, COPIED | host | ZERO),
    "compressed": lambda image, row, host: set_entry(image, row, COMPRESSED | host),
    "unallocated": lambda image, row, _: set_entry(image, row, 0),
    "the header": lambda image, row, _: set_entry(image, row, COPIED | 0),
    "an L2 table": lambda image, row, _: set_entry(image, row, COPIED | image._image.meta.l1[0] & (1 << 56) - 512),
    "shared": lambda image, _, host: set_count(image, host, 2),
    "free": lambda image, _, host: set_count(image, host, 0),
}


def set_entry(image: Qcow2, row: int, entry: int) -> None:
    table = image._clusters.table(0)
    assert table is not None
    table.data[row, 0] = np.uint64(entry)


def set_count(image: Qcow2, host: int, count: int) -> None:
    block = image._image.refcounts.block(0)
    assert block is not None
    block.data[host // K64] = count


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_batch_writes_nowhere_in_doubt(damage: str) -> None:
    """What is not an image's own cluster beyond doubt is left to single writes, and nothing is written."""
    file, image = filled()
    host = int(image.map(3 * K64, 512).host[0])
    DAMAGE[damage](image, 3, host)
    before = bytes(file.content)

    batch = Batch([3 * K64, 5 * K64 - 2048], [memoryview(b"w" * 4096)] * 2)
    assert list(image.write_many(batch)) == [0]

    after = bytearray(before)
    for at in (4 * K64, 5 * K64):
        place = int(image.map(at, 512).host[0])
        low, high = (K64 - 2048, K64) if at == 4 * K64 else (0, 2048)
        after[place + low : place + high] = b"w" * 2048
    assert file.content == after


def test_a_table_that_nobody_has_vetted_is_left() -> None:
    """The first write below a table looks at all of it, and that is not for a batch to do."""
    file, image = filled()
    image.close()
    again = Qcow2.open({"file": checked(file)}, {}, read_only=False)
    assert put(again, b"1" * 512, 0, K64) == 2
    assert put(again, b"2" * 512, 0, K64) == 0


def test_a_read_only_image_is_not_written() -> None:
    """Neither is one that became read-only."""
    _, image = filled()
    image.flush()
    image.reopen_prepare(read_only=True)
    image.reopen_commit()
    assert list(image.write_many(Batch([0], [memoryview(b"w")]))) == [0]
    assert get(image, 0) == [DATA[:4096]]


def test_a_cluster_on_the_move_is_left() -> None:
    """While somebody gives a cluster a new place, others wait for it one by one."""
    _, image = filled()
    with image.place(3 * K64, K64) as runs:
        image._image.inflight._claims[0].owner = -1  # somebody else's
        assert list(image.write_many(Batch([3 * K64, 5 * K64], [memoryview(b"w" * 512)] * 2))) == [0]
        image.data_child.write(int(runs.host[0]), b"p" * K64)  # type: ignore[union-attr]
    assert get(image, 3 * K64, 5 * K64, length=512) == [b"p" * 512, b"w" * 512]


def test_what_the_chain_below_has_comes_in_the_same_batch() -> None:
    """Unallocated clusters are read from the backing image, or left where it ends."""
    _, base = filled()
    _, top = new_image(MemoryFile(), size=2 * SIZE)
    top.attach("backing", checked(base))
    top.write(K64, b"t" * K64)
    left = top.read_many(Batch([0, K64, SIZE - 512], [memoryview(bytearray(1024)) for _ in range(3)]))
    assert list(left) == [2]
    places = (0, K64, SIZE - 512, SIZE)
    assert get(top, *places, length=1024) == [DATA[:1024], b"t" * 1024, DATA[-512:] + bytes(512), bytes(1024)]
