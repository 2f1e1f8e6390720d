"""Changes on their way to the state: in order, several in one transaction, told about when they are durable.

Whatever is posted while one transaction is being written goes into the next. If the state cannot be written any more it
is *given up*: put aside, so that no later start believes it, and the daemon goes on like one without.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import trio

from qmpd.control.bridge import Bridge
from qmpd.errors import QmpdError
from qmpd.state.schema import Change
from qmpd.state.store import Store
from qmpd.steps import Steps

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    changes: tuple[Change, ...]
    then: Callable[[], object]


def _nothing() -> None:
    pass


class Journal:
    """Control thread, except :meth:`write_at_once`."""

    def __init__(self, store: Store, on_given_up: Callable[[QmpdError], object]) -> None:
        """``on_given_up`` is called once, on the control thread, with the reason."""
        self._store: Store | None = store
        self._on_given_up = on_given_up
        self._bridge = Bridge(1)
        self._pending: list[_Entry] = []
        self._writing = False
        self._wake = trio.Event()
        self._settled = trio.Event()
        self._settled.set()

    @property
    def is_durable(self) -> bool:
        """Is there still a state to write to?"""
        return self._store is not None

    @property
    def is_settled(self) -> bool:
        """Has everything posted been written?"""
        return not self._pending and not self._writing

    def post(self, *changes: Change, then: Callable[[], object] = _nothing) -> None:
        """Have the changes written, all or none, and ``then`` called, which must not raise."""
        self._pending.append(_Entry(changes, then))
        self._settled = trio.Event() if self._settled.is_set() else self._settled
        self._wake.set()

    async def settle(self) -> None:
        """Until everything posted has been written. No checkpoint if it has."""
        while not self.is_settled:
            await self._settled.wait()

    def settling(self) -> Steps[None]:
        """:meth:`settle` where a change of the graph has to wait."""
        if not self.is_settled:
            written = threading.Event()
            self.post(then=written.set)
            yield written.wait

    def write_at_once(self, *changes: Change) -> None:
        """Worker thread: durable at return, ahead of what is posted. Raises nothing: a later write finds out."""
        store = self._store
        if store is not None:
            try:
                store.apply(changes)
            except QmpdError as error:
                _log.error("%s", error)

    async def serve(self) -> None:
        """The task that writes, for ever."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            with trio.CancelScope(shield=True):
                await self._write()

    async def _write(self) -> None:
        while self._pending:
            entries, self._pending, self._writing = self._pending, [], True
            changes = [change for entry in entries for change in entry.changes]
            if changes and self._store is not None:
                try:
                    await self._bridge.to_worker(self._store.apply, changes)
                except QmpdError as error:
                    await self._give_up(self._store, error)
            self._writing = False
            for entry in entries:
                entry.then()
        self._settled.set()

    async def _give_up(self, store: Store, error: QmpdError) -> None:
        _log.error("%s. The state is given up: what runs goes on, but would not survive the end of this daemon", error)
        self._store = None
        await self._bridge.to_worker(store.give_up)
        self._on_given_up(error)
