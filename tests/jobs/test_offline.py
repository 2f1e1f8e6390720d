"""Offline commits against ``qemu-img commit`` of a copy: the same images afterwards."""

from __future__ import annotations

import json
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qmpd.block.api import Perm, Role
from qmpd.block.copy import CopyEngine, CopyError
from qmpd.errors import Kind, QmpdError
from qmpd.graph.node import Backend
from qmpd.jobs.job import OnError
from qmpd.jobs.offline import OfflineCommitJob, plan_offline
from qmpd.jobs.plan import CommitRequest
from tests.jobs.rig import (
    AT_REST,
    CHAIN,
    DONE,
    MIB,
    QUIET,
    STARTED,
    VIEW,
    Rig,
    backing,
    check,
    image,
    output,
    reads,
    running,
    shell,
    spy,
)
from tests.jobs.test_commit_random import CHAINS, build, content
from tests.tools import need


async def offline(rig: Rig, device: str = "top", *, keep: bool = False, **more: Any) -> None:
    """x-qmpd-commit-offline."""
    request = CommitRequest(**{"job_id": "j0", "device": device} | more)
    await rig.jobs.launch(lambda: OfflineCommitJob(rig.graph, plan_offline(rig.graph, request), keep=keep))
    rig.log.append("R")


def depths(name: str) -> set[int]:
    """Which images of the chain have data, 0 being the image itself."""
    extents = json.loads(output(f"qemu-img map -U --output=json {name}.qcow2"))
    return {extent["depth"] for extent in extents if extent["present"]}


@pytest.mark.usefixtures("chain")
async def test_the_image_goes_into_its_immediate_backing_image(rig: Rig, tmp_path: Path) -> None:
    """As qemu-img commit of a copy: equal content of all images, equal headers, the emptied file of equal length."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("base", "mid", "top"):
        shutil.copy(f"{name}.qcow2", copy)
    shell("qemu-img commit -q -f qcow2 top.qcow2", cwd=copy)
    await rig.add(*CHAIN)

    await offline(rig)
    await rig.gone()

    assert rig.told() == f"{STARTED}, {DONE.format(4 * MIB)}"
    assert rig.edges() == AT_REST
    assert (rig.node("top").read_only, rig.node("mid").read_only) == (False, True)
    await rig.close()
    check("base.qcow2", "mid.qcow2", "top.qcow2")
    for name in ("base", "mid", "top"):
        output(f"qemu-img compare -f qcow2 -F qcow2 {name}.qcow2 copy/{name}.qcow2")
        assert backing(f"{name}.qcow2") == backing(f"copy/{name}.qcow2")
    assert Path("top.qcow2").stat().st_size == Path("copy/top.qcow2").stat().st_size
    assert depths("top") == {1, 2}
    reads("top.qcow2", *VIEW)
    reads("mid.qcow2", *VIEW)


@pytest.mark.usefixtures("chain")
async def test_keep(rig: Rig) -> None:
    """The image stays as it is, to the last byte; it need not be writable for that."""
    before = Path("top.qcow2").read_bytes()
    await rig.add(*CHAIN[:2], image("top", "mid", read_only=True))
    await offline(rig, keep=True)
    await rig.gone()
    await rig.close()

    assert Path("top.qcow2").read_bytes() == before
    reads("mid.qcow2", *VIEW)


@pytest.mark.usefixtures("chain")
async def test_a_read_only_image_is_emptied_and_read_only_again(rig: Rig) -> None:
    """Writable for the job's time only, and so is its backing image."""
    await rig.add(*CHAIN[:2], image("top", "mid", read_only=True))
    before = rig.edges()
    await offline(rig)
    await rig.gone()

    assert rig.edges() == before
    assert rig.node("top").read_only
    await rig.close()
    assert depths("top") == {1, 2}
    reads("top.qcow2", *VIEW)


