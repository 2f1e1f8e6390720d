"""Every verb in every state of a live job, against a model; then random walks through both.

The jobs are made of memory, the manager, its tasks and its threads are real. ``waiting`` is left at once by a job that
is in no group, so no verb can meet it; ``undefined`` and ``null`` are no states of a job that can be found.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing

from qmpd.errors import QmpdError
from qmpd.jobs.cell import Cell
from qmpd.jobs.job import Action, Body
from qmpd.jobs.table import Verb
from qmpd.steps import Steps
from tests.control.jobbench import Bench
from tests.jobs.test_table import PUBLISHED_VERBS, STATUSES
from tests.jobs.toys import Follower, Memory

GONE = "gone"
VISIBLE = ("created", "running", "paused", "ready", "standby", "pending", "aborting", "concluded")

#: Where a verb that is accepted leads, once everybody has done what they can; elsewhere the state stays.
LEADS_TO = {
    ("running", "cancel"): GONE,
    ("running", "pause"): "paused",
    ("paused", "resume"): "running",
    ("ready", "cancel"): GONE,
    ("ready", "pause"): "standby",
    ("ready", "complete"): GONE,
    ("standby", "resume"): "ready",
    ("pending", "cancel"): GONE,
    ("pending", "finalize"): GONE,
    ("concluded", "dismiss"): GONE,
}


def answer(status: str, verb: str) -> str:
    """The model: the text of the refusal, '' if the verb is accepted."""
    paused = status in ("paused", "standby")
    if verb == "cancel" and paused:
        return "The block job for device 'j0' is currently paused"
    if verb == "resume" and not paused:
        return "Can't resume a job that was not paused"
    if PUBLISHED_VERBS[verb].split()[STATUSES.index(status)] == "0":
        return f"Job 'j0' in state '{status}' cannot accept command verb '{verb}'"
    if verb == "pause" and paused:
        return "Job is already paused"
    return "Job type does not support change" if verb == "change" else ""


class Held(Memory):
    """Stays in one phase until it is let go."""

    def __init__(self, phase: str, **flags: bool) -> None:
        super().__init__("j0", speed=1, **flags)
        self.held, self.let_go = phase, threading.Event()

    def start(self, cell: Cell) -> Steps[None]:
        if self.held == "start":
            yield self.let_go.wait
        yield from super().start(cell)

    def abort(self) -> Steps[None]:
        if self.held == "abort":
            yield self.let_go.wait
        yield from super().abort()


class Slow(Memory):
    """At its first chunk for hours."""

    def run(self, cell: Cell) -> Body:
        cell.advance(0, charged=1 << 30)
        yield from super().run(cell)


def job_for(status: str) -> Memory:
    """A job that comes to ``status`` by itself, but for a pause."""
    if status in ("ready", "standby"):
        return Follower("j0")
    if status == "pending":
        return Memory("j0", auto_finalize=False)
    if status == "concluded":
        return Memory("j0", auto_dismiss=False)
    if status == "created":
        return Held("start")
    if status == "aborting":
        job = Held("abort")
        job.faults[0] = [(Action.REPORT, errno.EIO)]
        return job
    return Slow("j0", speed=1)


class Subject:
    """One live job, and what is to be done to it."""

    def __init__(self, bench: Bench, job: Memory) -> None:
        self.bench = bench
        self.job = job

    @property
    def status(self) -> str:
        return self.job.status.value if self.bench.jobs.query_jobs() else GONE

    async def become(self, status: str) -> None:
        self.bench.nursery.start_soon(self.bench.launch, self.job)
        before = {"paused": "running", "standby": "ready"}.get(status, status)
        await self.bench.until(lambda: self.status == before and not self.bench.life().busy)
        if before != status:
            assert await self.say("pause") == ""
        assert self.status == status

    async def say(self, verb: str) -> str:
        """The refusal, or ''."""
        jobs, life = self.bench.jobs, self.bench.life()
        calls: dict[str, Callable[[], Awaitable[None] | None]] = {
            "cancel": partial(jobs.cancel, life, force=False),
            "pause": partial(jobs.pause, life),
            "resume": partial(jobs.resume, life),
            "set-speed": partial(jobs.set_speed, life, 1),
            "complete": partial(jobs.complete, life),
            "finalize": partial(jobs.finalize, life),
            "dismiss": partial(jobs.dismiss, life),
            "change": partial(jobs.change, life),
        }
        try:
            result = calls[verb]()
            if result is not None:
                await result
        except QmpdError as error:
            return str(error)
        return ""

    async def check(self, verb: str) -> None:
        """The verb is answered as the model says, and the job goes where it says."""
        status = self.status
        expected = answer(status, verb)
        assert await self.say(verb) == expected
        await trio.testing.wait_all_tasks_blocked()
        wanted = status if expected else LEADS_TO.get((status, verb), status)
        await self.bench.until(lambda: self.status == wanted)


@pytest.fixture
async def bench(nursery: trio.Nursery, mock_clock: trio.testing.MockClock) -> AsyncIterator[Bench]:
    made = Bench(nursery)
    await nursery.start(made.jobs.serve)
    yield made
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("verb", [verb.value for verb in Verb])
@pytest.mark.parametrize("status", VISIBLE)
async def test_every_verb_in_every_state(bench: Bench, status: str, verb: str) -> None:
    """Accepted or refused as the published table says, with the published words, and with its effect."""
    subject = Subject(bench, job_for(status))
    try:
        await subject.become(status)
        await subject.check(verb)
    finally:
        if isinstance(subject.job, Held):
            subject.job.let_go.set()


@pytest.mark.parametrize("seed", range(40))
async def test_random_walks(bench: Bench, seed: int) -> None:
    """Any sequence of verbs keeps a job in step with the model, to its end."""
    chance = random.Random(seed)
    start = chance.choice(["running", "ready", "pending", "concluded"])
    subject = Subject(bench, job_for(start))
    await subject.become(start)
    for _ in range(30):
        # A job told to complete while paused ends when it is resumed: the model does not look that far.
        verb = chance.choice([verb for verb in PUBLISHED_VERBS if verb != "complete" or subject.status != "standby"])
        await subject.check(verb)
        if subject.status == GONE:
            return
