"""Showing a job's progress: a live bar on a terminal, plain lines elsewhere, nothing when a program reads along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from qmpd.ctl import text
from qmpd.meter import Meter

#: A plain line is printed each time another part of this size is done.
_PLAIN_STEP: Final = 0.1


class Display(Protocol):
    """What :func:`qmpd.ctl.follow.follow` tells its user. trio thread; nothing here blocks."""

    def progress(self, meter: Meter, status: str) -> None:
        """The job has got this far; ``status`` is QMP's word for its state."""

    def note(self, line: str) -> None:
        """Something worth a line of its own."""

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Leave the terminal alone while somebody is being asked something."""


class Silent:
    """For ``--json`` and ``--quiet``."""

    def progress(self, meter: Meter, status: str) -> None:
        pass

    def note(self, line: str) -> None:
        pass

    @contextmanager
    def suspended(self) -> Iterator[None]:
        yield


class Plain:
    """A line at the start, one for every tenth, one for every change of state."""

    def __init__(self, job: str, out: TextIO) -> None:
        self._job = job
        self._out = out
        self._last: tuple[str, int] | None = None

    def progress(self, meter: Meter, status: str) -> None:
        current = (status, int(meter.fraction / _PLAIN_STEP))
        if current != self._last:
            self._last = current
            self.note(f"{status}, {meter.fraction:.0%}, {figures(meter, status)}")

    def note(self, line: str) -> None:
        print(f"{self._job}: {line}", file=self._out, flush=True)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        yield


class Live:
    """A bar that is redrawn in place. Drawn by the calling thread only, when there is something new."""

    def __init__(self, job: str, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[figures]}"),
            TextColumn("{task.fields[status]}"),
            console=console,
            auto_refresh=False,
        )
        self._task: TaskID = self._progress.add_task(job, total=1.0, figures="", status="")

    def progress(self, meter: Meter, status: str) -> None:
        shown = "" if status == "running" else status
        self._progress.update(self._task, completed=meter.fraction, figures=figures(meter, status), status=shown)
        self._progress.refresh()

    def note(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """The bar is on the screen within this context, and stays there in its last form."""
        with self._progress:
            yield


def figures(meter: Meter, status: str) -> str:
    """``12 MiB of 64 MiB, 8 MiB/s, 7 s left``; what is not known, or means nothing any more, is left out."""
    parts = [f"{text.size(meter.offset)} of {text.size(meter.total)}"]
    if status == "running" and meter.rate:
        parts.append(text.rate(meter.rate))
        if meter.eta:
            parts.append(f"{text.duration(meter.eta)} left")
    return ", ".join(parts)


@contextmanager
def display(job: str, out: TextIO, *, silent: bool = False) -> Iterator[Display]:
    """The display that fits ``out``."""
    if silent:
        yield Silent()
    elif not out.isatty():
        yield Plain(job, out)
    else:
        live = Live(job, Console(file=out))
        with live.drawn():
            yield live
