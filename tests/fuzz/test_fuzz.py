"""The short form of ``make test-fuzz``, the same image against qemu-img, and what the fuzzer must be able to find."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmpd.block.drivers.qcow2 import Qcow2, reading
from qmpd.block.drivers.qcow2.clusters import Clusters
from qmpd.block.drivers.qcow2.decompress import decompress
from qmpd.block.drivers.qcow2.single import Single
from qmpd.errors import QmpdError
from tests.block.qcow2.support import MemoryFile, children, read
from tests.fixtures import mkimages
from tests.fuzz.__main__ import run
from tests.fuzz.execute import Guarded
from tests.fuzz.mutate import mutated
from tests.fuzz.seeds import Seed, seeds
from tests.tools import need

SEED = 1
#: What qmpd does not open, though qemu-img info does, which does without data files.
STRICTER = ("data-file", "Encrypted", "behind the end of the file")
#: What qemu-img does not open, though qmpd does, which only lists bitmaps.
MILDER = ("Could not read bitmap_table",)


def test_damaged_images_do_no_harm() -> None:
    """The first of the million: errors or correct reads, nothing written where it must not be."""
    outcomes, failures = run(SEED, 0, 1500, patience=0)

    assert failures == []
    assert min(outcomes[name] for name in ("read", "read error", "refused", "checked", "written", "sound")) > 20


@pytest.mark.parametrize("seed", seeds(), ids=lambda seed: seed.name)
def test_the_seeds_are_sound(seed: Seed, tmp_path: Path) -> None:
    """What is not damaged has nothing wrong: otherwise the fuzzer would start from rubbish."""
    need("qemu-img")
    path = tmp_path / "seed.qcow2"
    path.write_bytes(seed.raw)
    (tmp_path / "data.raw").write_bytes(seed.data or b"")

    done = subprocess.run(["qemu-img", "check", "-q", path], check=False, timeout=60, cwd=tmp_path)
    assert done.returncode == 0


def test_the_fuzzer_finds_a_write_to_shared_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that believes the copied flag does not survive a thousand executions."""
    monkeypatch.setattr(Single, "_is_own", lambda _, entry, __: bool(entry & mkimages.COPIED))
    monkeypatch.setattr(Clusters, "check_exclusive", lambda *_: None)

    assert any("not the guest's alone" in failure for failure in run(SEED, 0, 1500, patience=0)[1])


def test_the_fuzzer_finds_wrong_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that does not look for broken entries reads what is not there."""
    monkeypatch.setattr(reading, "bad_entries", lambda *_, **__: None)

    assert any("were read, but" in failure for failure in run(SEED, 0, 1000, patience=0)[1])


# -- beside qemu-img ---------------------------------------------------------------------------------------------------


def test_qemu_img_agrees(tmp_path: Path) -> None:
    """Of damaged images, those that qemu-img opens and reads have the same size and bytes here, or an error."""
    need("qemu-img")
    _beside_qemu_img(tmp_path, 60)


@pytest.mark.long
def test_qemu_img_agrees_on_many(tmp_path: Path) -> None:
    """The same for more of them."""
    need("qemu-img")
    _beside_qemu_img(tmp_path, 2000)


def _beside_qemu_img(directory: Path, count: int) -> None:
    sources, opened, same = seeds(), 0, 0
    for number in range(count):
        rng = random.Random(f"qemu-img/{SEED}/{number}")
        source = rng.choice(sources)
        raw = mutated(source, rng)
        (directory / "image.qcow2").write_bytes(raw)
        (directory / "data.raw").write_bytes(source.data or b"")
        name = _described(directory, source)
        told = _ask("info", "--output=json", name)
        if told.returncode:
            assert _fails(raw, source) or any(words in told.stderr for words in MILDER), (number, told.stderr)
            continue
        image = _opened(raw, source)
        if image is None:
            continue
        opened += 1
        assert image.length == json.loads(told.stdout)["virtual-size"], number
        if image.length <= 1 << 20 and image.backing_reference is None:
            same += _same_bytes(image, name, directory / "raw", number)
    assert opened > count // 3
    assert same > count // 4


def _described(directory: Path, source: Seed) -> str:
    """The image with the data file that the driver is given too, whatever has become of its name."""
    files = {"file": "image.qcow2", "data-file": "data.raw"} if source.data else {"file": "image.qcow2"}
    children = {slot: {"driver": "file", "filename": str(directory / name)} for slot, name in files.items()}
    return "json:" + json.dumps({"driver": "qcow2", **children})


def _fails(raw: bytes, source: Seed) -> bool:
    """Can the image not be opened, or at least not be read?"""
    try:
        _over(raw, source).readinto(0, memoryview(bytearray(1)))
    except QmpdError:
        return True
    return False


def _over(raw: bytes, source: Seed) -> Qcow2:
    return Qcow2.open(children(MemoryFile(raw), source.data and MemoryFile(source.data)), {}, read_only=True)


def _opened(raw: bytes, source: Seed) -> Qcow2 | None:
    """The image, or None for what only qmpd refuses."""
    refusal = ""
    try:
        return _over(raw, source)
    except QmpdError as error:
        refusal = error.desc
    assert any(words in refusal for words in STRICTER)
    return None


def _same_bytes(image: Qcow2, name: str, target: Path, number: int) -> bool:
    """Do both read the same? If one cannot, neither can the other."""
    copied = _ask("convert", "-O", "raw", name, target)
    content, refusal = b"", ""
    try:
        content = read(image, 0, image.length)
    except QmpdError as error:
        refusal = error.desc
    if not refusal:
        assert (number, copied.returncode) == (number, 0), copied.stderr
        assert target.read_bytes() == content, number
    # A table that lies over another structure is refused here, and read as a table there.
    assert not refusal or copied.returncode or "overlaps with" in refusal, (number, refusal)
    return not refusal


def _ask(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["qemu-img", *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
    )


# -- memory ------------------------------------------------------------------------------------------------------------


@contextmanager
def little_memory(limit: int) -> Iterator[None]:
    """Fails if more is allocated at one time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def claims(**fields: int) -> MemoryFile:
    made = mkimages.basic(cb=12, size=64 << 10).build()
    for name, value in fields.items():
        made.patch(name, value)
    file = MemoryFile(bytes(made.next * made.cs))
    for offset, data in [*made.chunks.items(), *made.patches]:
        file.write(offset, data)
    return file


