"""A lock on byte ranges: requests that must not overlap wait for each other, all others do not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class RangeLock:
    """Exclusive holds on ranges of one device. Any thread; a thread that holds a range must not ask for another."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: list[tuple[int, int]] = []

    @contextmanager
    def hold(self, start: int, end: int) -> Iterator[None]:
        """Wait until nobody holds a byte of ``[start, end)``, then keep it for the block."""
        span = start, end
        with self._changed:
            while start < end and any(start < high and low < end for low, high in self._held):
                self._changed.wait()
            self._held.append(span)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(span)
                self._changed.notify_all()
