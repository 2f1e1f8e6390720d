"""The control cell: the only thing that a job's body and the control thread both touch.

The control thread asks (pause, cancel, speed) and reads progress; the body looks at the cell between chunks, at no
other time, and reports progress. Every field is read and written under one lock that is held for a few instructions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass

from qmpd.errors import Kind, QmpdError
from qmpd.jobs.budget import Budget, Ticket
from qmpd.jobs.ratelimit import RateLimit


@dataclass(frozen=True, slots=True)
class Rest:
    """The body gives up its thread, for ``delay`` seconds or until it is woken; while paused, until it is resumed."""

    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes (for jobs without bytes: steps)."""

    current: int
    total: int


def cancelled() -> QmpdError:
    """What a cancelled body raises."""
    return QmpdError("Operation canceled", Kind.CANCELLED)


class Cell:
    """Pause, cancel, speed and progress of one job. Methods say which plane calls them."""

    def __init__(
        self, clock: Callable[[], float], wake: Callable[[], None] = lambda: None, budget: Budget | None = None
    ) -> None:
        """``clock`` gives seconds, on any thread. ``wake`` is called on the control thread and must be idempotent.

        ``budget`` is what all jobs share.
        """
        self._lock = threading.Lock()
        self._clock = clock
        self._wake = wake
        self._limit = RateLimit()
        self._budget = budget or Budget()
        self._ticket: Ticket | None = None
        self._paused = False
        self._cancelled = False
        self._progress = Progress(0, 0)
        #: The body finds out what really is to be moved; that, and how much of it has been.
        self._surveys = False
        self._work: int | None = None
        self._moved = 0

    # -- control thread ----------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """The body rests at its next checkpoint."""
        with self._lock:
            self._paused = True

    def resume(self) -> None:
        """The body may go on; it computes its rate limit again."""
        with self._lock:
            self._paused = False
        self._wake()

    def cancel(self) -> None:
        """The body ends at its next checkpoint, paused or not. Cannot be taken back."""
        with self._lock:
            self._cancelled = True
            self._paused = False
        self._wake()

    def set_speed(self, speed: int) -> None:
        """Bytes per second, 0 for no limit. A lowered speed lets the current sleep end by itself (section 6)."""
        with self._lock:
            old, self._limit.speed = self._limit.speed, speed
        if speed == 0 or speed > old:
            self._wake()

    # -- any thread --------------------------------------------------------------------------------------------------

    @property
    def paused(self) -> bool:
        with self._lock:
            return self._paused

    @property
    def cancelled(self) -> bool:
        with self._lock:
            return self._cancelled

    @property
    def speed(self) -> int:
        with self._lock:
            return self._limit.speed

    @property
    def is_limited(self) -> bool:
        """Is there a speed limit, or a budget?"""
        return self.speed > 0 or self.has_budget

    @property
    def has_budget(self) -> bool:
        """Is there one?"""
        return self._budget.is_limited

    @property
    def portion(self) -> int:
        """How many bytes may go in one piece where there is a limit."""
        return self._budget.portion

    @property
    def progress(self) -> Progress:
        with self._lock:
            return self._progress

    @property
    def work(self) -> Progress | None:
        """Progress in what really is to be moved, for those who want to know when it will be over; None: not known yet.

        Never falls.
        """
        with self._lock:
            progress, work = self._progress, self._work
            if not self._surveys:
                return progress
            if work is None:
                return None
            return Progress(work if progress.current >= progress.total else min(self._moved, work), work)

    # -- the body ----------------------------------------------------------------------------------------------------

    def expect_survey(self) -> None:
        """Progress is nothing to go by: :meth:`set_work` will be called."""
        with self._lock:
            self._surveys = True

    def set_work(self, total: int | None) -> None:
        """Of all there is to do, so much will be charged when it is done (bytes). None: nobody can tell after all."""
        with self._lock:
            self._work, self._surveys = total, total is not None

    def set_total(self, total: int) -> None:
        """How much there is to do altogether."""
        with self._lock:
            self._progress = Progress(self._progress.current, total)

    def advance(self, count: int, *, charged: int = 0) -> None:
        """``count`` more is done; ``charged`` bytes of it count against the speed limit."""
        with self._lock:
            current, total = self._progress.current, self._progress.total
            self._progress = Progress(current + count, total)
            self._moved += charged
            if charged:
                self._limit.delay(self._clock(), charged)
                self._budget.charge(charged, self._ticket)
                self._ticket = None

    def checkpoint(self) -> Generator[Rest, None, None]:
        """Rest while paused. Raises the cancellation; takes no thread hop when nobody asked for anything."""
        while True:
            with self._lock:
                paused, is_cancelled = self._paused, self._cancelled
            if is_cancelled:
                self._give_ticket_back()
                raise cancelled()
            if not paused:
                return
            self._give_ticket_back()
            yield Rest()

    def pace(self) -> Generator[Rest, None, None]:
        """A checkpoint which also sleeps until the speed limit and the budget let the next chunk go."""
        while True:
            yield from self.checkpoint()
            with self._lock:
                delay = self._limit.delay(self._clock()) or self._budget_delay(self._clock())
            if delay <= 0:
                return
            yield Rest(delay)

    def _budget_delay(self, now: float) -> float:
        self._ticket = self._budget.ticket(now, self._ticket)
        return 0.0 if self._ticket is None else self._ticket.start - now

    def _give_ticket_back(self) -> None:
        with self._lock:
            if self._ticket is not None:
                self._budget.give_back(self._ticket)
                self._ticket = None
