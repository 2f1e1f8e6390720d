"""Emptying an image: the same file as the peer leaves, and at no moment of a crash another content."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd.block.drivers.qcow2 import CreateOptions, Qcow2, create
from qmpd.errors import QmpdError
from tests.block.qcow2.support import MemoryFile, check_clean, new_image, opened, read, run
from tests.block.qcow2.test_crash import Doomed, PowerCutError
from tests.tools import need

#: Creation options, commands of qemu-img and qemu-io after the usual writes, and whether the file must shrink to its
#: metadata.
IMAGES: dict[str, tuple[str, list[str], bool]] = {
    "plain": ("", [], True),
    "small clusters": ("cluster_size=4096", [], True),
    "extended L2": ("cluster_size=16384,extended_l2=on", [], True),
    "wide counts": ("refcount_bits=64,cluster_size=2M", [], True),
    "narrow counts": ("refcount_bits=1,cluster_size=4096", [], True),
    "compressed": ("", ["io:write -c -P 0x44 1M 64k"], True),
    "zeros": ("", ["io:write -z 1M 128k", "io:discard 2M 128k"], True),
    "version 2": ("compat=0.10", [], False),
    "snapshot": ("", ["snapshot -c s0 {}", "io:write -P 0x55 64k 64k"], False),
    "bitmap": ("", ["bitmap --add {} b0"], False),
    "tiny clusters": ("cluster_size=512,refcount_bits=64", [], True),
    "a large L1 table": ("cluster_size=512,refcount_bits=64", ["resize -q -f qcow2 {} 256M"], False),
}


def build(directory: Path, options: str, commands: list[str]) -> Path:
    """An overlay of 4 MiB over a base that is all 0x11."""
    base, path = directory / "base.qcow2", directory / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "4M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x11 0 4M", base)
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2"]
    run(*create, *(["-o", options] if options else []), path)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x22 0 300k", "-c", "write -P 0x33 3M 100k", path)
    for command in commands:
        if command.startswith("io:"):
            run("qemu-io", "-f", "qcow2", "-c", command.removeprefix("io:"), path)
        else:
            run("qemu-img", *(word.format(path) for word in command.split()))
    return path


@pytest.mark.parametrize("kind", IMAGES)
def test_an_emptied_image_is_what_the_peer_leaves(tmp_path: Path, kind: str) -> None:
    """qemu-img commit of a copy: the file is as long as ours, which reads like its base and can be written.

    One that cannot shrink keeps its length.
    """
    need("qemu-img", "qemu-io")
    options, commands, shrinks = IMAGES[kind]
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    ours, theirs = (build(tmp_path / name, options, commands) for name in ("ours", "theirs"))
    before = ours.stat().st_size

    with opened(ours) as image:
        image.make_empty()
        assert read(image, 0, 4 << 20) == bytes(4 << 20)
    run("qemu-img", "commit", "-q", "-f", "qcow2", theirs)

    if shrinks:
        assert ours.stat().st_size == theirs.stat().st_size < before
    else:
        assert ours.stat().st_size == before <= theirs.stat().st_size
    # Whoever does not know bitmaps leaks theirs.
    check_clean(ours, leaks=kind == "bitmap")
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x11 0 4M", ours)
    extents = json.loads(run("qemu-img", "map", "--output=json", "--max-length=4M", ours))
    assert {extent["depth"] for extent in extents} == {1}
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x66 0 3M", ours)
    check_clean(ours, leaks=kind == "bitmap")


@pytest.mark.parametrize("layout", [{}, {"cluster_size": 512, "refcount_bits": 64}, {"version": "v2"}])
def test_it_goes_on_as_a_fresh_image(layout: dict[str, Any], tmp_path: Path) -> None:
    """Written, emptied, written again, without being opened in between; nothing leaks, and no old byte comes back."""
    need("qemu-img")
    file, image = new_image(size=4 << 20, **layout)
    for fill in (1, 2, 3):
        image.write(100_000, bytes([fill]) * 1_000_000)
        image.make_empty()
        assert read(image, 0, 4 << 20) == bytes(4 << 20)
    image.write(7, b"x")
    image.close()

    (tmp_path / "image.qcow2").write_bytes(file.content)
    check_clean(tmp_path / "image.qcow2")
    found = Qcow2.open({"file": MemoryFile(bytes(file.content))}, {}, read_only=True)
    assert read(found, 0, 4 << 20) == bytes(7) + b"x" + bytes((4 << 20) - 8)


def test_an_image_without_a_byte() -> None:
    """No clusters, no L1 table: nothing to do, nothing breaks."""
    _, image = new_image(size=0)
    image.make_empty()
    assert image.length == 0


def test_a_read_only_image_is_left_alone() -> None:
    """Refused, nothing written."""
    file, image = new_image(size=1 << 20)
    image.close()
    before = bytes(file.content)
    image = Qcow2.open({"file": file}, {}, read_only=True)
    with pytest.raises(QmpdError, match="read-only"):
        image.make_empty()
    assert file.content == before


LAYOUTS: list[dict[str, Any]] = [
    {"cluster_size": 512, "refcount_bits": 8},
    {"cluster_size": 4096},
    {"cluster_size": 512, "version": "v2"},
    {"cluster_size": 16384, "extended_l2": True},
]


def full_image(layout: dict[str, Any], seed: int) -> tuple[Doomed, Qcow2, MemoryFile]:
    """An image, some of whose clusters hold the same bytes as the backing file."""
    random = Random(seed)
    unit = layout["cluster_size"]
    below = MemoryFile(random.randbytes(200 * unit))
    file = Doomed(journal=True)
    create(file, CreateOptions(below.length, **layout))
    image = Qcow2.open({"file": file, "backing": below}, {}, read_only=False)
    for _ in range(12):
        offset, count = random.randrange(190 * unit), random.randrange(1, 10 * unit)
        image.write(offset, below.content[offset : offset + count])
    image.flush()
    file.moments, file.end, file.fullest = 0, 1 << 60, []
    return file, image, below


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda d: "-".join(str(v) for v in d.values()))
@given(seed=st.integers(0, 1 << 30), moment=st.floats(0, 1))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_power_cut_never_shows(tmp_path: Path, layout: dict[str, Any], seed: int, moment: float) -> None:
    """Any subset of the unflushed writes may survive: all that the backing file does not have is gone or as before,
    and the next writer finds an image that it can put in order."""
    need("qemu-img")
    file, image, below = full_image(layout, seed)
    image.make_empty()
    random = Random(seed)
    end = random.choice(file.fullest) if random.random() < 0.8 else int(moment * (file.moments - 1))
    file, image, below = full_image(layout, seed)
    file.end = end
    with pytest.raises(PowerCutError):
        image.make_empty()
    odds = random.choice((0.0, 0.3, 0.5, 0.7, 1.0))
    for _ in range(4):
        after = MemoryFile(file.after_crash(iter(lambda: random.random() < odds, None)))
        looking = Qcow2.open({"file": after, "backing": below}, {}, read_only=True)
        assert read(looking, 0, below.length) == below.content
        writer = Qcow2.open({"file": after, "backing": below}, {}, read_only=False)
        assert read(writer, 0, below.length) == below.content
        writer.write(0, b"still writable")
        writer.close()
        (tmp_path / "image.qcow2").write_bytes(after.content)
        check_clean(tmp_path / "image.qcow2", leaks=True)


def test_a_failure_in_the_middle_of_a_reset() -> None:
    """The image is empty for readers and takes no more writes; it can be closed, and opened again."""

    class Failing(MemoryFile):
        armed = False

        def write(self, offset: int, data: Any) -> None:
            if self.armed and offset == 40:
                raise QmpdError("Input/output error")
            super().write(offset, data)

    below = MemoryFile(b"\x11" * (1 << 20))
    file = Failing()
    create(file, CreateOptions(1 << 20))
    image = Qcow2.open({"file": file, "backing": below}, {}, read_only=False)
    image.write(0, below.content[: 300 << 10])
    file.armed = True
    with pytest.raises(QmpdError, match="Input/output error"):
        image.make_empty()

    assert read(image, 0, 1 << 20) == below.content
    with pytest.raises(QmpdError, match="takes no more writes"):
        image.write(0, b"x")
    image.close()
    file.armed = False
    again = Qcow2.open({"file": file, "backing": below}, {}, read_only=False)
    assert read(again, 0, 1 << 20) == below.content
    again.write(0, b"x")
    again.close()
