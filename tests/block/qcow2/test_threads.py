"""Random requests from several threads against a bytearray."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.contract import Checked
from qmpd.block.drivers.qcow2 import CreateOptions, Qcow2, create
from qmpd.block.drivers.qcow2.single import Single
from qmpd.block.storage.file import FileStorage, create_file
from tests.block.conformance import checked
from tests.block.qcow2.support import MemoryFile, check_clean, children, new_image, read
from tests.tools import need

THREADS = 4
LAYOUTS: list[dict[str, Any]] = [
    {"cluster_size": 512},
    {"cluster_size": 4096, "version": "v2"},
    {"cluster_size": 65536},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 4096, "data_file": "data"},
    {"cluster_size": 4096, "data_file": "data", "data_file_raw": True},
    {"cluster_size": 16384, "extended_l2": True, "data_file": "data"},
]


class Crowd:
    """An image on disk, and threads that each have every fourth stripe of it, borders within clusters."""

    def __init__(self, path: Path, layout: dict[str, Any], seed: int) -> None:
        self.rng = random.Random(seed)
        self.unit = layout["cluster_size"]
        self.bytes = bytearray(24 * self.unit)
        create_file(str(path), 0)
        self.storage = FileStorage.open({}, {"filename": str(path)}, read_only=False)
        self.file = checked(self.storage)
        self.raw = "data_file_raw" in layout
        self.data = self._data_file(path.with_name("data")) if "data_file" in layout else None
        create(self.file, CreateOptions(len(self.bytes), **layout), self.data)
        self.image = self._image()

    def _data_file(self, path: Path) -> Checked:
        create_file(str(path), 0)
        return checked(FileStorage.open({}, {"filename": str(path)}, read_only=False))

    def _image(self) -> Qcow2:
        return Qcow2.open(children(self.file, self.data), {"l2-cache-size": 4 * self.unit}, read_only=False)

    def round(self) -> None:
        """Everybody at once; then, with nobody there, perhaps a resize or a new start."""
        seeds = [self.rng.random() for _ in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(self._work, range(THREADS), seeds))
        way = self.rng.randrange(4)
        if way == 0:
            size = self.rng.randrange(1, 48) * self.unit // 2 // 512 * 512 or 512
            self.image.truncate(size)
            self.bytes = self.bytes[:size] + bytes(max(0, size - len(self.bytes)))
        elif way == 1:
            self.image.close()
            self.image = self._image()
        assert read(self.image, 0, len(self.bytes)) == self.bytes
        if self.raw and self.data is not None:
            assert read(self.data, 0, self.data.length) == self.bytes

    def _work(self, thread: int, seed: float) -> None:
        rng, stripe = random.Random(seed), max(1, self.unit * 5 // 8)
        for _ in range(12):
            index = rng.randrange(len(self.bytes) // stripe + 1) // THREADS * THREADS + thread
            start = index * stripe + rng.randrange(stripe)
            end = min(start + rng.randrange(1, stripe + 1), (index + 1) * stripe, len(self.bytes))
            if start < end:
                self._request(rng, start, end)

    def _request(self, rng: random.Random, start: int, end: int) -> None:
        kind, length = rng.choice(("write", "write", "write", "zero", "discard", "flush", "read")), end - start
        if kind == "write":
            data = rng.randbytes(length)
            self.image.write(start, data)
            self.bytes[start:end] = data
        elif kind == "zero":
            self.image.write_zeroes(start, length, unmap=rng.random() < 0.5)
            self.bytes[start:end] = bytes(length)
        elif kind == "discard":
            self.image.discard(start, length)
            after = read(self.image, start, length)
            assert all(new in (0, old) for new, old in zip(after, self.bytes[start:end], strict=True))
            self.bytes[start:end] = after
        elif kind == "flush":
            self.image.flush()
        else:
            assert read(self.image, start, length) == self.bytes[start:end]

    def close(self) -> None:
        self.image.close()
        self.storage.close()


def crowd(path: Path, layout: dict[str, Any], seed: int, rounds: int) -> None:
    need("qemu-img")
    many = Crowd(path, layout, seed)
    for _ in range(rounds):
        many.round()
    many.close()
    check_clean(path)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda d: "-".join(str(v) for v in d.values()))
def test_threads_see_their_own_bytes(tmp_path: Path, layout: dict[str, Any]) -> None:
    """Clusters shared by threads, tables moved under them: everybody reads what they wrote, and the image is clean."""
    crowd(tmp_path / "image", layout, seed=1, rounds=12)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 22))
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda d: "-".join(str(v) for v in d.values()))
def test_threads_see_their_own_bytes_for_long(tmp_path: Path, layout: dict[str, Any], seed: int) -> None:
    """The same with other seeds, for longer."""
    crowd(tmp_path / "image", layout, seed, rounds=60)


def test_a_cluster_mapped_by_somebody_else_meanwhile_is_not_written_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who saw the cluster before it was mapped writes its own bytes only: others may be writing beside them by now."""
    file, image = new_image(MemoryFile(journal=True), size=1 << 20)
    look = Single._write_in_place

    def too_early(single: Single, offset: int, data: memoryview) -> bool:
        monkeypatch.setattr(Single, "_write_in_place", look)
        image.write(4096, b"other" * 100)  # between this look at the cluster and the next
        file.pending.clear()
        return False

    monkeypatch.setattr(Single, "_write_in_place", too_early)
    image.write(512, b"mine")

    assert [data for _, data in file.pending] == [b"mine"]
    assert read(image, 512, 4) == b"mine"
    assert read(image, 4096, 500) == b"other" * 100