@pytest.mark.parametrize(
    "fields",
    [
        {"rt_clusters": 2048},
        {"l1_size": 4 << 20},
        {"l1_size": 4 << 20, "l1_off": 1 << 40},
        {"nb_snap": 65536, "snap_off": 1 << 20},
        {"size": 1 << 50, "l1_size": 4 << 20},
    ],
    ids=["refcount table of 8 MiB", "L1 table of 32 MiB", "L1 table far away", "65536 snapshots", "a huge disk"],
)
def test_a_claim_in_the_header_allocates_nothing(fields: dict[str, int]) -> None:
    """Memory follows what the file has, not what it says."""
    file = claims(**fields)
    with little_memory(1 << 20):
        for read_only in (True, False):
            try:
                image = Qcow2.open({"file": file}, {}, read_only=read_only)
                read(image, 0, 4096)
            except QmpdError:
                continue


def test_a_bitmap_directory_behind_the_end_allocates_nothing() -> None:
    """The extension may claim 64 MiB."""
    extension = (mkimages.EXT_BITMAPS, struct.pack(">IIQQ", 9, 0, 64 << 19, 1 << 30))
    made = mkimages.basic(cb=12, size=64 << 10, names=False, autoclear=1, exts=[extension]).build()
    file = MemoryFile(bytes(made.next * made.cs))
    for offset, data in made.chunks.items():
        file.write(offset, data)

    with little_memory(1 << 20), pytest.raises(QmpdError, match="doesn't satisfy the constraints"):
        Qcow2.open({"file": file}, {}, read_only=True)


def test_a_zstd_stream_cannot_ask_for_a_large_window() -> None:
    """A stream of a few bytes that wants a history of 64 MiB kept is refused; with 8 MiB it is read."""

    def frame(window: int) -> bytes:
        block = 1 | 1 << 1 | 65536 << 3  # the last one, one byte repeated
        return struct.pack("<IBB", 0xFD2FB528, 0, window - 10 << 3) + struct.pack("<I", block)[:3] + b"z"

    assert decompress(1, frame(23), 65536, offset=0) == b"z" * 65536
    with pytest.raises(QmpdError, match="too much memory"):
        decompress(1, frame(26), 65536, offset=0)


