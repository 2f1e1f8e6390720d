"""Active commits under guests that write: whatever is acknowledged is in base after the pivot, and the job ends."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qmpd.block.copy import CopyEngine
from qmpd.jobs import active
from tests.jobs.guest import Guest
from tests.jobs.rig import MIB, Rig, check, image, running, shell, spy
from tests.tools import need

KIB = 1024
GRANULE = 64 * KIB


def make(size: int = 4 * MIB, *, base: str = "64k", top: str = "64k") -> None:
    """base <- top, with some data in both; cluster sizes as given, ``raw`` for a raw base."""
    kind, options = ("raw", "") if base == "raw" else ("qcow2", f"-o cluster_size={base}")
    shell(
        f"qemu-img create -q -f {kind} {options} base.img {size}",
        f"qemu-img create -q -f qcow2 -o cluster_size={top} -b base.img -F {kind} top.qcow2",
        f"qemu-io -f {kind} -c 'write -P 0x11 0 {size}' base.img",
        f"qemu-io -f qcow2 -c 'write -P 0x33 0 {size // 2}' -c 'write -z {size // 4} 100k' top.qcow2",
    )


async def add(rig: Rig, *, raw: bool = False) -> None:
    file = {"driver": "file", "filename": "base.img"}
    await rig.add({"driver": "raw" if raw else "qcow2", "node-name": "base", "read-only": True, "file": file})
    await rig.add(image("top", "base"))


def is_ready(rig: Rig) -> bool:
    return any(line.startswith("READY") for line in rig.log)


def compare(shadow: bytes, kind: str = "qcow2") -> None:
    """qemu-img reads from base what the guest remembers."""
    Path("shadow.raw").write_bytes(shadow)
    subprocess.run(["qemu-img", "compare", "-q", "-f", kind, "-F", "raw", "base.img", "shadow.raw"], check=True)
    if kind == "qcow2":
        check("base.img")


def after_each_copy(monkeypatch: pytest.MonkeyPatch, call: Callable[[int], None]) -> None:
    """``call`` gets the bytes that were just copied, in the thread that copied them."""
    real = CopyEngine.copy

    def copy(self: CopyEngine, runs: Any, start: int, length: int) -> None:
        real(self, runs, start, length)
        call(runs.allocated_bytes)

    monkeypatch.setattr(CopyEngine, "copy", copy)


# -- one write at the worst moment -------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before the bytes are moved", "after they were moved", "after they are published"])
async def test_a_write_races_with_the_copy_of_its_granule(rig: Rig, moment: str) -> None:
    """The granule is copied once more, and counted once more."""
    make()
    await add(rig)
    guest = Guest(rig, "top")
    base = rig.node("base").opened
    real, writes = base.place_ranges, [b"A" * 512]

    def write() -> None:
        if writes:
            guest.device.write(65 * KIB, writes.pop())

    @contextmanager
    def place_ranges(*args: Any) -> Iterator[Any]:
        with real(*args) as runs:
            if "before" in moment:
                write()
            yield runs
            if "were" in moment:
                write()
        write()

    base.place_ranges = place_ranges
    await rig.commit(top=None)
    await rig.until(lambda: is_ready(rig))

    assert not writes
    total = 2 * MIB + GRANULE
    assert f"READY len={total} offset={total} speed=0" in rig.log
    rig.jobs.complete(rig.jobs.find("j0"))
    await rig.gone()
    guest.shadow = bytearray(guest.length)
    guest.device.readinto(0, memoryview(guest.shadow))
    assert guest.shadow[65 * KIB :][:512] == b"A" * 512
    guest.detach(rig)
    await rig.close()
    compare(guest.shadow)


@pytest.mark.parametrize("moment", ["before it reaches top", "after it reached top"])
async def test_a_write_is_under_way_while_the_job_completes(rig: Rig, moment: str) -> None:
    """Whatever was copied meanwhile, the pivot waits for it and takes it along."""
    make()
    await add(rig)
    guest = Guest(rig, "top")
    top = rig.node("top").opened
    real, go_on = top.write, threading.Event()
    inside: list[int] = []

    def write(offset: int, data: Any) -> None:
        if "after" in moment:
            real(offset, data)
        inside.append(offset)
        assert go_on.wait(60)
        if "before" in moment:
            real(offset, data)

    await rig.commit(top=None)
    await rig.until(lambda: is_ready(rig))
    top.write = write  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: [guest.request() for _ in range(8)])
    thread.start()
    await rig.until(lambda: bool(inside))
    rig.jobs.complete(rig.jobs.find("j0"))
    await rig.until(lambda: guest.is_held)
    assert "COMPLETED" not in ", ".join(rig.log)

    go_on.set()
    await rig.gone()
    await rig.until(lambda: not thread.is_alive())
    guest.detach(rig)
    await rig.close()
    compare(guest.shadow)


# -- a guest that never stops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "top", "more"),
    [
        ("64k", "64k", {}),
        ("4k", "64k", {}),
        ("64k", "512", {}),
        ("raw", "4k", {}),
        ("2M", "64k", {"speed": 1 << 40}),
        ("64k", "64k", {"auto_finalize": False}),
    ],
)
async def test_no_write_is_lost_at_the_pivot(
    rig: Rig, mock_clock: Any, base: str, top: str, more: dict[str, Any]
) -> None:
    """Random requests from a thread before, during and after the pivot: every read fits, and so does base."""
    mock_clock.rate = 100.0  # a ready job looks for writes every millisecond
    make(base=base, top=top)
    await add(rig, raw=base == "raw")
    # Hundreds of small pieces in every granule: only a guest that thinks now and then can be caught up with.
    guest = Guest(rig, "top", seed=len(base + top), pause=0.005 if top == "512" else 0.0)
    guest.start()
    try:
        await rig.commit(top=None, **more)
        await rig.until(lambda: is_ready(rig))
        seen = guest.requests
        await rig.until(lambda: guest.requests > seen + 100)
        rig.jobs.complete(rig.jobs.find("j0"))
        if more.get("auto_finalize") is False:
            await rig.until(lambda: rig.log[-1:] == ["PENDING"])
            seen = guest.requests
            await rig.until(lambda: guest.requests > seen + 100)
            await rig.jobs.finalize(rig.jobs.find("j0"))
        await rig.gone()
        seen = guest.requests
        await rig.until(lambda: guest.requests > seen + 100)
    finally:
        guest.finish()

    assert "COMPLETED" in rig.told()
    assert guest.edge is not None
    assert guest.edge.node is rig.node("base")
    guest.detach(rig)
    await rig.close()
    compare(guest.shadow, "raw" if base == "raw" else "qcow2")


async def test_no_write_is_lost_when_users_stay(rig: Rig, mock_clock: Any) -> None:
    """A soft cancel under load: the guest stays on top, which has everything; so does base, up to that moment."""
    mock_clock.rate = 100.0
    make()
    await add(rig)
    guest = Guest(rig, "top", seed=7)
    guest.start()
    try:
        await rig.commit(top=None)
        await rig.until(lambda: is_ready(rig))
        flushed: list[str] = []
        spy(rig.node("base"), "flush", flushed)
        await rig.jobs.cancel(rig.jobs.find("j0"), force=False)
        await rig.gone()
    finally:
        guest.finish()

    assert flushed == ["base.flush"]
    guest.detach(rig)
    await rig.close()
    Path("shadow.raw").write_bytes(guest.shadow)
    shell("qemu-img compare -q -f qcow2 -F raw top.qcow2 shadow.raw")
    check("base.img", "top.qcow2")


async def test_converges_under_a_writer_half_as_fast(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ready comes after twice the work at most."""
    make(16 * MIB)
    await add(rig)
    guest = Guest(rig, "top")
    copied = credit = position = 0

    def write(count: int) -> None:
        nonlocal copied, credit, position
        copied += count
        credit += count // 2
        while credit >= GRANULE:
            guest.device.write(position, b"w" * GRANULE)
            credit -= GRANULE
            position = (position + GRANULE) % (16 * MIB)

    after_each_copy(monkeypatch, write)
    await rig.commit(top=None)
    await rig.until(lambda: is_ready(rig))

    assert 8 * MIB < copied <= 16 * MIB
    await rig.jobs.cancel(rig.jobs.find("j0"), force=True)
    await rig.gone()
    guest.detach(rig)


