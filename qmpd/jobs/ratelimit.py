"""Pure arithmetic of a speed limit, over times it is handed.

Work is counted in slices of 100 ms. A slice that got more than its quota becomes longer, so the debt of one big chunk
is paid off before the next one goes out. Source: spec/jobs-and-commit.md section 6.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

SLICE: Final = 0.1
"""Seconds."""


@dataclass(slots=True)
class RateLimit:
    """``speed`` in bytes per second; 0 is no limit. Times are seconds on any clock that does not run backwards."""

    speed: int = 0
    _start: float = field(default=float("-inf"), init=False)
    _end: float = field(default=float("-inf"), init=False)
    _dispatched: int = field(default=0, init=False)

    @property
    def quota(self) -> int:
        """Bytes that one slice may carry; never 0, so that every limit makes progress."""
        return max(1, self.speed // 10)

    def delay(self, now: float, count: int = 0) -> float:
        """Charge ``count`` bytes at time ``now``; seconds to wait before the next chunk, 0 for none."""
        if not self.speed:
            return 0.0
        if self._end < now:
            self._start, self._end, self._dispatched = now, now + SLICE, 0
        self._dispatched += count
        if self._dispatched < self.quota:
            return 0.0
        self._end = self._start + SLICE * (self._dispatched / self.quota)
        return max(0.0, self._end - now)
