"""Making images: the option checks in QEMU's order, and the recorded layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmpd.block.drivers.qcow2 import CreateOptions, Qcow2, create
from qmpd.block.storage.file import FileStorage
from qmpd.errors import QmpdError
from tests.block.qcow2.support import MemoryFile, check_clean, new_image
from tests.tools import need

MIB = 1 << 20
V3 = "(use version=v3 or greater)"

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"size": 1000}, "Image size must be a multiple of 512 bytes"),
    (
        {"version": "v2", "extended_l2": True},
        f"Extended L2 entries are only supported with compatibility level 1.1 and above {V3}",
    ),
    ({"cluster_size": 65537}, "Cluster size must be a power of two between 512 and 2048k"),
    ({"cluster_size": 256}, "Cluster size must be a power of two between 512 and 2048k"),
    ({"cluster_size": 4 * MIB}, "Cluster size must be a power of two between 512 and 2048k"),
    (
        {"extended_l2": True, "cluster_size": 4096},
        "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
    ),
    (
        {"preallocation": "metadata", "backing_file": "b"},
        "Backing file and preallocation can only be used at the same time if extended_l2 is on",
    ),
    ({"backing_fmt": "qcow2"}, "Backing format cannot be used without backing file"),
    (
        {"version": "v2", "lazy_refcounts": True},
        f"Lazy refcounts only supported with compatibility level 1.1 and above {V3}",
    ),
    *(
        ({"refcount_bits": bits}, "Refcount width must be a power of two and may not exceed 64 bits")
        for bits in (0, 3, 128)
    ),
    (
        {"version": "v2", "refcount_bits": 8},
        f"Different refcount widths than 16 bits require compatibility level 1.1 or above {V3}",
    ),
    ({"data_file_raw": True}, "data-file-raw requires data-file"),
    (
        {"data_file": "d", "data_file_raw": True, "backing_file": "b"},
        "Backing file and data-file-raw cannot be used at the same time",
    ),
    (
        {"version": "v2", "data_file": "d"},
        f"External data files are only supported with compatibility level 1.1 and above {V3}",
    ),
    (
        {"version": "v2", "compression_type": "zstd"},
        f"Non-zlib compression type is only supported with compatibility level 1.1 and above {V3}",
    ),
    (
        {"size": 9223372036854775296},
        "Could not resize image: offset(9223372036854775296) exceeds maximum(9223372035781033984)",
    ),
    ({"size": 1 << 60}, "Could not resize image: Failed to grow the L1 table: File too large"),
    ({"encrypt": {"format": "luks"}}, "Encrypted images are not supported"),
    (
        {"backing_file": "x" * 1024, "backing_fmt": "qcow2"},
        f"Could not assign backing file '{'x' * 1024}' with format 'qcow2': Invalid argument",
    ),
]

#: Recorded lengths of 1 MiB images (0 for the empty one).
LENGTHS: list[tuple[dict[str, Any], int]] = [
    ({}, 196616),
    ({"version": "v2"}, 196616),
    ({"cluster_size": 512}, 1792),
    ({"cluster_size": 2 * MIB}, 6291464),
    ({"size": 0}, 196608),
    ({"preallocation": "metadata"}, 1376256),
    ({"preallocation": "falloc"}, 1376256),
    ({"preallocation": "full"}, 1376256),
    ({"refcount_bits": 1}, 196616),
    ({"refcount_bits": 64, "cluster_size": 512}, 1792),
    ({"extended_l2": True}, 196616),
    ({"compression_type": "zstd"}, 196616),
]


@pytest.mark.parametrize(("options", "text"), REFUSALS)
def test_refusals_come_in_the_peers_words_and_before_the_file_is_touched(options: dict[str, Any], text: str) -> None:
    """Unlike the peer's, even for a size or a backing name that does not fit."""
    file = MemoryFile(b"precious" * 100)
    with pytest.raises(QmpdError) as caught:
        create(file, CreateOptions(**{"size": MIB, **options}))
    assert caught.value.desc == text
    assert bytes(file.content) == b"precious" * 100


@pytest.mark.parametrize(("options", "length"), LENGTHS)
def test_files_are_as_long_as_the_peers(tmp_path: Path, options: dict[str, Any], length: int) -> None:
    """Old content is gone, the new image is clean."""
    need("qemu-img")
    path = tmp_path / "image.qcow2"
    path.write_bytes(b"old" * MIB)
    file = FileStorage.open({}, {"filename": str(path)}, read_only=False)
    create(file, CreateOptions(**{"size": MIB, **options}))
    file.close()
    assert path.stat().st_size == length
    check_clean(path)


@pytest.mark.parametrize(
    "options", [{"cluster_size": 512, "refcount_bits": 64, "size": 8 << 30}, {"size": 200 << 40}, {"size": 0}]
)
def test_large_tables_get_the_refcounts_they_need(tmp_path: Path, options: dict[str, Any]) -> None:
    """The L1 table may need several refcount blocks, and those a refcount table of several clusters."""
    need("qemu-img")
    file, image = new_image(**options)
    image.close()
    path = tmp_path / "image.qcow2"
    path.write_bytes(file.content)
    check_clean(path)


def test_info_speaks_of_the_options() -> None:
    """As queries print it."""
    _, image = new_image(size=MIB, lazy_refcounts=True, compression_type="zstd", refcount_bits=32, extended_l2=True)
    assert image.info().format_specific == {
        "type": "qcow2",
        "data": {
            "compat": "1.1",
            "compression-type": "zstd",
            "lazy-refcounts": True,
            "refcount-bits": 32,
            "corrupt": False,
            "extended-l2": True,
        },
    }
    _, image = new_image(size=MIB, version="v2")
    assert image.info().format_specific == {
        "type": "qcow2",
        "data": {"compat": "0.10", "compression-type": "zlib", "refcount-bits": 16},
    }


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"l2-cache-entry-size": 1000}, "L2 cache entry size must be a power of two between 512 and the cluster size"),
        ({"encrypt": {"format": "luks"}}, "No encryption in image header, but options specified format 'luks'"),
        ({"cache-size": 1, "l2-cache-size": 2}, "l2-cache-size may not exceed cache-size"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_open(options: dict[str, Any], text: str) -> None:
    """In QEMU's words."""
    file, image = new_image(size=MIB)
    image.close()
    with pytest.raises(QmpdError, match=text):
        Qcow2.open({"file": file}, options, read_only=True)
