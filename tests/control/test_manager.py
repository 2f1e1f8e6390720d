"""Life of jobs under the manager, with jobs made of memory: events, their order, and which side of the reply they fall.

Times are trio's own, on a clock that stands still unless a test moves it.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from qmpd.errors import QmpdError
from qmpd.jobs.job import Action, Job
from tests.control.jobbench import Bench, refused
from tests.jobs.toys import Follower, Memory


@pytest.fixture
async def bench(nursery: trio.Nursery, mock_clock: trio.testing.MockClock) -> AsyncIterator[Bench]:
    made = Bench(nursery)
    await nursery.start(made.jobs.serve)
    yield made
    nursery.cancel_scope.cancel()


STARTED = "created, running, R"
SLEEPING = {"chunks": 4, "speed": 1}  # one chunk, then ten seconds and more


async def test_success(bench: Bench) -> None:
    """Nothing but created and running comes before the reply."""
    await bench.launch(job := Memory("j0"))
    await bench.gone()

    assert bench.told() == (f"{STARTED}, waiting, pending, COMPLETED len=40 offset=40 speed=0, concluded, null")
    assert job.phases == ["start", "prepare", "commit", "clean"]


async def test_an_opening_stretch_that_ends_the_job_is_told_before_the_reply(bench: Bench) -> None:
    """A body that ends before its first rest has all its events in front of the reply."""
    await bench.launch(Memory("j0", chunks=0))

    assert bench.told() == "created, running, waiting, pending, COMPLETED len=0 offset=0 speed=0, concluded, null, R"


async def test_manual_finalize_and_dismiss(bench: Bench) -> None:
    """The job stays pending until finalized, concluded until dismissed, and names itself meanwhile."""
    await bench.launch(Memory("j0", auto_finalize=False, auto_dismiss=False))
    await bench.until(lambda: bench.life().job.status.value == "pending")

    assert bench.told() == f"{STARTED}, waiting, pending, PENDING"

    await bench.do(bench.jobs.finalize(bench.life()))

    assert bench.told() == "COMPLETED len=40 offset=40 speed=0, concluded, R"
    assert bench.jobs.query_jobs() == [
        {"id": "j0", "type": "commit", "status": "concluded", "current-progress": 40, "total-progress": 40}
    ]

    await bench.do(bench.jobs.dismiss(bench.life()))

    assert bench.told() == "null, R"
    assert bench.jobs.query_jobs() == []


async def test_a_held_job_in_queries(bench: Bench) -> None:
    """All members of BlockJobInfo while the job sleeps for its speed."""
    await bench.launch(Memory("j0", **SLEEPING))
    await bench.rested()

    assert bench.jobs.query_block_jobs() == [
        {
            "type": "commit",
            "device": "j0",
            "len": 40,
            "offset": 10,
            "speed": 1,
            "busy": False,
            "paused": False,
            "io-status": "ok",
            "ready": False,
            "status": "running",
            "auto-finalize": True,
            "auto-dismiss": True,
        }
    ]


async def test_cancel_of_a_sleeping_job_is_over_before_the_reply(bench: Bench) -> None:
    """All events come first; nothing of the job is prepared or committed."""
    await bench.launch(job := Memory("j0", **SLEEPING))
    await bench.rested()
    bench.told()

    await bench.do(bench.jobs.cancel(bench.life(), force=False))

    assert bench.told() == "aborting, CANCELLED len=40 offset=10 speed=1, concluded, null, R"
    assert job.phases == ["start", "abort", "clean"]


async def test_cancel_of_a_job_at_work_comes_after_the_reply(bench: Bench) -> None:
    """Nobody waits for I/O that is in flight."""
    job = Memory("j0")
    job.gate = threading.Event()
    await bench.launch(job)
    await bench.until(job.inside.is_set)
    bench.told()

    assert bench.jobs.query_block_jobs()[0]["busy"]

    await bench.do(bench.jobs.cancel(bench.life(), force=True))
    job.gate.set()
    await bench.gone()

    assert bench.told() == "R, aborting, CANCELLED len=40 offset=10 speed=0, concluded, null"


async def test_cancel_of_a_paused_job(bench: Bench) -> None:
    """A soft cancel is refused, a forced one goes through running."""
    await bench.launch(Memory("j0", **SLEEPING))
    await bench.rested()
    bench.jobs.pause(bench.life())
    bench.told()

    with refused("The block job for device 'j0' is currently paused"):
        await bench.jobs.cancel(bench.life(), force=False)

    await bench.do(bench.jobs.cancel(bench.life(), force=True))

    assert bench.told() == "running, aborting, CANCELLED len=40 offset=10 speed=1, concluded, null, R"


async def test_cancel_of_a_pending_job(bench: Bench) -> None:
    """Its last step is not taken, and it says so in queries."""
    await bench.launch(job := Memory("j0", auto_finalize=False, auto_dismiss=False))
    await bench.until(lambda: bench.life().job.status.value == "pending")
    bench.told()

    await bench.do(bench.jobs.cancel(bench.life(), force=False))

    assert bench.told() == "aborting, CANCELLED len=40 offset=40 speed=0, concluded, R"
    assert bench.jobs.query_jobs()[0]["error"] == "Operation canceled"
    assert job.phases == ["start", "abort", "clean"]


async def test_pause_and_resume_of_a_sleeping_job(bench: Bench, mock_clock: trio.testing.MockClock) -> None:
    """Both take effect before the reply; the sleep is computed anew at resume."""
    await bench.launch(Memory("j0", **SLEEPING))
    await bench.rested()
    bench.told()

    await bench.do(bench.jobs.pause(bench.life()))

    assert bench.told() == "paused, R"
    assert bench.jobs.query_block_jobs()[0]["paused"]

    mock_clock.jump(3600)
    await trio.testing.wait_all_tasks_blocked()

    assert bench.jobs.query_jobs()[0]["current-progress"] == 10

    with refused("Job is already paused"):
        bench.jobs.pause(bench.life())

    await bench.do(bench.jobs.resume(bench.life()))
    await bench.rested()

    assert bench.told() == "running, R"
    assert bench.jobs.query_jobs()[0]["current-progress"] == 20

    with refused("Can't resume a job that was not paused"):
        await bench.jobs.resume(bench.life())


async def test_a_job_at_work_pauses_at_its_next_checkpoint(bench: Bench) -> None:
    """The reply does not wait; the chunk in flight still counts."""
    job = Memory("j0")
    job.gate = threading.Event()
    await bench.launch(job)
    await bench.until(job.inside.is_set)
    bench.told()

    await bench.do(bench.jobs.pause(bench.life()))
    job.gate.set()
    await bench.rested()

    assert bench.told() == "R, paused"
    assert bench.jobs.query_jobs()[0]["current-progress"] == 10


async def test_sleep_follows_the_speed(bench: Bench, mock_clock: trio.testing.MockClock) -> None:
    """One byte a slice and ten bytes a chunk make a second between chunks."""
    await bench.launch(Memory("j0", **SLEEPING))
    for seconds in (1.01, 1.01, 1.01):
        await bench.rested()
        mock_clock.jump(seconds)
    await bench.gone()

    assert "COMPLETED len=40 offset=40 speed=1" in bench.told()


@pytest.mark.parametrize("speed", [0, 100000])
async def test_a_raised_speed_wakes_a_sleeper(bench: Bench, speed: int) -> None:
    """It need not sit out what the old speed asked for."""
    await bench.launch(Memory("j0", **SLEEPING))
    await bench.rested()

    bench.jobs.set_speed(bench.life(), speed)
    await bench.gone()

    assert f"COMPLETED len=40 offset=40 speed={speed}" in bench.told()


async def test_a_lowered_speed_waits_for_the_sleep_to_end(bench: Bench, mock_clock: trio.testing.MockClock) -> None:
    """And then counts: the delay is computed again before the next chunk."""
    await bench.launch(Memory("j0", chunks=4, speed=100))
    await bench.rested()
    bench.jobs.set_speed(bench.life(), 1)
    mock_clock.jump(0.1)  # what the old speed asked for; now there are 0.9 s more to pay
    await bench.rested()

    assert bench.jobs.query_block_jobs()[0]["offset"] == 10

    mock_clock.jump(0.9)
    await bench.rested()

    assert bench.jobs.query_block_jobs()[0]["offset"] == 20


async def test_report(bench: Bench) -> None:
    """The first error ends the job; it never pends, not even with auto-finalize off."""
    job = Memory("j0", auto_finalize=False, auto_dismiss=False)
    job.faults[1] = [(Action.REPORT, errno.EIO)]
    await bench.launch(job)
    await bench.until(lambda: bench.life().over.is_set())

    assert bench.told() == (
        f"{STARTED}, ERROR operation=read action=report, aborting, "
        "COMPLETED len=40 offset=10 speed=0 error=Input/output error, concluded"
    )
    assert job.phases == ["start", "abort", "clean"]
    info = bench.jobs.query_block_jobs()[0]
    assert (info["error"], info["io-status"]) == ("Input/output error", "ok")


async def test_stop_pauses_and_resume_tries_again(bench: Bench) -> None:
    """A retry that fails again is told before the reply of resume; one that works, after it."""
    job = Memory("j0")
    job.faults[1] = [(Action.STOP, errno.EIO), (Action.STOP, errno.ENOSPC)]
    await bench.launch(job)
    await bench.rested()

    assert bench.told() == f"{STARTED}, ERROR operation=read action=stop, paused"
    assert bench.jobs.query_block_jobs()[0]["io-status"] == "failed"
    with refused("Job is already paused"):
        bench.jobs.pause(bench.life())
    with refused("The block job for device 'j0' is currently paused"):
        await bench.jobs.cancel(bench.life(), force=False)

    await bench.do(bench.jobs.resume(bench.life()))

    assert bench.told() == "running, ERROR operation=read action=stop, paused, R"
    info = bench.jobs.query_block_jobs()[0]
    assert (info["io-status"], info["offset"]) == ("nospace", 10)

    job.gate = threading.Event()
    bench.nursery.start_soon(bench.do, bench.jobs.resume(bench.life()))
    await bench.until(job.inside.is_set)

    assert bench.jobs.query_block_jobs()[0]["io-status"] == "ok"

    job.gate.set()
    await bench.gone()

    assert "COMPLETED len=40 offset=40" in bench.told()


async def test_ignore_waits_a_little(bench: Bench, mock_clock: trio.testing.MockClock) -> None:
    """The chunk is tried again, but not in a tight loop."""
    job = Memory("j0")
    job.faults[0] = [(Action.IGNORE, errno.EIO)] * 3
    await bench.launch(job)
    await bench.rested()

    assert bench.told() == f"{STARTED}, ERROR operation=read action=ignore"

    for _ in range(2):
        mock_clock.jump(1)
        await bench.rested()
    mock_clock.jump(1)
    await bench.gone()

    assert bench.told().count("ERROR operation=read action=ignore") == 2


async def test_ready_complete(bench: Bench) -> None:
    """READY follows the status; complete replies first."""
    await bench.launch(Follower("j0"))
    await bench.rested()

    assert bench.told() == f"{STARTED}, ready, READY len=40 offset=0 speed=0"

    await bench.do(bench.jobs.pause(bench.life()))
    await bench.do(bench.jobs.complete(bench.life()))

    assert bench.told() == "standby, R, R"

    await bench.do(bench.jobs.resume(bench.life()))
    await bench.gone()

    assert bench.told() == "ready, R, waiting, pending, COMPLETED len=40 offset=0 speed=0, concluded, null"


async def test_soft_cancel_of_a_ready_job_is_a_success(bench: Bench) -> None:
    """After the reply, and without an error."""
    await bench.launch(Follower("j0"))
    await bench.rested()
    bench.told()

    await bench.do(bench.jobs.cancel(bench.life(), force=False))
    await bench.gone()

    assert bench.told() == "R, waiting, pending, COMPLETED len=40 offset=0 speed=0, concluded, null"


async def test_a_job_without_complete_refuses(bench: Bench) -> None:
    """The verb table first: a running job has nothing to complete."""
    await bench.launch(Memory("j0", **SLEEPING))
    await bench.rested()

    with refused("Job 'j0' in state 'running' cannot accept command verb 'complete'"):
        bench.jobs.complete(bench.life())
    with refused("Job type does not support change"):
        bench.jobs.change(bench.life())
    with refused("Parameter 'speed' expects a non-negative value"):
        bench.jobs.set_speed(bench.life(), -1)


async def test_a_failing_start_leaves_no_job(bench: Bench) -> None:
    """created and null, then the error; the id is free again."""
    job = Memory("j0")
    job.failing["start"] = QmpdError("no")

    with refused("no"):
        await bench.launch(job)

    assert bench.told() == "created, null"
    assert bench.jobs.query_jobs() == []
    assert job.phases == ["start"]


async def test_refused_before_it_exists(bench: Bench) -> None:
    """Bad ids, clashing ids and refusals of validation emit nothing."""
    await bench.launch(Memory("j0", auto_dismiss=False))
    await bench.until(lambda: bench.life().over.is_set())
    bench.told()

    def refuse() -> Job:
        raise QmpdError("not this one")

    for make, text in (
        (lambda: Memory("j0"), "Job ID 'j0' already in use"),
        (lambda: Memory("1a"), "Invalid job ID '1a'"),
        (lambda: Memory(""), "Invalid job ID ''"),
        (refuse, "not this one"),
    ):
        with refused(text):
            await bench.jobs.launch(make)

    assert bench.told() == ""


async def test_a_failing_prepare_aborts(bench: Bench) -> None:
    """pending, then aborting; the error is told."""
    job = Memory("j0", auto_dismiss=False)
    job.failing["prepare"] = QmpdError("Invalid argument", errno=errno.EINVAL)
    await bench.launch(job)
    await bench.until(lambda: bench.life().over.is_set())

    assert bench.told() == (
        f"{STARTED}, waiting, pending, aborting, COMPLETED len=40 offset=40 speed=0 error=Invalid argument, concluded"
    )
    assert job.phases == ["start", "prepare", "abort", "clean"]


@pytest.mark.parametrize("phase", ["commit", "clean"])
async def test_later_phases_always_run(bench: Bench, phase: str, caplog: pytest.LogCaptureFixture) -> None:
    """What fails after the outcome is decided is logged, and the job concludes."""
    job = Memory("j0")
    job.failing[phase] = QmpdError("too late")
    await bench.launch(job)
    await bench.gone()

    assert job.phases == ["start", "prepare", "commit", "clean"]
    assert "too late" in caplog.text
    assert "error" not in bench.told()


async def test_a_bug_costs_one_job(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """An exception that is none of the expected ends the job with EIO and goes to the log; the manager lives on."""
    job = Memory("j0")
    job.failing["prepare"] = ZeroDivisionError("oops")
    await bench.launch(job)
    await bench.gone()

    assert "COMPLETED len=40 offset=40 speed=0 error=Input/output error" in bench.told()
    assert "oops" in caplog.text

    await bench.launch(Memory("j0"))
    await bench.gone()


async def test_lookup(bench: Bench) -> None:
    """Two classes of error; jobs that are not block jobs exist for job-* commands only."""

    class Create(Memory):
        job_type = "create"
        is_block_job = False

    await bench.launch(Create("c0", auto_dismiss=False))
    await bench.until(lambda: bench.life("c0").over.is_set())

    assert bench.told() == "c0:created, c0:running, R, c0:waiting, c0:pending, c0:concluded"
    assert bench.jobs.query_block_jobs() == []
    with refused("Block job 'c0' not found") as error:
        bench.jobs.find_block("c0")
    assert error.value.qmp_class == "DeviceNotActive"
    with refused("Job not found") as error:
        bench.jobs.find("nope")
    assert error.value.qmp_class == "GenericError"


async def test_newest_first(bench: Bench) -> None:
    """Queries list the newest job first."""
    for job_id in ("a", "b", "c"):
        await bench.launch(Memory(job_id, **SLEEPING))

    assert [info["id"] for info in bench.jobs.query_jobs()] == ["c", "b", "a"]
    assert [info["device"] for info in bench.jobs.query_block_jobs()] == ["c", "b", "a"]


async def test_shutdown(bench: Bench) -> None:
    """Every job is cancelled by force, whatever it was doing, and no new one can be made."""
    await bench.launch(Memory("concluded", auto_dismiss=False))
    await bench.until(lambda: bench.life("concluded").over.is_set())
    await bench.launch(Memory("pending", auto_finalize=False))
    await bench.until(lambda: bench.life("pending").job.status.value == "pending")
    await bench.launch(Memory("paused", **SLEEPING))
    await bench.rested("paused")
    bench.jobs.pause(bench.life("paused"))
    await bench.launch(Memory("j0", auto_dismiss=False, **SLEEPING))
    await bench.rested()
    bench.told()

    await bench.jobs.shutdown()

    assert bench.told() == ", ".join(
        [
            "aborting, CANCELLED len=40 offset=10 speed=1, concluded, null",
            "paused:running, paused:aborting, CANCELLED len=40 offset=10 speed=1, paused:concluded, paused:null",
            "pending:aborting, CANCELLED len=40 offset=40 speed=0, pending:concluded, pending:null",
            "concluded:null",
        ]
    )
    with pytest.raises(QmpdError, match="shutting down"):
        await bench.jobs.launch(lambda: Memory("j1"))


async def test_a_client_that_hangs_up_takes_no_job_with_it(bench: Bench) -> None:
    """The start goes on when the caller of launch is cancelled."""
    await bench.lock.acquire()  # so that the start must wait
    async with trio.open_nursery() as client:
        client.start_soon(bench.jobs.launch, lambda: Memory("j0"))
        await trio.testing.wait_all_tasks_blocked()
        client.cancel_scope.cancel()
    bench.lock.release()
    await bench.until(lambda: bench.log[-1:] == ["null"])

    assert "COMPLETED" in bench.told()
