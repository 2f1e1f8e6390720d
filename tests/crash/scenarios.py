"""The commits that are interrupted: small images, each with a structure that makes some part of the order matter."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qmpd.block.api import BackingReference
from tests.block.qcow2.support import opened
from tests.crash.contents import Images, snapshots, view

SECTOR: Final = 512


@dataclass(frozen=True)
class Scenario:
    """Images base <- mid <- top, of which mid is committed into base.

    ``base``, ``mid``: options of qemu-img create. ``size``: of base, mid, top. ``in_base`` and so on: requests of
    qemu-io. ``bottom``: base has a backing image too. ``side``: the size of a second overlay of mid. ``snapshots``:
    so many in base. ``reflink``: the file system can share blocks. ``dirty``: base was left unclean. ``no_format``:
    no header names its backing image's format. ``active``: top is committed as well. ``offline``: mid is emptied
    afterwards, by a daemon that has only these two.
    """

    name: str
    size: tuple[str, str, str] = ("1M", "1M", "1M")
    base: str = ""
    mid: str = ""
    raw_base: bool = False
    bottom: bool = False
    side: str = ""
    in_base: tuple[str, ...] = ()
    in_mid: tuple[str, ...] = ()
    in_top: tuple[str, ...] = ("write -P 0x70 128k 64k",)
    snapshots: int = 0
    reflink: bool = False
    dirty: bool = False
    active: bool = False
    offline: bool = False
    no_format: bool = False

    @property
    def files(self) -> list[str]:
        """From the bottom up, data files first."""
        return [*re.findall("data_file=([^,]+)", f"{self.base},{self.mid}"), *self.images]

    @property
    def images(self) -> list[str]:
        """From the bottom up."""
        found = ["bottom.qcow2"] if self.bottom else []
        return [*found, self.base_file, "mid.qcow2", *self.overlays]

    @property
    def base_file(self) -> str:
        return "base.raw" if self.raw_base else "base.qcow2"

    @property
    def overlays(self) -> list[str]:
        return ["top.qcow2", "side.qcow2"] if self.side else ["top.qcow2"]

    @property
    def users(self) -> list[str]:
        """The images that are on base in the end."""
        return [] if self.active or self.offline else self.overlays

    def __str__(self) -> str:
        return self.name


def many(verb: str, start: int, step: int, length: int, count: int) -> tuple[str, ...]:
    """Requests in a row; bytes."""
    return tuple(f"{verb} {start + i * step} {length}" for i in range(count))


SCENARIOS: Final = (
    Scenario(
        "in place and new",
        in_base=("write -P 0x10 0 512k",),
        in_mid=("write -P 0x20 64k 64k", "write -P 0x21 448k 256k", "write -P 0x22 900k 3k"),
    ),
    Scenario(
        "copy on write",
        base="cluster_size=4k",
        mid="cluster_size=512",
        bottom=True,
        in_base=(*many("write -P 0x10", 2048, 40960, 7000, 8), "write -z 600k 64k"),
        in_mid=many("write -P 0x20", 1024, 13 << 10, 1536, 40),
    ),
    Scenario(
        "refcount table grows",
        size=("2M", "2M", "2M"),
        base="cluster_size=512,refcount_bits=64",
        mid="cluster_size=4k",
        in_base=("write -P 0x10 0 1800k",),
        in_mid=("write -P 0x20 1700k 200k", "write -P 0x21 2000k 48k"),
    ),
    Scenario(
        "base grows",
        size=("96k", "1536k", "1536k"),
        base="cluster_size=512",
        mid="cluster_size=4k",
        in_base=("write -P 0x10 1000 60k", "write -P 0x11 95k 1k"),
        in_mid=("write -P 0x20 94k 40k", *many("write -P 0x21", 200 << 10, 100 << 10, 5 << 10, 12)),
    ),
    Scenario(
        "snapshots",
        base="cluster_size=4k",
        mid="cluster_size=2k",
        in_base=("write -P 0x10 0 300k", "write -P 0x11 800k 16k"),
        in_mid=("write -P 0x20 10k 90k", "write -z 120k 40k", "write -P 0x21 805k 3k", "write -P 0x22 600k 50k"),
        snapshots=2,
    ),
    Scenario(
        "raw base grows",
        size=("700k", "1M", "1M"),
        raw_base=True,
        in_base=("write -P 0x10 0 700k",),
        in_mid=("write -P 0x20 100k 100k", "write -P 0x21 690k 100k", "write -z 320k 128k"),
        side="1M",
    ),
    Scenario(
        "two overlays",
        size=("1M", "768k", "768k"),
        base="cluster_size=4k",
        side="1M",
        in_base=("write -P 0x10 0 1M",),
        in_mid=("write -P 0x20 0 64k", "write -P 0x21 700k 30k"),
        in_top=("write -P 0x70 60k 10k",),
    ),
    Scenario(
        "zeros and compressed",
        base="cluster_size=4k",
        mid="cluster_size=4k",
        in_base=(*many("write -c -P 0x10", 0, 4096, 4096, 30), "write -P 0x11 400k 200k"),
        in_mid=(
            *many("write -c -P 0x20", 16 << 10, 12 << 10, 4 << 10, 8),
            "write -z -u 410k 60k",
            "write -z 500k 33k",
            "write -P 0x21 58k 10k",
            "write -P 0x22 700k 10k",
        ),
    ),
    Scenario(
        "subclusters",
        base="cluster_size=16k,extended_l2=on",
        mid="cluster_size=16k,extended_l2=on",
        bottom=True,
        in_base=("write -P 0x10 0 100k", *many("write -P 0x11", 200 << 10, 48 << 10, 2048, 6)),
        in_mid=(*many("write -P 0x20", 1024, 40 << 10, 3072, 20), "write -z 90k 20k"),
    ),
    Scenario(
        "version 2",
        size=("512k", "1M", "1M"),
        base="compat=0.10,cluster_size=4k",
        mid="compat=0.10,cluster_size=4k",
        in_base=("write -P 0x10 0 256k",),
        in_mid=("write -P 0x20 200k 200k", "write -P 0x21 510k 80k"),
    ),
    Scenario(
        "unclean base",
        base="cluster_size=4k,lazy_refcounts=on",
        in_base=("write -P 0x10 0 256k",),
        in_mid=("write -P 0x20 128k 256k",),
        dirty=True,
    ),
    Scenario(
        "no format in the headers",
        in_base=("write -P 0x10 0 256k",),
        in_mid=("write -P 0x20 128k 256k",),
        side="1M",
        no_format=True,
    ),
    Scenario(
        "shared blocks",
        in_base=("write -P 0x10 0 512k",),
        in_mid=("write -P 0x20 64k 64k", "write -P 0x21 448k 256k"),
        reflink=True,
    ),
    Scenario(
        "data file",
        size=("512k", "1M", "1M"),
        base="cluster_size=4k,data_file=data.raw",
        in_base=("write -P 0x10 0 256k", "write -z 300k 40k"),
        in_mid=("write -P 0x20 100k 190k", "write -z 20k 30k", "write -P 0x21 510k 80k", "write -P 0x22 3k 2k"),
    ),
    Scenario(
        "raw data file",
        base="cluster_size=4k,data_file=data.raw,data_file_raw=on",
        in_base=("write -P 0x10 0 256k",),
        in_mid=("write -P 0x20 100k 190k", "write -z 20k 30k", "write -P 0x21 510k 80k"),
    ),
    Scenario(
        "offline, emptied with its data file",
        mid="cluster_size=4k,data_file=data.raw",
        in_base=("write -P 0x10 0 256k",),
        in_mid=("write -P 0x20 100k 300k", "write -z 600k 40k", "write -P 0x21 900k 3k"),
        offline=True,
    ),
    Scenario(
        "active layer",
        size=("512k", "1M", "1M"),
        base="cluster_size=4k",
        in_base=("write -P 0x10 0 256k",),
        in_mid=("write -P 0x20 100k 300k", "write -P 0x21 510k 80k"),
        in_top=("write -P 0x70 130k 60k", "write -z 200k 40k", "write -P 0x71 700k 100k"),
        active=True,
    ),
    Scenario(
        "offline, emptied in one go",
        mid="cluster_size=4k",
        in_base=("write -P 0x10 0 256k",),
        in_mid=("write -P 0x20 100k 300k", "write -z 600k 40k", "write -P 0x21 900k 3k"),
        offline=True,
    ),
    Scenario(
        "offline, emptied cluster by cluster",
        mid="compat=0.10,cluster_size=4k",
        in_base=("write -P 0x10 0 256k",),
        in_mid=("write -P 0x20 100k 300k", "write -P 0x21 900k 3k"),
        offline=True,
    ),
)


@dataclass(frozen=True)
class Prepared:
    """A scenario's images, and what every reader must find in them whatever happens."""

    scenario: Scenario
    images: Images
    #: Guest's view by overlay; snapshot views of base by name.
    views: dict[str, bytes]
    snapshots: dict[str, bytes]
    #: What base shows after a complete commit.
    committed: bytes


