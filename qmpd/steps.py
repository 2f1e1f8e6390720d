"""Work that alternates between the control thread and a worker, without an event loop in sight.

A function that changes the graph must run on the control thread, but opening, flushing and header rewrites block. Such
a function is written as a generator: the code between the yields runs on the control thread, and every yielded callable
is run by a worker thread, its result (or exception) coming back out of the ``yield``. The control plane drives it with
``control.bridge.run_steps``; tests and tools without an event loop use :func:`run_steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")

#: Yields blocking callables, receives their results, returns a T.
Steps = Generator[Callable[[], Any], Any, T]


def run_steps(steps: Steps[T]) -> T:
    """Run everything in the calling thread."""
    try:
        call = next(steps)
        while True:
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001  the generator decides what it means
                call = steps.throw(error)
            else:
                call = steps.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value
