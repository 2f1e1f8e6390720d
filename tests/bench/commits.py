"""How long a commit takes: until the job is over, and until base is on disk."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench import images
from tests.bench.images import Extents
from tests.bench.runner import Row, Times, Topic, alternate
from tests.daemons import Client, Program

_LONG = 600.0  # seconds; the peer needs half a minute for the sparse disk, more on a busy machine


@dataclass(frozen=True)
class Chain:
    """base <- overlays <- active layer. The overlays are committed into base; they are only ever read."""

    directory: Path
    base_format: str
    overlays: tuple[Extents, ...]

    @property
    def base(self) -> Path:
        return self.directory / f"base.{self.base_format}"

    @property
    def active(self) -> Path:
        return self.directory / "active.qcow2"

    def overlay(self, number: int) -> Path:
        return self.directory / f"overlay{number}.qcow2"

    def make(self) -> None:
        """All images, and pristine copies of those that a commit changes."""
        self.directory.mkdir()
        size = max(extents.size for extents in self.overlays)
        images.create(self.base, self.base_format, size)
        below = (self.base, self.base_format)
        for number, extents in enumerate(self.overlays):
            images.create(self.overlay(number), "qcow2", size, below)
            images.fill(self.overlay(number), extents)
            below = (self.overlay(number), "qcow2")
        images.create(self.active, "qcow2", size, below)
        for image in (self.base, self.active):
            images.copy(image, image.with_suffix(".pristine"))

    def refresh(self) -> None:
        """As before the last run, with all that will be read in the page cache."""
        for image in (self.base, self.active):
            image.unlink()
            images.copy(image.with_suffix(".pristine"), image)
        images.warm(self.overlay(number) for number in range(len(self.overlays)))

    def open(self, client: Client) -> None:
        """Add the nodes: "base", "overlay0"... and "active"."""
        nodes = [(self.base, self.base_format)]
        nodes += [(self.overlay(number), "qcow2") for number in range(len(self.overlays))]
        nodes += [(self.active, "qcow2")]
        below: str | None = None
        for path, image_format in nodes:
            options = {"driver": image_format, "node-name": path.stem, "read-only": path != self.active}
            options["file"] = {"driver": "file", "filename": str(path)}
            if image_format == "qcow2":
                options["backing"] = below
            client.execute_with("blockdev-add", options)
            below = path.stem

    def commit(self, program: Program) -> Times:
        """Seconds of one commit: "job" from the command to BLOCK_JOB_COMPLETED, "durable" until base is on disk."""
        self.refresh()
        with program.start(self.directory) as daemon, daemon.client(_LONG) as client:
            self.open(client)
            base = os.open(self.base, os.O_RDONLY)
            top = f"overlay{len(self.overlays) - 1}"
            started = time.perf_counter()
            client.execute("block-commit", job_id="j", device="active", top_node=top, base_node="base")
            ended = client.wait_event(lambda event: event["event"] == "BLOCK_JOB_COMPLETED", _LONG)
            job = time.perf_counter() - started
            os.fsync(base)
            durable = time.perf_counter() - started
            os.close(base)
        assert "error" not in ended["data"], ended
        return {"job": job, "durable": durable}


def compare(chain: Chain, what: str, goal: float) -> Iterator[Row]:
    """Both programs commit the chain; a row for the job, a row for the disk."""
    chain.make()
    rows = {"job": Row(what, goal), "durable": Row(f"{what}, durable", goal)}
    try:
        alternate(rows, chain.commit)
    finally:
        images.remove(chain.directory)
    yield from rows.values()


def contiguous(directory: Path) -> Iterator[Row]:
    for base_format in ("raw", "qcow2"):
        chain = Chain(directory / "contiguous", base_format, (images.contiguous(),))
        yield from compare(chain, f"commit of {_size(chain)} in one piece onto {base_format}", 1.7)


def scattered(directory: Path) -> Iterator[Row]:
    for base_format in ("raw", "qcow2"):
        chain = Chain(directory / "scattered", base_format, (images.scattered(),))
        yield from compare(chain, f"commit of {_size(chain)} in scattered 64 KiB clusters onto {base_format}", 1.6)


def sparse(directory: Path) -> Iterator[Row]:
    chain = Chain(directory / "sparse", "qcow2", (images.sparse(),))
    yield from compare(chain, f"commit of {_size(chain)} spread over {chain.overlays[0].size / images.TIB:g} TiB", 100)


def deep(directory: Path) -> Iterator[Row]:
    chain = Chain(directory / "deep", "qcow2", tuple(images.every_nth(part, 24) for part in range(24)))
    yield from compare(chain, f"commit of 24 overlays, {_size(chain)} in all", 1.5)


def kernel_copy(directory: Path) -> Iterator[Row]:
    """The bytes of the contiguous commit, moved and made durable by the kernel alone: what there is to reach."""
    chain = Chain(directory / "copy", "raw", (images.contiguous(),))
    chain.make()
    row = Row(f"commit of {_size(chain)}, durable, against copy_file_range + fsync", 0.8, other="kernel copy")
    bare = directory / "bare"
    try:
        alternate({"durable": row, "copy": Row("", 0)}, chain.commit)
        row.theirs = [_copy_once(chain, bare) for _ in row.ours]
    finally:
        images.remove(chain.directory)
        bare.unlink(missing_ok=True)
    yield row


def _copy_once(chain: Chain, target: Path) -> float:
    images.warm([chain.overlay(0)])
    source = os.open(chain.overlay(0), os.O_RDONLY)
    copy = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    left = chain.overlays[0].data
    started = time.perf_counter()
    while left:
        left -= os.copy_file_range(source, copy, left)
    os.fsync(copy)
    seconds = time.perf_counter() - started
    os.close(source)
    os.close(copy)
    target.unlink()
    return seconds


def _size(chain: Chain) -> str:
    data = sum(extents.data for extents in chain.overlays)
    return f"{data / images.GIB:g} GiB" if data >= images.GIB else f"{data / images.MIB:.0f} MiB"


TOPICS = [
    Topic("contiguous", contiguous),
    Topic("scattered", scattered),
    Topic("sparse", sparse),
    Topic("deep", deep),
    Topic("kernel-copy", kernel_copy),
]
