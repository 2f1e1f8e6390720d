"""Throttle groups: threads that wait, take turns, and are let go."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from qmpd.block.limits import Direction, Limits
from qmpd.block.throttling import Member, ThrottleGroup
from qmpd.errors import QmpdError

WRITE = Direction.WRITE


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def group() -> ThrottleGroup:
    """One byte a second: whoever waits, waits for the length of the test."""
    return ThrottleGroup("g", Limits().merged({"bps-write": 1}), Clock())


def start(group: ThrottleGroup, member: Member, then: Callable[[], None] = lambda: None) -> threading.Thread:
    """A thread with a request that has to wait; returns when it does."""
    before = group.waiting

    def request() -> None:
        group.pass_through(member, WRITE, 1000)
        then()

    thread = threading.Thread(target=request)
    thread.start()
    until(lambda: group.waiting > before)
    return thread


def until(condition: Callable[[], bool]) -> None:
    """Let other threads run until it holds."""
    while not condition():
        threading.Event().wait(0.001)


def tick(group: ThrottleGroup, seconds: float) -> None:
    """Let time pass, and everybody notice."""
    group._clock.now += seconds  # type: ignore[attr-defined]
    with group._changed:
        group._changed.notify_all()


def fill(group: ThrottleGroup) -> Member:
    """A member whose first request went at once."""
    member = group.join()
    group.pass_through(member, WRITE, 1000)
    return member


def test_a_change_of_the_limits_frees_who_waits(group: ThrottleGroup) -> None:
    """At once: the peer's requests sleep out their old delay."""
    thread = start(group, fill(group))
    group.change({"bps-write": 0})
    thread.join()
    assert group.waiting == 0


def test_a_change_that_is_refused_changes_nothing(group: ThrottleGroup) -> None:
    """And frees nobody."""
    thread = start(group, fill(group))
    with pytest.raises(QmpdError):
        group.change({"bps-write": -1})
    assert group.waiting == 1
    assert group.limits.rates["bps-write"].avg == 1
    group.change({"bps-write": 0})
    thread.join()


def test_draining_frees_the_requests_of_one_node(group: ThrottleGroup) -> None:
    """Those of others stay."""
    one, other = fill(group), group.join()
    waits = start(group, other)
    drained = start(group, one)
    group.drain(one, 1)
    drained.join()
    group.pass_through(one, WRITE, 1)
    assert group.waiting == 1
    group.drain(one, -1)
    again = start(group, one)
    for member in (one, other):
        group.drain(member, 1)
    for thread in (waits, again):
        thread.join()


def test_nodes_take_turns(group: ThrottleGroup) -> None:
    """One node with many requests does not starve another; the requests of a node stay in order."""
    greedy, modest = fill(group), group.join()
    order: list[str] = []
    threads = [start(group, greedy, lambda name=name: order.append(name)) for name in ("g1", "g2", "g3")]  # type: ignore[misc]
    threads.append(start(group, modest, lambda: order.append("m1")))
    for count in range(1, 5):
        tick(group, 1000)
        until(lambda count=count: len(order) == count)  # type: ignore[misc]
    assert order == ["g1", "m1", "g2", "g3"]


def test_reads_do_not_wait_in_the_queue_of_writes(group: ThrottleGroup) -> None:
    """No limit for them."""
    member = fill(group)
    thread = start(group, member)
    group.pass_through(member, Direction.READ, 1 << 30)
    group.drain(member, 1)
    thread.join()


def test_a_group_with_nodes_in_it_stays(group: ThrottleGroup) -> None:
    """And one that has been deleted takes no more."""
    member = group.join()
    assert not group.retire()
    group.leave(member)
    assert group.retire()
    with pytest.raises(QmpdError, match="Throttle group 'g' does not exist"):
        group.join()