def prepare(scenario: Scenario, directory: Path) -> Prepared:
    """Make the images there with QEMU's tools, and read them with them too."""
    made = _Builder(scenario, directory)
    made.build()
    images = {name: (directory / name).read_bytes() for name in scenario.files}
    views = {name: _flat(directory, name) for name in scenario.overlays}
    for name, found in views.items():
        assert view(images, name) == found, "the two programs read the images differently"
    kept = {}
    for name in snapshots(images[scenario.base_file]) if scenario.snapshots else ():
        kept[name] = _flat(directory, scenario.base_file, "-l", f"snapshot.name={name}")
    return Prepared(scenario, images, views, kept, _flat(directory, "top.qcow2" if scenario.active else "mid.qcow2"))


def _flat(directory: Path, name: str, *options: str) -> bytes:
    run(directory, "qemu-img", "convert", "-O", "raw", *options, name, "flat.bin")
    content = (directory / "flat.bin").read_bytes()
    (directory / "flat.bin").unlink()
    return content


class _Builder:
    def __init__(self, scenario: Scenario, directory: Path) -> None:
        self._is, self._directory = scenario, directory

    def build(self) -> None:
        s = self._is
        if s.bottom:
            self._create("bottom.qcow2", s.size[0])
            self._fill("bottom.qcow2", ("write -P 0x01 0 1M",))
        self._create(s.base_file, s.size[0], s.base, below="bottom.qcow2" if s.bottom else "")
        self._fill(s.base_file, s.in_base)
        for i in range(s.snapshots):
            run(self._directory, "qemu-img", "snapshot", "-c", f"s{i}", s.base_file)
            self._fill(s.base_file, (f"write -P {0x18 + i} {40 * i}k 20k",))
        self._create("mid.qcow2", s.size[1], s.mid, below=s.base_file)
        self._fill("mid.qcow2", s.in_mid)
        self._create("top.qcow2", s.size[2], below="mid.qcow2")
        self._fill("top.qcow2", s.in_top)
        if s.side:
            self._create("side.qcow2", s.side, below="mid.qcow2")
            self._fill("side.qcow2", ("write -P 0x60 0 1k",))
        if s.dirty:
            soil(self._directory / s.base_file)
        if s.no_format:
            for name in ("mid.qcow2", *s.overlays):
                drop_format(self._directory / name)

    def _create(self, name: str, size: str, options: str = "", below: str = "") -> None:
        kind = "raw" if name.endswith("raw") else "qcow2"
        arguments: list[str] = ["-o", options] if options else []
        if below:
            arguments += ["-b", below, "-F", "raw" if below.endswith("raw") else "qcow2"]
        run(self._directory, "qemu-img", "create", "-q", "-f", kind, *arguments, name, size)

    def _fill(self, name: str, requests: tuple[str, ...]) -> None:
        kind = "raw" if name.endswith("raw") else "qcow2"
        commands = [part for request in requests for part in ("-c", request)]
        if commands:
            said = run(self._directory, "qemu-io", "-f", kind, *commands, name)
            assert "failed" not in said, said


def soil(path: Path) -> None:
    """Leave the image as after a crash with lazy refcounts: dirty bit set, all counts of data clusters lost."""
    raw = bytearray(path.read_bytes())
    size = 1 << int.from_bytes(raw[20:24], "big")
    table = int.from_bytes(raw[48:56], "big")
    block = int.from_bytes(raw[table : table + 8], "big")
    raw[block + 16 : block + size] = bytes(size - 16)
    raw[79] |= 1
    path.write_bytes(raw)


def drop_format(path: Path) -> None:
    """Remove the backing format from the header, as old programs left it out."""
    with opened(path) as image:
        reference = image.backing_reference
        assert reference is not None
        image.change_backing_reference(BackingReference(reference.filename, None))


def run(directory: Path, *command: Any) -> str:
    """Output of a program that must succeed."""
    done = subprocess.run([str(part) for part in command], cwd=directory, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def copy_images(source: Path, target: Path, names: list[str]) -> None:
    target.mkdir(exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
