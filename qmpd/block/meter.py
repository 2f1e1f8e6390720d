"""How far a node has been written, and who wants to know when it is further than that.

For hosts that give a thin volume more room before it is full. Source: spec/toolbox.md section 10.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

#: Told once: (bytes written beyond the threshold, the threshold). On the thread that writes, so it must not wait.
Notify = Callable[[int, int], None]


class WriteMeter:
    """The end of the highest write, and a threshold. Offsets in bytes; any thread.

    A writer compares the end of its request with :attr:`alert` and calls :meth:`passed` only when that is exceeded, so
    that a write within what is written already costs one comparison.
    """

    __slots__ = ("_lock", "_notify", "alert", "highest", "threshold")

    def __init__(self) -> None:
        self.highest = 0
        #: 0 for none.
        self.threshold = 0
        self.alert = 0
        self._notify: Notify | None = None
        self._lock = threading.Lock()

    def watch(self, threshold: int, notify: Notify) -> None:
        """Call ``notify`` at the next write that ends beyond ``threshold``, and only then; 0 ends the watch."""
        with self._lock:
            self.threshold, self._notify = threshold, notify
            self._set_alert()

    def passed(self, end: int) -> None:
        """A write ends at ``end``."""
        notify = None
        with self._lock:
            self.highest = max(self.highest, end)
            threshold = self.threshold
            if threshold and end > threshold:
                notify, self._notify, self.threshold = self._notify, None, 0
            self._set_alert()
        if notify is not None:
            notify(end - threshold, threshold)

    def _set_alert(self) -> None:
        self.alert = min(self.highest, self.threshold) if self.threshold else self.highest
