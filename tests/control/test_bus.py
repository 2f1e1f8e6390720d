"""Event fan-out (spec/qmp-protocol.md section 10)."""

from __future__ import annotations

from qmpd.control.bus import Bus


class Listener:
    """Keeps what it is told."""

    def __init__(self, pretty: bool = False) -> None:
        self.pretty = pretty
        self.heard: list[bytes] = []

    def publish(self, message: bytes) -> None:
        """One message."""
        self.heard.append(message)


def test_the_event_is_with_every_subscriber_when_publish_returns() -> None:
    """And carries the wall clock in seconds and microseconds."""
    bus, one, two = Bus(clock=lambda: 1_700_000_000_123_456_789), Listener(), Listener()
    bus.join(one)
    bus.join(two)
    bus.publish("JOB_STATUS_CHANGE", {"status": "created", "id": "j"})

    assert one.heard == two.heard
    assert b'"seconds": 1700000000, "microseconds": 123456' in one.heard[0]
    assert one.heard[0].endswith(b"}\r\n")


def test_data_is_left_out_if_there_is_none() -> None:
    """Not even an empty object."""
    bus, listener = Bus(), Listener()
    bus.join(listener)
    bus.publish("X")
    bus.publish("X", {})

    assert all(b'"data"' not in message for message in listener.heard)


def test_who_left_hears_nothing() -> None:
    """Also one who never joined may leave; also in the middle of an event."""
    bus, listener = Bus(), Listener()
    bus.leave(listener)

    class Leaver(Listener):
        def publish(self, message: bytes) -> None:
            bus.leave(listener)

    bus.join(Leaver())
    bus.join(listener)
    bus.publish("FIRST")
    bus.publish("SECOND")

    assert len(listener.heard) == 1


def test_pretty_clients_get_it_pretty() -> None:
    """Each kind is spelled once."""
    bus, plain, pretty = Bus(), Listener(), Listener(pretty=True)
    bus.join(plain)
    bus.join(pretty)
    bus.publish("X", {"a": 1})

    assert plain.heard[0].count(b"\r\n") == 1
    assert b'    "event": "X"' in pretty.heard[0]
