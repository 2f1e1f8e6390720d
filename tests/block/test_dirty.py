"""The map of dirty granules against a plain set, and from several threads."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.block import dirty
from qmpd.block.dirty import I64, DirtyMap
from qmpd.errors import QmpdError

G = 4096
GRANULES = 300

RANGE = st.tuples(st.integers(0, GRANULES * G), st.integers(0, 40 * G))
STEP = st.one_of(
    st.tuples(st.just("mark"), RANGE),
    st.tuples(st.just("mark many"), st.lists(RANGE, max_size=6)),
    st.tuples(st.just("take"), st.tuples(st.integers(0, GRANULES * G), st.integers(1, 50 * G), st.booleans())),
)


def touched(offset: int, length: int, size: int) -> set[int]:
    """The granules of a range, within the device."""
    end = min(offset + length, size)
    return set(range(offset // G, -(-end // G))) if length > 0 and offset < end else set()


def granules(start: I64, end: I64) -> list[int]:
    """What ranges taken stand for; they must be well formed."""
    assert (start < end).all()
    assert (start[1:] > end[:-1]).all()  # those that touch are one
    assert not (start % G).any()
    return [g for s, e in zip(start.tolist(), end.tolist(), strict=True) for g in range(s // G, -(-e // G))]


@settings(max_examples=150)
@given(size=st.integers(1, GRANULES * G), steps=st.lists(STEP, max_size=30))
def test_is_a_set_of_granules(size: int, steps: list[Any]) -> None:
    """Marked by touch, counted to the byte, taken in order from where one asks and once only."""
    real, model = DirtyMap(size, G), set[int]()
    for verb, what in steps:
        if verb == "mark":
            real.mark(*what)
            model |= touched(what[0], what[1], size)
        elif verb == "mark many":
            ranges = disjoint(what, size)
            real.mark_ranges(np.array([s for s, _ in ranges], np.int64), np.array([e for _, e in ranges], np.int64))
            model |= set().union(*(touched(s, e - s, size) for s, e in ranges))
        else:
            start, limit, single = what
            took = granules(*real.take(start, limit, single=single))
            assert took == expected(model, start, limit, single, size)
            model -= set(took)
        tail = -size % G if -(-size // G) - 1 in model else 0
        assert real.bytes == len(model) * G - tail


def disjoint(ranges: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """(start, end), sorted and cut so that they do not overlap."""
    cut: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        start, end = max(offset, cut[-1][1] if cut else 0), min(offset + length, size)
        if start < end:
            cut.append((start, end))
    return cut


def expected(model: set[int], start: int, limit: int, single: bool, size: int) -> list[int]:
    """What take gives: the granules next to ``start``, from the beginning if there are none."""
    ahead = sorted(g for g in model if g >= min(start // G, -(-size // G))) or sorted(model)
    took = ahead[: max(1, limit // G)]
    if single:
        took = [g for i, g in enumerate(took) if g == took[0] + i]
    return took


def test_an_empty_device() -> None:
    """Nothing to mark and nothing to take."""
    empty = DirtyMap(0, G)
    empty.mark(0, 10)

    assert empty.bytes == 0
    assert len(empty.take(0, G)[0]) == 0


@pytest.mark.parametrize("far", [1, 9, 70_000, 1_200_000])
def test_a_lonely_granule_is_found(far: int) -> None:
    """Wherever it is, and from wherever one looks."""
    big = DirtyMap(2_000_000 * G, G)
    for start in (0, far * G, (far + 1) * G, 1_999_999 * G):
        big.mark(far * G + 5, 1)

        assert granules(*big.take(start, G)) == [far]
        assert big.bytes == 0


def test_a_device_too_large_for_any_map() -> None:
    """An error like any other."""
    with pytest.raises(QmpdError, match=r"^Cannot allocate memory$"):
        DirtyMap(1 << 62, G)


def test_one_take_stays_in_one_neighbourhood() -> None:
    """What is far away waits for the next one, however large the limit."""
    big = DirtyMap(2_000_000 * G, G)
    big.mark(0, G)
    big.mark(1_000_000 * G, G)

    assert granules(*big.take(0, 1 << 62)) == [0]
    assert granules(*big.take(G, 1 << 62)) == [1_000_000]
    assert dirty._WINDOW * 8 < 1_000_000


def test_nothing_is_lost_between_threads() -> None:
    """Four threads mark every granule once while another takes: each is taken, or still there."""
    count = 40_000
    shared = DirtyMap(count * G, G)
    taken = np.zeros(count, np.int64)

    def mark(own: range) -> None:
        for granule in own:
            shared.mark(granule * G, 1)

    markers = [threading.Thread(target=mark, args=(range(i, count, 4),)) for i in range(4)]
    for thread in markers:
        thread.start()
    position = 0
    while any(thread.is_alive() for thread in markers) or shared.bytes:
        start, end = shared.take(position, 64 * G)
        for s, e in zip((start // G).tolist(), (end // G).tolist(), strict=True):
            taken[s:e] += 1
        position = int(end[-1]) if len(end) else 0
    for thread in markers:
        thread.join()

    assert (taken == 1).all()
