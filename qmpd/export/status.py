"""What block status says about a range (spec/nbd-export.md section 8). Worker thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from qmpd.block.api import Driver
from qmpd.block.extents import NO_LAYER, ChainRuns, RunKind, chain_runs
from qmpd.nbd.constants import ALLOCATION_DEPTH
from qmpd.units import align_down, align_up

MAX_EXTENTS: Final = 131072
"""Of one context in one reply."""

_HOLE_ZERO: Final = 3

Extents = list[tuple[int, int]]
Sizes = np.ndarray[tuple[int], np.dtype[np.int64]]


def extents(layers: Sequence[Driver], context: str, offset: int, length: int, *, one: bool) -> Extents:
    """(length, flags) from ``offset`` on, equal neighbours joined; ``one`` stops after the first.

    ``length`` and all that is answered is in bytes. Raises QmpdError.
    """
    found: Extents = []
    end = offset + length
    position = align_down(offset, layers[0].map_unit)  # what a unit is must not hang on where it is asked
    while position < end and len(found) <= MAX_EXTENTS and not (one and len(found) > 1):
        runs = chain_runs(layers, position, end - position)
        flags = _depth(runs) if context == ALLOCATION_DEPTH else _allocation(runs)
        for size, flag in zip(_whole_units(layers, runs).tolist(), flags.tolist(), strict=True):
            skipped = min(size, max(0, offset - position))
            position += size
            size -= skipped
            if not size:
                continue
            if found and found[-1][1] == flag:
                found[-1] = found[-1][0] + size, flag
            else:
                found.append((size, flag))
        position = runs.end
    return found[: 1 if one else MAX_EXTENTS]


def _whole_units(layers: Sequence[Driver], runs: ChainRuns) -> Sizes:
    """Lengths of the runs. A unit that the image file ends within counts as data to its end, as if it were stored."""
    kind, layer, length, ends = runs.kind, runs.layer, runs.length, runs.offset + runs.length
    unit = np.array([device.map_unit for device in layers], np.int64)[layer]
    cut = (kind[:-1] == RunKind.DATA) & (kind[1:] == RunKind.ZERO) & (layer[:-1] == layer[1:])
    cut &= ends[:-1] % unit[:-1] != 0
    if cut.any():
        length = length.copy()
        for index in np.flatnonzero(cut).tolist():
            device, stop = layers[int(layer[index])], int(ends[index])
            more = min(align_up(stop, device.map_unit), device.length) - stop
            more = min(max(more, 0), int(length[index + 1]))
            length[index] += more
            length[index + 1] -= more
    return length


def _allocation(runs: ChainRuns) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    empty = (runs.kind == RunKind.UNALLOCATED) | (runs.kind == RunKind.ZERO)
    return np.where(empty, _HOLE_ZERO, 0)


def _depth(runs: ChainRuns) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.where(runs.layer == NO_LAYER, 0, runs.layer + 1).astype(np.int64)
