"""Images for the benchmarks: made once, copied cheaply, brought into the page cache before every run."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.runner import SCALE

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
CLUSTER = 64 * KIB


@dataclass(frozen=True)
class Extents:
    """Where an image gets data, in the order of writing: offset and length in bytes."""

    size: int  # of the guest's disk
    writes: tuple[tuple[int, int], ...]

    @property
    def data(self) -> int:
        """Bytes written."""
        return sum(length for _, length in self.writes)


def contiguous() -> Extents:
    """1 GiB in one piece."""
    size = round(GIB * SCALE) // (16 * MIB) * 16 * MIB or 16 * MIB
    return Extents(size, tuple((offset, 16 * MIB) for offset in range(0, size, 16 * MIB)))


def scattered() -> Extents:
    """16,384 clusters, every other one of the disk, in no order in the file."""
    count = round(16384 * SCALE)
    offsets = [2 * CLUSTER * number for number in range(count)]
    random.Random(0).shuffle(offsets)
    return Extents(2 * CLUSTER * count, tuple((offset, CLUSTER) for offset in offsets))


def sparse() -> Extents:
    """200 MiB in pieces of 1 MiB, spread over 4 TiB."""
    size = round(4 * TIB * SCALE) // GIB * GIB
    count = 200
    return Extents(size, tuple((size // count * number // CLUSTER * CLUSTER, MIB) for number in range(count)))


def every_nth(part: int, parts: int) -> Extents:
    """One of ``parts`` images that together hold 1 GiB: every so manieth piece of 256 KiB."""
    whole = contiguous()
    piece = 256 * KIB
    return Extents(whole.size, tuple((offset, piece) for offset in range(part * piece, whole.size, parts * piece)))


def run(*argv: str | Path, cwd: Path | None = None, typed: str | None = None) -> None:
    """Run a program that must succeed."""
    subprocess.run(argv, cwd=cwd, input=typed, check=True, stdout=subprocess.DEVNULL, text=True)


def create(image: Path, image_format: str, size: int, below: tuple[Path, str] | None = None) -> None:
    """An empty image, over another of a given format if there is one below."""
    backing = ["-b", below[0].name, "-F", below[1]] if below else []
    run("qemu-img", "create", "-q", "-f", image_format, *backing, image, str(size))


def fill(image: Path, extents: Extents) -> None:
    """Write the extents of a qcow2 image."""
    commands = (f"write -q -P {1 + number % 250} {start} {size}" for number, (start, size) in enumerate(extents.writes))
    run("qemu-io", "-t", "unsafe", "-f", "qcow2", image, typed="\n".join(commands) + "\n")


def copy(source: Path, target: Path) -> None:
    """A copy that costs as little as the file system allows."""
    run("cp", "--sparse=always", "--reflink=auto", source, target)


def warm(images: Iterable[Path]) -> None:
    """Bring files into the page cache, and let the disk come to rest."""
    for image in images:
        run("dd", f"if={image}", "of=/dev/null", "bs=4M", "status=none")
    os.sync()


def remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
