"""What all jobs do together is what the budget says, whatever they are and however often it is changed."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.control.bridge import Bridge
from qmpd.jobs.budget import Budget, Limits, Ticket
from qmpd.jobs.cell import Cell
from qmpd.jobs.pieces import CHUNK
from tests.inprocess import CommandError
from tests.inprocess import running as core_running
from tests.jobs.rig import Rig, image, running, shell

T = TypeVar("T")
KIB, MIB = 1 << 10, 1 << 20
SECONDS = 10.0


def simulate(budget: Budget, workers: int, size: Callable[[], int], took: Callable[[], float]) -> None:
    """Until ``SECONDS``: each worker takes a ticket, waits for it, moves a piece, and begins again."""
    events: list[tuple[float, int, Ticket | None]] = [(0.0, worker, None) for worker in range(workers)]
    while events:
        now, worker, ticket = heapq.heappop(events)
        if now > SECONDS:
            return
        held = budget.ticket(now, ticket)
        assert held is not None
        if held.start > now:
            heapq.heappush(events, (held.start, worker, held))
            continue
        budget.charge(size(), held)
        heapq.heappush(events, (now + took(), worker, None))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 8),
    st.sampled_from([MIB, 8 * MIB, 100 * MIB, 1 << 30]),
    st.integers(0, 1 << 32),
)
def test_bytes_are_within_two_percent_over_ten_seconds(workers: int, rate: int, seed: int) -> None:
    """Pieces of any size up to a portion, as long as there is enough to do and moving is fast enough."""
    budget, random = Budget(), Random(seed)
    budget.set(Limits(bytes_per_second=rate), 0.0)
    pace = 4 * KIB / rate
    portion = budget.portion
    simulate(budget, workers, lambda: random.randint(portion // 2, portion), lambda: random.uniform(0, pace))
    used, _ = budget.used
    assert abs(used / (rate * SECONDS) - 1) < 0.02


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 8), st.sampled_from([50, 1000]), st.integers(0, 1 << 32))
def test_operations_are_within_two_percent_over_ten_seconds(workers: int, rate: int, seed: int) -> None:
    """However many bytes are in them."""
    budget, random = Budget(), Random(seed)
    budget.set(Limits(iops=rate), 0.0)
    simulate(budget, workers, lambda: random.randint(1, CHUNK), lambda: random.uniform(0, 0.1 / rate))
    _, operations = budget.used
    assert abs(operations / (rate * SECONDS) - 1) < 0.02


def test_what_was_not_used_is_not_saved_up() -> None:
    """After a rest there is no more than an instant's worth at once."""
    budget = Budget()
    budget.set(Limits(bytes_per_second=MIB), 0.0)
    moved, ticket = 0, budget.ticket(1000.0, None)
    while ticket is not None and ticket.start <= 1000.0:
        budget.charge(64 * KIB, ticket)
        moved, ticket = moved + 64 * KIB, budget.ticket(1000.0, None)
    assert moved <= 0.05 * MIB + 64 * KIB


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_paused_job_does_not_keep_its_place() -> None:
    """What it had taken goes to the others."""
    budget, clock = Budget(), Clock()
    budget.set(Limits(bytes_per_second=MIB), 0.0)
    first, second = Cell(clock, budget=budget), Cell(clock, budget=budget)
    list(first.pace())
    first.advance(MIB, charged=MIB)
    waiting = first.pace()
    delay = next(waiting).delay
    first.pause()
    next(waiting)
    assert next(second.pace()).delay == pytest.approx(delay)


def test_a_change_counts_for_those_who_wait() -> None:
    """Woken, they ask again: for a new ticket, or for none."""
    budget, clock = Budget(), Clock()
    budget.set(Limits(bytes_per_second=64 * KIB), 0.0)
    cell = Cell(clock, budget=budget)
    list(cell.pace())
    cell.advance(MIB, charged=MIB)
    waiting = cell.pace()
    assert next(waiting).delay > 10
    budget.set(Limits(bytes_per_second=MIB), 0.0)
    assert next(waiting, None) is None
    cell.advance(MIB, charged=MIB)
    waiting = cell.pace()
    assert next(waiting).delay == pytest.approx(1.0)
    budget.set(Limits(), 0.0)
    assert next(waiting, None) is None
    assert not cell.is_limited


