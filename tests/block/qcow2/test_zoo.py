"""Every image of the zoo: the good ones read right, the bad ones are refused in QEMU's words and never written to."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.drivers.qcow2 import Qcow2
from qmpd.block.storage.file import FileStorage
from qmpd.errors import Kind, QmpdError
from tests.block.qcow2.support import check_clean, children, read, run
from tests.fixtures import mkimages
from tests.tools import need

#: Where qmpd refuses what QEMU opens, and why it says so.
REFUSED = {
    "bad-datafile-json": "'data-file' is required for this image",
    "bad-datafile-none": "'data-file' is required for this image",
    "bad-datafile-raw": "data-file-raw requires a data file",
}
#: Where qmpd does not read what QEMU reads as garbage.
UNREADABLE = {
    "bad-l1e-rt": "L2 table offset 0x50000 overlaps with refcount table (L1 index: 0)",
    "bad-l2-overlap-rb": "L2 table offset 0x60000 overlaps with refcount block (L1 index: 0)",
}
#: Reading fails with EIO, but in clearer words than "Input/output error".
OWN_WORDS = {"bad-comp-eof", "bad-comp-garbage"}
#: Not writable, though QEMU tries: what each says after "Image is damaged".
DAMAGED = {
    "odd-l1-0": "L2 table lies behind the end of the file",
    "odd-l1-eof": "L1 table lies behind the end of the file",
    "odd-l1e-eof": "L2 table lies behind the end of the file",
    "odd-l1e-reserved": "L1 entry with reserved bits set",
    "odd-rt-eof": "refcount table lies behind the end of the file",
    "bad-l1e-header": "L1 entry without an L2 table, but with the copied flag",
    "bad-l1e-rt": "refcount table overlaps with active L2 table",
    "bad-l2-overlap-rb": "active L2 table overlaps with refcount block",
    "bad-rte-unaligned": "Refblock offset 0x60200 unaligned (reftable index: 0)",
    "bad-trunc-l1": "L1 table lies behind the end of the file",
    "corrupt-bit": "Image is corrupt; cannot be opened read/write",
}
#: Found out by the write itself, which then marks the image.
UNWRITABLE = {
    "bad-l1e-unaligned": "L2 table offset 0x20200 unaligned",
    "bad-l2e-unaligned": "Cluster allocation offset 0x30200 unaligned",
    "bad-l2e-l1": "Preventing invalid write on metadata .overlaps with active L1 table",
    "odd-l2e-eof": "Cluster offset 0x10000000000 behind the end of the file",
    "odd-l2e-reserved": "L2 entry 0xbf000000000301fe has reserved bits set",
    "bad-l2e-zero-v2": "Zero cluster entry found in pre-v3 image",
    "bad-comp-eof": "Cluster offset 0x10000000000 behind the end of the file",
    "bad-comp-garbage": "Preventing invalid free of metadata .overlaps with active L2 table",
    "bad-extl2-both": "Invalid cluster entry found",
    "bad-extl2-alloc": "Invalid cluster entry found",
    "bad-datafile-map": "External data file host cluster offset 0x50000 does not match guest cluster offset: 0",
    "bad-rc-zero": "Cluster at 0x30000 is in use, but its refcount is 0",
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoo")
    assert mkimages.main([sys.argv[0], str(path)]) == 0
    return path


def entries() -> list[str]:
    return [name for name, *_ in mkimages.zoo()]


def open_image(path: Path, *, read_only: bool = True) -> Qcow2:
    file = FileStorage.open({}, {"filename": str(path), "locking": "off"}, read_only=read_only)
    try:
        data = data_file(path.parent / (Qcow2.named_data_file(file) or ""), read_only=read_only)
        return Qcow2.open(children(file, data), {}, read_only=read_only)
    except QmpdError:
        file.close()
        raise


def data_file(path: Path, *, read_only: bool) -> FileStorage | None:
    """The file that an image names, if it is there."""
    return FileStorage.open({}, {"filename": str(path)}, read_only=read_only) if path.is_file() else None


def open_chain(path: Path) -> Qcow2:
    """With the backing chain, as the graph would attach it; the json: name stands for base.qcow2."""
    image = open_image(path)
    reference = image.backing_reference
    if reference is not None:
        name = "base.qcow2" if reference.filename.startswith("json:") else reference.filename
        image.attach("backing", open_chain(path.parent / name))
    return image


def manifest(zoo: Path, name: str) -> dict[str, Any]:
    images = json.loads((zoo / "manifest.json").read_text())["images"]
    entry: dict[str, Any] = next(entry for entry in images if entry["file"] == f"{name}.qcow2")
    return entry


@pytest.mark.parametrize("name", entries())
def test_opening_answers_like_the_peer(zoo: Path, name: str) -> None:
    """The same images open, with the same size; the others are refused with the same text."""
    expected = manifest(zoo, name)
    error = REFUSED.get(name) or expected["error"]
    if not error:
        assert open_image(zoo / expected["file"]).length == expected["virtual_size"]
        return
    with pytest.raises(QmpdError) as caught:
        open_image(zoo / expected["file"])
    assert caught.value.desc == error
    assert caught.value.kind in (Kind.CORRUPT, Kind.UNSUPPORTED)


@pytest.mark.parametrize("name", entries())
def test_reading_gives_the_right_bytes_or_an_error(zoo: Path, name: str) -> None:
    """Content matches the manifest's digest; damage is an EIO with QEMU's diagnosis."""
    expected = manifest(zoo, name)
    if expected["open"] == "error" or expected["read"] == "skip" or name in REFUSED:
        return
    if name.startswith("bad-backing-"):
        return  # what a backing name may be is the graph's business
    image = open_chain(zoo / expected["file"])
    if expected["read"] == "ok" and name not in UNREADABLE:
        digest = hashlib.sha256(read(image, 0, image.length)).hexdigest()
        assert expected["sha256"] in (None, digest)
        return
    with pytest.raises(QmpdError) as caught:
        read(image, 0, image.length)
    assert caught.value.kind == Kind.CORRUPT
    assert caught.value.strerror == "Input/output error"
    if name not in OWN_WORDS:
        assert (UNREADABLE.get(name) or expected["read_error"]) in caught.value.desc


@pytest.mark.parametrize("name", entries())
def test_writing_keeps_good_images_good_and_bad_ones_no_worse(
    zoo: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overwriting every byte works on valid images; a damaged one is refused before its content can be harmed."""
    need("qemu-img")
    expected = manifest(zoo, name)
    if expected["open"] == "error" or name in REFUSED or expected["virtual_size"] == 0:
        return
    path = tmp_path / expected["file"]
    shutil.copyfile(zoo / expected["file"], path)
    shutil.copyfile(zoo / "ext.raw", tmp_path / "ext.raw")
    monkeypatch.chdir(tmp_path)  # from where qemu-img looks for data files
    if name in DAMAGED:
        before = path.read_bytes()
        with pytest.raises(QmpdError) as caught:
            open_image(path, read_only=False)
        assert DAMAGED[name] in caught.value.desc
        assert path.read_bytes() == before
        return
    image = open_image(path, read_only=False)
    pattern = b"\x5a" * image.length
    if name in UNWRITABLE:
        with pytest.raises(QmpdError, match=UNWRITABLE[name]):
            image.write(0, pattern)
        assert open_image(path).info().format_specific["data"].get("corrupt", True)
        return
    image.write(0, pattern)
    image.close()
    assert read(open_image(path), 0, len(pattern)) == pattern
    if expected["kind"] == "valid":
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", path)
        check_clean(path, leaks=name in ("leak", "trailing"))


@pytest.mark.parametrize("name", ["dirty", "dirty-stale"])
def test_a_dirty_image_is_repaired_when_opened_for_writing(zoo: Path, name: str, tmp_path: Path) -> None:
    """The refcounts are counted anew, the dirty bit goes, the content stays."""
    need("qemu-img")
    path = tmp_path / "image.qcow2"
    shutil.copyfile(zoo / f"{name}.qcow2", path)
    image = open_image(path, read_only=False)
    assert not image.info().dirty
    image.close()
    check_clean(path)
    digest = hashlib.sha256(read(open_image(path), 0, image.length)).hexdigest()
    assert digest == manifest(zoo, name)["sha256"]
