"""Programs that others wrote use an export: libnbd's tools, QEMU's tools, fio."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.exports.serving import LAYERS, SIZE, Server, export_map, image_map, run
from tests.tools import need

kinds = pytest.mark.parametrize("kind", LAYERS)


def test_nbdinfo_lists_exports_with_what_they_can(anywhere: Server) -> None:
    """Name, description, size, block sizes and abilities arrive, of a writable and of a read-only export."""
    need("nbdinfo")
    anywhere.serve("qcow2", description="the top")
    anywhere.serve("raw", writable=False)
    listing = json.loads(run("nbdinfo", "--list", "--json", anywhere.url("")))
    assert listing["protocol"] == "newstyle-fixed"
    assert listing["structured"] is True
    by_name = {export["export-name"]: export for export in listing["exports"]}
    assert sorted(by_name) == ["qcow2", "raw"]
    writable, read_only = by_name["qcow2"], by_name["raw"]
    assert writable["description"] == "the top"
    for export in (writable, read_only):
        assert export["export-size"] == SIZE
        assert export["contexts"] == ["base:allocation"]
        sizes = [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
        assert sizes == [1, 4096, 32 << 20]
        assert all(export[ability] for ability in ("can_cache", "can_df", "can_flush", "can_fua", "can_multi_conn"))
    assert not writable["is_read_only"]
    assert all(writable[ability] for ability in ("can_trim", "can_zero", "can_fast_zero"))
    assert read_only["is_read_only"]
    assert not any(read_only[ability] for ability in ("can_trim", "can_zero", "can_fast_zero"))


@kinds
def test_nbdinfo_maps_what_qemu_img_maps(server: Server, kind: str) -> None:
    """Block status says of every byte what ``qemu-img map`` says of the image."""
    need("nbdinfo")
    files = server.serve(kind, writable=False)
    assert export_map(server.url(kind)) == image_map(files)


@pytest.mark.parametrize("writes", [["write 128k 512"], ["write 1M 4k", "write 131584 1"], ["write 192k 64k"]])
def test_nbdinfo_maps_whole_clusters(server: Server, writes: list[str]) -> None:
    """A cluster that was written in part is data as a whole, also where the image file ends within it."""
    need("nbdinfo", "qemu-io")
    image = server.directory / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE))
    server.open("disk", [image])
    server.export("disk")
    url = server.url("disk")
    run("qemu-io", "-f", "raw", *(word for write in writes for word in ("-c", write)), url)
    assert export_map(url) == image_map([image])
    clusters = {int(flags == 0) * length for _, length, flags in export_map(url)} - {0}
    assert clusters == {65536}


@kinds
def test_nbdcopy_copies_an_export_out_and_in(anywhere: Server, kind: str, tmp_path: Path) -> None:
    """A copy out is the disk; a copy in becomes the disk, and the image stays clean."""
    need("nbdcopy")
    files = anywhere.serve(kind)
    driver, url = files[0].suffix[1:], anywhere.url(kind)
    out = tmp_path / "out"
    run("nbdcopy", url, out)
    run("qemu-img", "compare", "-U", "-f", "raw", "-F", driver, out, files[0])
    changed = bytearray(out.read_bytes())
    changed[1 << 20 : 3 << 20] = bytes(range(256)) * (8 << 10)
    changed[:4096] = bytes(4096)
    (tmp_path / "in").write_bytes(changed)
    run("nbdcopy", "--flush", tmp_path / "in", url)
    anywhere.client.execute("quit")
    anywhere.daemon.exit_status()
    run("qemu-img", "compare", "-f", "raw", "-F", driver, tmp_path / "in", files[0])
    if driver == "qcow2":
        run("qemu-img", "check", "-q", files[0])


@kinds
def test_qemu_img_compares_and_converts(anywhere: Server, kind: str, tmp_path: Path) -> None:
    """QEMU's own client finds in the export what is in the image, and reads it as a source."""
    files = anywhere.serve(kind, writable=False)
    driver, url = files[0].suffix[1:], anywhere.url(kind)
    run("qemu-img", "compare", "-U", "-f", "raw", "-F", driver, url, files[0])
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", url, tmp_path / "copy.qcow2")
    run("qemu-img", "compare", "-U", "-f", "qcow2", "-F", driver, tmp_path / "copy.qcow2", files[0])
    info = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", url))
    assert info["virtual-size"] == SIZE


