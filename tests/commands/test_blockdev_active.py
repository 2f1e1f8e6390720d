"""blockdev-set-active on real images: locks, permissions, what others change meanwhile."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.api import Perm, Role
from qmpd.errors import QmpdError
from qmpd.graph.node import Backend
from tests.commands.served import Served, serving
from tests.jobs.guest import Guest
from tests.jobs.rig import AT_REST, CHAIN, check, image, reads, shell, spy

KIB = 1 << 10
MIB = 1 << 20
EVERYTHING = {"base", "base-file", "mid", "mid-file", "top", "top-file"}


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Served]:
    """base <- mid <- top, where top can be written."""
    async with serving(tmp_path) as made:
        shell(
            "qemu-img create -q -f qcow2 base.qcow2 2M",
            "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2",
            "qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2",
            "qemu-io -f qcow2 -c 'write -P 0x22 0 2M' mid.qcow2",
        )
        await made.rig.add(*CHAIN)
        yield made


async def set_active(daemon: Served, name: str | None, active: bool) -> None:
    await daemon.call("blockdev-set-active", active=active, **({} if name is None else {"node_name": name}))


async def refused(daemon: Served, name: str | None, active: bool = False) -> str:
    """The text; nothing is changed, the nodes' activity included."""
    before = inactive(daemon)
    more = {} if name is None else {"node_name": name}
    text = await daemon.refused("blockdev-set-active", active=active, **more)
    assert inactive(daemon) == before
    return text


def inactive(daemon: Served) -> set[str]:
    return {node.name for node in daemon.graph.nodes if not node.active}


def can_be_written(name: str) -> bool:
    """By another program, that is."""
    argv = ["qemu-io", "-f", "qcow2", "-c", "write -P 0x77 0 64k", f"{name}.qcow2"]
    return subprocess.run(argv, capture_output=True).returncode == 0


async def test_a_chain_from_the_top(daemon: Served) -> None:
    """A node takes those below along that nobody else uses; activating it brings all of them back."""
    assert daemon.rig.edges() == AT_REST
    await set_active(daemon, "top", False)
    assert inactive(daemon) == EVERYTHING
    shared = "shared=consistent-read,resize,write,write-unchanged"
    assert f"top -file-> top-file perm=consistent-read {shared}" in daemon.rig.edges()
    await set_active(daemon, "base", True)
    assert inactive(daemon) == EVERYTHING - {"base", "base-file"}
    await set_active(daemon, "top", True)
    assert inactive(daemon) == set()
    assert daemon.rig.edges() == AT_REST


async def test_all_nodes(daemon: Served) -> None:
    """Without a name; doing it again changes nothing."""
    for active in (False, False, True, True):
        await set_active(daemon, None, active)
        assert inactive(daemon) == (set() if active else EVERYTHING)
    assert daemon.rig.edges() == AT_REST


async def test_parents_go_first(daemon: Served) -> None:
    """An active node does not stand on an inactive one."""
    for name in ("base", "mid", "top-file"):
        assert await refused(daemon, name) == "Node has active parent node"
    assert await refused(daemon, "nope") == "Failed to find node with node-name='nope'"


async def test_what_others_use_stays_active(daemon: Served) -> None:
    """A base with two overlays follows the last of them."""
    shell("qemu-img create -q -f qcow2 side.qcow2 2M")
    await daemon.rig.add(image("side", "base"))
    await set_active(daemon, "top", False)
    assert inactive(daemon) == EVERYTHING - {"base", "base-file"}
    await set_active(daemon, "side", False)
    assert inactive(daemon) == EVERYTHING | {"side", "side-file"}


async def test_writers_hinder_and_readers_do_not(daemon: Served) -> None:
    """Found before anything is changed, wherever the writer is."""
    writer = Guest(daemon.rig, "top")
    assert await refused(daemon, "top") == "Failed to inactivate node: Operation not permitted"
    assert await refused(daemon, None) == "Failed to inactivate all nodes: Operation not permitted"
    writer.detach(daemon.rig)
    reader = Backend()
    with daemon.graph.edit() as edit:
        edit.attach(reader, "root", daemon.graph.get("top"), Role.NONE, perm=Perm.CONSISTENT_READ)
    await set_active(daemon, "top", False)
    assert reader.edge is not None
    seen = bytearray(64 * KIB)
    reader.edge.device.readinto(0, memoryview(seen))
    assert seen == b"\x22" * len(seen)
    with pytest.raises(QmpdError, match="permission"):
        reader.edge.device.write(0, b"x")
    with daemon.graph.edit() as edit:
        edit.detach(reader.edge)


async def test_a_job_hinders(daemon: Served) -> None:
    """Also one that sleeps in its rate limit; it ends as if nothing had been asked."""
    await daemon.call("block-commit", job_id="j0", device="top", top_node="mid", base_node="base", speed=1)
    await daemon.rig.rested()
    assert await refused(daemon, "top") == "Failed to inactivate node: Operation not permitted"
    assert await refused(daemon, None) == "Failed to inactivate all nodes: Operation not permitted"
    await daemon.call("block-job-set-speed", device="j0", speed=0)
    await daemon.rig.gone()
    await daemon.rig.close()
    reads("top.qcow2", "0x22 0 2M")


