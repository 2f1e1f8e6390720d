"""Many requests at once.

A guest has a dozen small requests under way at any time. Handed down together, they share what each would cost by
itself on its way through the layers: locks, checks, tables. Pure; any thread.
"""

from __future__ import annotations

from operator import add


class Batch:
    """Requests of one kind: ``buffers[i]``, which is not empty, is to be filled from or stored at ``offsets[i]``.

    Byte units. At least one request; overlapping ones may be carried out in any order.
    """

    __slots__ = ("buffers", "high", "low", "offsets")

    def __init__(self, offsets: list[int], buffers: list[memoryview]) -> None:
        self.offsets = offsets
        self.buffers = buffers
        #: All of it is inside ``[low, high)``.
        self.low = min(offsets)
        self.high = max(map(add, offsets, map(len, buffers)))

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def indexes(self) -> range:
        """All of the requests."""
        return range(len(self.offsets))

    def moved(self, by: int) -> Batch:
        """The same buffers at other offsets."""
        return Batch([offset + by for offset in self.offsets], self.buffers) if by else self

    def only(self, indexes: list[int]) -> Batch:
        """Some of the requests."""
        return Batch([self.offsets[i] for i in indexes], [self.buffers[i] for i in indexes])
