"""The lock on byte ranges."""

from __future__ import annotations

import threading

from qmpd.block.ranges import RangeLock


def test_what_does_not_overlap_does_not_wait() -> None:
    """Neighbours, and empty ranges, included."""
    lock = RangeLock()
    with lock.hold(0, 10), lock.hold(10, 20), lock.hold(5, 5):
        pass


def test_what_overlaps_waits() -> None:
    """Until the range is free, by an exception too."""
    lock = RangeLock()
    order: list[str] = []

    def second() -> None:
        with lock.hold(9, 11):
            order.append("second")

    thread = threading.Thread(target=second)
    try:
        with lock.hold(0, 10):
            thread.start()
            with lock.hold(100, 110):
                order.append("first")
            raise RuntimeError
    except RuntimeError:
        pass
    thread.join()
    assert order == ["first", "second"]