@kinds
def test_qemu_io_reads_what_it_wrote(anywhere: Server, kind: str) -> None:
    """Patterns, zeroes, FUA, discards and flushes of QEMU's own client, at odd places."""
    files = anywhere.serve(kind)
    writes = ("write -P 0x41 100k 300k", "write -f -P 0x42 511 1025", "write -z 1M 128k", "write -z -u 2M 64k")
    after = ("discard 3M 64k", "flush", "read -P 0x41 100k 300k", "read -P 0x42 511 1025", "read -P 0 1M 128k")
    reads = ("read -P 0 2M 64k", "read -P 0 3M 64k")
    words = [word for command in (*writes, *after, *reads[:1]) for word in ("-c", command)]
    output = run("qemu-io", "-f", "raw", *words, anywhere.url(kind))
    assert "failed" not in output
    anywhere.client.execute("quit")
    anywhere.daemon.exit_status()
    driver = files[0].suffix[1:]
    run("qemu-io", "-r", "-f", driver, "-c", "read -P 0x41 100k 300k", "-c", "read -P 0x42 511 1025", files[0])


def test_qemu_nbd_lists(anywhere: Server) -> None:
    """``qemu-nbd --list`` shows each export."""
    need("qemu-nbd")
    anywhere.serve("raw", description="a disk")
    place = (
        ["-b", "127.0.0.1", "-p", str(anywhere.port)] if anywhere.port else ["-k", str(anywhere.directory / "nbd.sock")]
    )
    listing = run("qemu-nbd", "--list", *place)
    assert "exports available: 1" in listing
    for line in ("export: 'raw'", "description: a disk", f"size:  {SIZE}", "min block: 1", "base:allocation"):
        assert line in listing


@pytest.mark.long
@kinds
def test_fio_verifies_random_writes(server: Server, kind: str) -> None:
    """fio's NBD engine reads back every block it wrote, at depth 16 in random order."""
    need("fio")
    if "nbd" not in run("fio", "--enghelp").split():
        pytest.skip("this fio has no NBD engine")
    server.serve(kind)
    job = ["--name=verify", "--ioengine=nbd", f"--uri={server.url(kind)}", "--rw=randwrite", "--bs=4k", "--iodepth=16"]
    checks = ["--verify=crc32c", "--verify_fatal=1", f"--size={SIZE}", "--randseed=5", "--output-format=json"]
    report = run("fio", *job, *checks, cwd=server.directory)
    result = json.loads(report[report.index("{") :])["jobs"][0]
    assert result["error"] == 0
    assert result["read"]["total_ios"] == SIZE >> 12


