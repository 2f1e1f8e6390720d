"""Event fan-out: one publisher's event to every client that has negotiated. Source: spec/qmp-protocol.md section 10."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from qmpd.wire import messages


class Subscriber(Protocol):
    """The outbox of one client."""

    pretty: bool

    def publish(self, message: bytes) -> None:
        """Take one message, without waiting and without raising."""


class Bus:
    """The clients that hear events; control thread only.

    ``clock`` gives the wall-clock time in nanoseconds since the epoch.
    """

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._subscribers: dict[Subscriber, None] = {}

    def join(self, subscriber: Subscriber) -> None:
        """Deliver every event from now on."""
        self._subscribers[subscriber] = None

    def leave(self, subscriber: Subscriber) -> None:
        """Deliver no more; harmless for one who never joined."""
        self._subscribers.pop(subscriber, None)

    def publish(self, event_name: str, data: dict[str, Any] | None = None) -> None:
        """Put the event into every subscriber's outbox; it is there when this returns.

        The reply that a command adds afterwards is therefore read after the events it caused.
        """
        seconds, nanoseconds = divmod(self._clock(), 1_000_000_000)
        written: dict[bool, bytes] = {}
        for subscriber in list(self._subscribers):
            if subscriber.pretty not in written:
                written[subscriber.pretty] = messages.event(
                    event_name, data or None, seconds, nanoseconds // 1000, pretty=subscriber.pretty
                )
            subscriber.publish(written[subscriber.pretty])
