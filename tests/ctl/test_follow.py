"""Following a job: every way it can end, from its beginning, from the middle, and after the fact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from qmpd.ctl.client import CommandError, ConnectionLostError, connect
from qmpd.ctl.follow import JOB_EVENTS, Ending, Outcome, follow
from qmpd.meter import Meter
from tests.ctl.fake import FakeDaemon, fake_daemon, raises

MIB = 1 << 20


class Recorder:
    """A display that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []
        self.notes: list[str] = []

    def progress(self, meter: Meter, status: str) -> None:
        self.seen.append((status, meter.fraction))

    def note(self, line: str) -> None:
        self.notes.append(line)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        yield


def row(status: str = "running", done: int = 0, **more: Any) -> dict[str, Any]:
    """A row of query-jobs."""
    return {
        "id": "j0",
        "type": "commit",
        "status": status,
        "current-progress": done,
        "total-progress": 64 * MIB,
        **more,
    }


async def run(
    directory: Path, rows: list[dict[str, Any]], *script: tuple[Any, ...], **options: bool
) -> tuple[Ending, Recorder, FakeDaemon]:
    """Follow 'j0' while the fake emits ``script``: (event, data) or (status, ...)."""
    recorder = Recorder()
    async with fake_daemon(directory) as daemon:
        daemon.answers["query-jobs"] = lambda _: rows
        daemon.answers["job-complete"] = lambda _: {}
        async with connect(daemon.path) as client:
            with client.events(*JOB_EVENTS) as events:
                for name, *data in script:
                    if isinstance(name, str) and name.isupper():
                        await daemon.emit(name, **data[0])
                    else:
                        await daemon.status("j0", name, *data)
                ending = await follow(client, events, "j0", recorder, **options)
        return ending, recorder, daemon


def block_job(**more: Any) -> dict[str, Any]:
    """The data of a BLOCK_JOB event."""
    return {"type": "commit", "device": "j0", "len": 64 * MIB, "offset": 64 * MIB, "speed": 0, **more}


async def test_success_is_told_by_the_completed_event(tmp_path: Path) -> None:
    """The job is over when it is concluded, and the numbers are those of the event."""
    ending, recorder, _ = await run(
        tmp_path,
        [row()],
        ("waiting", "pending"),
        ("BLOCK_JOB_COMPLETED", block_job()),
        ("concluded", "null"),
    )

    assert ending == Ending("j0", Outcome.COMPLETED, None, 64 * MIB, 64 * MIB)
    assert recorder.seen[-1] == ("concluded", 1.0)


async def test_a_failure_carries_its_error(tmp_path: Path) -> None:
    """COMPLETED with an error is a failure; the I/O error before it is worth a line."""
    ending, recorder, _ = await run(
        tmp_path,
        [row()],
        ("BLOCK_JOB_ERROR", {"device": "j0", "operation": "read", "action": "report"}),
        ("aborting",),
        ("BLOCK_JOB_COMPLETED", block_job(offset=MIB, error="Input/output error")),
        ("concluded",),
    )

    assert ending == Ending("j0", Outcome.FAILED, "Input/output error", MIB, 64 * MIB)
    assert recorder.notes == ["read error, action: report"]


async def test_a_stop_says_what_can_be_done(tmp_path: Path) -> None:
    """A job that stopped at an error waits for somebody; the watch goes on."""
    ending, recorder, _ = await run(
        tmp_path,
        [row()],
        ("BLOCK_JOB_ERROR", {"device": "j0", "operation": "write", "action": "stop"}),
        ("paused", "running", "aborting"),
        ("BLOCK_JOB_CANCELLED", block_job(offset=MIB)),
        ("concluded",),
    )

    assert ending.outcome is Outcome.CANCELLED
    assert "resume j0" in recorder.notes[0]


async def test_a_pending_job_says_what_it_waits_for(tmp_path: Path) -> None:
    """With manual finalisation the chain is unchanged until somebody says so."""
    ending, recorder, _ = await run(
        tmp_path,
        [row()],
        ("waiting", "pending"),
        ("BLOCK_JOB_PENDING", {"type": "commit", "id": "j0"}),
        ("BLOCK_JOB_COMPLETED", block_job()),
        ("concluded",),
    )

    assert ending.outcome is Outcome.COMPLETED
    assert "finalize j0" in recorder.notes[0]


async def test_a_ready_job_is_completed_when_asked_to(tmp_path: Path) -> None:
    """An active commit needs one more word."""
    ending, _, daemon = await run(
        tmp_path,
        [row()],
        ("ready",),
        ("BLOCK_JOB_READY", block_job()),
        ("waiting", "pending"),
        ("BLOCK_JOB_COMPLETED", block_job()),
        ("concluded",),
        complete=True,
    )

    assert ending.outcome is Outcome.COMPLETED
    assert ("job-complete", {"id": "j0"}) in daemon.asked


@pytest.mark.parametrize("found", ["running", "ready"])
async def test_a_job_may_be_left_ready(tmp_path: Path, found: str) -> None:
    """Whether it becomes ready now or was before."""
    ending, _, daemon = await run(tmp_path, [row(found)], ("BLOCK_JOB_READY", block_job()), until_ready=True)

    assert ending.outcome is Outcome.READY
    assert "job-complete" not in [name for name, _ in daemon.asked]


