"""The limits of throttle groups, and their arithmetic over a clock of the test's own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.block.limits import MEMBERS, MOST, RATES, Buckets, Direction, Limits, Rate
from qmpd.errors import QmpdError

READ, WRITE = Direction.READ, Direction.WRITE


def limits(**values: int) -> Limits:
    return Limits().merged({name.replace("_", "-"): value for name, value in values.items()})


# -- values ------------------------------------------------------------------------------------------------------------


def test_all_members_are_told() -> None:
    """19 of them; burst lengths are 1 by default."""
    values = Limits().to_wire()
    assert set(values) == set(MEMBERS)
    assert len(values) == 19
    assert {name for name, value in values.items() if value} == {f"{rate}-max-length" for rate in RATES}


def test_members_not_named_keep_their_value() -> None:
    """A change merges."""
    merged = limits(iops_total=100, bps_read=7).merged({"iops-total": 200}).merged({})
    assert merged.rates["iops-total"] == Rate(200)
    assert merged.rates["bps-read"] == Rate(7)


CONFLICT = "bps/iops/max total values and read/write values cannot be used at the same time"
RANGE = f"bps/iops/max values must be within [0, {MOST}]"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"iops_total": 1, "iops_read": 1}, CONFLICT),
        ({"bps_total": 1, "bps_write": 1}, CONFLICT),
        ({"iops_total": -1, "iops_read": -1}, CONFLICT),
        ({"bps_total": 5, "bps_total_max": 10, "bps_read_max": 5}, CONFLICT),
        ({"iops_total": -1}, RANGE),
        ({"iops_total": MOST + 1}, RANGE),
        ({"iops_total_max": -1}, RANGE),
        ({"iops_total_max": 5}, "bps_max/iops_max require corresponding bps/iops values"),
        ({"iops_total": 10, "iops_total_max": 5}, "bps_max/iops_max cannot be lower than bps/iops"),
        ({"iops_total": 10, "iops_total_max_length": 0}, "the burst length cannot be 0"),
        ({"iops_total": 10, "iops_total_max_length": 3}, "burst length set without burst rate"),
        ({"iops_total_max_length": -1}, "burst length set without burst rate"),
        (
            {"iops_total": 10, "iops_total_max": 20, "iops_total_max_length": -1},
            "burst length too high for this burst rate",
        ),
        (
            {"iops_total": 10, "iops_total_max": MOST, "iops_total_max_length": 2},
            "burst length too high for this burst rate",
        ),
        ({"iops_total_max_length": 1 << 33}, "iops-total-max-length value must be in the range [0, 4294967295]"),
        ({"iops_size": 4096}, "iops size requires an iops value to be set"),
        ({"bps_read": 5, "iops_size": -1}, "iops size requires an iops value to be set"),
    ],
)
def test_what_is_refused(values: dict[str, int], text: str) -> None:
    """In the peer's words, and in its order."""
    with pytest.raises(QmpdError) as caught:
        limits(**values)
    assert caught.value.desc == text


# -- arithmetic --------------------------------------------------------------------------------------------------------


def run(buckets: Buckets, requests: list[tuple[Direction, int]], start: float = 0.0) -> list[float]:
    """When each request goes, if each is made when the one before it went."""
    now, times = start, []
    for direction, length in requests:
        now += buckets.wait(direction, now)
        buckets.pour(direction, length)
        times.append(now)
    return times


def test_without_limits_nothing_waits() -> None:
    """Of either direction."""
    buckets = Buckets(Limits(), 0.0)
    assert not buckets.limits_anything(READ)
    assert run(buckets, [(READ, 1 << 40)] * 3) == [0.0] * 3


def test_the_debt_of_a_request_is_paid_by_the_next() -> None:
    """A large one goes at once; the brim is a tenth of a second."""
    assert run(Buckets(limits(bps_total=1000), 0.0), [(READ, 1000), (WRITE, 500), (READ, 1)]) == pytest.approx(
        [0.0, 0.9, 1.4]
    )


def test_directions_have_limits_of_their_own() -> None:
    """Reads do not wait for writes."""
    buckets = Buckets(limits(bps_write=1000), 0.0)
    assert not buckets.limits_anything(READ)
    assert run(buckets, [(WRITE, 1000), (READ, 5000), (WRITE, 1)]) == pytest.approx([0.0, 0.0, 0.9])


def test_a_burst_is_let_through_for_its_time() -> None:
    """10 a second, 100 a second for 2 seconds: some 200 go fast, then it is 10 a second."""
    buckets = Buckets(limits(iops_total=10, iops_total_max=100, iops_total_max_length=2), 0.0)
    times = run(buckets, [(READ, 512)] * 300)
    fast = sum(time < 2.3 for time in times)
    assert 200 < fast < 245
    slow = [later - earlier for earlier, later in pairwise(times[260:])]
    assert slow == pytest.approx([0.1] * len(slow))


def test_large_requests_count_as_several() -> None:
    """Once for each iops-size bytes."""
    buckets = Buckets(limits(iops_total=10, iops_size=4096), 0.0)
    assert run(buckets, [(READ, 40960), (READ, 512), (READ, 512)]) == pytest.approx([0.0, 0.9, 1.0])


def test_a_clock_that_stands_still_or_jumps_back_does_no_harm() -> None:
    """Nothing leaks, nothing breaks."""
    buckets = Buckets(limits(iops_total=10), 5.0)
    buckets.pour(READ, 1)
    buckets.pour(READ, 1)
    assert buckets.wait(READ, 4.0) == buckets.wait(READ, 5.0) == pytest.approx(0.1)


requests = st.lists(st.tuples(st.sampled_from(list(Direction)), st.integers(1, 10**6)), min_size=2, max_size=50)
rates: Any = st.integers(1, 10**7)


@given(requests, rates)
def test_the_long_run_rate_is_kept(todo: list[tuple[Direction, int]], rate: int) -> None:
    """What went before the last request fits into the time plus a tenth of a second."""
    times = run(Buckets(limits(bps_total=rate), 0.0), todo)
    assert sum(length for _, length in todo[:-1]) <= (times[-1] + 0.1) * rate * (1 + 1e-6) + 1e-6
    assert times == sorted(times)
