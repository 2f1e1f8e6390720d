"""A commit that cannot come to its end does not begin, if that can be seen quickly."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from qmpd.jobs import preflight
from qmpd.jobs.growth import Work
from tests.inprocess import CommandError, InProcess, Wire, running
from tests.jobs.rig import CHAIN, image, shell

MIB = 1 << 20
COMMIT = {"job_id": "j", "device": "top", "top_node": "mid", "base_node": "base"}


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """base <- mid <- top, a MiB of data in mid, in the working directory."""
    monkeypatch.setattr(preflight, "PATIENCE", 60.0)  # the machine may be busy
    monkeypatch.chdir(tmp_path)
    shell(
        "qemu-img create -q -f qcow2 base.qcow2 64M",
        "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2",
        "qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2",
        "qemu-io -f qcow2 -c 'write -P 7 0 1M' mid.qcow2",
    )


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with 4096 bytes left, as far as anybody asks."""
    monkeypatch.setattr(preflight, "free_space", lambda storage: 4096)


async def started(core: InProcess) -> Wire:
    client = await core.client()
    for node in CHAIN:
        await client.call("blockdev-add", dict(node))
    return client


async def result(client: Wire) -> Any:
    """The end of the job: its error, if it has one."""
    return (await client.event("BLOCK_JOB_COMPLETED")).get("error")


@pytest.mark.usefixtures("full")
async def test_lack_of_space_is_told_beforehand() -> None:
    """With the numbers; base is as it was. The plan says the same."""
    before = Path("base.qcow2").read_bytes()
    async with running() as core:
        client = await started(core)
        with pytest.raises(CommandError, match=f"'base.qcow2': the commit takes {MIB} bytes there, 4096 are free"):
            await client.execute("block-commit", **COMMIT)
        assert await client.execute("query-jobs") == []
    assert Path("base.qcow2").read_bytes() == before


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize(
    "more", [{"on_error": "stop"}, {"on_error": "enospc"}, {"on_error": "ignore"}, {"x_qmpd_force": True}]
)
async def test_it_is_no_refusal_where_the_job_would_wait_for_space_or_the_client_insists(more: dict[str, Any]) -> None:
    """Managers extend volumes when a job stops."""
    async with running() as core:
        client = await started(core)
        await client.execute("block-commit", **COMMIT, **more)
        assert await result(client) is None


@pytest.mark.usefixtures("full")
async def test_what_base_has_already_takes_no_space() -> None:
    """The exact growth counts, where the upper bound would not do."""
    shell("qemu-io -f qcow2 -c 'write -P 8 0 1M' base.qcow2")
    async with running() as core:
        client = await started(core)
        await client.execute("block-commit", **COMMIT)
        assert await result(client) is None


async def test_where_there_is_plenty_nothing_is_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual case costs no more than a look at the maps."""
    monkeypatch.setattr(Work, "growth", None)
    async with running() as core:
        client = await started(core)
        await client.execute("block-commit", **COMMIT)
        assert await result(client) is None


@pytest.mark.usefixtures("full")
async def test_what_takes_long_is_left_to_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """No start waits for it."""
    monkeypatch.setattr(preflight, "PATIENCE", -1.0)
    async with running() as core:
        client = await started(core)
        await client.execute("block-commit", **COMMIT)
        assert await result(client) is None


@pytest.mark.usefixtures("full")
async def test_the_offline_commit_is_looked_at_too() -> None:
    """And can be forced too."""
    async with running() as core:
        client = await started(core)
        await client.execute("blockdev-del", node_name="top")
        with pytest.raises(CommandError, match=r"Not enough space for 'base\.qcow2'"):
            await client.execute("x-qmpd-commit-offline", job_id="j", device="mid")
        await client.execute("x-qmpd-commit-offline", job_id="j", device="mid", x_qmpd_force=True)
        assert await result(client) is None


def damage(name: str) -> None:
    """The first L2 table is where none can be."""
    with Path(name).open("r+b") as file:
        file.seek(40)
        (l1_offset,) = struct.unpack(">Q", file.read(8))
        file.seek(l1_offset)
        file.write(struct.pack(">Q", 1 << 63 | 0x1200))


async def test_a_damaged_image_is_told_beforehand() -> None:
    """Instead of in the middle, with a part of it in base. Who wants to see it fail can."""
    damage("mid.qcow2")
    async with running() as core:
        client = await started(core)
        with pytest.raises(CommandError, match=r"The commit would fail: .*L2 table"):
            await client.execute("block-commit", **COMMIT)
        await client.execute("block-commit", **COMMIT, x_qmpd_force=True)
        assert await result(client) is not None


async def test_filters_are_not_touched_by_anybody_but_the_job() -> None:
    """A scripted fault below hits the job, not the preflight."""
    async with running() as core:
        client = await core.client()
        faults = {"driver": "blkdebug", "node-name": "faults", "image": {"driver": "file", "filename": "mid.qcow2"}}
        faults["inject-error"] = [{"event": "l2_load", "errno": 5}]
        await client.call("blockdev-add", image("base", read_only=True))
        await client.call("blockdev-add", image("mid", "base", read_only=True, file=faults))
        await client.call("blockdev-add", image("top", "mid"))
        await client.execute("block-commit", **COMMIT)
        assert await result(client) == "Input/output error"
