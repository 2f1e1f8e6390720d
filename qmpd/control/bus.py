"""Event fan-out: one publisher's event to every client that has negotiated. Source: spec/qmp-protocol.md section 10.

A client that has not asked for anything hears what the peer would tell it. One with a :class:`Subscription` hears the
events it named, those that only qmpd has among them, each with its number; and, if it wants, how far jobs are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from qmpd.control.history import Event, Excerpt, History
from qmpd.wire import messages

OWN: Final = "X_QMPD_"
"""How the names of events begin that the peer does not have: for subscribed clients only."""


class Subscriber(Protocol):
    """The outbox of one client."""

    pretty: bool

    def publish(self, message: bytes) -> None:
        """Take one message, without waiting and without raising."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """What a client asked for: the names of ``events`` (None for all) and whether it wants ``progress``."""

    events: frozenset[str] | None = None
    progress: bool = False

    def wants(self, name: str) -> bool:
        """Is the event one of those asked for?"""
        return self.events is None or name in self.events


class Bus:
    """The clients that hear events, and what they heard; control thread only.

    ``clock`` gives the wall-clock time in nanoseconds since the epoch.
    """

    def __init__(self, clock: Callable[[], int] = time.time_ns, history: History | None = None) -> None:
        self.clock = clock
        self.history = history or History()
        #: The number of the event published last; it may not have been told yet.
        self.last = self.history.last
        #: Takes each event instead of its being told, and has it told (:meth:`tell`) once it is durable, in order.
        self.keep: Callable[[Event], object] | None = None
        #: None: the client has not subscribed.
        self._subscribers: dict[Subscriber, Subscription | None] = {}
        #: Called when somebody begins to.
        self.on_progress_wanted: Callable[[], object] = lambda: None

    def join(self, subscriber: Subscriber) -> None:
        """Deliver every event from now on."""
        self._subscribers[subscriber] = None

    def leave(self, subscriber: Subscriber) -> None:
        """Deliver no more; harmless for one who never joined."""
        self._subscribers.pop(subscriber, None)

    def publish(self, event_name: str, data: dict[str, Any] | None = None) -> None:
        """Put the event into every subscriber's outbox; it is there when this returns.

        The reply that a command adds afterwards is therefore read after the events it caused. Where events are made
        durable first, the server waits for that.
        """
        self.last += 1
        event = Event(self.last, event_name, data or None, self.clock())
        if self.keep is None:
            self.tell(event)
        else:
            self.keep(event)

    def tell(self, event: Event) -> None:
        """Let everybody know now what was published."""
        self.history.add(event)
        self._deliver(event)

    def _deliver(self, event: Event) -> None:
        written: dict[tuple[bool, bool], bytes] = {}
        is_own = event.name.startswith(OWN)
        for subscriber, subscription in list(self._subscribers.items()):
            if is_own if subscription is None else not subscription.wants(event.name):
                continue
            form = (subscriber.pretty, subscription is not None)
            if form not in written:
                written[form] = event.message(pretty=form[0], numbered=form[1])
            subscriber.publish(written[form])

    # -- subscribing ---------------------------------------------------------------------------------------------------

    def subscribe(
        self, subscriber: Subscriber, subscription: Subscription, since: int | None = None, log: str | None = None
    ) -> Excerpt:
        """From now on deliver what ``subscription`` says, instead of what an earlier one said.

        With ``since`` the events after that number of ``log`` come first, as far as they are kept; they are on their
        way when this returns. What was replayed is in the answer.
        """
        if subscriber not in self._subscribers:
            return Excerpt([], complete=True)  # it is lost already
        replay = Excerpt([], complete=True) if since is None else self.history.since(since, log)
        self._subscribers[subscriber] = subscription
        for event in replay.events:
            if subscription.wants(event.name):
                subscriber.publish(event.message(pretty=subscriber.pretty, numbered=True))
        if subscription.progress:
            self.on_progress_wanted()
        return replay

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Deliver what a client hears that has not asked for anything."""
        if subscriber in self._subscribers:
            self._subscribers[subscriber] = None

    def is_subscribed(self, subscriber: Subscriber) -> bool:
        """Has the client asked for more than the peer tells?"""
        return self._subscribers.get(subscriber) is not None

    # -- progress ------------------------------------------------------------------------------------------------------

    @property
    def wants_progress(self) -> bool:
        """Does anybody?"""
        return any(subscription and subscription.progress for subscription in self._subscribers.values())

    def tell_progress(self, event_name: str, data: dict[str, Any]) -> None:
        """To those who want it. It has no number and is not kept: the next one says all that it did."""
        seconds, nanoseconds = divmod(self.clock(), 1_000_000_000)
        for subscriber, subscription in list(self._subscribers.items()):
            if subscription is not None and subscription.progress:
                subscriber.publish(
                    messages.event(event_name, data, seconds, nanoseconds // 1000, pretty=subscriber.pretty)
                )
