"""Numbered events, subscriptions, results: what a client hears, and what it can learn that was away."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from qmpd.control import channel
from qmpd.errors import Kind, QmpdError
from qmpd.jobs.cell import Cell, Rest
from qmpd.jobs.job import Body, Job
from qmpd.steps import Steps
from tests.inprocess import CommandError, InProcess, Wire, running

MIB = 1 << 20


class Idle(Job):
    """Moves ``steps`` MiB out of twice as many, one a second; then fails if ``error`` is set."""

    job_type = "commit"

    def __init__(self, job_id: str, steps: int = 2, error: QmpdError | None = None) -> None:
        super().__init__(job_id)
        self._steps = steps
        self._failure = error

    def start(self, cell: Cell) -> Steps[None]:
        cell.expect_survey()
        return super().start(cell)

    def run(self, cell: Cell) -> Body:
        cell.set_total(2 * self._steps * MIB)
        cell.set_work(self._steps * MIB)
        for _ in range(self._steps):
            yield from cell.checkpoint()
            cell.advance(2 * MIB, charged=MIB)
            yield Rest(1.0)
        if self._failure is not None:
            raise self._failure


async def launch(core: InProcess, job_id: str, steps: int = 2, error: QmpdError | None = None) -> None:
    await core.core.jobs.launch(lambda: Idle(job_id, steps, error))


async def ended(core: InProcess) -> None:
    """All jobs are over."""
    while lives := core.core.jobs.lives:
        await lives[0].over.wait()


async def heard(wire: Wire) -> list[dict[str, Any]]:
    """Every event that has come to a client so far."""
    await wire.execute("query-version")
    return wire.events


def numbers(events: list[dict[str, Any]]) -> list[int]:
    return [event["x-qmpd-number"] for event in events]


async def test_a_hundred_clients_hear_fifty_jobs_once_and_in_order(autojump_clock: trio.testing.MockClock) -> None:
    """Every event, with the same numbers for all, none missing and none twice."""
    async with running() as core:
        wires = [await core.client() for _ in range(100)]
        for wire in wires:
            assert (await wire.execute("x-qmpd-subscribe"))["complete"]
        async with trio.open_nursery() as nursery:
            for index in range(50):
                nursery.start_soon(launch, core, f"j{index}", 1 + index % 3)
        await ended(core)
        first, *others = [await heard(wire) for wire in wires]

        assert numbers(first) == list(range(1, core.ctx.bus.history.last + 1))
        assert all(other == first for other in others)
        finished = [event["data"]["device"] for event in first if event["event"] == "BLOCK_JOB_COMPLETED"]
        assert sorted(finished) == sorted(f"j{index}" for index in range(50))


async def test_who_did_not_ask_hears_what_the_peer_would_tell(autojump_clock: trio.testing.MockClock) -> None:
    """No number, no event of ours, no progress; also after having unsubscribed."""
    async with running() as core:
        plain, asked, left = [await core.client() for _ in range(3)]
        await asked.execute("x-qmpd-subscribe", progress=True)
        await left.execute("x-qmpd-subscribe", progress=True)
        await left.execute("x-qmpd-unsubscribe")
        core.ctx.bus.publish("X_QMPD_SOMETHING", {"a": 1})
        await launch(core, "j0")
        await ended(core)
        told = await heard(plain)

        assert told == await heard(left)
        assert {"timestamp", "event", "data"} == {key for event in told for key in event}
        ours = [event for event in await heard(asked) if event["event"].startswith("X_QMPD_")]
        assert ours[0]["event"] == "X_QMPD_SOMETHING"
        assert [event["event"] for event in told] == [
            event["event"] for event in asked.events if not event["event"].startswith("X_QMPD_")
        ]


async def test_a_client_that_was_away_learns_the_rest_once(autojump_clock: trio.testing.MockClock) -> None:
    """What it heard before and what is replayed make the whole, without a seam."""
    async with running() as core:
        early = await core.client()
        await early.execute("x-qmpd-subscribe")
        await launch(core, "j0")
        seen = await heard(early)
        await early.close()
        await ended(core)
        await launch(core, "j1")

        late = await core.client()
        log = await late.execute("x-qmpd-subscribe", since=seen[-1]["x-qmpd-number"], log=core.ctx.bus.history.log)
        await ended(core)
        rest = await heard(late)

        assert log["complete"]
        assert numbers(seen + rest) == list(range(1, core.ctx.bus.history.last + 1))
        asked = await late.execute("x-qmpd-events", since=len(seen))
        assert [row["number"] for row in asked["events"]] == numbers(rest)
        assert [row["data"] for row in asked["events"]] == [event["data"] for event in rest]


async def test_a_subscription_can_name_events(autojump_clock: trio.testing.MockClock) -> None:
    """Live and replayed."""
    async with running() as core:
        await launch(core, "j0")
        await ended(core)
        wire = await core.client()
        await wire.execute("x-qmpd-subscribe", names=["BLOCK_JOB_COMPLETED"], since=0)
        await launch(core, "j1")
        await ended(core)

        assert [event["data"]["device"] for event in (await heard(wire))[-2:]] == ["j0", "j1"]
        assert {event["event"] for event in wire.events} == {"BLOCK_JOB_COMPLETED"}


async def test_a_deaf_client_is_dropped_and_can_come_back(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Its outbox is bounded; what it missed is in the log."""
    monkeypatch.setattr(channel, "HARD_LIMIT", 1 << 16)
    async with running() as core:
        deaf = core.connect(send_buffer=4096)
        await deaf.receive()
        await deaf.call("qmp_capabilities")
        await deaf.execute("x-qmpd-subscribe")
        for index in range(2000):
            core.ctx.bus.publish("X_QMPD_SOMETHING", {"index": index})
        seen = numbers(await deaf.rest())
        assert len(seen) < 2000

        monkeypatch.undo()
        back = await core.client()
        assert (await back.execute("x-qmpd-subscribe", since=seen[-1] if seen else 0))["complete"]
        assert seen + numbers(await heard(back)) == list(range(1, 2001))


