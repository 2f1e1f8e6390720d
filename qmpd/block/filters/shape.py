"""The forms of requests that a device insists on: alignment, and upper and lower bounds of their size (bytes)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from qmpd.errors import QmpdError
from qmpd.units import align_down, align_up

_INT_MAX: Final = (1 << 31) - 1

Span = tuple[int, int]
"""(offset, length)"""


@dataclass(frozen=True, slots=True)
class Shape:
    """0 is no demand. Names are those of blkdebug's options."""

    align: int = 0
    max_transfer: int = 0
    opt_write_zero: int = 0
    max_write_zero: int = 0
    opt_discard: int = 0
    max_discard: int = 0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """From a driver's options. Raises QmpdError with the peer's texts where they contradict each other."""
        shape = cls(**{name: options.get(name.replace("_", "-"), 0) for name in cls.__dataclass_fields__})
        for name in cls.__dataclass_fields__:
            value, option = getattr(shape, name), name.replace("_", "-")
            if value < 0:
                raise QmpdError(f"Value '{value}' is out of range for parameter '{option}'")
            if value > _INT_MAX and name != "align":
                raise QmpdError(f"Parameter '{option}' expects int32_t")
            if not shape._allows(name, value):
                raise QmpdError(f"Cannot meet constraints with {option} {value}")
        return shape

    def _allows(self, name: str, value: int) -> bool:
        unit = max(self.align, 1)
        match name:
            case "align":
                return value < _INT_MAX and value & (value - 1) == 0
            case "max_write_zero":
                unit = max(unit, self.opt_write_zero)
            case "max_discard":
                unit = max(unit, self.opt_discard)
        return value < _INT_MAX and value % unit == 0

    def transfers(self, offset: int, length: int) -> Iterator[Span]:
        """The parts in which data is moved; one, possibly empty, if nothing limits it."""
        return _parts(offset, length, self.max_transfer)

    def zeroing(self, offset: int, length: int) -> tuple[list[Span], list[Span]]:
        """A request for zeros: the parts to pass on as such, and those to be written as data."""
        return _whole_units(offset, length, max(self.align, self.opt_write_zero, 1), self.max_write_zero)

    def discarding(self, offset: int, length: int) -> list[Span]:
        """The parts of a discard to pass on; the rest is forgotten."""
        return _whole_units(offset, length, max(self.align, self.opt_discard, 1), self.max_discard)[0]


def _parts(offset: int, length: int, limit: int) -> Iterator[Span]:
    if not limit or length <= limit:
        yield offset, length
        return
    for start in range(offset, offset + length, limit):
        yield start, min(limit, offset + length - start)


def _whole_units(offset: int, length: int, unit: int, limit: int) -> tuple[list[Span], list[Span]]:
    """The whole units in the range, cut at ``limit``, and the ragged ends."""
    end = offset + length
    first, last = align_up(offset, unit), align_down(end, unit)
    if first >= last:
        return [], [(offset, length)]
    ragged = [(start, stop - start) for start, stop in ((offset, first), (last, end)) if start < stop]
    return list(_parts(first, last - first, limit)), ragged
