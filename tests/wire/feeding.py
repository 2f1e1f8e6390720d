"""Ways to cut bytes into pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qmpd.wire.dialect import DialectError
from qmpd.wire.stream import Framer


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def chunks(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def every_split(data: bytes) -> Iterator[list[bytes]]:
    """All ways to cut ``data`` in two."""
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]


def frame(pieces: Iterable[bytes]) -> list[object]:
    """What a fresh framer makes of the pieces; errors as their text in a tuple, so that they compare."""
    framer = Framer()
    return [plain(item) for piece in pieces for item in framer.feed(piece)]


def plain(item: object) -> object:
    return ("error", item.desc) if isinstance(item, DialectError) else item
