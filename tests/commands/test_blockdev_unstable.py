"""The commands whose names begin with x-: amending, quorum children, iothreads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.api import Role
from qmpd.graph.node import Backend
from tests.commands.served import Served, serving
from tests.jobs.rig import image, shell


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Served]:
    """base <- top."""
    async with serving(tmp_path) as made:
        shell(
            "qemu-img create -q -f qcow2 base.qcow2 2M",
            "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
        )
        await made.rig.add(image("base", read_only=True), image("top", "base"))
        yield made


# -- x-blockdev-amend --------------------------------------------------------------------------------------------------

LUKS = {"format": "luks", "state": "active", "new-secret": "s"}


async def amend(daemon: Served, **options: Any) -> dict[str, Any]:
    """The one job there is, as query-jobs shows it."""
    await daemon.call("x-blockdev-amend", job_id="c0", node_name="top", options={"driver": "qcow2"} | options)
    (job,) = await daemon.call("query-jobs")
    assert isinstance(job, dict)
    return job


async def test_nothing_to_amend(daemon: Served) -> None:
    """The job succeeds; it is no block job, is over when the command is answered, and waits to be dismissed."""
    expected = {"id": "c0", "type": "amend", "status": "concluded", "current-progress": 1, "total-progress": 1}
    assert await amend(daemon) == expected
    assert daemon.rig.told() == "created, running, waiting, pending, concluded"
    assert await daemon.call("query-block-jobs") == []
    await daemon.call("job-dismiss", id="c0")
    assert daemon.rig.told() == "null"


@pytest.mark.parametrize("encrypt", [LUKS, {"format": "qcow"}])
async def test_key_slots(daemon: Served, encrypt: dict[str, str]) -> None:
    """There are none: the job says so."""
    assert (await amend(daemon, encrypt=encrypt))["error"] == "image is not encrypted, can't amend"
    assert daemon.rig.told() == "created, running, aborting, concluded"


@pytest.mark.parametrize(
    ("node", "options", "text"),
    [
        ("nope", {"driver": "qcow2"}, "Cannot find device='' nor node-name='nope'"),
        ("top", {"driver": "raw"}, "x-blockdev-amend doesn't support changing the block driver"),
        ("top", {"driver": "luks"}, "Parameter 'options.state' is missing"),
        ("top", {"driver": "luks", "state": "active"}, "x-blockdev-amend doesn't support changing the block driver"),
        ("top-file", {"driver": "file"}, "Driver does not support x-blockdev-amend"),
        ("top", {"driver": "qcow2", "lazy-refcounts": True}, "Parameter 'options.lazy-refcounts' is unexpected"),
        ("top", {"driver": "qcow2"}, "Invalid job ID '1x'"),
    ],
)
async def test_amendments_refused(daemon: Served, node: str, options: dict[str, Any], text: str) -> None:
    """Before there is a job; its id is looked at last."""
    assert await daemon.refused("x-blockdev-amend", job_id="1x", node_name=node, options=options) == text
    assert await daemon.call("query-jobs") == []


# -- x-blockdev-change -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"parent": "nope"}, "Cannot find device='nope' nor node-name='nope'"),
        ({"parent": "top"}, "Either child or node must be specified"),
        ({"parent": "top", "child": "nope", "node": "nope"}, "The parameters child and node are in conflict"),
        ({"parent": "top", "child": "nope"}, "Node 'top' does not have child 'nope'"),
        ({"parent": "top", "child": "backing"}, "The node top does not support removing a child"),
        ({"parent": "top", "node": "nope"}, "Node 'nope' not found"),
        ({"parent": "top", "node": "base"}, "The node top does not support adding a child"),
    ],
)
async def test_children_do_not_change(daemon: Served, arguments: dict[str, Any], text: str) -> None:
    """The reason that comes first."""
    assert await daemon.refused("x-blockdev-change", **arguments) == text


# -- x-blockdev-set-iothread -------------------------------------------------------------------------------------------


async def set_iothread(daemon: Served, thread: str | None, **more: Any) -> None:
    await daemon.call("x-blockdev-set-iothread", node_name="top", iothread=thread, **more)


async def delete_refused(daemon: Served, name: str) -> str:
    return await daemon.refused("object-del", id=name)


async def test_a_thread_with_a_node_in_it_stays(daemon: Served) -> None:
    """Until the node is put elsewhere, or is gone; putting it there twice does not count double."""
    in_use = "object 't0' is in use, can not be deleted"
    for name in ("t0", "t1"):
        await daemon.call("object-add", qom_type="iothread", id=name)
    await set_iothread(daemon, "t0")
    await set_iothread(daemon, "t0")
    assert await delete_refused(daemon, "t0") == in_use
    await set_iothread(daemon, "t1")
    await daemon.call("object-del", id="t0")
    await daemon.call("object-add", qom_type="iothread", id="t0")
    await set_iothread(daemon, None)
    await daemon.call("object-del", id="t1")
    await set_iothread(daemon, "t0")
    assert await delete_refused(daemon, "t0") == in_use
    await daemon.call("blockdev-del", node_name="top")
    await daemon.rig.add(image("top", "base"))
    await daemon.call("object-del", id="t0")


async def test_users_may_be_in_another_thread(daemon: Served) -> None:
    """So a node with users is not moved, unless the client insists."""
    await daemon.call("object-add", qom_type="iothread", id="t0")
    with daemon.graph.edit() as edit:
        edge = edit.attach(Backend(), "root", daemon.graph.get("top"), Role.NONE)
    text = "Node top is associated with a BlockBackend and could be in use (use force=true to override this check)"
    assert await daemon.refused("x-blockdev-set-iothread", node_name="top", iothread="t0") == text
    await set_iothread(daemon, "t0", force=True)
    await set_iothread(daemon, None, force=True)
    with daemon.graph.edit() as edit:
        edit.detach(edge)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"node_name": "nope", "iothread": "nope"}, "Failed to find node with node-name='nope'"),
        ({"node_name": "top", "iothread": "nope"}, "Cannot find iothread nope"),
        ({"node_name": "top", "iothread": "secret"}, "Cannot find iothread secret"),
        ({"node_name": "top"}, "Parameter 'iothread' is missing"),
        ({"node_name": "top", "iothread": 1}, "Invalid parameter type for 'iothread', expected: StrOrNull"),
    ],
)
async def test_threads_refused(daemon: Served, arguments: dict[str, Any], text: str) -> None:
    """Other objects are no threads."""
    await daemon.call("object-add", qom_type="secret", id="secret", data="x")
    assert await daemon.refused("x-blockdev-set-iothread", **arguments) == text
