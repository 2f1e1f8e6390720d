"""Merging layers: the topmost word on each byte, whatever the shapes. Judged by a byte-per-byte shadow."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.block.extents import NO_LAYER, ChainRuns, Run, RunKind, Runs, chain_runs, merge

LENGTH = 64


class Layer:
    """A device that answers map() from a table, in answers of at most ``stride`` runs, and counts the questions."""

    def __init__(self, rows: list[Run], stride: int = 1000) -> None:
        self.rows = rows
        self.stride = stride
        self.asked: list[tuple[int, int]] = []

    @property
    def length(self) -> int:
        return self.rows[-1].offset + self.rows[-1].length if self.rows else 0

    def map(self, offset: int, length: int) -> Runs:
        self.asked.append((offset, length))
        assert length > 0
        assert offset + length <= self.length
        cut = []
        for row in self.rows:
            start, end = max(row.offset, offset), min(row.offset + row.length, offset + length)
            if start < end:
                host = row.host + start - row.offset if row.kind == RunKind.DATA else -1
                cut.append(Run(start, end - start, row.kind, host))
        return Runs.of(cut[: self.stride])


@st.composite
def layers(draw: st.DrawFn, longest: int = LENGTH, shortest: int = LENGTH) -> Layer:
    """Random runs; hosts are far apart so that runs continue each other now and then."""
    length = draw(st.integers(shortest, longest))
    cuts = sorted(draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=8)) - {length, 0})
    bounds = [0, *[c for c in cuts if c < length], length]
    rows = []
    for start, end in itertools.pairwise(bounds):
        if end == start:
            continue
        kind = draw(st.sampled_from([RunKind.UNALLOCATED, *RunKind]))
        host = draw(st.sampled_from([start, 1000 + start, 5000])) if kind == RunKind.DATA else -1
        rows.append(Run(start, end - start, kind, host))
    return Layer(rows, draw(st.integers(1, 10)))


def shadow(stack: list[Layer], start: int, end: int) -> Iterator[tuple[RunKind, int, int]]:
    """(kind, layer, host) of each byte, one by one."""
    for position in range(start, end):
        word = (RunKind.UNALLOCATED, NO_LAYER, -1)
        for index, layer in enumerate(stack):
            if position >= layer.length:
                word = (RunKind.ZERO, index, -1)
                break
            row = next(r for r in layer.rows if r.offset <= position < r.offset + r.length)
            if row.kind != RunKind.UNALLOCATED:
                host = row.host + position - row.offset if row.kind == RunKind.DATA else -1
                word = (row.kind, index, host)
                break
        yield word


def flat(runs: ChainRuns) -> list[tuple[RunKind, int, int]]:
    """The same form, from a table."""
    return [
        (run.kind, run.layer, run.host + i if run.kind == RunKind.DATA else -1)
        for run in runs
        for i in range(run.length)
    ]


@settings(deadline=None)
@given(st.lists(layers(), min_size=1, max_size=6))
def test_merge_is_the_topmost_word_on_each_byte(stack: list[Layer]) -> None:
    """Whatever the layers say, each byte gets the first answer from the top."""
    whole = [Runs.of(layer.rows) for layer in stack]
    merged = merge(whole)
    assert flat(merged) == list(shadow(stack, 0, LENGTH))


@settings(deadline=None)
@given(layers(), st.lists(layers(shortest=0), max_size=5), st.integers(0, LENGTH - 1), st.integers(1, LENGTH))
def test_chain_runs_agrees_with_the_shadow_in_any_range(
    top: Layer, lower: list[Layer], start: int, length: int
) -> None:
    """Ranges, layers that are shorter than the top, and drivers that answer in pieces change nothing."""
    stack, end = [top, *lower], min(start + length, LENGTH)
    position, words = start, []
    while position < end:
        runs = chain_runs(stack, position, end - position)  # type: ignore[arg-type]
        assert runs.start == position
        assert position < runs.end <= end
        words += flat(runs)
        position = runs.end
    assert words == list(shadow(stack, start, end))


@settings(deadline=None)
@given(st.lists(layers(), min_size=1, max_size=4), st.integers(0, LENGTH), st.integers(0, LENGTH))
def test_clip_keeps_what_lies_inside(stack: list[Layer], start: int, end: int) -> None:
    """A clipped table says the same about each byte inside, and nothing about others."""
    merged = merge([Runs.of(layer.rows) for layer in stack])
    inside = merged.clip(start, end)
    assert flat(inside) == flat(merged)[start:end]
    assert inside.allocated_bytes == sum(kind != RunKind.UNALLOCATED for kind, _, _ in flat(inside))


@settings(deadline=None)
@given(st.lists(layers(), min_size=1, max_size=4))
def test_neighbours_that_continue_each_other_are_one_run(stack: list[Layer]) -> None:
    """No two rows could be one, except compressed clusters: each of those is a unit of work."""
    rows = list(merge([Runs.of(layer.rows) for layer in stack]))
    for a, b in itertools.pairwise(rows):
        assert a.offset + a.length == b.offset
        continues = b.host == a.host + a.length or a.kind != RunKind.DATA
        assert (a.kind, a.layer) != (b.kind, b.layer) or not continues or a.kind == RunKind.COMPRESSED


def test_beyond_a_short_layer_is_zero_of_that_layer() -> None:
    """What a short layer hides must not show through: zeros belong to it, and nobody below is asked."""
    top = Layer([Run(0, 64, RunKind.UNALLOCATED, -1)])
    short = Layer([Run(0, 16, RunKind.UNALLOCATED, -1)])
    below = Layer([Run(0, 64, RunKind.DATA, 0)])
    runs = list(chain_runs([top, short, below], 0, 64))  # type: ignore[list-item]
    assert [(r.offset, r.length, r.kind, r.layer) for r in runs] == [
        (0, 16, RunKind.DATA, 2),
        (16, 48, RunKind.ZERO, 1),
    ]
    assert below.asked == [(0, 16)]


def test_a_layer_is_not_asked_about_long_stretches_settled_above() -> None:
    """Two gaps a gigabyte apart cost two questions about a gap each, not one about everything between."""
    gib = 1 << 30
    rows = [(0, 4096, RunKind.UNALLOCATED), (4096, gib, RunKind.ZERO), (4096 + gib, 4096, RunKind.UNALLOCATED)]
    top = Layer([Run(offset, length, kind, -1) for offset, length, kind in rows])
    below = Layer([Run(0, gib + 8192, RunKind.DATA, 0)])
    chain_runs([top, below], 0, gib + 8192)  # type: ignore[list-item]
    assert below.asked == [(0, 4096), (gib + 4096, 4096)]


def test_nothing_more_is_asked_once_all_is_settled() -> None:
    """A full layer ends the descent."""
    full = Layer([Run(0, 64, RunKind.DATA, 0)])
    below = Layer([Run(0, 64, RunKind.DATA, 0)])
    chain_runs([full, below], 0, 64)  # type: ignore[list-item]
    assert below.asked == []


def test_a_range_of_nothing_is_an_empty_table() -> None:
    """Length 0 asks nobody."""
    layer = Layer([Run(0, 64, RunKind.DATA, 0)])
    runs = chain_runs([layer], 8, 0)  # type: ignore[list-item]
    assert (len(runs), list(runs), runs.allocated_bytes, layer.asked) == (0, [], 0, [])


@pytest.mark.parametrize("depth", [2, 24])
def test_each_byte_is_settled_once_however_deep_the_chain(depth: int) -> None:
    """Rows handled in all are rows of the result, not rows times layers."""
    count, unit = 2000, 65536
    stack = []
    for index in range(depth):
        mine = np.arange(count) % depth == index
        kind = np.where(mine, RunKind.DATA, RunKind.UNALLOCATED).astype(np.uint8)
        host = np.where(mine, 7 * unit * np.arange(count), -1)
        length = np.full(count, unit, np.int64)
        stack.append(Runs(np.arange(count, dtype=np.int64) * unit, length, kind, host))
    merged = merge(stack)
    assert merged.layer.tolist() == [i % depth for i in range(count)]
    assert merged.allocated_bytes == count * unit


@settings(deadline=None)
@given(layers(), st.sets(st.integers(0, LENGTH), max_size=8))
def test_within_keeps_the_parts_in_the_ranges(layer: Layer, cuts: set[int]) -> None:
    """Any ranges, also those that begin in a gap of the table: what is left is what the table said there."""
    runs = merge([layer.map(0, LENGTH)]).allocated()
    bounds = sorted(cuts)[: len(cuts) // 2 * 2]
    start, end = (np.array(bounds[i::2], np.int64) for i in (0, 1))
    inside = {byte for s, e in zip(bounds[::2], bounds[1::2], strict=True) for byte in range(s, e)}

    got = {o + i: (k, n, h + i if h >= 0 else h) for o, c, k, n, h in runs.within(start, end) for i in range(c)}
    all_of_it = {o + i: (k, n, h + i if h >= 0 else h) for o, c, k, n, h in runs for i in range(c)}

    assert got == {byte: what for byte, what in all_of_it.items() if byte in inside}
