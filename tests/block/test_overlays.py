"""The index of overlays on disk: what headers say, whatever is in them, and what a second look costs."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.block import overlays
from qmpd.block.overlays import Overlays, View, identity_of
from tests.jobs.rig import shell


@pytest.fixture
def base(tmp_path: Path) -> Path:
    shell("qemu-img create -q -f qcow2 base.qcow2 1M", cwd=tmp_path)
    return tmp_path / "base.qcow2"


def header(name: bytes, *, version: int = 3, offset: int = 200, length: int | None = None) -> bytes:
    """The part of a qcow2 header that matters here."""
    start = struct.pack(">4sIQI", b"QFI\xfb", version, offset, len(name) if length is None else length)
    return start.ljust(offset, b"\0") + name


def found(view: View, path: Path) -> list[str]:
    return sorted(Path(one.path).name for one in view.overlays_of(identity_of(path.stat())))


@pytest.mark.parametrize(
    "name",
    [
        "base.qcow2",
        "./base.qcow2",
        "{dir}/base.qcow2",
        "link.qcow2",
        "hard.qcow2",
        "../{name}/base.qcow2",
        "file:base.qcow2",
        "file:{dir}/base.qcow2",
        'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"base.qcow2"}}}}',
        'json:{{"driver":"qcow2","file.filename":"{dir}/base.qcow2"}}',
    ],
)
def test_however_a_header_names_it(base: Path, name: str) -> None:
    """Files are told apart by inode; a name may be anything that QEMU would open."""
    place = base.parent
    (place / "link.qcow2").symlink_to("base.qcow2")
    os.link(base, place / "hard.qcow2")
    (place / "over.qcow2").write_bytes(header(name.format(dir=place, name=place.name).encode()))

    assert found(Overlays().look([str(place)]), base) == ["over.qcow2"]


def test_a_link_to_an_overlay_counts_from_where_it_leads(base: Path, tmp_path: Path) -> None:
    """A directory that holds nothing but links to images is as good as theirs."""
    (base.parent / "over.qcow2").write_bytes(header(b"base.qcow2"))
    links = tmp_path / "links"
    links.mkdir()
    (links / "linked.qcow2").symlink_to(base.parent / "over.qcow2")

    assert found(Overlays().look([str(links)]), base) == ["linked.qcow2"]


def test_image_directories_are_searched_to_the_bottom_those_of_the_chain_are_not(base: Path) -> None:
    """Links to directories are not followed."""
    deep = base.parent / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "over.qcow2").write_bytes(header(str(base).encode()))
    (base.parent / "loop").symlink_to(base.parent)
    where = str(base.parent)

    assert found(Overlays().look([where]), base) == []
    assert found(Overlays([where]).look(), base) == ["over.qcow2"]
    assert found(Overlays([where]).look([str(deep)]), base) == ["over.qcow2"]


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(lambda rest: b"QFI\xfb\0\0\0\3" + rest)))
def test_no_garbage_harms(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Whatever is in a file, looking at it raises nothing."""
    place = tmp_path_factory.mktemp("garbage")
    (place / "x").write_bytes(content)
    Overlays().look([str(place)])


@pytest.mark.parametrize(
    "content",
    [
        header(b"base.qcow2", version=4),
        header(b"base.qcow2", length=2000),
        header(b"base.qcow2", length=0),
        struct.pack(">4sIQI", b"QFI\xfb", 3, 1 << 62, 10),
        struct.pack(">4sIQI", b"QFI\xfb", 3, 1 << 20, 10),
        header(b"\0\0\0"),
        header(b"json:" + b"[" * 900),
        header(b"json:{" + b'"file":{' * 100),
        header(b"\xff\xfe\n"),
        b"QFI\xfb",
        b"",
    ],
    ids=range(11),
)
def test_headers_that_make_no_sense_name_nothing(base: Path, content: bytes) -> None:
    """They are no overlays, and those beside them are found."""
    (base.parent / "bad").write_bytes(content)
    (base.parent / "over.qcow2").write_bytes(header(b"base.qcow2"))

    assert found(Overlays().look([str(base.parent)]), base) == ["over.qcow2"]


def test_what_is_no_regular_file_is_not_opened(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipes would wait, devices may do things."""
    os.mkfifo(base.parent / "pipe")
    (base.parent / "device").symlink_to("/dev/null")
    (base.parent / "nowhere").symlink_to("gone")
    opened = watch_opens(monkeypatch)

    Overlays().look([str(base.parent)])

    assert opened == [str(base.parent), "base.qcow2"]


def test_a_second_look_opens_only_what_has_changed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a header was rewritten in place, by which no directory changes."""
    for number in range(20):
        (base.parent / f"o{number}.qcow2").write_bytes(header(b"base.qcow2"))
    (base.parent / "sib.qcow2").write_bytes(header(b"elsewhere.qcow2"))
    index, place = Overlays(), [str(base.parent)]
    later = time.time_ns() + 10**9
    monkeypatch.setattr(overlays.time, "time_ns", lambda: later)
    assert len(found(index.look(place), base)) == 20
    opened = watch_opens(monkeypatch)

    assert len(found(index.look(place), base)) == 20
    assert opened == place

    with (base.parent / "sib.qcow2").open("r+b") as file:
        file.write(header(b"base.qcow2", length=10))
    (base.parent / "o3.qcow2").unlink()
    assert "sib.qcow2" in (now := found(index.look(place), base))
    assert "o3.qcow2" not in now
    assert opened == [*place, *place, "sib.qcow2"]


def test_a_file_changed_a_moment_ago_is_read_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second change within one tick of the clock leaves the same times behind."""
    over = base.parent / "over.qcow2"
    over.write_bytes(header(b"elsewhere!"))
    now = over.stat()
    monkeypatch.setattr(overlays.time, "time_ns", lambda: now.st_ctime_ns + 1)
    index, place = Overlays(), [str(base.parent)]
    assert found(index.look(place), base) == []
    opened = watch_opens(monkeypatch)

    index.look(place)

    assert "over.qcow2" in opened


def watch_opens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is opened from now on."""
    opened: list[str] = []
    plain = os.open

    def watched(path: str, *args: int, **more: int) -> int:
        opened.append(str(path))
        return plain(path, *args, **more)

    monkeypatch.setattr(overlays.os, "open", watched)
    return opened
