"""Devices and shortcuts for the qcow2 tests."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qmpd.block.api import BlockDevice
from qmpd.block.batch import Batch
from qmpd.block.drivers.qcow2 import CreateOptions, Qcow2, create
from qmpd.block.extents import RunKind, Runs
from qmpd.block.storage.file import FileStorage
from qmpd.errors import QmpdError


class MemoryFile:
    """A growable file in memory that remembers its writes, and which of them were flushed."""

    growable = True
    placement_unit = None
    data_child = None

    def __init__(self, content: bytes = b"", *, journal: bool = False) -> None:
        self.content = bytearray(content)
        self.journal = journal
        #: Content at the last flush, and (offset, bytes or None for a cut) since then.
        self.durable = bytes(content)
        self.pending: list[tuple[int, bytes | None]] = []
        self.discarded: list[tuple[int, int]] = []

    @property
    def length(self) -> int:
        return -(-len(self.content) // 512) * 512

    def readinto(self, offset: int, buffer: memoryview) -> None:
        piece = self.content[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        buffer[len(piece) :] = bytes(len(buffer) - len(piece))

    def write(self, offset: int, data: Any) -> None:
        if self.journal:
            self.pending.append((offset, bytes(data)))
        self._put(self.content, offset, data)

    @staticmethod
    def _put(content: bytearray, offset: int, data: Any) -> None:
        if len(content) < offset:
            content.extend(bytes(offset - len(content)))
        content[offset : offset + len(data)] = data

    def read_many(self, batch: Batch) -> list[int]:
        return one_by_one(self.readinto, batch)

    def write_many(self, batch: Batch) -> list[int]:
        return one_by_one(self.write, batch)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self.write(offset, bytes(length))

    def discard(self, offset: int, length: int) -> None:
        self.discarded.append((offset, length))
        self.write(offset, bytes(length))

    def flush(self) -> None:
        if self.journal:
            self.durable = bytes(self.content)
            self.pending.clear()

    def truncate(self, length: int) -> None:
        if self.journal:
            self.pending.append((length, None))
        self._cut(self.content, length)

    @staticmethod
    def _cut(content: bytearray, length: int) -> None:
        del content[length:]
        content.extend(bytes(length - len(content)))

    def map(self, offset: int, length: int) -> Runs:
        return Runs.single(offset, length, RunKind.DATA, offset)

    def direct(self, offset: int, length: int) -> None:
        return None

    def place(self, offset: int, length: int) -> Any:
        raise NotImplementedError

    def after_crash(self, survives: Iterator[bool]) -> bytes:
        """What a crash may leave: all that was flushed, and any of the writes since."""
        content = bytearray(self.durable)
        for offset, data in self.pending:
            if not next(survives):
                continue
            if data is None:
                self._cut(content, offset)
            else:
                self._put(content, offset, data)
        return bytes(content)


def one_by_one(call: Callable[[int, memoryview], None], batch: Batch) -> list[int]:
    """The requests of a batch; the indexes of those that failed."""
    failed: list[int] = []
    for index, (offset, buffer) in enumerate(zip(batch.offsets, batch.buffers, strict=True)):
        try:
            call(offset, buffer)
        except QmpdError:
            failed.append(index)
    return failed


def new_image(
    file: BlockDevice | None = None, *, size: int, data: BlockDevice | None = None, **options: Any
) -> tuple[Any, Qcow2]:
    """A fresh image, open for writing. With ``data`` that is its data file."""
    file = MemoryFile() if file is None else file
    create(file, CreateOptions(size, **options), data)
    return file, Qcow2.open(children(file, data), {}, read_only=False)


def children(file: BlockDevice, data: BlockDevice | None) -> dict[str, BlockDevice]:
    """What an image is opened over."""
    return {"file": file} if data is None else {"file": file, "data-file": data}


@contextmanager
def opened(path: Path, *, read_only: bool = False, backing: BlockDevice | None = None) -> Iterator[Qcow2]:
    """An image on disk."""
    file = FileStorage.open({}, {"filename": str(path)}, read_only=read_only)
    try:
        image = Qcow2.open({"file": file}, {}, read_only=read_only)
        image.attach("backing", backing)
        try:
            yield image
        finally:
            image.close()
    finally:
        file.close()


def read(device: BlockDevice, offset: int, length: int) -> bytes:
    """Bytes of the guest's view."""
    buffer = bytearray(length)
    device.readinto(offset, memoryview(buffer))
    return bytes(buffer)


def run(*command: str | Path) -> str:
    """Output of a program that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_clean(path: Path, *, leaks: bool = False) -> None:
    """qemu-img finds no fault (leaked clusters allowed if ``leaks``)."""
    command = ["qemu-img", "check", "-f", "qcow2", path.resolve()]
    # From the directory where it looks for data files.
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=path.resolve().parent)
    assert done.returncode in ((0, 3) if leaks else (0,)), done.stdout + done.stderr
