"""One execution: open a damaged image, read it, check it, write it, and hold every answer against the model."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from qmpd.block.batch import Batch
from qmpd.block.drivers.qcow2 import Qcow2
from qmpd.errors import Kind, QmpdError
from tests.block.qcow2.support import MemoryFile, children, read
from tests.crash.contents import Structure, _snapshot_rows
from tests.fuzz.model import Model, UnreadableError

KIB: Final = 1 << 10
#: A disk that is full from here on: no fuzzed image has reason to become larger.
FULL: Final = 1 << 20
#: What the guest writes; no seed has such bytes.
PATTERN: Final = 0xA5
_TRACE: Final = bytes([PATTERN]) * 32
#: Bytes of the file that one execution may read and write in all, and the number of requests.
MAX_BYTES: Final = 64 << 20
MAX_REQUESTS: Final = 20_000
#: Memory at the worst moment, beside a few times the file's length.
MAX_MEMORY: Final = 3 << 20


class FoundError(AssertionError):
    """The driver did what it must never do."""


@dataclass
class Guarded(MemoryFile):
    """The image file, which watches what is asked of it."""

    forbidden: set[int] = field(default_factory=set)
    cluster_size: int = 1 << 62

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.forbidden, self.cluster_size = set(), 1 << 62
        self.requests = self.moved = self.writes = 0

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._count(offset, len(buffer))
        if offset + len(buffer) > self.length:
            raise FoundError(f"read of {len(buffer)} bytes at {offset:#x}, behind the end at {self.length:#x}")
        super().readinto(offset, buffer)

    def write(self, offset: int, data: Any) -> None:
        self._count(offset, len(data))
        self.writes += 1
        if offset + len(data) > FULL:
            raise QmpdError("No space left on device", Kind.NO_SPACE)
        if self.forbidden and _TRACE in bytes(data):
            hit = self.forbidden.intersection(
                range(offset // self.cluster_size, (offset + len(data) - 1) // self.cluster_size + 1)
            )
            if hit:
                raise FoundError(f"guest data written to clusters {sorted(hit)}, which are not the guest's alone")
        super().write(offset, data)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        if offset + length > FULL:
            raise QmpdError("No space left on device", Kind.NO_SPACE)
        super().write_zeroes(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        if offset + length > self.length:
            raise FoundError(f"discard of {length} bytes at {offset:#x}, behind the end at {self.length:#x}")
        super().discard(offset, length)

    def truncate(self, length: int) -> None:
        if length > FULL:
            raise QmpdError("No space left on device", Kind.NO_SPACE)
        super().truncate(length)

    def _count(self, offset: int, length: int) -> None:
        self.requests += 1
        self.moved += length
        if offset < 0 or length < 0:
            raise FoundError(f"request of {length} bytes at {offset}")
        if self.requests > MAX_REQUESTS or self.moved > MAX_BYTES:
            raise FoundError(f"{self.requests} requests, {self.moved} bytes: is there an end?")


def execute(
    raw: bytes, data: bytes | None, rng: random.Random, outcomes: Counter[str], *, measure: bool = False
) -> None:
    """Do everything to the image ``raw`` with the data file ``data``. Anything raised is a fault of the driver.

    ``outcomes`` counts what happened; with ``measure`` the memory used is looked at as well, which takes time.
    """
    if measure:
        tracemalloc.start()
    try:
        _read(raw, data, rng, outcomes)
        if not rng.randrange(3):
            _write(raw, data, rng, outcomes)
        if measure:
            outcomes["measured"] += 1
            peak = tracemalloc.get_traced_memory()[1]
            if peak > MAX_MEMORY + 16 * len(raw):
                raise FoundError(f"{peak >> 10} KiB of memory used for an image of {len(raw) >> 10} KiB")
    finally:
        if measure:
            tracemalloc.stop()


def _read(raw: bytes, data: bytes | None, rng: random.Random, outcomes: Counter[str]) -> None:
    try:
        image = Qcow2.open(children(Guarded(raw), None if data is None else Guarded(data)), {}, read_only=True)
    except QmpdError:
        outcomes["refused"] += 1
        return
    model = Model(raw, data)
    if image.length != model.size:
        raise FoundError(f"length {image.length}, not {model.size}")
    fine = True
    for offset, length in _windows(image.length, model.cs, rng):
        fine &= _compare(image, model, offset, length)
    outcomes["read"] += fine
    outcomes["read error"] += not fine
    if rng.randrange(4):
        return
    outcomes["checked"] += 1
    try:
        image.check(fix_leaks=False, pulse=lambda: None)
    except QmpdError:
        outcomes["not checked"] += 1


def _windows(size: int, unit: int, rng: random.Random) -> list[tuple[int, int]]:
    """The beginning at once, its clusters one by one, and a bit anywhere."""
    start = min(size, 64 * KIB, 64 * unit)
    found = [(0, start)] if start else []
    for _ in range(3 if start else 0):
        offset = rng.randrange(start)
        found.append((offset, min(rng.choice((1, 512, unit)), size - offset)))
    if size > start:
        offset = rng.randrange(start, size)
        found.append((offset, min(size - offset, 3 * unit)))
    return found


def _compare(image: Qcow2, model: Model, offset: int, length: int) -> bool:
    """Does reading succeed? It must where the model can read, and give the same bytes."""
    try:
        expected = model.read(offset, length)
    except UnreadableError as error:
        expected, reason = None, str(error)
    try:
        if expected is None and not image.read_many(Batch([offset], [memoryview(bytearray(length))])):
            raise FoundError(f"{length} bytes at {offset:#x} were read in a batch, but: {reason}")
        got = read(image, offset, length)
    except QmpdError as error:
        if expected is not None and "overlaps with" not in error.desc:
            raise FoundError(f"{length} bytes at {offset:#x} can be read, but: {error.desc}") from error
        return False
    if expected is None:
        raise FoundError(f"{length} bytes at {offset:#x} were read, but: {reason}")
    buffer = bytearray(length)
    if got != expected or (not image.read_many(Batch([offset], [memoryview(buffer)])) and buffer != expected):
        raise FoundError(f"{length} bytes at {offset:#x} are not what the image says")
    return True


# -- writing -----------------------------------------------------------------------------------------------------------


def _write(raw: bytes, data: bytes | None, rng: random.Random, outcomes: Counter[str]) -> None:
    file, beside = Guarded(raw), None if data is None else Guarded(data)
    try:
        image = Qcow2.open(children(file, beside), {}, read_only=False)
    except QmpdError:
        outcomes["not writable"] += 1
        if file.content != raw and not (len(raw) >= 80 and raw[79] & 1):
            raise FoundError("refused, but changed") from None
        return
    model = Model(bytes(file.content), data)
    file.cluster_size = model.cs
    clusters = len(model.raw) // model.cs + 1
    file.forbidden = model.metadata() | {c for c in range(clusters) if model.refcount(c) > 1}
    if beside is not None:
        file.forbidden = set(range(FULL // model.cs))
    sound = _sound(model)
    before = _views(image, model)
    ranges = _change(image, rng, outcomes)
    file.forbidden = set()
    try:
        image.close()
    except QmpdError:
        outcomes["not flushed"] += 1
        ranges = [(offset, length, False) for offset, length, _ in ranges]
    if sound:
        outcomes["sound"] += 1
        _judge(Model(bytes(file.content), None if beside is None else bytes(beside.content)), before, ranges)


def _change(image: Qcow2, rng: random.Random, outcomes: Counter[str]) -> list[tuple[int, int, bool]]:
    """A few writes; where they went, and whether they succeeded."""
    done: list[tuple[int, int, bool]] = []
    size = min(image.length, 64 * KIB)
    for _ in range(rng.randrange(1, 4) if size else 0):
        offset = rng.randrange(size)
        length = min(size - offset, rng.choice((1, 512, 4096, 3 * 4096)))
        try:
            way = rng.randrange(8)
            if way == 0:
                image.write_zeroes(offset, length)
            elif way == 1:
                image.discard(offset, length)
            else:
                data = bytes([PATTERN]) * length
                if way < 5 or image.write_many(Batch([offset], [memoryview(data)])):
                    image.write(offset, data)
            outcomes["written"] += 1
            done.append((offset, length, way > 1))
        except QmpdError:
            outcomes["write error"] += 1
            done.append((offset, length, False))
    return done


def _sound(model: Model) -> bool:
    """Does a check of our own find nothing wrong?"""
    end = len(model.raw)
    if model.l1_size * 8 > end or model.table_clusters * model.cs > end or model.snapshots > 9 or model.dirty:
        return False
    try:
        if any(row[1] * 8 > end for row in _snapshot_rows(model.raw, model.snapshots, model.snapshot_table)):
            return False
        structure = Structure(model.raw)
        return not structure.errors and not structure.ambiguous
    except (ValueError, IndexError, OverflowError, struct.error):
        return False


def _views(image: Qcow2, model: Model) -> dict[int, bytes]:
    """The guest's first clusters, as far as they can be read."""
    found = {}
    for number in range(min(16, model.size // model.cs)):
        try:
            found[number] = model.read(number * model.cs, model.cs)
        except UnreadableError:
            continue
    return found


def _judge(after: Model, before: dict[int, bytes], ranges: list[tuple[int, int, bool]]) -> None:
    """A sound image is sound afterwards, has what was written, and the rest as it was."""
    if not after.incompatible & 2 and (errors := Structure(after.raw).errors):
        raise FoundError(f"sound before the write, but now: {errors[0]}")
    for number, old in before.items():
        start, end = number * after.cs, (number + 1) * after.cs
        expected, new = bytearray(old), bytearray(after.read(start, after.cs))
        for offset, length, certain in ranges:
            low, high = max(offset, start) - start, min(offset + length, end) - start
            if low < high:
                expected[low:high] = bytes([PATTERN]) * (high - low)
                if not certain:
                    new[low:high] = expected[low:high]
        if expected != new:
            raise FoundError(f"guest cluster {number} changed, or did not take what was written")
