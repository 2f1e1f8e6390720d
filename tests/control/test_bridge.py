"""The crossing to worker threads: results, errors, cancellation, budgets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio

from qmpd.control.bridge import JOBS, SHORT, Bridge, run_steps, to_worker
from qmpd.steps import Steps


def boom() -> None:
    """Fails."""
    raise ZeroDivisionError


async def test_a_worker_is_another_thread() -> None:
    """And its result comes back."""
    assert await to_worker(threading.get_ident) != threading.get_ident()


async def test_a_workers_exception_is_raised_here() -> None:
    """Unchanged."""
    with pytest.raises(ZeroDivisionError):
        await to_worker(boom)


async def test_steps_alternate_between_the_threads() -> None:
    """Code between the yields runs here, what is yielded runs there, also after an error."""

    def steps() -> Steps[list[bool]]:
        here, seen = threading.get_ident(), []
        seen.append((yield threading.get_ident) == here)
        try:
            yield boom
        except ZeroDivisionError:
            seen.append(threading.get_ident() == here)
        seen.append((yield threading.get_ident) == here)
        return seen

    assert await run_steps(steps()) == [False, True, False]


async def test_steps_without_a_yield_need_no_worker() -> None:
    """A generator that returns at once."""

    def steps() -> Steps[int]:
        return 5
        yield boom

    assert await run_steps(steps()) == 5


async def test_begun_steps_are_finished_although_cancelled() -> None:
    """A change to the graph is never left half-way; the caller learns of the cancellation afterwards."""
    begun, proceed = trio.Event(), threading.Event()
    trace: list[str] = []
    token = trio.lowlevel.current_trio_token()

    def wait() -> None:
        token.run_sync_soon(begun.set)
        proceed.wait()

    def steps() -> Steps[None]:
        yield wait
        trace.append("second")
        yield wait
        trace.append("end")

    async def change() -> None:
        await run_steps(steps())
        await trio.lowlevel.checkpoint()
        trace.append("not reached")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(change)
        await begun.wait()
        nursery.cancel_scope.cancel()
        proceed.set()

    assert trace == ["second", "end"]


async def test_cancelled_steps_are_not_begun() -> None:
    """Before the first step there is nothing to finish."""
    trace: list[str] = []

    def steps() -> Steps[None]:
        trace.append("begun")
        yield boom

    with trio.CancelScope() as scope:
        scope.cancel()
        generator = steps()
        await run_steps(generator)

    assert trace == []


async def test_a_worker_is_waited_for_although_cancelled() -> None:
    """Workers are never abandoned."""
    proceed, ended = threading.Event(), threading.Event()

    def work() -> None:
        proceed.wait()
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(to_worker, work)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        proceed.set()

    assert ended.is_set()


async def test_jobs_at_work_leave_room_for_commands() -> None:
    """The budgets are separate, and one that is used up makes the next wait."""
    narrow, proceed = Bridge(1), threading.Event()
    second = trio.Event()

    async def waiting() -> None:
        await narrow.to_worker(lambda: None)
        second.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(narrow.to_worker, proceed.wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(waiting)
        await SHORT.to_worker(lambda: None)
        await JOBS.to_worker(lambda: None)

        assert not second.is_set()
        proceed.set()

    assert second.is_set()


def test_both_drivers_of_steps_agree() -> None:
    """The one with an event loop and the one without call the same things in the same order."""
    from qmpd.steps import run_steps as run_here

    def steps(log: list[Any]) -> Steps[str]:
        log.append((yield lambda: 1))
        try:
            yield boom
        except ZeroDivisionError:
            log.append("caught")
        return "done"

    def trace(drive: Callable[[Steps[str]], str]) -> list[Any]:
        log: list[Any] = []
        log.append(drive(steps(log)))
        return log

    assert trace(run_here) == trace(lambda generator: trio.run(run_steps, generator)) == [1, "caught", "done"]