async def test_what_is_too_old_is_told_to_be_missing() -> None:
    """The log is bounded, and so is honesty about it: up to the very border nothing is missing."""
    async with running() as core:
        history = core.ctx.bus.history
        bound = history.events.maxlen
        assert bound is not None
        for index in range(bound + 5):
            core.ctx.bus.publish("X_QMPD_SOMETHING", {"index": index})
        wire = await core.client()

        kept = await wire.execute("x-qmpd-events", since=5)
        assert (kept["complete"], len(kept["events"]), kept["last"]) == (True, bound, bound + 5)
        assert not (await wire.execute("x-qmpd-events", since=4))["complete"]


@pytest.mark.parametrize("where", [{"since": 1, "log": "another"}, {"since": 99}])
async def test_a_number_of_another_log_brings_all_of_this_one(where: dict[str, Any]) -> None:
    """A client that outlived the daemon must not miss the beginning of the new one."""
    async with running() as core:
        core.ctx.bus.publish("X_QMPD_SOMETHING")
        core.ctx.bus.publish("X_QMPD_SOMETHING")
        wire = await core.client()
        answer = await wire.execute("x-qmpd-events", **where)

        assert not answer["complete"]
        assert [row["number"] for row in answer["events"]] == [1, 2]


async def test_negative_numbers_are_refused() -> None:
    async with running() as core:
        wire = await core.client()
        for name in ("x-qmpd-events", "x-qmpd-subscribe", "x-qmpd-job-results"):
            with pytest.raises(CommandError, match="Parameter 'since' expects a non-negative value"):
                await wire.execute(name, since=-1)


async def test_results_stay_when_jobs_are_gone(autojump_clock: trio.testing.MockClock) -> None:
    """Completed, failed and cancelled; each is told by the event whose number it has."""
    async with running() as core:
        wire = await core.client()
        await launch(core, "good")
        await launch(core, "bad", error=QmpdError("Input/output error", Kind.IO))
        await launch(core, "stopped", steps=1000)
        await wire.execute("job-cancel", id="stopped")
        await ended(core)
        results = await wire.execute("x-qmpd-job-results")
        log = {row["number"]: row for row in (await wire.execute("x-qmpd-events"))["events"]}

        assert {(row["id"], row["outcome"], row.get("error")) for row in results} == {
            ("good", "completed", None),
            ("bad", "failed", "Input/output error"),
            ("stopped", "cancelled", None),
        }
        assert await wire.execute("query-jobs") == []
        for row in results:
            assert log[row["number"]]["data"] == {"id": row["id"], "status": "concluded"}
            assert row["incarnation"] == core.ctx.bus.history.incarnation
        last = results[-1]
        assert await wire.execute("x-qmpd-job-results", since=last["number"] - 1) == [last]
        assert [row["id"] for row in await wire.execute("x-qmpd-job-results", id="bad")] == ["bad"]


async def test_progress_is_of_what_is_copied_and_never_falls(autojump_clock: trio.testing.MockClock) -> None:
    """At most two messages a second and job, and the last one says that all is done."""
    async with running() as core:
        wire = await core.client()
        await wire.execute("x-qmpd-subscribe", progress=True)
        began = trio.current_time()
        await launch(core, "j0", steps=40)
        await ended(core)
        took = trio.current_time() - began
        told = [event["data"] for event in await heard(wire) if event["event"] == "X_QMPD_JOB_PROGRESS"]

        done = [data["done"] for data in told]
        assert done == sorted(set(done))
        assert {data["total"] for data in told} == {40 * MIB}
        assert done[-1] == 40 * MIB
        assert 10 < len(told) <= 2 * took + 2
        assert any(data.get("rate", 0) > 0 and data.get("eta", 0) > 0 for data in told)


async def test_who_subscribes_late_is_told_where_jobs_are(autojump_clock: trio.testing.MockClock) -> None:
    """Also of one that is paused, and so does not move."""
    async with running() as core:
        wire = await core.client()
        await launch(core, "j0", steps=1000)
        await wire.execute("job-pause", id="j0")
        await wire.execute("x-qmpd-subscribe", progress=True)
        event = await wire.event("X_QMPD_JOB_PROGRESS")

        assert (event["id"], event["total"]) == ("j0", 1000 * MIB)
