"""Commits on disks that fail at every moment that qcow2 announces: the guest's view stays, and so does every image."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from qmpd.errors import QmpdError
from qmpd.jobs.job import OnError
from tests.jobs.rig import Rig, image, reads, shell

VIEW = ("0x33 0 64k", "0x22 64k 3008k", "0 3M 512k", "0x22 3584k 64k", "0x11 3648k 448k")

MOMENTS = {
    "base": [
        *("l1_update", "l2_load", "l2_update", "l2_alloc_write", "cluster_alloc", "write_aio", "read_aio"),
        *("refblock_load", "refblock_update_part", "reftable_load", "cow_write"),
        *("pwritev", "pwritev_zero", "pwritev_done", "flush_to_disk", "none"),
    ],
    "mid": ["l2_load", "read_aio", "refblock_load", "flush_to_disk"],
    "top": ["pwritev", "flush_to_disk", "l2_load"],
}

#: Where one failure ends it: base cannot be opened; or a sync failed, and nobody knows what the next would vouch for.
REFUSED = {("base", "reftable_load"), ("base", "none")}
FATAL = {
    *(("base", event) for event in ("l1_update", "l2_update", "refblock_update_part", "flush_to_disk")),
    *(("top", event) for event in ("pwritev", "flush_to_disk")),
}

EVERYWHERE = [(name, event) for name, events in MOMENTS.items() for event in events]


@pytest.fixture
def images(tmp_path: Path) -> None:
    """base has room to grow; mid has data, zeros over base's data, and nothing at the end."""
    shell(
        "qemu-img create -q -f qcow2 -o cluster_size=4k base.qcow2 4M",
        "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2",
        "qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2",
        "qemu-io -f qcow2 -c 'write -P 0x11 3M 1M' base.qcow2",
        "qemu-io -f qcow2 -c 'write -P 0x22 0 3M' -c 'write -z 3M 512k' -c 'write -P 0x22 3584k 64k' mid.qcow2",
        "qemu-io -f qcow2 -c 'write -P 0x33 0 64k' top.qcow2",
        cwd=tmp_path,
    )


def faulty(description: Mapping[str, Any], rule: Mapping[str, Any]) -> dict[str, Any]:
    """An image with a blkdebug between it and its file."""
    file = {key: value for key, value in description["file"].items() if key != "node-name"}
    return {**description, "file": {"driver": "blkdebug", "image": file, "inject-error": [rule]}}


async def commit(rig: Rig, clock: MockClock, where: str, rule: Mapping[str, Any], policy: OnError) -> str:
    """mid into base with a fault in one of the images; how the job was last heard of."""
    chain = {
        "base": image("base", read_only=True),
        "mid": image("mid", "base", read_only=True),
        "top": image("top", "mid"),
    }
    chain[where] = faulty(chain[where], rule)
    try:
        for description in chain.values():
            await rig.add(description)
        await rig.commit(on_error=policy, auto_dismiss=False, backing_file="base.qcow2")
    except QmpdError:
        return ""
    while rig.jobs.query_jobs()[0]["status"] != "concluded":
        await wait_all_tasks_blocked()
        clock.jump(1)  # over the rest before a retry
    return next(line for line in rig.log if line.startswith("COMPLETED"))


def sound(*names: str) -> None:
    """The images hold together; clusters may have leaked."""
    for name in names:
        assert subprocess.run(["qemu-img", "check", "-q", name], capture_output=True).returncode in (0, 3)


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(("where", "event"), EVERYWHERE)
async def test_one_failure(rig: Rig, mock_clock: MockClock, where: str, event: str) -> None:
    """Ignored, what failed is tried again and the commit succeeds, unless it cannot be tried again."""
    last = await commit(rig, mock_clock, where, {"event": event, "errno": 5, "once": True}, OnError.IGNORE)
    if (where, event) not in REFUSED:
        assert ("error" in last) == ((where, event) in FATAL)
    await rig.close()

    reads("top.qcow2", *VIEW)
    sound("base.qcow2", "mid.qcow2", "top.qcow2")


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(("where", "event"), EVERYWHERE)
@pytest.mark.parametrize("iotype", ["write", "flush"])
async def test_no_write_succeeds_from_then_on(
    rig: Rig, mock_clock: MockClock, where: str, event: str, iotype: str
) -> None:
    """As after a crash at that moment: whatever was written before must do."""
    await commit(rig, mock_clock, where, {"event": event, "errno": 5, "iotype": iotype}, OnError.REPORT)
    await rig.close()

    reads("top.qcow2", *VIEW)
    sound("base.qcow2", "mid.qcow2", "top.qcow2")
