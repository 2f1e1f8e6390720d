"""What block status says about a range (spec/nbd-export.md section 8). Worker thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from qmpd.block.api import BlockDevice
from qmpd.block.extents import NO_LAYER, ChainRuns, RunKind, chain_runs
from qmpd.nbd.constants import ALLOCATION_DEPTH

MAX_EXTENTS: Final = 131072
"""Of one context in one reply."""

_HOLE_ZERO: Final = 3

Extents = list[tuple[int, int]]


def extents(layers: Sequence[BlockDevice], context: str, offset: int, length: int, *, one: bool) -> Extents:
    """(length, flags) from ``offset`` on, equal neighbours joined; ``one`` stops after the first.

    ``length`` and all that is answered is in bytes. Raises QmpdError.
    """
    found: Extents = []
    position, end = offset, offset + length
    while position < end and len(found) <= MAX_EXTENTS and not (one and len(found) > 1):
        runs = chain_runs(layers, position, end - position)
        flags = _depth(runs) if context == ALLOCATION_DEPTH else _allocation(runs)
        for size, flag in zip(runs.length.tolist(), flags.tolist(), strict=True):
            if found and found[-1][1] == flag:
                found[-1] = found[-1][0] + size, flag
            else:
                found.append((size, flag))
        position = runs.end
    return found[: 1 if one else MAX_EXTENTS]


def _allocation(runs: ChainRuns) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    empty = (runs.kind == RunKind.UNALLOCATED) | (runs.kind == RunKind.ZERO)
    return np.where(empty, _HOLE_ZERO, 0)


def _depth(runs: ChainRuns) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.where(runs.layer == NO_LAYER, 0, runs.layer + 1).astype(np.int64)
