"""Streams of real images: what is copied, who wins, what the headers say. Graphs and events are replayed elsewhere."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from contextlib import contextmanager
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
from qmpd.jobs import stream as stream_module
from qmpd.jobs.job import OnError
from qmpd.jobs.stream import StreamJob
from qmpd.jobs.stream_plan import StreamRequest, plan_stream
from tests.jobs.guest import Guest
from tests.jobs.rig import AT_REST, CHAIN, MIB, STARTED, VIEW, Rig, backing, check, image, reads, running, shell, spy
from tests.jobs.test_commit_random import CHAINS, build, content
from tests.tools import need

KIB = 1024


async def stream(rig: Rig, device: str = "top", **more: Any) -> None:
    """block-stream by node names."""
    request = StreamRequest(**{"job_id": "j0", "device": device} | more)
    await rig.jobs.launch(lambda: StreamJob(rig.graph, plan_stream(rig.graph, request)))
    rig.log.append("R")


def during_each_copy(monkeypatch: pytest.MonkeyPatch, before: Any) -> None:
    """``before(start, length)`` is called in the job's thread, with the range looked up and not copied yet."""
    real = CopyEngine.copy

    def copy(self: CopyEngine, runs: Any, start: int, length: int) -> None:
        before(start, length)
        real(self, runs, start, length)

    monkeypatch.setattr(CopyEngine, "copy", copy)