#: What a program does with libnbd's handle ``h`` on the qcow2 image; ``other`` opens a second connection.
CONVERSATIONS = {
    "what is written is read": """
h.pwrite(b"x" * 5000, 1001)
assert h.pread(5002, 1000) == b"\\0" + b"x" * 5000 + b"\\0" or h.pread(5000, 1001) == b"x" * 5000
h.pwrite(b"y" * 512, 4096, nbd.CMD_FLAG_FUA)
h.flush()
assert h.pread(512, 4096) == b"y" * 512
""",
    "zeroes are read as such, by any flag": """
for offset, flags in ((65536, 0), (131072, nbd.CMD_FLAG_NO_HOLE), (196608, nbd.CMD_FLAG_FUA), (262245, 0)):
    h.zero(4099, offset, flags)
    assert h.pread(4099, offset) == bytes(4099), (offset, flags)
    assert h.pread(1, offset + 4099) == b"\\x21"
""",
    "a fast zero is fast or refused, and refused it changes nothing": """
before = h.pread(100, 65600)
try:
    h.zero(100, 65600, nbd.CMD_FLAG_FAST_ZERO)
    after = bytes(100)
except nbd.Error as error:
    assert error.errno in ("EOPNOTSUPP", "ENOTSUP"), error
    after = before
assert h.pread(100, 65600) == after
""",
    "a trim may change what it covers and nothing beside it": """
h.trim(200000, 100001)
h.trim(65536, 589824, nbd.CMD_FLAG_FUA)
assert h.pread(100001 - 65536, 65536) == b"\\x21" * (100001 - 65536)
assert h.pread(100, 300001) == b"\\x21" * 100
""",
    "cache answers": "h.cache(1 << 20, 0)",
    "chunks arrive in order and cover the read": """
seen = []
def chunk(data, offset, status, error):
    seen.append((offset, len(data), status))
h.pread_structured(4 << 20, 0, chunk)
assert sum(length for _, length, _ in seen) == 4 << 20 or any(s == nbd.READ_HOLE for _, _, s in seen)
assert [offset for offset, _, _ in seen] == sorted(offset for offset, _, _ in seen)
seen.clear()
h.pread_structured(4 << 20, 0, chunk, nbd.CMD_FLAG_DF)
assert [row[:2] for row in seen] == [(0, 4 << 20)]
""",
    "block status of one extent is one extent": """
seen = []
def extents(context, offset, entries, error):
    assert context == "base:allocation"
    seen.append(entries)
h.block_status(2 << 20, 65536, extents, nbd.CMD_FLAG_REQ_ONE)
assert seen == [[1 << 20, 0]], seen
seen.clear()
h.block_status(2 << 20, 0, extents)
assert seen == [[65536, 3, 1 << 20, 0, (1 << 20) - 65536, 3]], seen
""",
    "a flush on one connection covers another, which sees the write": """
assert h.can_multi_conn()
two = other()
h.pwrite(b"z" * 65536, 1 << 20)
assert two.pread(65536, 1 << 20) == b"z" * 65536
two.flush()
two.shutdown()
""",
    "out of bounds is an error, not the end": """
h.set_strict_mode(0)
for call in (lambda: h.pread(512, (4 << 20) - 511), lambda: h.pwrite(b"a" * 512, 4 << 20), lambda: h.trim(1, 1 << 62)):
    try:
        call()
    except nbd.Error as error:
        assert error.errno in ("EINVAL", "ENOSPC"), error
    else:
        raise AssertionError("no error")
assert h.pread(1, 65536) == b"\\x21"
""",
    "sixty-four reads in flight are answered, each with its own": """
h.pwrite(b"".join(bytes([number]) * 4096 for number in range(64)), 1 << 20)
buffers = [nbd.Buffer(4096) for _ in range(64)]
cookies = [h.aio_pread(buffer, (1 << 20) + number * 4096) for number, buffer in enumerate(buffers)]
while h.aio_in_flight():
    h.poll(-1)
assert all(h.aio_command_completed(cookie) for cookie in cookies)
for number, buffer in enumerate(buffers):
    assert buffer.to_bytearray() == bytes([number]) * 4096
""",
    "simple replies do as well": """
plain = other(structured=False)
assert not plain.get_structured_replies_negotiated()
plain.pwrite(b"s" * 1000, 123456)
assert plain.pread(1002, 123455) == b"\\x21" + b"s" * 1000 + b"\\x21"
plain.shutdown()
""",
}

_PROLOGUE = """
import nbd
def other(structured=True):
    second = nbd.NBD()
    second.set_request_structured_replies(structured)
    second.connect_uri(h.get_uri())
    return second
"""


@pytest.mark.parametrize("claim", CONVERSATIONS)
def test_nbdsh(server: Server, claim: str) -> None:
    """A program over libnbd gets what the protocol promises."""
    need("nbdsh")
    server.serve("qcow2")
    # Not by its name: nbdsh takes the first python3 of the path, which need not be the one that knows libnbd.
    argv = ["/usr/bin/python3", "-m", "nbd", "--base-allocation", "-u", server.url("qcow2")]
    steps = [word for step in (_PROLOGUE, CONVERSATIONS[claim], "h.shutdown()") for word in ("-c", step)]
    done = subprocess.run([*argv, *steps], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    server.alive()
