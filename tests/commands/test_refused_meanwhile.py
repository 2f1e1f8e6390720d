"""While an intermediate commit runs: what is refused, in which words, and that a refusal changes nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from qmpd.errors import QmpdError
from tests.commands.served import Served, serving
from tests.jobs.rig import backing, check, image, reads, shell

BUSY = "Node '{}' is busy: block device is in use by block job: commit"
ROOT = "Need a root block node"
FROZEN = "Cannot change frozen 'backing' link from '{}' to '{}'"
SIZE = 4 << 20


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Served]:
    """mid is on its way into base below top, and sleeps in its rate limit; other and over are not in the chain."""
    async with serving(tmp_path) as made:
        shell(
            "qemu-img create -q -f qcow2 base.qcow2 4M",
            "qemu-io -f qcow2 -c 'write -P 0x11 0 4M' base.qcow2",
            "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2",
            "qemu-io -f qcow2 -c 'write -P 0x22 0 2M' mid.qcow2",
            "qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2",
            "qemu-io -f qcow2 -c 'write -P 0x33 0 1M' top.qcow2",
            "qemu-img create -q -f qcow2 other.qcow2 4M",
            "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 over.qcow2",
        )
        chain = image("base", read_only=True), image("mid", "base", read_only=True), image("top", "mid")
        await made.rig.add(*chain, image("other"), image("over"))
        arguments = {"job_id": "j0", "device": "top", "top_node": "mid", "base_node": "base"}
        await made.call("block-commit", **arguments, speed=1, filter_node_name="cflt", x_qmpd_siblings="allow")
        await made.rig.rested()
        yield made


def reopened(name: str, below: str | None, **more: Any) -> dict[str, Any]:
    options = {"driver": "qcow2", "node-name": name, "file": f"{name}-file", "backing": below}
    return {"options": [options | {key.replace("_", "-"): value for key, value in more.items()}]}


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("block-commit", {"job_id": "j1", "device": "mid"}, ROOT),
    ("block-commit", {"job_id": "j1", "device": "base"}, ROOT),
    ("block-commit", {"job_id": "j1", "device": "top"}, ROOT),
    ("change-backing-file", {"device": "top", "image_node_name": "top", "backing_file": "x"}, ROOT),
    ("blockdev-del", {"node_name": "top"}, BUSY.format("top")),
    ("blockdev-del", {"node_name": "mid"}, "Node mid is in use"),
    ("blockdev-del", {"node_name": "base"}, "Node base is in use"),
    ("blockdev-del", {"node_name": "mid-file"}, "Node mid-file is not owned by the monitor"),
    ("blockdev-del", {"node_name": "cflt"}, "Node 'cflt' is busy: node is used as backing hd of 'top'"),
    *(("block-stream", {"job_id": "j1", "device": name}, BUSY.format(name)) for name in ("top", "mid", "base")),
    ("blockdev-snapshot", {"node": "top", "overlay": "over"}, BUSY.format("top")),
    (
        "blockdev-snapshot-sync",
        {"node_name": "top", "snapshot_file": "new.qcow2", "snapshot_node_name": "new"},
        BUSY.format("top"),
    ),
    *(("block_resize", {"node_name": name, "size": 2 * SIZE}, BUSY.format(name)) for name in ("top", "mid", "base")),
    ("blockdev-reopen", reopened("mid", "other", read_only=True), FROZEN.format("mid", "base")),
    ("blockdev-reopen", reopened("mid", None, read_only=True), FROZEN.format("mid", "base")),
    *(("blockdev-reopen", reopened("top", below), FROZEN.format("top", "cflt")) for below in (None, "other", "base")),
    (
        "blockdev-reopen",
        reopened("base", None, read_only=True),
        "Read-only block node 'base' cannot support read-write users",
    ),
]


async def test_refused_with_the_graph_as_it_was(daemon: Served) -> None:
    """Row by row the published words; x-debug-query-block-graph and the jobs say the same before and after.

    The commit then ends as if nobody had asked for anything.
    """
    before = await daemon.call("x-debug-query-block-graph"), await daemon.call("query-block-jobs")
    answers = []
    for command, arguments, _ in REFUSALS:
        try:
            await daemon.call(command, **arguments)
            answers.append("")
        except QmpdError as error:
            answers.append(str(error))
        assert (await daemon.call("x-debug-query-block-graph"), await daemon.call("query-block-jobs")) == before
    assert answers == [text for _, _, text in REFUSALS]
    assert not Path("new.qcow2").exists()

    await daemon.call("block-job-set-speed", device="j0", speed=0)
    await daemon.rig.gone()
    await daemon.rig.close()
    assert backing("top.qcow2") == ("base.qcow2", "qcow2")
    check("base.qcow2", "mid.qcow2", "top.qcow2", "other.qcow2", "over.qcow2")
    reads("top.qcow2", "0x33 0 1M", "0x22 1M 1M", "0x11 2M 2M")


async def test_a_new_overlay_of_base_is_allowed(daemon: Served) -> None:
    """It comes and goes, and leaves the graph as it was."""
    await daemon.call("blockdev-del", node_name="over")
    before = await daemon.call("x-debug-query-block-graph")
    await daemon.call("blockdev-add", **{key.replace("-", "_"): value for key, value in image("over", "base").items()})
    assert daemon.graph.get("over").backing is daemon.graph.get("base")
    await daemon.call("blockdev-del", node_name="over")
    assert await daemon.call("x-debug-query-block-graph") == before
