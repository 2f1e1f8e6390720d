"""A commit where the file system can share blocks: XFS in a file, mounted for the occasion. Needs root."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench import images
from tests.bench.commits import Chain, compare
from tests.bench.runner import Row, Topic

_DISK = 6 * images.GIB  # the least that mkfs.xfs takes is 300 MiB


def reflink(directory: Path) -> Iterator[Row]:
    if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        print("reflink: needs root and mkfs.xfs; left out", file=sys.stderr)
        return
    with xfs(directory) as mounted:
        chain = Chain(mounted / "reflink", "raw", (images.contiguous(),))
        yield from compare(chain, f"commit of {chain.overlays[0].data / images.MIB:.0f} MiB on XFS, by reflink", 20)


@contextmanager
def xfs(directory: Path) -> Iterator[Path]:
    """A fresh XFS with reflinks."""
    disk, mounted = directory / "xfs.img", directory / "xfs"
    mounted.mkdir()
    with disk.open("wb") as file:
        file.truncate(_DISK)
    images.run("mkfs.xfs", "-q", "-m", "reflink=1", disk)
    images.run("mount", "-o", "loop", disk, mounted)
    try:
        yield mounted
    finally:
        images.run("umount", mounted)
        mounted.rmdir()
        disk.unlink()


TOPICS = [Topic("reflink", reflink)]
