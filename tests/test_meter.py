"""Rate and time left, from samples."""

from __future__ import annotations

from qmpd.meter import WINDOW, Meter

MIB = 1 << 20


def metered(*samples: tuple[float, int], total: int = 64 * MIB) -> Meter:
    """A meter that has seen these."""
    meter = Meter()
    for now, offset in samples:
        meter.update(now, offset, total)
    return meter


def test_nothing_is_claimed_from_one_sample() -> None:
    """No rate and no time left before there is something to tell them from."""
    meter = metered((10.0, MIB))

    assert meter.rate is None
    assert meter.eta is None


def test_the_rate_is_bytes_per_second() -> None:
    """8 MiB a second leave 6 seconds for the last 48 MiB."""
    meter = metered((10.0, 0), (11.0, 8 * MIB), (12.0, 16 * MIB))

    assert meter.rate == 8 * MIB
    assert meter.eta == 6.0
    assert meter.fraction == 0.25


def test_a_change_of_speed_is_forgotten_after_the_window() -> None:
    """The rate is that of the last seconds, not of the whole job."""
    slow = [(float(second), second * MIB) for second in range(20)]
    fast = [(20.0 + second, 19 * MIB + second * 4 * MIB) for second in range(1, int(WINDOW) + 2)]

    assert metered(*slow, *fast).rate == 4 * MIB


def test_standing_still_has_no_end() -> None:
    """A rate of zero gives no time left rather than a division."""
    meter = metered((0.0, MIB), (1.0, MIB))

    assert meter.rate == 0
    assert meter.eta is None


def test_a_rest_starts_the_measuring_anew() -> None:
    """The time of a pause does not count as slowness."""
    meter = metered((0.0, 0), (1.0, MIB))
    meter.rest()
    meter.update(100.0, MIB, 64 * MIB)

    assert meter.rate is None


def test_an_offset_that_runs_backwards_starts_anew() -> None:
    """A job with the same name may be another job."""
    assert metered((0.0, 10 * MIB), (1.0, 20 * MIB), (2.0, 0)).rate is None


def test_a_job_without_work_is_done() -> None:
    """An empty device is complete at once."""
    meter = metered((0.0, 0), total=0)

    assert meter.fraction == 1.0
    assert meter.eta == 0.0
