"""One commit as it was written to the disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.crash import powercut
from tests.crash.contents import DamageError
from tests.crash.instrument import Event
from tests.crash.judge import judge
from tests.crash.powercut import State
from tests.crash.scenarios import Prepared


@dataclass(frozen=True)
class Recording:
    """``directory`` holds the images as they were before."""

    prepared: Prepared
    events: list[Event]
    directory: Path

    @property
    def calls(self) -> list[Event]:
        """The events that a daemon can be killed at."""
        return [event for event in self.events if event.kind != "told"]

    def without(self, number: int) -> Recording:
        """The same commit, had it not flushed at that event."""
        return replace(self, events=[event for i, event in enumerate(self.events) if i != number])

    def states(self, seed: int, samples: int) -> Iterator[State]:
        """Disk states that a power cut may leave."""
        return powercut.states(self.prepared.images, self.events, seed, samples)

    def find_damage(self, seed: int, samples: int) -> str | None:
        """The first damaged state, or None."""
        for state in self.states(seed, samples):
            try:
                judge(self.prepared, state.images, told=state.told)
            except DamageError as damage:
                return f"{state.label}: {damage}"
        return None
