"""Random backing chains: as values that hypothesis can shrink, and as images that qemu-img and qemu-io make of them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

SECTOR = 512
MIB = 1 << 20
LARGEST = 6 * MIB  # bytes of guest address space; a good many clusters of any size but the largest

CLUSTER_SIZES = [SECTOR << shift for shift in range(13)]  # 512 bytes to 2 MiB, all that the format has
EXTENDED_L2_FROM = 16384  # bytes; a subcluster is a 32nd of a cluster and at least a sector


@dataclass(frozen=True)
class Change:
    """One request that fills an image. Offset and length in bytes, within the image."""

    verb: str  # a qemu-io command without its range
    offset: int
    length: int

    @property
    def compressed(self) -> bool:
        return self.verb.endswith(" -c")

    def overlaps(self, other: Change) -> bool:
        return self.offset < other.offset + other.length and other.offset < self.offset + self.length

    def __str__(self) -> str:
        return f"{self.verb} {self.offset} {self.length}"


@dataclass(frozen=True)
class Layer:
    """One image of a chain. ``size`` in bytes; no qcow2 option is set for a raw one.

    ``data``: whether it has a data file, ``off``, ``on`` or ``raw``.
    """

    size: int
    changes: tuple[Change, ...]
    format: str = "qcow2"
    cluster_size: int = 65536
    version: str = "1.1"
    refcount_bits: int = 16
    extended_l2: bool = False
    data: str = "off"

    @property
    def options(self) -> str:
        if self.format == "raw":
            return ""
        options = f"cluster_size={self.cluster_size},compat={self.version}"
        if self.version == "1.1":
            extended = "on" if self.extended_l2 else "off"
            options += f",refcount_bits={self.refcount_bits},extended_l2={extended}"
        return options


@dataclass(frozen=True)
class Chain:
    """Layers from the bottom up, and which of them are committed into which: ``layers[base]`` to ``layers[top]``."""

    layers: tuple[Layer, ...]
    base: int
    top: int
    named_nodes: bool  # blockdev-add of each node with a name, or of the uppermost with an implicit chain below
    full_names: bool  # whether the headers name their backing images with directory


def changes(size: int, cluster_size: int, *, compressible: bool) -> st.SearchStrategy[tuple[Change, ...]]:
    """A few writes, zeroes and discards; those that must be are aligned to clusters."""
    sectors = size // SECTOR
    patterns = st.integers(1, 255).map(lambda pattern: f"write -P {pattern}")
    verbs = st.one_of(patterns, st.sampled_from(["write -z", "write -z -u", "discard"]))

    @st.composite
    def anywhere(draw: st.DrawFn) -> Change:
        start = draw(st.integers(0, sectors - 1))
        longest = min(sectors - start, MIB // SECTOR)
        return Change(draw(verbs), start * SECTOR, draw(st.integers(1, longest)) * SECTOR)

    @st.composite
    def whole_clusters(draw: st.DrawFn) -> Change:
        start = draw(st.integers(0, (size - 1) // cluster_size)) * cluster_size
        count = draw(st.integers(1, 4))
        length = min(count * cluster_size, size - start)
        compressed = compressible and draw(st.booleans())
        return Change(f"{draw(patterns)} -c" if compressed else draw(verbs), start, length)

    return st.lists(st.one_of(anywhere(), whole_clusters()), max_size=8).map(in_possible_order)


def in_possible_order(wanted: list[Change]) -> tuple[Change, ...]:
    """Compressed writes first, and only where nothing is yet: qcow2 does not compress over an allocated cluster."""
    compressed: list[Change] = []
    for change in wanted:
        if change.compressed and not any(change.overlaps(other) for other in compressed):
            compressed.append(change)
    return (*compressed, *(change for change in wanted if not change.compressed))


@st.composite
def layers(draw: st.DrawFn, sizes: st.SearchStrategy[int], *, may_be_raw: bool) -> Layer:
    """Any image qemu-img can make."""
    size = draw(sizes)
    if may_be_raw and draw(st.booleans()):
        return Layer(size, draw(changes(size, 65536, compressible=False)), format="raw")
    cluster_size = draw(st.sampled_from(CLUSTER_SIZES))
    modern = draw(st.booleans())
    data = draw(st.sampled_from(["off", "off", "on", "raw" if may_be_raw else "on"])) if modern else "off"
    return Layer(
        size,
        draw(changes(size, cluster_size, compressible=data == "off")),
        cluster_size=cluster_size,
        version="1.1" if modern else "0.10",
        refcount_bits=draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64])) if modern else 16,
        extended_l2=modern and cluster_size >= EXTENDED_L2_FROM and draw(st.booleans()),
        data=data,
    )


@st.composite
def chains(draw: st.DrawFn, *, one_size: bool = False, full_names: bool | None = None) -> Chain:
    """A base under two to five overlays, and a stretch of it to commit, below the active layer.

    Mostly the layers have one size, which need not be a multiple of any cluster, and now and then one has its own.
    """
    any_size = st.integers(1, LARGEST // SECTOR).map(lambda sectors: sectors * SECTOR)
    usual = st.just(draw(any_size))
    sizes = usual if one_size else st.one_of(usual, usual, any_size)
    bottom = draw(layers(sizes, may_be_raw=True))
    overlays = draw(st.lists(layers(sizes, may_be_raw=False), min_size=2, max_size=5))
    top = draw(st.integers(1, len(overlays) - 1))
    base = draw(st.integers(0, top - 1))
    names = st.booleans() if full_names is None else st.just(full_names)
    return Chain((bottom, *overlays), base, top, draw(st.booleans()), draw(names))


def data_file(image: Path) -> Path:
    """Where an image's data file is, if it has one."""
    return image.with_suffix(".data")


def make(chain: Chain, directory: Path) -> list[Path]:
    """The images of a chain, from the bottom up. One qemu-io run an image, from the bottom up."""
    paths: list[Path] = []
    for number, layer in enumerate(chain.layers):
        path = directory / f"{number}.{layer.format}"
        backing: list[str] = []
        if paths:
            below = paths[-1] if chain.full_names else paths[-1].name
            backing = ["-b", str(below), "-F", chain.layers[number - 1].format]
        options = ["-o", layer.options] if layer.options else []
        if layer.data != "off":
            options[1] += f",data_file={data_file(path)},data_file_raw={'on' if layer.data == 'raw' else 'off'}"
        run("qemu-img", "create", "-q", "-f", layer.format, *options, *backing, str(path), str(layer.size))
        if layer.changes:
            commands = [argument for change in layer.changes for argument in ("-c", str(change))]
            run("qemu-io", "-d", "unmap", "-f", layer.format, *commands, str(path))
        paths.append(path)
    return paths


def run(*argv: str) -> str:
    """Output of a program that must succeed; qemu-io says so only in its output."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def flatten(image: Path, into: Path) -> None:
    """Copy what a guest sees through ``image`` into a raw file."""
    run("qemu-img", "convert", "-O", "raw", str(image), str(into))