async def test_completes_against_a_writer_twice_as_fast(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying to catch up ends at some point; the rest is copied with the guest held."""
    make(16 * MIB)
    monkeypatch.setattr(active, "HELD", 4 * GRANULE)
    await add(rig)
    guest = Guest(rig, "top")
    await rig.commit(top=None)
    await rig.until(lambda: is_ready(rig))
    copied = 0

    def write(count: int) -> None:
        nonlocal copied
        copied += count
        if not guest.is_held:
            for _ in range(2 * count // GRANULE + 8):
                guest.request()

    after_each_copy(monkeypatch, write)
    for _ in range(50):
        guest.request()
    rig.jobs.complete(rig.jobs.find("j0"))
    await rig.gone()

    assert copied > 4 * GRANULE
    guest.detach(rig)
    await rig.close()
    compare(guest.shadow)


# -- any images, any requests ------------------------------------------------------------------------------------------

CLUSTERS = st.sampled_from(["512", "4k", "64k", "2M"])


async def follow(directory: Path, sizes: tuple[int, int], clusters: tuple[str, str], raw: bool, seed: int) -> None:
    async with running(directory) as rig:
        below, above = ("" if raw else f"-o cluster_size={clusters[0]}"), f"-o cluster_size={clusters[1]}"
        kind = "raw" if raw else "qcow2"
        shell(
            f"qemu-img create -q -f {kind} {below} base.img {sizes[0] * 512}",
            f"qemu-img create -q -f qcow2 {above} -b base.img -F {kind} top.qcow2 {sizes[1] * 512}",
            f"qemu-io -f {kind} -c 'write -P 0x11 0 {sizes[0] * 512}' base.img",
        )
        await add(rig, raw=raw)
        guest = Guest(rig, "top", seed=seed)
        for _ in range(seed % 20):
            guest.request()
        left = 30

        def write(_: int) -> None:
            nonlocal left
            for _ in range(min(left, 2)):
                left -= 1
                guest.request()

        with pytest.MonkeyPatch.context() as patch:
            after_each_copy(patch, write)
            await rig.commit(top=None)
            await rig.until(lambda: is_ready(rig))
        for _ in range(5):
            guest.request()
        rig.jobs.complete(rig.jobs.find("j0"))
        await rig.gone()
        for _ in range(5):
            guest.request()

        assert "error" not in rig.told()
        guest.detach(rig)
        await rig.close()
        content = bytearray(guest.shadow)
        content += b"\x11" * (sizes[0] * 512 - len(content))
        compare(content, kind)


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    sizes=st.tuples(st.integers(300, 3000), st.integers(300, 3000)),
    clusters=st.tuples(CLUSTERS, CLUSTERS),
    raw=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_follows_any_guest(sizes: tuple[int, int], clusters: tuple[str, str], raw: bool, seed: int) -> None:
    """Sizes that are no whole clusters, base longer or shorter: base holds what the guest wrote between the copies."""
    need("qemu-img", "qemu-io")
    with tempfile.TemporaryDirectory() as directory:
        trio.run(follow, Path(directory), sizes, clusters, raw, seed, clock=trio.testing.MockClock(rate=1.0))
