"""Where metadata lies, so that nothing else is written there (spec/qcow2.md section 10). Clusters by index."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from qmpd.block.drivers.qcow2.tables import I64


class Area(NamedTuple):
    """Clusters ``[first, end)`` of one structure."""

    first: int
    end: int
    name: str


class Overlap:
    """The clusters known to be metadata. Kept up to date by whoever moves metadata."""

    def __init__(self) -> None:
        self._areas: dict[str, list[Area]] = {}
        self._flat: list[Area] = []
        self.l2: set[int] = set()
        self.blocks: set[int] = set()

    def place(self, name: str, *areas: tuple[int, int]) -> None:
        """The structure called ``name`` (QEMU's words) now occupies these clusters ``[first, end)``."""
        self._areas[name] = [Area(first, end, name) for first, end in areas if end > first]
        self._flat = [area for group in self._areas.values() for area in group]

    def at(self, cluster: int) -> str | None:
        """What lies there, or None for data and free clusters."""
        for first, end, name in self._flat:
            if first <= cluster < end:
                return name
        if cluster in self.l2:
            return "active L2 table"
        if cluster in self.blocks:
            return "refcount block"
        return None

    def any(self, clusters: I64) -> str | None:
        """The first structure that any of the clusters belongs to."""
        for area in self._flat:
            if ((clusters >= area.first) & (clusters < area.end)).any():
                return area.name
        listed = clusters.tolist()
        if not self.l2.isdisjoint(listed):
            return "active L2 table"
        if not self.blocks.isdisjoint(listed):
            return "refcount block"
        return None

    def conflict(self) -> tuple[str, str] | None:
        """Two structures that share a cluster, if there are such."""
        areas = sorted(self._flat)
        for one, other in pairwise(areas):
            if other.first < one.end:
                return one.name, other.name
        shared = self.l2 & self.blocks
        if shared:
            return "active L2 table", "refcount block"
        for area in areas:
            if self._meets(area, self.l2):
                return area.name, "active L2 table"
            if self._meets(area, self.blocks):
                return area.name, "refcount block"
        return None

    @staticmethod
    def _meets(area: Area, clusters: Iterable[int]) -> bool:
        known = np.fromiter(clusters, np.int64)
        return bool(((known >= area.first) & (known < area.end)).any())
