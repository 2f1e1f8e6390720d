"""What a round of requests is answered with, laid out as it will be sent: what is read goes to its place at once.

One thread. Offsets and lengths in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from qmpd.nbd.transmission import Buffer, Raw, Wire
from qmpd.units import KIB, MIB

Pieces = list[Buffer]

MOST: Final = 1 * MIB
"""Data of a round that certainly finds room."""

_HEADS: Final = 4 * KIB
_COPIED: Final = 64 * KIB


class Replies:
    """One buffer for most of it, used again and again; what does not fit there follows in pieces of its own.

    Replies are in no particular order, but each is in one piece.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._buffer = bytearray(MOST + _HEADS)
        self._view = memoryview(self._buffer)
        self._end = 0
        #: Stretches of the buffer that are not sent after all.
        self._dropped: list[tuple[int, int]] = []
        self._more: Pieces = []

    @property
    def filled(self) -> int:
        """How much there is in the buffer, bytes."""
        return self._end

    def add_reads(self, requests: Sequence[Raw]) -> list[memoryview]:
        """Answer reads with data; where each is to be put. Of empty replies, MOST bytes and a round find room."""
        view, end, buffer = self._view, self._end, self._buffer
        put, head = self._wire.put_data, self._wire.data_head
        places = []
        for _, _, _, cookie, offset, length in requests:
            put(buffer, end, cookie, offset, length)
            end += head
            places.append(view[end : end + length])
            end += length
        self._end = end
        return places

    def is_zero(self, start: int, length: int) -> bool:
        """Is that all zeros? For a few bytes of :meth:`add_reads`' data."""
        return not self._buffer[start] and self._buffer[start : start + length].count(0) == length

    def drop(self, start: int, length: int) -> None:
        """Take back one of the answers of :meth:`add_reads`, by where its data are."""
        self._dropped.append((start - self._wire.data_head, start + length))

    def add_done(self, request: Raw) -> None:
        """Success without data."""
        if self._end + self._wire.done_size > len(self._buffer):
            self._more.append(self._wire.done(request[3], request[4]))
            return
        self._wire.put_done(self._buffer, self._end, request[3], request[4])
        self._end += self._wire.done_size

    def add(self, pieces: Pieces) -> None:
        """Any reply."""
        size = sum(map(len, pieces))
        if size > _COPIED or self._end + size > len(self._buffer):
            self._more += pieces
            return
        for piece in pieces:
            self._buffer[self._end : self._end + len(piece)] = piece
            self._end += len(piece)

    def take(self) -> Pieces:
        """All of it, to be sent before anything else is added."""
        if self._dropped:
            cuts = [(0, 0), *sorted(self._dropped), (self._end, self._end)]
            pieces: Pieces = [self._view[low:high] for (_, low), (high, _) in pairwise(cuts) if high > low]
            self._dropped = []
        else:
            pieces = [self._view[: self._end]] if self._end else []
        self._end = 0
        if self._more:
            pieces.append(b"".join(self._more) if len(self._more) > 1 else self._more[0])
            self._more = []
        return pieces