def test_clusters_given_up_at_a_ragged_end_are_discarded_inside_the_file() -> None:
    """A file that ends within its last cluster can be written: no request goes past its end."""
    made = mkimages.basic(cb=12, size=64 << 10)
    last = made.build().alloc(1)
    made.poke(made.l2[0][0], struct.pack(">Q", last | mkimages.COPIED)).poke(
        made.rb_off + 2 * (last // made.cs), b"\0\1"
    )
    file = Guarded(bytes(last + 512))
    for offset, data in [*made.chunks.items(), *made.patches]:
        file.content[offset : offset + len(data)] = data
    image = Qcow2.open({"file": file}, {}, read_only=False)

    image.discard(0, 4096)
    image.close()

    assert file.discarded == [(last, 512)]


# -- clusters given out twice ------------------------------------------------------------------------------------------


def two_tables(*, refcount: int) -> tuple[MemoryFile, int]:
    """An image with two L2 tables, the second of which has a cluster with that refcount; and that cluster's offset."""
    made = mkimages.Img(cb=9, size=64 << 10)
    made.data(0, b"first")
    used = made.data(64, b"second")
    made.data(1, b"behind it")
    made.ref[used // made.cs] = refcount
    made.build()
    file = MemoryFile(bytes(made.next * made.cs))
    for offset, data in made.chunks.items():
        file.write(offset, data)
    return file, used


def test_a_cluster_that_looks_free_is_not_written_by_two() -> None:
    """Whoever gets it, the guest cluster that had it all along does not write there any more."""
    file, used = two_tables(refcount=0)
    image = Qcow2.open({"file": file}, {}, read_only=False)
    for cluster in range(2, 60):
        image.write(cluster * 512, b"n" * 512)
    assert file.content[used : used + 512] == b"n" * 512

    with pytest.raises(QmpdError, match=f"Cluster offset {used:#x} was free"):
        image.write(64 * 512, b"o" * 512)

    assert file.content[used : used + 512] == b"n" * 512


def test_a_cluster_that_looks_free_is_not_given_out_beside_its_user() -> None:
    """Nothing is written below a table that refers to such a cluster."""
    file, used = two_tables(refcount=0)
    before = bytes(file.content[used : used + 512])
    image = Qcow2.open({"file": file}, {}, read_only=False)

    with pytest.raises(QmpdError, match=f"Cluster at {used:#x} is in use, but its refcount is 0"):
        image.write(65 * 512, b"n" * 512)

    assert file.content[used : used + 512] == before


def test_growing_does_not_make_an_old_entry_good() -> None:
    """An entry that pointed behind the end of the file does so no more when the file has grown, but is not followed."""
    file, used = two_tables(refcount=1)
    end = len(file.content)
    table = file.content.index(struct.pack(">Q", used | mkimages.COPIED))
    file.write(table, struct.pack(">Q", end + 512 * 3 | mkimages.COPIED))
    image = Qcow2.open({"file": file}, {}, read_only=False)
    for cluster in range(2, 60):
        image.write(cluster * 512, b"n" * 512)

    with pytest.raises(QmpdError, match="was free"):
        image.write(64 * 512, b"o" * 512)


def test_the_whole_of_a_good_image_can_be_written_again() -> None:
    """Clusters given up and taken again, tables read again after they left the cache: none of it looks stale."""
    file, _ = two_tables(refcount=1)
    for fill in range(1, 5):
        image = Qcow2.open({"file": file}, {"l2-cache-size": 512, "refcount-cache-size": 512}, read_only=False)
        image.discard(0, image.length // 2)
        image.flush()
        for offset in range(0, image.length, 512 * 7):
            image.write(offset, bytes([fill]) * min(512 * 7, image.length - offset))
            image.flush()
        assert read(image, 0, image.length) == bytes([fill]) * image.length
        image.close()


def test_a_bitmap_table_far_behind_the_end_is_a_finding(tmp_path: Path) -> None:
    """Offsets that no file can have are counted as corruption, as qemu-img does."""
    need("qemu-img")
    seed = next(seed for seed in seeds() if seed.name == "bitmaps")
    raw = bytearray(seed.raw)
    entry = raw.index(b"b0" + bytes(6)) - 24
    struct.pack_into(">Q", raw, entry, (1 << 64) - seed.cluster_size)
    path = tmp_path / "image.qcow2"
    path.write_bytes(raw)
    told = _ask("check", "--output=json", "-f", "qcow2", path)

    result = Qcow2.open({"file": MemoryFile(raw)}, {}, read_only=True).check(fix_leaks=False, pulse=lambda: None)

    assert result.corruptions > 0
    assert told.returncode in (1, 2)