@pytest.mark.usefixtures("chain")
async def test_while_it_runs(rig: Rig) -> None:
    """The graph, a speed limit, and what is refused: writers, other jobs, another chain."""
    await rig.add(*CHAIN)
    await offline(rig, speed=1)
    held = await rig.rested()

    assert (held["type"], held["offset"], held["len"], held["speed"]) == ("commit", 64 << 10, 4 * MIB, 1)
    assert "block-backend -root-> mid perm=consistent-read,write shared=" + QUIET in rig.edges()
    for node in ("top", "mid"):
        with pytest.raises(QmpdError, match=f"Node '{node}' is busy: block device is in use by block job: commit"):
            rig.node(node).check_op("resize")
        with pytest.raises(QmpdError, match=f"Permission conflict on node '{node}'"), rig.graph.edit() as edit:
            edit.attach(Backend(), "root", rig.node(node), Role.NONE, perm=Perm.WRITE)
    with rig.graph.edit() as edit:
        edit.attach(Backend(), "root", rig.node("top"), Role.NONE, perm=Perm.CONSISTENT_READ)
    with pytest.raises(QmpdError, match="Cannot change frozen 'backing' link"), rig.graph.edit() as edit:
        edit.detach(rig.node("top").children["backing"])


@pytest.mark.usefixtures("chain")
async def test_a_pending_job_has_emptied_nothing(rig: Rig) -> None:
    """Cancelled then, it leaves the image full; finalized, empty."""
    await rig.add(*CHAIN)
    await offline(rig, auto_finalize=False)
    await rig.until(lambda: rig.log[-1:] == ["PENDING"])
    await rig.jobs.cancel(rig.jobs.find("j0"), force=True)

    assert rig.edges() == AT_REST
    assert depths("top") == {0, 1, 2}

    await offline(rig, auto_finalize=False)
    await rig.until(lambda: rig.log[-1:] == ["PENDING"])
    await rig.jobs.finalize(rig.jobs.find("j0"))
    await rig.close()
    assert depths("top") == {1, 2}
    reads("top.qcow2", *VIEW)


@pytest.mark.usefixtures("chain")
async def test_the_backing_image_is_durable_before_the_image_is_emptied(rig: Rig) -> None:
    """Or a crash would lose what was only in the image."""
    await rig.add(*CHAIN)
    calls: list[str] = []
    for name, method in (("mid", "place"), ("mid", "flush"), ("top", "make_empty")):
        spy(rig.node(name), method, calls)
    await offline(rig)
    await rig.gone()

    assert calls.index("mid.place") < calls.index("mid.flush") < calls.index("top.make_empty")
    assert "mid.place" not in calls[calls.index("mid.flush") :]


# -- refusals and failures ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("chain")
async def test_refusals(rig: Rig) -> None:
    """Exact texts, no events, nothing changed."""
    await rig.add(*CHAIN)
    for device, text in (
        ("nope", "Cannot find device='nope' nor node-name='nope'"),
        ("base", "Node 'base' is busy: node is used as backing hd of 'mid'"),
        ("mid", "Node 'mid' is busy: node is used as backing hd of 'top'"),
        ("top-file", "Image does not have a backing file"),
    ):
        with pytest.raises(QmpdError) as error:
            await offline(rig, device)
        assert str(error.value) == text
    with pytest.raises(QmpdError, match=r"^Invalid job ID ''$"):
        await offline(rig, job_id="")

    assert rig.told() == ""
    assert rig.edges() == AT_REST


@pytest.mark.usefixtures("chain")
async def test_an_image_with_a_writer_is_refused(rig: Rig) -> None:
    """What it writes would be lost. The job that could not start leaves no trace."""
    await rig.add(*CHAIN)
    with rig.graph.edit() as edit:
        edit.attach(Backend(), "root", rig.node("top"), Role.NONE, perm=Perm.WRITE)
    before = rig.edges()

    with pytest.raises(QmpdError, match="Permission conflict on node 'top': permissions 'write' are both required by"):
        await offline(rig)

    assert rig.told() == "created, null"
    assert rig.edges() == before
    assert rig.node("mid").read_only
    assert not rig.node("top").blockers


