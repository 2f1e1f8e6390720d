"""Runs of bytes: where the content of a range lives.

:class:`Runs` is a small table of numpy columns, because a disk can hold hundreds of thousands of runs and Python
objects for each would cost more than copying them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class RunKind(IntEnum):
    """What a run is made of."""

    UNALLOCATED = 0  # this layer says nothing: look below (zeros below the last layer)
    DATA = 1  # bytes at `host` in the layer's data child
    ZERO = 2  # reads as zeros, needs no bytes
    COMPRESSED = 3  # one compressed cluster (or part of it); only the driver can read it
    OPAQUE = 4  # allocated, but only readable through the driver


class Run(NamedTuple):
    """One row of :class:`Runs`; bytes."""

    offset: int
    length: int
    kind: RunKind
    host: int  # byte offset in the data child for DATA, else -1


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Sorted, gapless runs: ``offset[i] + length[i] == offset[i + 1]``. Columns have equal shape (n,), n >= 1."""

    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    kind: npt.NDArray[np.uint8]
    host: npt.NDArray[np.int64]

    @classmethod
    def single(cls, offset: int, length: int, kind: RunKind, host: int = -1) -> Runs:
        """One run."""
        return cls(
            np.array([offset], np.int64),
            np.array([length], np.int64),
            np.array([kind], np.uint8),
            np.array([host], np.int64),
        )

    @classmethod
    def of(cls, rows: list[Run]) -> Runs:
        """From Python rows (tests, small results)."""
        return cls(
            np.array([r.offset for r in rows], np.int64),
            np.array([r.length for r in rows], np.int64),
            np.array([r.kind for r in rows], np.uint8),
            np.array([r.host for r in rows], np.int64),
        )

    @property
    def start(self) -> int:
        return int(self.offset[0])

    @property
    def end(self) -> int:
        return int(self.offset[-1] + self.length[-1])

    def __len__(self) -> int:
        return len(self.offset)

    def __iter__(self) -> Iterator[Run]:
        for o, n, k, h in zip(
            self.offset.tolist(), self.length.tolist(), self.kind.tolist(), self.host.tolist(), strict=True
        ):
            yield Run(o, n, RunKind(k), h)
