"""Jobs that wait until their chain is free, in their order; and commands that may be sent twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.inprocess import CommandError, InProcess, Wire, running
from tests.jobs.rig import image, reads, shell

FIRST = {"job_id": "j1", "device": "top", "top_node": "mid", "base_node": "low"}
SECOND = {"job_id": "j2", "device": "top", "top_node": "low", "base_node": "base"}
QUEUE = {"x_qmpd_queue": True}


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """base <- low <- mid <- top and b <- t, with data in all but the topmost; the working directory."""
    monkeypatch.chdir(tmp_path)
    shell("qemu-img create -q -f qcow2 base.qcow2 4M", "qemu-img create -q -f qcow2 b.qcow2 4M")
    for below, above in (("base", "low"), ("low", "mid"), ("mid", "top"), ("b", "t")):
        shell(f"qemu-img create -q -f qcow2 -b {below}.qcow2 -F qcow2 {above}.qcow2")
    shell("qemu-io -f qcow2 -c 'write -P 2 0 4M' low.qcow2", "qemu-io -f qcow2 -c 'write -P 3 0 2M' mid.qcow2")
    shell("qemu-io -f qcow2 -c 'write -P 4 0 1M' t.qcow2")


async def started(core: InProcess) -> Wire:
    """A client that has subscribed, with both chains as nodes."""
    client = await core.client()
    for name, below in (("base", None), ("low", "base"), ("mid", "low"), ("top", "mid"), ("b", None), ("t", "b")):
        await client.call("blockdev-add", image(name, below, read_only=name not in ("top", "t")))
    await client.execute("x-qmpd-subscribe")
    return client


async def go(client: Wire, job: str) -> None:
    await client.execute("block-job-set-speed", device=job, speed=0)


async def over(client: Wire, job: str) -> None:
    """Until it has completed."""
    ended = await client.event("BLOCK_JOB_COMPLETED", lambda data: data["device"] == job)
    assert "error" not in ended
    await client.event("JOB_STATUS_CHANGE", lambda data: data == {"id": job, "status": "null"})


async def waiting(client: Wire) -> dict[str, Any]:
    """Job -> what it waits for, in the order of the queue."""
    queue = await client.execute("x-qmpd-query-queue")
    return {row["id"]: row["waiting-on"] for row in queue["waiting"]}


async def test_a_job_waits_for_its_chain_and_then_runs() -> None:
    """Who asked can see what it waits for; the others see nothing but the jobs that run."""
    async with running() as core:
        client, plain = await started(core), await core.client()
        await client.execute("block-commit", **FIRST, speed=1)
        with pytest.raises(CommandError, match="Need a root block node"):
            await client.execute("block-commit", **SECOND)

        await client.execute("block-commit", **SECOND, **QUEUE)

        on = {"kind": "job", "id": "j1"}
        assert await waiting(client) == {"j2": on}
        queued = await client.event("X_QMPD_JOB_QUEUED")
        assert queued == {"id": "j2", "type": "commit", "device": "top", "waiting-on": on}
        assert [job["id"] for job in await plain.execute("query-jobs")] == ["j1"]
        await go(client, "j1")
        await over(client, "j1")
        assert (await client.event("X_QMPD_JOB_DEQUEUED"))["outcome"] == "started"
        await over(client, "j2")
        assert await waiting(client) == {}
        await plain.execute("query-jobs")
        assert not [event for event in plain.events if event["event"].startswith("X_QMPD")]
    reads("base.qcow2", "3 0 2M", "2 2M 2M")


async def test_on_an_idle_chain_it_is_the_usual_command() -> None:
    """It starts at once, and what is wrong with it is the answer."""
    async with running() as core:
        client = await started(core)
        with pytest.raises(CommandError, match="Cannot find device='' nor node-name='nope'"):
            await client.execute("block-commit", **FIRST | {"base_node": "nope"}, **QUEUE)
        with pytest.raises(CommandError, match="Device 'nope' not found"):
            await client.execute("block-commit", **FIRST | {"device": "nope"}, **QUEUE)
        with pytest.raises(CommandError, match="Invalid job ID '%'"):
            await client.execute("block-commit", **FIRST | {"job_id": "%"}, **QUEUE)
        await client.execute("block-commit", **FIRST, **QUEUE)
        await over(client, "j1")
        assert "X_QMPD_JOB_QUEUED" not in {event["event"] for event in client.events}


async def test_a_chain_keeps_its_order_and_does_not_hold_up_others() -> None:
    """What came later waits for what came earlier, also when only that is in its way."""
    async with running() as core:
        client = await started(core)
        await client.execute("block-commit", **FIRST, speed=1)
        await client.execute("block-commit", **SECOND, **QUEUE, speed=1)
        await client.execute("block-stream", job_id="j3", device="top", **QUEUE)
        await client.execute("block-commit", job_id="other", device="t", top_node="t", **QUEUE)
        await client.event("BLOCK_JOB_READY", lambda data: data["device"] == "other")
        await go(client, "j1")
        await over(client, "j1")
        await client.event("X_QMPD_JOB_DEQUEUED", lambda data: data["id"] == "j2")
        assert await waiting(client) == {"j3": {"kind": "job", "id": "j2"}}
        await go(client, "j2")
        await over(client, "j2")
        await over(client, "j3")
    reads("top.qcow2", "3 0 2M", "2 2M 2M")


async def test_no_more_than_the_limit_run() -> None:
    """Of those that may wait; others are not held up."""
    async with running() as core:
        client = await started(core)
        core.core.queue.limit = 1
        await client.execute("block-commit", **FIRST, speed=1)
        await client.execute("block-stream", job_id="s", device="t", **QUEUE)
        await client.execute("block-stream", job_id="after", device="t", **QUEUE)
        assert await waiting(client) == {"s": {"kind": "limit"}, "after": {"kind": "queued", "id": "s"}}
        assert (await client.execute("x-qmpd-query-queue"))["running"] == 1
        await go(client, "j1")
        await over(client, "j1")
        await over(client, "s")
        await over(client, "after")


async def test_what_cannot_start_when_its_turn_comes_has_a_result() -> None:
    """The command was answered long ago: an event tells why, and so do the results."""
    async with running() as core:
        client = await started(core)
        await client.execute("block-commit", **FIRST, speed=1)
        await client.execute("block-commit", **SECOND | {"top_node": "mid"}, **QUEUE)
        await go(client, "j1")
        told = await client.event("X_QMPD_JOB_DEQUEUED")
        text = "'mid' is not in this backing file chain"
        assert told == {"id": "j2", "type": "commit", "outcome": "failed", "error": text}
        (result,) = await client.execute("x-qmpd-job-results", id="j2")
        assert (result["outcome"], result["error"]) == ("failed", text)


@pytest.mark.parametrize("command", [("job-cancel", "id"), ("block-job-cancel", "device")])
async def test_a_waiting_job_can_be_cancelled(command: tuple[str, str]) -> None:
    """Its name is taken as long as it waits."""
    async with running() as core:
        client = await started(core)
        await client.execute("block-commit", **FIRST, speed=1)
        await client.execute("block-commit", **SECOND, **QUEUE)
        with pytest.raises(CommandError, match="Job ID 'j2' already in use"):
            await client.execute("block-stream", job_id="j2", device="t")
        await client.execute(command[0], **{command[1]: "j2"})
        assert (await client.event("X_QMPD_JOB_DEQUEUED"))["outcome"] == "cancelled"
        assert await waiting(client) == {}
        await client.execute("block-stream", job_id="j2", device="t")


async def test_what_waits_ends_with_the_daemon() -> None:
    """After quit nothing starts any more."""
    async with running() as core:
        client = await started(core)
        await client.execute("block-commit", **FIRST, speed=1)
        await client.execute("block-commit", **SECOND, **QUEUE)
        await client.execute("quit")
        assert (await client.event("X_QMPD_JOB_DEQUEUED"))["outcome"] == "cancelled"
        assert "j2" not in {event["data"].get("id") for event in client.events if event["event"] == "JOB_STATUS_CHANGE"}


async def test_equal_commands_start_one_job() -> None:
    """Whether it runs or waits; anything else in it makes it another one, whose name is taken."""
    again = {"x_qmpd_idempotent": True}
    async with running() as core:
        client = await started(core)
        for _ in range(2):
            await client.execute("block-commit", **FIRST, speed=1, **again)
        for _ in range(2):
            await client.execute("block-commit", **SECOND, **QUEUE, **again)
        assert [job["id"] for job in await client.execute("query-jobs")] == ["j1"]
        assert list(await waiting(client)) == ["j2"]
        for different in (FIRST | {"speed": 2}, SECOND | {"speed": 1} | QUEUE, FIRST | {"top_node": "low"}):
            with pytest.raises(CommandError, match=r"already in use|Need a root"):
                await client.execute("block-commit", **different, **again)
        with pytest.raises(CommandError, match="Need a root block node"):
            await client.execute("block-commit", **FIRST, speed=1)


@pytest.mark.parametrize("parameter", ["x-qmpd-queue", "x-qmpd-idempotent"])
async def test_a_transaction_cannot_wait(parameter: str) -> None:
    """It is all at once or not at all."""
    data = {"job-id": "j", "device": "t", parameter: True}
    async with running() as core:
        client = await started(core)
        with pytest.raises(CommandError, match=f"Parameter '{parameter}' is not supported in a transaction"):
            await client.execute("transaction", actions=[{"type": "x-qmpd-block-stream", "data": data}])
