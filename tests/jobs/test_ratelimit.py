"""The limiter against its definition, and against what it is for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.jobs.ratelimit import SLICE, RateLimit
from qmpd.units import KIB, MIB

CHUNK = 512 * KIB


def test_no_limit_never_waits() -> None:
    """Speed 0 disables the limiter, whatever was charged."""
    free = RateLimit(0)

    assert free.delay(0.0, 1 << 60) == 0.0
    assert free.delay(0.0) == 0.0


def test_first_chunk_is_free_and_the_next_pays() -> None:
    """At one byte per second one chunk goes out, then the job sleeps for half a million slices."""
    slow = RateLimit(1)

    assert slow.delay(10.0) == 0.0

    slow.delay(10.0, CHUNK)

    assert slow.delay(10.0) == pytest.approx(CHUNK * SLICE)


def test_below_the_quota_nothing_waits() -> None:
    """Less than a slice's quota (speed / 10) passes without delay; reaching it waits for the slice to end."""
    steady = RateLimit(10 * MIB)

    assert steady.delay(0.0, MIB - 1) == 0.0
    assert steady.delay(0.0, 1) == pytest.approx(SLICE)


def test_a_slice_that_is_over_forgets_its_debt() -> None:
    """After the slice's end the next charge begins a new slice."""
    steady = RateLimit(10 * MIB)
    steady.delay(0.0, 2 * MIB)

    assert steady.delay(0.2) == pytest.approx(0.0)
    assert steady.delay(0.21) == 0.0
    assert steady.delay(0.21, MIB // 2) == 0.0


def test_a_raised_speed_shortens_the_running_sleep() -> None:
    """The quota changes at once; what was dispatched in the slice still counts."""
    changing = RateLimit(1)
    changing.delay(0.0, CHUNK)

    changing.speed = 10 * MIB

    assert changing.delay(1.0) == 0.0


def test_quota_is_never_zero() -> None:
    """Speeds below 10 bytes per second round down to nothing per slice, but still make progress."""
    assert RateLimit(9).quota == 1


@given(speed=st.integers(1, 1 << 63), chunks=st.lists(st.integers(1, 4 * MIB), min_size=1, max_size=40))
def test_throughput_never_exceeds_the_speed(speed: int, chunks: list[int]) -> None:
    """A job that sleeps as told moves at most its speed, but for the one chunk that goes out first."""
    throttle = RateLimit(speed)
    now = 0.0
    for count in chunks:
        now += throttle.delay(now)
        throttle.delay(now, count)
    rate = max(speed, 10)

    assert sum(chunks[:-1]) <= rate * (now + 2 * SLICE) * 1.01


@given(speed=st.integers(10, 1 << 40), count=st.integers(1, 1 << 30), start=st.floats(0, 1e6))
def test_the_debt_is_paid_exactly(speed: int, count: int, start: float) -> None:
    """After the delay it names, the limiter lets the next chunk go (give or take a clock's rounding)."""
    throttle = RateLimit(speed)
    throttle.delay(start, count)

    wait = throttle.delay(start)

    assert throttle.delay(start + wait) == pytest.approx(0.0, abs=1e-6)


@given(speed=st.integers(1, 1 << 40), steps=st.lists(st.tuples(st.floats(0, 10), st.integers(0, MIB)), max_size=20))
def test_delays_are_never_negative(speed: int, steps: list[tuple[float, int]]) -> None:
    """However late the caller comes, it is never told to wait a negative time."""
    throttle = RateLimit(speed)
    now = 0.0

    for pause, count in steps:
        now += pause

        assert throttle.delay(now, count) >= 0.0