# -- with real jobs ----------------------------------------------------------------------------------------------------


class Inline(Bridge):
    """Workers take no time, so that a clock which jumps says how long a job takes."""

    async def to_worker(self, fn: Callable[..., T], *args: Any) -> T:
        await trio.lowlevel.checkpoint()
        return fn(*args)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three chains of two images, 64 MiB of data in each upper one."""
    for number in range(3):
        shell(
            f"qemu-img create -q -f qcow2 b{number}.qcow2 64M",
            f"qemu-img create -q -f qcow2 -b b{number}.qcow2 -F qcow2 m{number}.qcow2",
            f"qemu-io -f qcow2 -c 'write -P 7 0 64M' m{number}.qcow2",
            f"qemu-img create -q -f qcow2 -b m{number}.qcow2 -F qcow2 t{number}.qcow2",
            cwd=tmp_path,
        )
    return tmp_path


async def three_jobs(rig: Rig) -> None:
    """An intermediate commit, an active one, and one with a limit of its own, which is no obstacle."""
    rig.jobs._around = replace(rig.jobs._around, bridge=Inline(1))
    for number in range(3):
        await rig.add(image(f"b{number}", read_only=True), image(f"m{number}", f"b{number}", read_only=True))
        await rig.add(image(f"t{number}", f"m{number}"))
    await rig.commit(job_id="j0", device="t0", top="m0", base="b0")
    await rig.commit(job_id="j1", device="t1", top="t1", base="b1")
    await rig.commit(job_id="j2", device="t2", top="m2", base="b2", speed=1 << 30)


async def test_three_jobs_keep_to_it(images: Path, autojump_clock: Any) -> None:
    """Within 2 % of 8 MiB a second over 10 s, then of 4 MiB; each gets a share."""
    async with running(images) as rig:
        rig.jobs.set_budget(Limits(bytes_per_second=8 * MIB))
        await three_jobs(rig)
        start = rig.jobs.budget.used[0]
        await trio.sleep(SECONDS)
        middle = rig.jobs.budget.used[0]
        rig.jobs.set_budget(Limits(bytes_per_second=4 * MIB))
        await trio.sleep(SECONDS)
        end = rig.jobs.budget.used[0]
        assert abs((middle - start) / (8 * MIB * SECONDS) - 1) < 0.02
        assert abs((end - middle) / (4 * MIB * SECONDS) - 1) < 0.02
        for job in rig.jobs.query_jobs():
            assert job["current-progress"] > 20 * MIB


async def test_three_jobs_keep_to_their_operations(images: Path, autojump_clock: Any) -> None:
    """10 a second, of 512 KiB at most."""
    async with running(images) as rig:
        rig.jobs.set_budget(Limits(iops=10))
        await three_jobs(rig)
        start = rig.jobs.budget.used
        await trio.sleep(SECONDS)
        moved, operations = (now - then for now, then in zip(rig.jobs.budget.used, start, strict=True))
        assert abs(operations / (10 * SECONDS) - 1) < 0.02
        assert moved <= operations * CHUNK


async def test_clients_set_and_see_it() -> None:
    """What is not given stays; 0 takes a limit away."""
    async with core_running() as core:
        client = await core.client()
        none = {"bytes-per-second": 0, "iops": 0, "bytes": 0, "operations": 0}
        assert await client.execute("x-qmpd-query-budget") == none
        await client.execute("x-qmpd-set-budget", bytes_per_second=MIB)
        await client.execute("x-qmpd-set-budget", iops=5)
        assert await client.execute("x-qmpd-query-budget") == none | {"bytes-per-second": MIB, "iops": 5}
        for name in ("bytes-per-second", "iops"):
            with pytest.raises(CommandError, match=f"Parameter '{name}' expects a non-negative value"):
                await client.call("x-qmpd-set-budget", {name: -1})
        await client.execute("x-qmpd-set-budget", bytes_per_second=0)
        assert (await client.execute("x-qmpd-query-budget"))["iops"] == 5
