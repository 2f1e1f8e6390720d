"""The only crossing between the control thread and worker threads.

Workers are never abandoned: whoever waits for one waits until it has ended, cancelled or not, because a half-done image
operation belongs to nobody. Long work is cut short by its own means (a job looks at its cell), not by cancellation.

Jobs and short operations have separate thread budgets, so that jobs at work never keep a command from opening a file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final, TypeVar

import outcome
import trio

from qmpd.steps import Steps

T = TypeVar("T")


class Bridge:
    """A crossing of its own thread budget: at most ``threads`` callables at once, the others queue in order."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._limiter: trio.CapacityLimiter | None = None

    async def to_worker(self, fn: Callable[..., T], *args: Any) -> T:
        """Run ``fn(*args)`` in a worker thread; its result or exception. Cancellation is seen before the start only."""
        return await trio.to_thread.run_sync(fn, *args, abandon_on_cancel=False, limiter=self._tokens())

    async def run_steps(self, steps: Steps[T]) -> T:
        """Drive a generator of :mod:`qmpd.steps`: its code here, what it yields in a worker, its return value back.

        Not cancellable between two steps: a change to the graph is carried through or undone, and undoing may itself
        need a worker. Such changes are bounded (open, flush, rewrite a header), so shutdown can wait for them.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            value = await self._drive(steps)
        return value  # noqa: RET504  for all mypy knows, a cancel scope may swallow the return

    async def _drive(self, steps: Steps[T]) -> T:
        result: outcome.Outcome[Any] = outcome.Value(None)
        while True:
            try:
                call = result.send(steps)
            except StopIteration as stop:
                value: T = stop.value
                return value
            result = await outcome.acapture(self.to_worker, call)

    def _tokens(self) -> trio.CapacityLimiter:
        if self._limiter is None:
            self._limiter = trio.CapacityLimiter(self._threads)
        return self._limiter


SHORT: Final = Bridge(16)
"""For commands: opening, creating, flushing, looking up."""

JOBS: Final = Bridge(64)
"""For job bodies and phases: one thread for every job that is moving bytes."""

to_worker = SHORT.to_worker
run_steps = SHORT.run_steps


class Mailbox:
    """The way back: any thread can have something run on the control thread, soon, in order, without waiting for it.

    Make it on the control thread. What is posted when the event loop is over is dropped.
    """

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()

    def post(self, fn: Callable[..., object], *args: Any) -> None:
        """Have ``fn(*args)`` run; it must not raise. Any thread."""
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(fn, *args)