@pytest.mark.parametrize(
    ("command", "arguments", "text"),
    [
        ("block_resize", {"node_name": "top", "size": 4 * MIB}, "Permission 'resize' unavailable on inactive node"),
        (
            "block-commit",
            {"job_id": "j0", "device": "top", "top_node": "mid", "base_node": "base", "filter_node_name": "f"},
            "Inactive 'mid' can't be a backing child of active 'f'",
        ),
    ],
)
async def test_an_inactive_node_is_not_changed(
    daemon: Served, command: str, arguments: dict[str, Any], text: str
) -> None:
    """In the peer's words."""
    await set_active(daemon, "top", False)
    assert await daemon.refused(command, **arguments) == text


async def test_another_program_takes_over(daemon: Served) -> None:
    """It gets the locks; what it wrote is read when the node is active again: data, tables, length, backing name."""
    user = Guest(daemon.rig, "top")
    user.device.write(0, b"\x33" * 64 * KIB)
    user.detach(daemon.rig)
    assert not can_be_written("top")
    await set_active(daemon, "top", False)
    check("top.qcow2")
    assert can_be_written("top")
    shell(
        "qemu-io -f qcow2 -c 'write -P 0x88 1M 64k' top.qcow2",
        "qemu-img resize -q -f qcow2 top.qcow2 4M",
        "qemu-img rebase -u -b ./mid.qcow2 -F qcow2 top.qcow2",
    )
    await set_active(daemon, "top", True)
    assert not can_be_written("top")
    top = daemon.graph.get("top")
    assert top.length == 4 * MIB
    assert top.opened.backing_reference is not None
    assert top.opened.backing_reference.filename == "./mid.qcow2"
    user = Guest(daemon.rig, "top")
    assert user.shadow[: 64 * KIB] == b"\x77" * 64 * KIB
    assert user.shadow[MIB : MIB + 64 * KIB] == b"\x88" * 64 * KIB
    assert user.shadow[64 * KIB : 128 * KIB] == b"\x22" * 64 * KIB
    user.device.write(3 * MIB, b"\x99" * 64 * KIB)
    user.device.flush()
    user.detach(daemon.rig)
    await daemon.rig.close()
    check("top.qcow2", "mid.qcow2", "base.qcow2")
    reads("top.qcow2", "0x77 0 64k", "0x88 1M 64k", "0x99 3M 64k")


async def test_another_program_still_holds_the_image(daemon: Served) -> None:
    """Activating fails, and all nodes stay inactive."""
    await set_active(daemon, None, False)
    argv = ["qemu-io", "-f", "qcow2", "top.qcow2"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write("length\n")
        other.stdin.flush()
        while "2 MiB" not in other.stdout.readline():
            pass
        assert "lock" in await refused(daemon, "top", active=True)
        other.stdin.close()
        other.stdout.read()
    await set_active(daemon, "top", True)
    assert inactive(daemon) == set()


async def test_an_image_that_was_damaged_meanwhile(daemon: Served) -> None:
    """Activating fails with what opening it would say; all nodes stay inactive and give up the locks again."""
    await set_active(daemon, None, False)
    content = Path("mid.qcow2").read_bytes()
    Path("mid.qcow2").write_bytes(b"nonsense" * 64 + content[512:])
    assert await refused(daemon, "top", active=True) == "Image is not in qcow2 format"
    assert can_be_written("base")
    Path("mid.qcow2").write_bytes(content)
    await set_active(daemon, "top", True)
    assert inactive(daemon) == set()


async def test_a_node_that_cannot_be_flushed_stays_active(daemon: Served) -> None:
    """What is not on disk cannot be handed over."""
    spy(daemon.graph.get("top"), "flush", [], QmpdError("No space left on device"), once=True)
    assert await refused(daemon, "top") == "No space left on device"


async def test_a_node_added_inactive(daemon: Served) -> None:
    """It is opened without locks, and can be activated like others."""
    shell("qemu-img create -q -f qcow2 new.qcow2 1M")
    file = {"driver": "file", "filename": "new.qcow2", "node-name": "new-file", "active": False}
    await daemon.call("blockdev-add", driver="qcow2", node_name="new", file=file, active=False)
    assert can_be_written("new")
    await set_active(daemon, "new", True)
    assert not can_be_written("new")
    user = Guest(daemon.rig, "new")
    assert user.shadow[: 64 * KIB] == b"\x77" * 64 * KIB
    user.device.write(0, b"\x11" * 64 * KIB)
    user.device.flush()
    user.detach(daemon.rig)
    nodes = await daemon.call("query-named-block-nodes", flat=True)
    assert all(node["active"] for node in nodes)
    await daemon.rig.close()
    assert (
        json.loads(
            subprocess.run(["qemu-img", "check", "--output=json", "new.qcow2"], check=True, capture_output=True).stdout
        )["check-errors"]
        == 0
    )
    reads("new.qcow2", "0x11 0 64k")
