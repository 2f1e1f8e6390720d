"""Jobs that end together: a grouped transaction, or a single job, which is a group of its own.

All members wait for each other, then all are pending, and take their last steps one after the other, the last one
first. If one is cancelled or fails, the others are cancelled. A last step that has been taken is not taken back: where
a later one fails, the chains before it are merged already, which no guest can tell.

Source: spec/toolbox.md section 13. Control thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpd.jobs.table import Status

if TYPE_CHECKING:
    from qmpd.control.joblife import Life


class Group:
    """The members in the order in which a client named them."""

    def __init__(self) -> None:
        self._lives: list[Life] = []
        #: May the pending members take their last steps?
        self.released = False

    def join(self, life: Life) -> None:
        """Before it is created."""
        self._lives.append(life)

    def arrive(self) -> None:
        """One more waits. With the last one all are pending, and go on if none is to be finalized by hand."""
        if not all(life.job.status is Status.WAITING for life in self._lives):
            return
        for life in reversed(self._lives):
            life.show_pending()
        if all(life.job.auto_finalize for life in self._lives):
            self.release()

    def release(self) -> None:
        """Let the pending members take their last steps."""
        self.released = True
        for life in self._lives:
            life.wake()

    def fail(self, culprit: Life) -> None:
        """One will not succeed: nor will those that have not."""
        for life in reversed(self._lives):
            if life is not culprit and life.job.error is None and not life.over.is_set():
                life.cancel()

    async def turn(self, life: Life) -> None:
        """Until all that were named after ``life`` are over."""
        for later in self._lives[self._lives.index(life) + 1 :]:
            await later.over.wait()
