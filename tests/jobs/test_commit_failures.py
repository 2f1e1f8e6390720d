"""Intermediate commits that meet errors or refusals: policies, undoing, and a graph that is as before."""

from __future__ import annotations

from typing import Any

import pytest

from qmpd.block.api import Perm, Role
from qmpd.errors import Kind, QmpdError
from qmpd.graph.node import Backend
from qmpd.jobs.job import OnError
from tests.jobs.rig import (
    AT_REST,
    CHAIN,
    MIB,
    STARTED,
    VIEW,
    Rig,
    backing,
    image,
    reads,
    shell,
    spy,
)


def fail_writes(rig: Rig, number: int, times: int) -> None:
    """Let base's placements from 512 KiB on fail with this errno, ``times`` times."""
    base = rig.node("base").opened
    real = base.place

    def place(offset: int, length: int) -> Any:
        nonlocal times
        if offset + length > 512 << 10 and times:
            times -= 1
            raise QmpdError("x", Kind.IO, errno=number)
        return real(offset, length)

    base.place = place  # type: ignore[method-assign]


@pytest.mark.usefixtures("chain")
@pytest.mark.parametrize(
    ("policy", "number", "action"),
    [
        ("report", 28, "report"),
        ("report", 5, "report"),
        ("enospc", 28, "stop"),
        ("enospc", 5, "report"),
        ("auto", 28, "stop"),
        ("stop", 5, "stop"),
        ("ignore", 5, "ignore"),
    ],
)
async def test_on_error(rig: Rig, mock_clock: Any, policy: str, number: int, action: str) -> None:
    """The failing chunk is the second; it is where offset stays and what is tried again."""
    await rig.add(*CHAIN)
    fail_writes(rig, number, 1)
    await rig.commit(on_error=OnError(policy), auto_dismiss=False, speed=1 << 40)
    await rig.until(lambda: any(line.startswith("ERROR") for line in rig.log))
    await rig.until(lambda: rig.jobs.query_jobs()[0]["status"] in ("paused", "concluded", "running"))

    assert f"ERROR operation=write action={action}" in rig.told()
    if action == "report":
        await rig.until(lambda: rig.jobs.query_jobs()[0]["status"] == "concluded")
        assert rig.jobs.query_block_jobs()[0]["offset"] == 512 << 10
        assert rig.edges() == AT_REST
        return
    if action == "stop":
        info = rig.jobs.query_block_jobs()[0]
        assert (info["status"], info["offset"]) == ("paused", 512 << 10)
        assert info["io-status"] == ("nospace" if number == 28 else "failed")
        await rig.jobs.resume(rig.jobs.find("j0"))
    else:
        mock_clock.jump(1)
    await rig.until(lambda: rig.jobs.query_jobs()[0]["status"] == "concluded")
    assert "error" not in rig.jobs.query_jobs()[0]
    await rig.close()
    reads("top.qcow2", *VIEW)


@pytest.mark.usefixtures("chain")
async def test_a_failing_allocation_query_is_a_read_error(rig: Rig) -> None:
    """Asking where the data are counts as reading them."""
    await rig.add(*CHAIN)
    spy(rig.node("mid"), "map", [], QmpdError("x", Kind.CORRUPT))
    await rig.commit()
    await rig.gone()

    assert rig.told() == (
        f"{STARTED}, ERROR operation=read action=report, aborting, "
        f"COMPLETED len={4 * MIB} offset=0 speed=0 error=Input/output error, concluded, null"
    )
    assert rig.edges() == AT_REST


@pytest.mark.usefixtures("chain")
async def test_a_failed_sync_is_never_retried(rig: Rig) -> None:
    """Whatever on-error says: after it nobody knows what is on the disk. No header is touched."""
    await rig.add(*CHAIN)
    spy(rig.node("base"), "flush", [], QmpdError("x", Kind.IO, errno=5), once=True)
    calls: list[str] = []
    spy(rig.node("top"), "change_backing_reference", calls)
    await rig.commit(on_error=OnError.STOP)
    await rig.gone()

    assert rig.told() == (
        f"{STARTED}, ERROR operation=write action=report, aborting, "
        f"COMPLETED len={4 * MIB} offset={4 * MIB} speed=0 error=Input/output error, concluded, null"
    )
    assert calls == []


@pytest.mark.usefixtures("chain")
async def test_a_writer_on_base_is_refused(rig: Rig) -> None:
    """With the text of a permission conflict, after created; nothing is left behind."""
    await rig.add(image("base"), *CHAIN[1:])
    writer = Backend()
    with rig.graph.edit() as edit:
        edit.attach(writer, "root", rig.node("base"), Role.NONE, perm=Perm.WRITE)
    before = rig.edges()
    text = (
        "Permission conflict on node 'base': permissions 'write' are both required by an unnamed block device (uses "
        "node 'base' as 'root' child) and unshared by an unnamed block device (uses node 'base' as 'root' child)."
    )

    with pytest.raises(QmpdError) as refusal:
        await rig.commit()

    assert str(refusal.value) == text
    assert rig.told() == "created, null"
    assert rig.edges() == before
    with rig.graph.edit() as edit:
        assert writer.edge is not None
        edit.detach(writer.edge)


@pytest.mark.usefixtures("chain")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
        ({"filter_node_name": "base"}, "Duplicate nodes with node-name='base'"),
        ({"filter_node_name": "9x"}, "Invalid node-name: '9x'"),
        ({"filter_node_name": ""}, "Invalid node-name: ''"),
        ({"filter_node_name": "a" * 32}, "Node name too long"),
    ],
)
async def test_refused_after_the_job_exists(rig: Rig, arguments: dict[str, Any], text: str) -> None:
    """created and null come first; base is read-only again."""
    await rig.add(*CHAIN)

    with pytest.raises(QmpdError) as refusal:
        await rig.commit(**arguments)

    assert str(refusal.value) == text
    assert rig.told() == "created, null"
    assert rig.edges() == AT_REST
    assert rig.node("base").read_only


@pytest.mark.usefixtures("chain")
async def test_base_whose_file_is_explicitly_read_only(rig: Rig) -> None:
    """The reopen changes only what the file inherited, so it cannot become writable."""
    fixed = {"driver": "file", "filename": "base.qcow2", "read-only": True}
    await rig.add({"driver": "qcow2", "node-name": "base", "file": fixed, "read-only": True}, *CHAIN[1:])

    with pytest.raises(QmpdError, match="Block node is read-only"):
        await rig.commit()

    assert rig.told() == "created, null"
    assert rig.node("base").read_only


@pytest.mark.usefixtures("chain")
async def test_new_overlays_are_found_at_the_end(rig: Rig) -> None:
    """An image put over the filter while the job runs is relinked like those from before, also where it is longer."""
    await rig.add(*CHAIN)
    await rig.commit(speed=1, filter_node_name="cflt")
    await rig.rested()
    shell("qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 late.qcow2 4M")
    await rig.add(image("late", "cflt"))

    rig.jobs.set_speed(rig.jobs.find("j0"), 0)
    await rig.gone()

    assert rig.node("late").backing is rig.node("base")
    await rig.close()
    assert backing("late.qcow2") == ("base.qcow2", "qcow2")