@pytest.mark.usefixtures("chain")
async def test_no_space_in_the_backing_image(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped with nospace, then cancelled: everything is as it was, and the image is still full."""

    def full(self: CopyEngine, runs: Any, start: int, length: int) -> None:
        raise CopyError("write", QmpdError("x", Kind.NO_SPACE), start)

    monkeypatch.setattr(CopyEngine, "copy", full)
    await rig.add(*CHAIN)
    await offline(rig, on_error=OnError.ENOSPC)
    await rig.until(lambda: rig.log[-1:] == ["paused"])
    assert rig.jobs.query_block_jobs()[0]["io-status"] == "nospace"
    await rig.jobs.cancel(rig.jobs.find("j0"), force=True)

    assert "ERROR operation=write action=stop" in rig.told()
    assert rig.edges() == AT_REST
    await rig.close()
    assert depths("top") == {0, 1, 2}
    reads("top.qcow2", *VIEW)


@pytest.mark.usefixtures("chain")
@pytest.mark.parametrize(
    ("error", "end"),
    [
        (QmpdError("x", Kind.IO, errno=5), " error=Input/output error"),
        (QmpdError("x", Kind.UNSUPPORTED), ""),
    ],
)
async def test_an_image_that_cannot_be_emptied(rig: Rig, error: QmpdError, end: str) -> None:
    """A failure is told; a format without the ability is none. The guest reads the same either way."""
    await rig.add(*CHAIN)
    spy(rig.node("top"), "make_empty", [], error)
    await offline(rig)
    await rig.gone()

    assert f"COMPLETED len={4 * MIB} offset={4 * MIB} speed=0{end}, concluded" in rig.told()
    assert rig.edges() == AT_REST
    await rig.close()
    reads("top.qcow2", *VIEW)
    reads("mid.qcow2", *VIEW)


async def test_a_shorter_raw_base_grows(rig: Rig) -> None:
    """To the image's length."""
    shell(
        "qemu-img create -q -f raw base.raw 1M",
        "qemu-img create -q -f qcow2 -b base.raw -F raw top.qcow2 3M",
        "qemu-io -f qcow2 -c 'write -P 0x33 2M 64k' top.qcow2",
    )
    file = {"driver": "file", "filename": "base.raw"}
    await rig.add({"driver": "raw", "node-name": "base", "read-only": True, "file": file}, image("top", "base"))
    await offline(rig)
    await rig.gone()
    assert "error" not in rig.told()

    await rig.close()
    assert Path("base.raw").stat().st_size == 3 * MIB
    assert Path("base.raw").read_bytes()[2 * MIB : 2 * MIB + 65536] == b"\x33" * 65536
    reads("top.qcow2", "0 0 2M", "0x33 2M 64k", "0 2112k 960k")


async def test_an_image_without_a_byte(rig: Rig) -> None:
    """Length 0: nothing to copy, nothing to empty, success."""
    shell("qemu-img create -q -f qcow2 mid.qcow2 0", "qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2")
    await rig.add(image("mid", read_only=True), image("top", "mid"))
    await offline(rig)
    await rig.gone()
    assert "COMPLETED len=0 offset=0 speed=0, concluded" in rig.told()


# -- any chain ---------------------------------------------------------------------------------------------------------


async def both(directory: Path, drawn: dict[str, Any]) -> None:
    """Ours and qemu-img's, side by side."""
    async with running(directory) as rig:
        names = build(drawn)
        Path("copy").mkdir()
        for name in names:
            shutil.copy(f"{name}.qcow2", "copy")
        shell(f"qemu-img commit -q -f qcow2 {names[-1]}.qcow2", cwd=Path("copy"))
        first = image(names[0], read_only=True)
        if drawn["raw_base"]:
            first = {"driver": "raw", "node-name": "i0", "file": first["file"], "read-only": True}
        await rig.add(first)
        for lower, upper in pairwise(names):
            await rig.add(image(upper, lower, read_only=upper != names[-1]))
        before = content(names[-1])
        await offline(rig, names[-1], speed=drawn["speed"])
        await rig.gone()

        assert "error" not in rig.told()
        await rig.close()
        assert content(names[-1]) == before
        for name in names:
            kind = "raw" if drawn["raw_base"] and name == "i0" else "qcow2"
            output(f"qemu-img compare -f {kind} -F {kind} {name}.qcow2 copy/{name}.qcow2")
        assert Path(f"{names[-1]}.qcow2").stat().st_size == Path(f"copy/{names[-1]}.qcow2").stat().st_size
        check(*(f"{name}.qcow2" for name in names[drawn["raw_base"] :]))


# An example takes a third of a second, so there is no time for shrinking.
@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(drawn=CHAINS, short=st.booleans())
def test_the_same_as_the_peer(drawn: dict[str, Any], short: bool) -> None:
    """Any mixture of sizes, clusters, zeros and compressed clusters: every image has the content that qemu-img commit
    gives it, and the emptied one the same length."""
    need("qemu-img", "qemu-io")
    if short:
        drawn = drawn | {"sizes": drawn["sizes"][:2], "clusters": drawn["clusters"][:2], "writes": drawn["writes"][:2]}
    with tempfile.TemporaryDirectory() as directory:
        trio.run(both, Path(directory), drawn, clock=trio.testing.MockClock(rate=1.0))