async def test_a_job_faster_than_the_first_look_is_not_missed(tmp_path: Path) -> None:
    """Its whole life lies in the events that came before."""
    ending, _, _ = await run(
        tmp_path,
        [],
        ("created", "running", "waiting", "pending"),
        ("BLOCK_JOB_COMPLETED", block_job()),
        ("concluded", "null"),
    )

    assert ending.outcome is Outcome.COMPLETED


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ({}, Outcome.COMPLETED),
        ({"error": "Operation canceled"}, Outcome.CANCELLED),
        ({"error": "Could not resize file: File too large"}, Outcome.FAILED),
    ],
)
async def test_a_concluded_job_tells_its_end_by_query(tmp_path: Path, error: dict[str, str], expected: Outcome) -> None:
    """Jobs that keep their result, and types without events of their own."""
    ending, _, _ = await run(tmp_path, [row("concluded", MIB, **error)])

    assert ending.outcome is expected


async def test_a_job_type_without_events_ends_by_status(tmp_path: Path) -> None:
    """Its last status sends us to the query."""
    rows = [row("running")]
    recorder = Recorder()
    async with fake_daemon(tmp_path) as daemon, connect(daemon.path) as client:
        daemon.answers["query-jobs"] = lambda _: rows
        with client.events(*JOB_EVENTS) as events:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_conclude, daemon, rows)
                ending = await follow(client, events, "j0", recorder)

    assert ending.outcome is Outcome.FAILED
    assert ending.error == "No space left on device"


async def _conclude(daemon: FakeDaemon, rows: list[dict[str, Any]]) -> None:
    await trio.testing.wait_all_tasks_blocked()
    rows[:] = [row("concluded", error="No space left on device")]
    await daemon.status("j0", "aborting", "concluded")


async def test_other_jobs_are_not_ours(tmp_path: Path) -> None:
    """Events of the neighbours change nothing."""
    ending, recorder, _ = await run(
        tmp_path,
        [row()],
        ("BLOCK_JOB_CANCELLED", block_job(device="j1")),
        ("BLOCK_JOB_ERROR", {"device": "j1", "operation": "read", "action": "stop"}),
        ("BLOCK_JOB_COMPLETED", block_job()),
        ("concluded",),
    )

    assert ending.outcome is Outcome.COMPLETED
    assert recorder.notes == []


async def test_no_such_job_is_an_error(tmp_path: Path) -> None:
    """There is nothing to wait for."""
    async with fake_daemon(tmp_path) as daemon, connect(daemon.path) as client:
        daemon.answers["query-jobs"] = lambda _: []
        with client.events(*JOB_EVENTS) as events, pytest.raises(CommandError, match="Job not found: j0"):
            await follow(client, events, "j0", Recorder())


async def test_a_daemon_that_ends_ends_the_watch(tmp_path: Path) -> None:
    """Not a success, not a failure of the job: the connection is gone."""
    async with fake_daemon(tmp_path) as daemon, connect(daemon.path) as client:
        daemon.answers["query-jobs"] = lambda _: [row()]
        with client.events(*JOB_EVENTS) as events:
            await trio.testing.wait_all_tasks_blocked()
            await daemon.hang_up()
            with pytest.raises(ConnectionLostError):
                await follow(client, events, "j0", Recorder())


async def test_a_refused_completion_does_not_end_the_watch(tmp_path: Path) -> None:
    """Somebody else was quicker."""
    async with fake_daemon(tmp_path) as daemon, connect(daemon.path) as client:
        daemon.answers["query-jobs"] = lambda _: [row()]
        daemon.answers["job-complete"] = raises("Job 'j0' in state 'pending' cannot accept command verb 'complete'")
        with client.events(*JOB_EVENTS) as events:
            await daemon.emit("BLOCK_JOB_READY", **block_job())
            await daemon.emit("BLOCK_JOB_COMPLETED", **block_job())
            await daemon.status("j0", "concluded")
            ending = await follow(client, events, "j0", Recorder(), complete=True)

    assert ending.outcome is Outcome.COMPLETED


async def test_progress_is_asked_for_while_nothing_happens(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Between events the numbers move; pauses are shown and not counted as slowness."""
    recorder = Recorder()
    async with fake_daemon(tmp_path) as daemon, connect(daemon.path) as client:
        looks = iter([row(), row(done=16 * MIB), row("paused", 16 * MIB), row(done=32 * MIB)])

        async def next_row(_: dict[str, Any]) -> list[dict[str, Any]]:
            if (current := next(looks, None)) is not None:
                return [current]
            await daemon.emit("BLOCK_JOB_COMPLETED", **block_job())
            await daemon.status("j0", "concluded")
            return [row("concluded", 64 * MIB)]

        daemon.answers["query-jobs"] = next_row
        with client.events(*JOB_EVENTS) as events:
            await follow(client, events, "j0", recorder)

    assert recorder.seen[:4] == [("running", 0.0), ("running", 0.25), ("paused", 0.25), ("running", 0.5)]


async def test_progress_that_is_pushed_is_not_asked_for(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """A daemon that tells it is asked once who the job is, however long it takes; what it tells is what is shown."""
    recorder = Recorder()
    async with fake_daemon(tmp_path) as daemon, connect(daemon.path) as client:
        daemon.answers["x-qmpd-subscribe"] = lambda _: {"log": "", "incarnation": "", "last": 0, "complete": True}
        daemon.answers["query-jobs"] = lambda _: [row(done=32 * MIB)]

        async def push() -> None:
            for done in (1, 2, 4):
                await trio.sleep(60)
                await daemon.emit("X_QMPD_JOB_PROGRESS", id="j0", type="commit", done=done * MIB, total=4 * MIB)
            await daemon.emit("BLOCK_JOB_COMPLETED", **block_job())
            await daemon.status("j0", "concluded")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(push)
            with client.events(*JOB_EVENTS) as events:
                ending = await follow(client, events, "j0", recorder)

        assert [name for name, _ in daemon.asked].count("query-jobs") == 1
    assert ending.outcome is Outcome.COMPLETED
    assert [fraction for _, fraction in recorder.seen] == [0.25, 0.5, 1.0, 1.0]
