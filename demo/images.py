"""Three real images with known content, made and read back with qmpd's own drivers used as a library.

The disk is a row of 64 KiB blocks. Which image of the chain fills which blocks is a table, and what a block holds
follows from the image's name and the block's number; so what anybody must read, before and after, can be computed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qmpd.block.api import Driver
from qmpd.block.drivers.qcow2 import CreateOptions, Qcow2, create
from qmpd.block.storage.file import FileStorage, create_file

BLOCK = 64 << 10
BLOCKS = 2048
SIZE = BLOCK * BLOCKS

#: The chain from its base up.
CHAIN = ("base", "mid", "top")

#: Which blocks an image fills: long stretches, scattered pieces, and room below for zeros to show through.
FILLED = {
    "base": [block for block in range(BLOCKS) if block < 1200 or block % 16 == 0],
    "mid": [block for block in range(BLOCKS) if 100 <= block < 1000 or block % 4 == 1],
    "top": [block for block in range(BLOCKS) if 900 <= block < 1100 or block % 64 == 5],
}

Owners = dict[int, str]


def owners(*layers: str) -> Owners:
    """Which image each block comes from when these lie on each other, the last on top; blocks of nobody are zeros."""
    return {block: layer for layer in layers for block in FILLED[layer]}


def content(layer: str, block: int) -> bytes:
    """What ``layer`` put into ``block``."""
    return random.Random(f"{layer}:{block}").randbytes(BLOCK)


def build(folder: Path) -> None:
    """Make and fill base.qcow2 <- mid.qcow2 <- top.qcow2 in ``folder``."""
    for layer, below in zip(CHAIN, (None, *CHAIN), strict=False):
        path = folder / f"{layer}.qcow2"
        create_file(str(path), 0)
        file = FileStorage.open({}, {"filename": str(path)}, read_only=False)
        create(file, creation(below))
        image = Qcow2.open({"file": file}, {}, read_only=False)
        for block in FILLED[layer]:
            image.write(block * BLOCK, content(layer, block))
        image.flush()
        image.close()
        file.close()


def creation(below: str | None) -> CreateOptions:
    """What an image over ``below`` is made with."""
    return CreateOptions(SIZE, backing_file=f"{below}.qcow2", backing_fmt="qcow2") if below else CreateOptions(SIZE)


@contextmanager
def opened(folder: Path, name: str) -> Iterator[Driver]:
    """The disk as whoever opens ``name``.qcow2 sees it; backing files are found by the names in the headers."""
    file = FileStorage.open({}, {"filename": str(folder / f"{name}.qcow2")}, read_only=True)
    image = Qcow2.open({"file": file}, {}, read_only=True)
    try:
        reference = image.backing_reference
        if reference is None:
            yield image
        else:
            with opened(folder, reference.filename.removesuffix(".qcow2")) as backing:
                image.attach("backing", backing)
                yield image
    finally:
        image.close()
        file.close()


def differing(folder: Path, name: str, expected: Owners) -> list[int]:
    """The blocks in which the disk seen through ``name`` is not what it must be."""
    buffer = bytearray(BLOCK)
    with opened(folder, name) as image:
        return [block for block in range(BLOCKS) if not _as_expected(image, block, expected, buffer)]


def _as_expected(image: Driver, block: int, expected: Owners, buffer: bytearray) -> bool:
    image.readinto(block * BLOCK, memoryview(buffer))
    layer = expected.get(block)
    return buffer == (content(layer, block) if layer else bytes(BLOCK))


def backing_names(folder: Path, name: str) -> list[str]:
    """The chain as the headers tell it, from ``name`` down."""
    with opened(folder, name) as image:
        reference = image.backing_reference
    return [name, *(backing_names(folder, reference.filename.removesuffix(".qcow2")) if reference else [])]
