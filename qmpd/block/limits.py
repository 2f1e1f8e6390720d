"""The limits of a throttle group, and the leaky buckets that they fill. Pure arithmetic over times it is handed.

Each limit has a bucket that leaks at its rate (units a second). A request may go while no bucket that counts it is over
the brim, and is then poured in whole: so a large request goes at once, and the debt is paid by those after it. The brim
is a tenth of a second's worth; with a burst rate it is ``max`` times ``length`` (seconds): so long may requests come at
the burst rate, which a second bucket holds them to. Source: spec/block-graph.md section 4, spec/toolbox.md
section 11.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

from qmpd.errors import QmpdError

MOST: Final = 10**15
"""The highest rate, in units a second."""

_SLICE: Final = 0.1
"""Seconds."""


class Direction(StrEnum):
    READ = "read"
    WRITE = "write"


#: The limits, by the first part of their names, in the order in which they are checked.
RATES: Final = tuple(f"{unit}-{what}" for unit in ("bps", "iops") for what in ("total", "read", "write"))


class Rate(NamedTuple):
    """One limit: units a second in the long run (0: none), and for ``length`` seconds of burst (0: no burst)."""

    avg: int = 0
    max: int = 0
    length: int = 1

    @property
    def brim(self) -> float:
        """What the bucket holds before requests wait."""
        return self.max * self.length if self.max else self.avg * _SLICE

    @property
    def burst_brim(self) -> float:
        """The same of the bucket of the burst rate."""
        return self.max * _SLICE


def _member_names() -> dict[str, tuple[str, str]]:
    parts = {"": "avg", "-max": "max", "-max-length": "length"}
    return {rate + suffix: (rate, part) for rate in RATES for suffix, part in parts.items()}


_MEMBERS: Final = _member_names()

MEMBERS: Final = (*_MEMBERS, "iops-size")
"""Names of all members of QMP's ThrottleLimits."""


@dataclass(frozen=True, slots=True)
class Limits:
    """All limits of a group. ``iops_size``: a request counts once for each so many bytes (0: once)."""

    rates: Mapping[str, Rate] = field(default_factory=lambda: dict.fromkeys(RATES, Rate()))
    iops_size: int = 0

    def merged(self, values: Mapping[str, int]) -> Limits:
        """These with the members of a QMP ThrottleLimits changed that are given. Raises QmpdError."""
        rates, iops_size = dict(self.rates), self.iops_size
        for name, value in values.items():
            if name == "iops-size":
                iops_size = value
                continue
            rate, part = _MEMBERS[name]
            if part == "length" and value >= 1 << 32:
                raise QmpdError(f"{name} value must be in the range [0, {(1 << 32) - 1}]")
            rates[rate] = rates[rate]._replace(**{part: value})
        merged = Limits(rates, iops_size)
        merged._check()
        return merged

    def to_wire(self) -> dict[str, int]:
        """All members of a QMP ThrottleLimits."""
        values = {name: int(getattr(self.rates[rate], part)) for name, (rate, part) in _MEMBERS.items()}
        return values | {"iops-size": self.iops_size}

    def _check(self) -> None:
        """The order of the checks, and what negative numbers run into, are the peer's."""
        for unit in ("bps", "iops"):
            total, read, write = (self.rates[f"{unit}-{what}"] for what in ("total", "read", "write"))
            if (total.avg and (read.avg or write.avg)) or (total.max and (read.max or write.max)):
                text = "bps/iops/max total values and read/write values cannot be used at the same time"
                raise QmpdError(text)
        if self.iops_size and not any(self.rates[f"iops-{what}"].avg for what in ("total", "read", "write")):
            raise QmpdError("iops size requires an iops value to be set")
        for name in RATES:
            _check_rate(self.rates[name])


def _check_rate(rate: Rate) -> None:
    endless = rate.length < 0
    if not (0 <= rate.avg <= MOST and 0 <= rate.max <= MOST):
        raise QmpdError(f"bps/iops/max values must be within [0, {MOST}]")
    if rate.length == 0:
        raise QmpdError("the burst length cannot be 0")
    if (rate.length > 1 or endless) and not rate.max:
        raise QmpdError("burst length set without burst rate")
    if rate.max and (endless or rate.length > MOST // rate.max):
        raise QmpdError("burst length too high for this burst rate")
    if rate.max and not rate.avg:
        raise QmpdError("bps_max/iops_max require corresponding bps/iops values")
    if rate.max and rate.max < rate.avg:
        raise QmpdError("bps_max/iops_max cannot be lower than bps/iops")


@dataclass(slots=True)
class _Bucket:
    rate: Rate
    level: float = 0.0
    burst_level: float = 0.0

    def leak(self, seconds: float) -> None:
        self.level = max(0.0, self.level - self.rate.avg * seconds)
        self.burst_level = max(0.0, self.burst_level - self.rate.max * seconds)

    def pour(self, units: float) -> None:
        self.level += units
        if self.rate.length > 1:
            self.burst_level += units

    @property
    def wait(self) -> float:
        """Seconds until it is below its brim."""
        long_run = (self.level - self.rate.brim) / self.rate.avg
        if self.rate.length <= 1:
            return long_run
        return max(long_run, (self.burst_level - self.rate.burst_brim) / self.rate.max)


class Buckets:
    """How full the buckets of one group are. Times are seconds on any clock that does not run backwards."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self._then = now
        self._buckets = {name: _Bucket(rate) for name, rate in limits.rates.items() if rate.avg}
        self._of = {direction: self._counting(direction) for direction in Direction}

    def _counting(self, direction: Direction) -> list[tuple[_Bucket, bool]]:
        """The buckets for requests of a direction, and whether they count bytes."""
        names = [f"{unit}-{what}" for unit in ("bps", "iops") for what in ("total", direction)]
        return [(self._buckets[name], name.startswith("bps")) for name in names if name in self._buckets]

    def limits_anything(self, direction: Direction) -> bool:
        """Is there a limit for requests of that direction?"""
        return bool(self._of[direction])

    def wait(self, direction: Direction, now: float) -> float:
        """Seconds until the next request of that direction may go, 0 for now."""
        elapsed, self._then = max(0.0, now - self._then), max(now, self._then)
        for bucket in self._buckets.values():
            bucket.leak(elapsed)
        return max([0.0, *(bucket.wait for bucket, _ in self._of[direction])])

    def pour(self, direction: Direction, length: int) -> None:
        """Count a request of ``length`` bytes that goes now."""
        size = self.limits.iops_size
        operations = length / size if 0 < size < length else 1.0
        for bucket, counts_bytes in self._of[direction]:
            bucket.pour(length if counts_bytes else operations)
