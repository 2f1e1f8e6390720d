"""Where a replayed conversation takes place: in a process of its own, or in a thread of this one.

A thread costs milliseconds where a process costs half a second, and everything above the byte stream is the same; so
hundreds of recordings are replayed there, and only those that are about the process itself get one.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import trio

from qmpd.control.channel import Channel
from qmpd.control.registry import Client as MonitorClient
from qmpd.daemon import Core
from qmpd.jobs.siblings import SiblingPolicy
from tests.daemons import PATIENCE, QMPD, HungError, under_test
from tests.tools import need


class Host(Protocol):
    """A daemon that can be dialled and that ends, perhaps with a status."""

    def dial(self) -> socket.socket:
        """Connect to the monitor."""

    def exit_status(self) -> int | None:
        """Wait for the end; None if the host has no status of its own. Raises HungError."""


@contextlib.contextmanager
def start(
    cwd: Path,
    *,
    own_process: bool = False,
    unprivileged: bool = False,
    monitor: str = "",
    siblings: SiblingPolicy = SiblingPolicy.REFUSE,
) -> Iterator[Host]:
    """A fresh daemon of the program under test, with one monitor; relative names count from ``cwd``.

    ``unprivileged`` is for tests of file modes, which mean nothing to root. ``siblings`` is for hosts in a thread.
    """
    program = under_test()
    if unprivileged:
        program, own_process = program.bound_by_modes(), True
    if under_test() == QMPD and not own_process:
        with contextlib.chdir(cwd), _thread("pretty=on" in monitor, siblings) as host:
            yield host
        return
    if under_test() != QMPD:
        need(program.argv[0])
    with program.start(cwd, monitor=monitor) as daemon:
        yield daemon


class _Thread:
    """qmpd's core in a thread, its clients on socket pairs."""

    def __init__(self, pretty: bool, siblings: SiblingPolicy) -> None:
        self._pretty = pretty
        self._siblings = siblings
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=[self._serve], name="qmpd under test")
        self._thread.start()
        assert self._ready.wait(PATIENCE), "the core did not start"

    def dial(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        trio.from_thread.run_sync(self._attach, theirs, trio_token=self._token)
        return ours

    def exit_status(self) -> None:
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            raise HungError("the core did not end")

    def stop(self) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._end)
        self.exit_status()

    def _attach(self, sock: socket.socket) -> None:
        self._core.server.attach(Channel.of_socket(sock), MonitorClient("test"), pretty=self._pretty)

    def _end(self) -> None:
        if not self._core.stopping.is_set():
            self._nursery.start_soon(self._core.shutdown)

    async def _serve(self) -> None:
        self._core = Core()
        self._core.guard.policy = self._siblings
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self._core.run)
            self._ready.set()


@contextlib.contextmanager
def _thread(pretty: bool, siblings: SiblingPolicy) -> Iterator[_Thread]:
    host = _Thread(pretty, siblings)
    try:
        yield host
    finally:
        host.stop()
