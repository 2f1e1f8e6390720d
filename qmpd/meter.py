"""How fast a job moves and when it will be done. Pure arithmetic over a clock it is handed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

#: Seconds that the rate is averaged over: long enough to smooth a rate limit's steps, short enough to follow a change.
WINDOW: Final = 5.0


@dataclass(slots=True)
class Meter:
    """Progress of one job from samples of (time, offset); offset and total in bytes, time in seconds."""

    offset: int = 0
    total: int = 0
    _samples: deque[tuple[float, int]] = field(default_factory=deque)

    def update(self, now: float, offset: int, total: int) -> None:
        """Take a sample. Times must not run backwards; an offset that does starts the measuring anew."""
        if offset < self.offset:
            self._samples.clear()
        self.offset, self.total = offset, total
        self._samples.append((now, offset))
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW:
            self._samples.popleft()

    def rest(self) -> None:
        """The job stands still on purpose (paused): what was measured says nothing about what follows."""
        self._samples.clear()

    @property
    def fraction(self) -> float:
        """Done, from 0 to 1; a job without work is done."""
        return min(self.offset / self.total, 1.0) if self.total else 1.0

    @property
    def rate(self) -> float | None:
        """Bytes per second over the last :data:`WINDOW` seconds, None until there is something to tell from."""
        if len(self._samples) < 2:
            return None
        (start, before), (end, after) = self._samples[0], self._samples[-1]
        return (after - before) / (end - start) if end > start else None

    @property
    def eta(self) -> float | None:
        """Seconds to the end at the present rate, None while that cannot be told."""
        speed = self.rate
        if self.offset >= self.total:
            return 0.0
        return (self.total - self.offset) / speed if speed else None