# -- guests ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("chain")
async def test_a_write_into_the_range_being_copied_comes_after_the_copy(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy holds the range that it has looked up, a write there waits, and its bytes are the last word."""
    await rig.add(*CHAIN)
    guest = Guest(rig, "top")
    order: list[str] = []
    writers: list[threading.Thread] = []

    def write(offset: int) -> None:
        guest.device.write(offset, b"G" * 512)
        order.append("written")

    def race(start: int, length: int) -> None:
        if not writers:
            writers.append(threading.Thread(target=write, args=[start + length // 2]))
            writers[0].start()
            writers[0].join(0.05)  # it would be through, if it could
        order.append("copied")

    during_each_copy(monkeypatch, race)
    await stream(rig)
    await rig.gone()
    await trio.to_thread.run_sync(writers[0].join)

    assert order[0] == "copied"
    assert "written" in order
    guest.detach(rig)
    await rig.close()
    whole = Path("top.qcow2").read_bytes()
    assert whole.count(b"G" * 512) == 1
    check("top.qcow2")


@pytest.mark.usefixtures("chain")
async def test_what_a_guest_wrote_before_is_not_copied_over(rig: Rig) -> None:
    """Written, zeroed and discarded while the job sleeps after its first chunk."""
    await rig.add(*CHAIN)
    guest = Guest(rig, "top")
    await stream(rig, base_node="base", speed=1, filter_node_name="sflt")
    held = await rig.rested()

    assert held["offset"] == 576 * KIB
    assert guest.edge is not None
    assert guest.edge.node.name == "sflt"
    guest.device.write(MIB, b"\x77" * 1000)
    guest.device.write_zeroes(MIB + 64 * KIB, 64 * KIB)
    guest.device.discard(MIB + 128 * KIB, 64 * KIB)
    rig.jobs.set_speed(rig.jobs.find("j0"), 0)
    await rig.gone()

    guest.detach(rig)
    await rig.close()
    assert backing("top.qcow2") == ("base.qcow2", "qcow2")
    reads("top.qcow2", *VIEW[:1], "0x77 1M 1000", "0 1088k 128k", "0x22 1216k 832k", "0x11 2M 2M")
    check("top.qcow2")


@pytest.mark.parametrize("seed", range(3))
async def test_a_busy_guest_never_loses_a_byte(
    rig: Rig, chain: None, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random requests during the whole job, from before it starts until after it ends; every read is compared."""
    monkeypatch.setattr(stream_module, "STRETCH", 128 * KIB)
    await rig.add(*CHAIN)
    guest = Guest(rig, "top", seed=seed)
    guest.start()
    try:
        await stream(rig, auto_finalize=False)
        await rig.until(lambda: rig.log[-1:] == ["PENDING"])
        await rig.jobs.finalize(rig.jobs.find("j0"))
    finally:
        await trio.to_thread.run_sync(guest.finish)

    assert guest.requests > 0
    guest.detach(rig)
    await rig.close()
    assert backing("top.qcow2") == (None, None)
    Path("shadow.raw").write_bytes(guest.shadow)
    subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", "top.qcow2", "shadow.raw"], check=True)
    check("top.qcow2")


@pytest.mark.usefixtures("chain")
async def test_what_a_guest_reads_stays_in_the_device(rig: Rig) -> None:
    """Its reads pass a copy-on-read filter: the job finds nothing left to do there."""
    await rig.add(*CHAIN)
    guest = Guest(rig, "top")
    await stream(rig, base_node="base", speed=1)
    await rig.rested()
    guest.device.readinto(MIB, memoryview(bytearray(512)))

    runs = rig.node("top").opened.map(MIB, 64 * KIB)

    assert [run.kind.name for run in runs] == ["DATA"]
    guest.detach(rig)


@pytest.mark.usefixtures("chain")
async def test_writers_beside_the_filter_are_refused(rig: Rig) -> None:
    """Whoever wants to write to the device itself would write behind the filter's back."""
    await rig.add(*CHAIN)
    await stream(rig, speed=1, filter_node_name="sflt")

    def attach(node: str, perm: Perm) -> None:
        with rig.graph.edit() as edit:
            edit.attach(Backend(), "root", rig.node(node), Role.NONE, perm=perm)

    with pytest.raises(QmpdError, match="Permission conflict on node 'top': permissions 'write'"):
        attach("top", Perm.WRITE)
    attach("sflt", Perm.WRITE)
    attach("top", Perm.CONSISTENT_READ)


# -- the chain ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("chain")
async def test_the_whole_stretch_is_held_in_place(rig: Rig) -> None:
    """From the filter to base, the link to base included."""
    await rig.add(*CHAIN)
    await stream(rig, base_node="base", speed=1, filter_node_name="sflt")

    for upper, slot, lower in (("sflt", "file", "top"), ("top", "backing", "mid"), ("mid", "backing", "base")):
        text = f"^Cannot change frozen '{slot}' link from '{upper}' to '{lower}'$"
        with pytest.raises(QmpdError, match=text), rig.graph.edit() as edit:
            edit.detach(rig.node(upper).children[slot])


@pytest.mark.usefixtures("chain")
async def test_cancelling_leaves_the_old_chain_with_more_in_it(rig: Rig) -> None:
    """Graph and header as before, the guest reads the same, and the same stream can be run again."""
    await rig.add(*CHAIN)
    await stream(rig, speed=1)
    await rig.rested()
    await rig.jobs.cancel(rig.jobs.find("j0"), force=False)

    assert rig.edges() == AT_REST
    assert not rig.node("top").blockers
    assert backing("top.qcow2")[0] == "mid.qcow2"

    await stream(rig)
    await rig.gone()
    await rig.close()
    assert backing("top.qcow2") == (None, None)
    Path("mid.qcow2").unlink()
    Path("base.qcow2").unlink()
    reads("top.qcow2", *VIEW)


@pytest.mark.usefixtures("chain")
async def test_a_header_is_put_back_when_the_links_cannot_change(rig: Rig) -> None:
    """A lock that cannot be had at the last moment: the job fails, the old chain stays."""
    await rig.add(*CHAIN)
    await stream(rig, base_node="base", auto_finalize=False)
    await rig.until(lambda: rig.log[-1:] == ["PENDING"])
    refusals = [QmpdError("no lock", Kind.LOCKED, errno=11)]

    def refuse(perm: Perm, shared: Perm) -> None:
        if refusals:
            raise refusals.pop()

    rig.node("base").opened.permissions_check = refuse  # type: ignore[method-assign]
    await rig.jobs.finalize(rig.jobs.find("j0"))

    assert not refusals
    assert "error=Resource temporarily unavailable" in rig.told()
    assert rig.edges() == AT_REST
    await rig.close()
    assert backing("top.qcow2") == ("mid.qcow2", "qcow2")


@pytest.mark.usefixtures("chain")
async def test_copies_are_durable_before_the_header_names_base(rig: Rig) -> None:
    """The sync of the device comes after its last write and before its header."""
    await rig.add(*CHAIN)
    calls: list[str] = []
    for method in ("place", "place_ranges", "flush", "change_backing_reference"):
        spy(rig.node("top"), method, calls)

    await stream(rig)
    await rig.gone()

    last = max(i for i, call in enumerate(calls) if call.startswith("top.place"))
    assert last < calls.index("top.flush", last) < calls.index("top.change_backing_reference")


@pytest.mark.usefixtures("chain")
async def test_a_string_that_does_not_fit_is_found_out_before_anything_is_copied(rig: Rig) -> None:
    """EINVAL, no progress, the old chain."""
    await rig.add(*CHAIN)
    await stream(rig, base_node="base", backing_file="x" * 1024)
    await rig.gone()

    assert f"COMPLETED len={4 * MIB} offset=0 speed=0 error=Invalid argument" in rig.told()
    assert rig.edges() == AT_REST


async def test_relative_names_lead_from_the_image_to_base(rig: Rig) -> None:
    """Images in three directories: the string written resolves from the image's own."""
    for name in ("a", "b", "c"):
        Path(name).mkdir()
    shell(
        "qemu-img create -q -f qcow2 a/base.qcow2 1M",
        "qemu-img create -q -f qcow2 -b ../a/base.qcow2 -F qcow2 b/mid.qcow2",
        "qemu-img create -q -f qcow2 -b ../b/mid.qcow2 -F qcow2 c/top.qcow2",
        "qemu-io -f qcow2 -c 'write -P 0x22 0 64k' b/mid.qcow2",
    )
    await rig.add({"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "c/top.qcow2"}})
    await stream(rig, base="../a/base.qcow2")
    await rig.gone()
    assert len(rig.graph.nodes) == 4  # what only the chain was holding is closed
    await rig.close()

    assert backing("c/top.qcow2") == ("../a/base.qcow2", "qcow2")
    Path("b/mid.qcow2").unlink()
    reads("c/top.qcow2", "0x22 0 64k", "0 64k 960k")


@pytest.mark.usefixtures("chain")
@pytest.mark.parametrize(("named", "link"), [("base", "base"), ("above-base", "above-base"), (None, None)])
async def test_filters_in_the_chain(rig: Rig, named: str | None, link: str | None) -> None:
    """The device may be a filter: the image below it is what is filled and relinked. The link leads to the node that
    was named, be it a filter; the header names the image."""
    await rig.add(
        image("base"),
        {"driver": "copy-on-read", "node-name": "above-base", "file": "base"},
        image("mid", "above-base", read_only=True),
        CHAIN[2],
        {"driver": "copy-on-read", "node-name": "above-top", "file": "top"},
    )
    guest = Guest(rig, "above-top")
    await stream(rig, "above-top", base_node=named)
    await rig.gone()

    assert "error" not in rig.told()
    backing_node = rig.node("top").backing
    assert (backing_node.name if backing_node else None) == link
    assert guest.edge is not None
    assert guest.edge.node.name == "above-top"
    guest.detach(rig)
    await rig.close()
    assert backing("top.qcow2")[0] == ("base.qcow2" if named else None)
    with hidden(["mid"] if named else ["mid", "base"]):
        reads("top.qcow2", *VIEW)


@pytest.mark.parametrize("version", ["1.1", "0.10"])
async def test_what_a_short_image_hides_stays_hidden(rig: Rig, version: str) -> None:
    """Its end lies inside a cluster of the device. Zeros are made to stay although nothing but zeros is below, yet."""
    shell(
        "qemu-img create -q -f qcow2 base.qcow2 4M",
        "qemu-io -f qcow2 -c 'write -P 0x11 0 4M' base.qcow2",
        f"qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2 {MIB + 4 * KIB}",
        f"qemu-img create -q -f qcow2 -o compat={version} -b mid.qcow2 -F qcow2 top.qcow2 4M",
    )
    await rig.add(*CHAIN)
    await stream(rig, base_node="base")
    await rig.gone()
    await rig.close()

    assert backing("top.qcow2")[0] == "base.qcow2"
    reads("top.qcow2", "0x11 0 1028k", "0 1028k 3068k")
    check("top.qcow2")


# -- errors ------------------------------------------------------------------------------------------------------------


def fail(monkeypatch: pytest.MonkeyPatch, bad: int, errno: int, unless: list[bool] | None = None) -> None:
    """Copies that touch byte ``bad`` fail, unless there is something in the list."""

    def refuse(start: int, length: int) -> None:
        if start <= bad < start + length and not unless:
            raise CopyError("write", QmpdError("x", Kind.IO, errno=errno), start)

    during_each_copy(monkeypatch, refuse)


@pytest.mark.usefixtures("chain")
async def test_a_large_piece_that_fails_is_tried_again_in_chunks(
    rig: Rig, mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that ignoring an error skips no more than the chunk it is in; the first error is how the job ends."""
    fail(monkeypatch, MIB, 5)
    await rig.add(*CHAIN)
    await stream(rig, on_error=OnError.IGNORE)
    await rig.until(lambda: any(line.startswith("ERROR") for line in rig.log))
    mock_clock.jump(1)
    await rig.gone()

    assert rig.told() == (
        f"{STARTED}, ERROR operation=read action=ignore, aborting, "
        f"COMPLETED len={4 * MIB} offset={4 * MIB} speed=0 error=Input/output error, concluded, null"
    )
    assert rig.edges() == AT_REST
    missing = [(run.offset, run.length) for run in rig.node("top").opened.map(0, 4 * MIB) if run.kind == 0]
    await rig.close()
    assert sum(length for _, length in missing) <= 512 * KIB
    assert any(start <= MIB < start + length for start, length in missing)
    reads("top.qcow2", *VIEW)


@pytest.mark.usefixtures("chain")
async def test_no_space_stops_the_job_until_there_is_some(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """on-error=enospc: paused with io-status nospace, then resumed to success."""
    space: list[bool] = []
    fail(monkeypatch, 3 * MIB, 28, unless=space)
    await rig.add(*CHAIN)
    await stream(rig, on_error=OnError.ENOSPC)
    await rig.until(lambda: rig.log[-1:] == ["paused"])
    (info,) = rig.jobs.query_block_jobs()
    assert (info["io-status"], info["offset"]) == ("nospace", 3 * MIB)
    await rig.jobs.resume(rig.jobs.find("j0"))
    await rig.until(lambda: rig.log[-1:] == ["paused"])
    space.append(True)
    await rig.jobs.resume(rig.jobs.find("j0"))
    await rig.gone()

    assert rig.told().endswith(f"COMPLETED len={4 * MIB} offset={4 * MIB} speed=0, concluded, null")
    await rig.close()
    reads("top.qcow2", *VIEW)


# -- any chain ---------------------------------------------------------------------------------------------------------


@contextmanager
def hidden(names: list[str]) -> Any:
    """Nobody can open these images meanwhile."""
    for name in names:
        Path(f"{name}.qcow2").rename(f"{name}.hidden")
    try:
        yield
    finally:
        for name in names:
            Path(f"{name}.hidden").rename(f"{name}.qcow2")


async def merge(directory: Path, drawn: dict[str, Any], device: int, base: int | None, old: bool) -> None:
    async with running(directory) as rig:
        names = build(drawn)
        if old:
            shell(f"qemu-img amend -f qcow2 -o compat=0.10 {names[device]}.qcow2")
        before = {name: content(name) for name in names[device:]}
        first = image(names[0], read_only=True)
        if drawn["raw_base"]:
            first = {"driver": "raw", "node-name": "i0", "file": first["file"], "read-only": True}
        await rig.add(first)
        for lower, upper in pairwise(names):
            await rig.add(image(upper, lower, read_only=upper != names[-1]))
        await stream(rig, names[device], speed=drawn["speed"], base_node=None if base is None else names[base])
        await rig.gone()

        assert "error" not in rig.told()
        await rig.close()
        assert backing(f"{names[device]}.qcow2")[0] == (None if base is None else f"{names[base]}.qcow2")
        with hidden(names[0 if base is None else base + 1 : device]):
            assert {name: content(name) for name in names[device:]} == before
        check(*(f"{name}.qcow2" for name in names[drawn["raw_base"] :]))


# An example takes a third of a second, so there is no time for shrinking.
@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(drawn=CHAINS, old=st.booleans(), data=st.data())
def test_the_guest_sees_no_difference(drawn: dict[str, Any], old: bool, data: st.DataObject) -> None:
    """Sizes, cluster sizes, versions, zeros, discards and compressed clusters in any mixture; the images that left the
    chain are not needed any more, and qemu-img finds no fault."""
    need("qemu-img", "qemu-io")
    device = data.draw(st.integers(1, len(drawn["sizes"]) - 1), label="device")
    base = data.draw(st.none() | st.integers(0, device - 1), label="base")

    with tempfile.TemporaryDirectory() as directory:
        trio.run(merge, Path(directory), drawn, device, base, old, clock=trio.testing.MockClock(rate=1.0))
