"""query-blockstats, and the event for a node that is written far."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio.testing

from tests.commands.served import Served, serving
from tests.jobs.guest import Guest
from tests.jobs.rig import image, shell

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Served]:
    """base <- mid <- top; mid is full, base is empty."""
    async with serving(tmp_path) as made:
        shell(
            "qemu-img create -q -f qcow2 base.qcow2 2M",
            "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2",
            "qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2",
            "qemu-io -f qcow2 -c 'write -P 0x22 0 2M' mid.qcow2",
        )
        await made.rig.add(image("base", read_only=True), image("mid", "base", read_only=True), image("top", "mid"))
        yield made


async def stats(daemon: Served) -> dict[str, Any]:
    return {entry["node-name"]: entry for entry in await daemon.call("query-blockstats", query_nodes=True)}


async def highest(daemon: Served, *names: str) -> list[int]:
    found = await stats(daemon)
    return [found[name]["stats"]["wr_highest_offset"] for name in names]


async def threshold(daemon: Served, node: str, value: int) -> None:
    await daemon.call("block-set-write-threshold", node_name=node, write_threshold=value)


async def told(daemon: Served) -> list[dict[str, Any]]:
    """Data of the threshold events, when nothing is under way any more."""
    await trio.testing.wait_all_tasks_blocked()
    return [data for name, data in daemon.events if name == "BLOCK_WRITE_THRESHOLD"]


# -- query-blockstats --------------------------------------------------------------------------------------------------


async def test_guest_devices_do_not_exist(daemon: Served) -> None:
    """Only nodes have statistics."""
    assert await daemon.call("query-blockstats") == []
    assert await daemon.call("query-blockstats", query_nodes=False) == []


async def test_every_node_oldest_first_with_its_file(daemon: Served) -> None:
    """``parent`` is the file below; backing files are not repeated; files have counters of discards."""
    found = await daemon.call("query-blockstats", query_nodes=True)
    assert [entry["node-name"] for entry in found] == ["base-file", "base", "mid-file", "mid", "top-file", "top"]
    top = found[-1]
    assert top.keys() == {"node-name", "stats", "parent"}
    assert top["parent"] == found[-2]
    specific = {"driver": "file", "discard-nb-ok": 0, "discard-nb-failed": 0, "discard-bytes-ok": 0}
    assert top["parent"]["driver-specific"] == specific
    assert top["stats"]["timed_stats"] == []
    assert top["stats"]["account_failed"] is False
    assert "idle_time_ns" not in top["stats"]


async def test_counts_the_end_of_the_highest_write(daemon: Served) -> None:
    """In guest bytes on the image, in file bytes on its file; zero writes count, discards and reads do not."""
    assert await highest(daemon, "top", "top-file") == [0, 0]
    user = Guest(daemon.rig, "top")
    user.device.write(0, b"x" * 512)
    user.device.write_zeroes(128 * KIB, 64 * KIB)
    user.device.discard(MIB, 64 * KIB)
    user.device.readinto(2 * MIB - 512, memoryview(bytearray(512)))
    user.device.flush()
    image_end, file_end = await highest(daemon, "top", "top-file")
    assert image_end == 192 * KIB
    used = json.loads(output("qemu-img check --output=json -f qcow2 -U top.qcow2"))["image-end-offset"]
    assert 0 < file_end <= used
    assert await highest(daemon, "mid", "mid-file", "base", "base-file") == [0, 0, 0, 0]
    user.detach(daemon.rig)


def output(line: str) -> str:
    return subprocess.run(line.split(), check=True, capture_output=True, text=True).stdout


async def test_discards_of_a_file_are_counted(daemon: Served) -> None:
    """Number and bytes."""
    Path("f.raw").write_bytes(b"x" * MIB)
    await daemon.call("blockdev-add", driver="file", node_name="f", filename="f.raw", discard="unmap")
    user = Guest(daemon.rig, "f")
    user.device.discard(0, 64 * KIB)
    assert (await stats(daemon))["f"]["driver-specific"]["discard-bytes-ok"] == 64 * KIB
    assert (await stats(daemon))["f"]["driver-specific"]["discard-nb-ok"] == 1
    user.detach(daemon.rig)


# -- block-set-write-threshold -----------------------------------------------------------------------------------------


async def test_is_told_once(daemon: Served) -> None:
    """A write that ends at the threshold is not beyond it; the first that is beyond switches it off."""
    user = Guest(daemon.rig, "top")
    await threshold(daemon, "top", MIB)
    assert await shown(daemon, "top") == MIB
    user.device.write(MIB - 512, b"x" * 512)
    assert await told(daemon) == []
    user.device.write_zeroes(MIB, 64 * KIB)
    user.device.write(MIB + 64 * KIB, b"x" * 512)
    assert await told(daemon) == [{"node-name": "top", "write-threshold": MIB, "amount-exceeded": 64 * KIB}]
    assert await shown(daemon, "top") == 0
    user.detach(daemon.rig)


async def shown(daemon: Served, name: str) -> int:
    nodes = await daemon.call("query-named-block-nodes", flat=True)
    return next(int(node["write_threshold"]) for node in nodes if node["node-name"] == name)


async def test_below_what_is_written_already(daemon: Served) -> None:
    """The next write beyond it counts, not one before."""
    user = Guest(daemon.rig, "top")
    user.device.write(MIB, b"x" * 512)
    await threshold(daemon, "top", 512 * KIB)
    user.device.write(0, b"x" * 512)
    assert await told(daemon) == []
    user.device.write(512 * KIB, b"x" * 512)
    assert [event["amount-exceeded"] for event in await told(daemon)] == [512]
    user.detach(daemon.rig)


async def test_on_the_file_it_counts_bytes_of_the_file(daemon: Served) -> None:
    """The use for volumes that grow."""
    user = Guest(daemon.rig, "top")
    await threshold(daemon, "top-file", 256 * KIB)
    user.device.write(2 * MIB - 64 * KIB, b"x" * 64 * KIB)
    (event,) = await told(daemon)
    assert event["node-name"] == "top-file"
    assert 0 < event["amount-exceeded"] < MIB
    user.detach(daemon.rig)


@pytest.mark.parametrize("node", ["base", "base-file"])
async def test_writes_of_jobs_count(daemon: Served, node: str) -> None:
    """Also what goes from file to file past the drivers; told before the job is over."""
    await threshold(daemon, node, MIB)
    await daemon.call("block-commit", job_id="j0", device="top", top_node="mid", base_node="base")
    await daemon.rig.gone()
    (event,) = await told(daemon)
    assert event["node-name"] == node
    names = [name for name, _ in daemon.events]
    assert "BLOCK_WRITE_THRESHOLD" in names
    assert await highest(daemon, "base") == [2 * MIB]
    assert (await highest(daemon, "base-file"))[0] > 2 * MIB


async def test_writes_of_jobs_to_a_raw_base_count(daemon: Served) -> None:
    """On every node that is bypassed, each in its own bytes."""
    shell(
        "qemu-img create -q -f raw r.raw 4M",
        "qemu-img create -q -f qcow2 o.qcow2 2M",
        "qemu-img create -q -f qcow2 p.qcow2 2M",
        "qemu-io -f qcow2 -c 'write -P 0x55 0 1M' o.qcow2",
    )
    file = {"driver": "file", "node-name": "r-file", "filename": "r.raw"}
    await daemon.call("blockdev-add", driver="raw", node_name="r", file=file, offset=MIB, read_only=True)
    await daemon.rig.add(image("o", "r", read_only=True), image("p", "o"))
    await daemon.call("block-commit", job_id="j0", device="p", top_node="o", base_node="r")
    await daemon.rig.gone()
    assert await highest(daemon, "r", "r-file") == [MIB, 2 * MIB]


async def test_zero_ends_the_watch_and_large_values_are_taken(daemon: Served) -> None:
    """-1 is the largest of all; queries show it as the signed number of their schema."""
    await threshold(daemon, "top", -1)
    assert await shown(daemon, "top") == -1
    await threshold(daemon, "top", 0)
    assert await shown(daemon, "top") == 0
    await threshold(daemon, "top", (1 << 64) - 1)
    assert await shown(daemon, "top") == -1


async def test_unknown_nodes(daemon: Served) -> None:
    """The peer's text, of class GenericError."""
    text = await daemon.refused("block-set-write-threshold", node_name="nope", write_threshold=1)
    assert text == "Device 'nope' not found"


async def test_a_tall_stack_of_nodes(daemon: Served) -> None:
    """Its height is limited by nothing but memory."""
    await daemon.call("blockdev-add", driver="null-co", node_name="n0", size=MIB)
    for number in range(1, 400):
        await daemon.call("blockdev-add", driver="raw", node_name=f"n{number}", file=f"n{number - 1}")
    entry: dict[str, Any] | None = (await stats(daemon))["n399"]
    height = 0
    while entry is not None:
        height, entry = height + 1, entry.get("parent")
    assert height == 400
