"""Pieces cover a region exactly, step like the peer, and never grow beyond what may pass without a look at the cell."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qmpd.block.extents import ChainRuns, RunKind
from qmpd.jobs.pieces import CHUNK, STRETCH, ZERO_SHARE, Piece, Pieces
from qmpd.units import GIB, KIB, MIB

KINDS = st.sampled_from([RunKind.UNALLOCATED, RunKind.DATA, RunKind.ZERO, RunKind.COMPRESSED])
REGIONS = st.tuples(
    st.integers(0, 1 << 40).map(lambda n: n * 512),
    st.lists(st.tuples(st.integers(1, 4 * MIB).map(lambda n: n * 512), KINDS), min_size=1, max_size=30),
)


def region(start: int, rows: list[tuple[int, RunKind]]) -> ChainRuns:
    """Adjacent runs of the given lengths and kinds."""
    length = np.array([count for count, _ in rows], np.int64)
    kind = np.array([kind for _, kind in rows], np.uint8)
    offset = start + np.cumsum(length) - length
    layer = np.where(kind == RunKind.UNALLOCATED, -1, 0).astype(np.int32)
    return ChainRuns(offset, length, kind, layer, np.full(len(rows), -1, np.int64))


def allocated(runs: ChainRuns, start: int, end: int) -> int:
    """The slow way to count."""
    return sum(
        max(0, min(end, run.offset + run.length) - max(start, run.offset))
        for run in runs
        if run.kind is not RunKind.UNALLOCATED
    )


@given(REGIONS)
def test_stretches_cover_the_region(made: tuple[int, list[tuple[int, RunKind]]]) -> None:
    """They follow each other without gap or overlap, count what is allocated, and are of bounded effort."""
    runs = region(*made)
    pieces = Pieces(runs)
    offset = pieces.start

    while offset < pieces.end:
        piece = pieces.stretch(offset)
        inside = runs.clip(offset, offset + piece.length)
        zeroes = int(inside.length[inside.kind == RunKind.ZERO].sum())

        assert piece.length > 0
        assert piece.allocated == allocated(runs, offset, offset + piece.length)
        assert piece.allocated - zeroes + zeroes // ZERO_SHARE <= STRETCH

        offset += piece.length

    assert offset == pieces.end == runs.end


@given(REGIONS, st.integers(0, 100))
def test_a_step_is_of_one_answer(made: tuple[int, list[tuple[int, RunKind]]], percent: int) -> None:
    """Allocated: at most a chunk; not allocated: up to where that changes."""
    runs = region(*made)
    pieces = Pieces(runs)
    offset = pieces.start + (pieces.end - 1 - pieces.start) * percent // 100

    piece = pieces.step(offset)
    end = offset + piece.length

    assert piece.length > 0
    assert piece.allocated == allocated(runs, offset, end)
    assert piece.allocated in (0, piece.length)
    if piece.allocated:
        assert piece.length <= CHUNK
    elif end < pieces.end:
        assert allocated(runs, end, end + 1) == 1


def test_steps_of_the_peer() -> None:
    """Runs of different kind or layer that are all allocated make one run; the chunk is 512 KiB."""
    rows = [(1536 * KIB, RunKind.UNALLOCATED), (64 * KIB, RunKind.DATA), (MIB, RunKind.ZERO), (512, RunKind.DATA)]
    pieces = Pieces(region(0, rows))

    assert pieces.step(0) == Piece(1536 * KIB, 0)
    assert pieces.step(1536 * KIB) == Piece(CHUNK, CHUNK)
    assert pieces.step(2560 * KIB) == Piece(64 * KIB + 512, 64 * KIB + 512)


def test_stretches_of_data_and_of_zeros() -> None:
    """64 MiB of data, 1 GiB of zeros, any amount of nothing."""
    assert Pieces(region(0, [(GIB, RunKind.DATA)])).stretch(0) == Piece(STRETCH, STRETCH)
    assert Pieces(region(0, [(4 * GIB, RunKind.ZERO)])).stretch(0) == Piece(GIB, GIB)
    assert Pieces(region(0, [(1 << 44, RunKind.UNALLOCATED)])).stretch(0) == Piece(1 << 44, 0)


def test_stretches_end_on_cluster_boundaries() -> None:
    """A cluster of up to 2 MiB is never cut in two."""
    pieces = Pieces(region(0, [(64 * KIB, RunKind.UNALLOCATED), (GIB, RunKind.DATA)]))

    first = pieces.stretch(0)

    assert first.length % (2 * MIB) == 0
    assert pieces.stretch(first.length).length == STRETCH
