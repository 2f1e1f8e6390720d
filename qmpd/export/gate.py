"""Where requests wait while the graph below them changes."""

from __future__ import annotations

import threading
from types import TracebackType


class Gate:
    """Open or closed; whoever is inside keeps a close from returning. Any thread.

    A context manager for those who go in. Closing nests: as many openings as closings let requests in again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._closed = 0
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            while self._closed:
                self._changed.wait()
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._closed and not self._inside:
                self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in; returns when nobody is inside."""
        with self._changed:
            self._closed += 1
            while self._inside:
                self._changed.wait()

    def open(self) -> None:
        """Take one :meth:`close` back."""
        with self._changed:
            self._closed -= 1
            if not self._closed:
                self._changed.notify_all()
