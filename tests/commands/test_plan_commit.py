"""x-qmpd-plan-commit: what it tells, and that nothing is other than before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qmpd.jobs import forecast
from tests.commands.served import serving
from tests.jobs.rig import CHAIN, MIB, image, shell


@pytest.fixture
def images(tmp_path: Path) -> Path:
    shell(
        "qemu-img create -q -f qcow2 base.qcow2 64M",
        "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2 64M",
        "qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 64M",
        "qemu-io -f qcow2 -c 'write -P 7 0 1M' -c 'write -z 1M 2M' mid.qcow2",
        cwd=tmp_path,
    )
    return tmp_path


async def test_a_plan_tells_the_chain_the_amounts_and_the_growth(images: Path) -> None:
    """By kind; inodes are those of the files; the graph stays as it is."""
    async with serving(images) as served:
        await served.rig.add(*CHAIN)
        edges = served.rig.edges()

        plan = await served.call("x-qmpd-plan-commit", device="top", top_node="mid", base_node="base")

        assert served.rig.edges() == edges
    assert [one["node-name"] for one in plan["images"]] == ["top", "mid", "base"]
    assert plan["images"][2]["inode"] == os.stat(images / "base.qcow2").st_ino
    assert plan["copy"] == {"data": MIB, "zero": 2 * MIB, "compressed": 0, "other": 0}
    assert (plan["growth"]["data-clusters"], plan["growth"]["l2-clusters"]) == (16, 1)
    assert plan["obstacles"] == []


async def test_what_would_stop_the_commit_is_listed(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file locked by somebody else, and a file system with too little space."""
    monkeypatch.setattr(forecast, "free_space", lambda storage: 4096)
    async with serving(images) as served:
        await served.rig.add(*CHAIN)
        await served.rig.add(image("reader", read_only=True, file={"driver": "file", "filename": "base.qcow2"}))

        plan = await served.call("x-qmpd-plan-commit", device="top", top_node="mid", base_node="base")

    assert any("lock" in obstacle for obstacle in plan["obstacles"]), plan["obstacles"]
    text = f"Not enough space for 'base.qcow2': the commit takes {MIB} bytes there, 4096 are free"
    assert text in plan["obstacles"]
