"""Take turns, keep the times, print the ratios."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.daemons import PEER, QMPD, Program

SCALE = float(os.environ.get("BENCH_SCALE", "1"))
RUNS = int(os.environ.get("BENCH_RUNS", "5"))

#: Seconds, by what was measured: one run may measure several things.
Times = Mapping[str, float]


@dataclass
class Row:
    """One line of the table: the same work by qmpd and by another, or by qmpd against a limit."""

    what: str
    goal: float  # the least ratio; for a limit the largest value
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    other: str = PEER.name
    unit: str = "s"
    more_is_better: bool = False
    limit: bool = False  # the goal is an upper limit for our own value; the other is for information

    @property
    def ratio(self) -> float:
        """How many times better than the other, by medians."""
        return self._compare(statistics.median)

    @property
    def best_ratio(self) -> float:
        """How many times better than the other, the best of each compared: noise only ever makes a run slower."""
        return self._compare(max if self.more_is_better else min)

    @property
    def met(self) -> bool:
        return min(self.ours) <= self.goal if self.limit else self.best_ratio >= self.goal

    def _compare(self, pick: Callable[[list[float]], float]) -> float:
        ours, theirs = pick(self.ours), pick(self.theirs)
        return ours / theirs if self.more_is_better else theirs / ours

    def __str__(self) -> str:
        best = max if self.more_is_better else min
        cells = [self.what]
        for values in (self.ours, self.theirs):
            cells.append(
                f"{_number(best(values))} / {_number(statistics.median(values))} {self.unit}" if values else "-"
            )
        cells += [self.other, f"{self.best_ratio:.2f}x / {self.ratio:.2f}x" if self.theirs else "-"]
        cells.append(f"<= {self.goal:g} {self.unit}" if self.limit else f">= {self.goal:g}x")
        cells.append("met" if self.met else "**missed**")
        return "| " + " | ".join(cells) + " |"


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:,.0f}"


@dataclass(frozen=True)
class Topic:
    """Something to measure. ``measure`` yields finished rows; it may use the directory as it likes."""

    name: str
    measure: Callable[[Path], Iterator[Row]]


def alternate(rows: Mapping[str, Row], run: Callable[[Program], Times]) -> None:
    """Let each program run once unmeasured, then both in turn; sort what ``run`` returns into ``rows`` by its keys."""
    for program in (QMPD, PEER):
        run(program)
    for _ in range(RUNS):
        for program in (QMPD, PEER):
            for key, value in run(program).items():
                if key in rows:
                    (rows[key].ours if program == QMPD else rows[key].theirs).append(value)


HEADER = """\
| work | qmpd, best / median | other, best / median | other | ratio, best / median | goal | |
| --- | --- | --- | --- | --- | --- | --- |"""
