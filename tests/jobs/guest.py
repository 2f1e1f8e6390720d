"""A guest: random requests from a thread of its own, each of them checked or remembered."""

from __future__ import annotations

import random
import threading

from qmpd.block.api import BlockDevice, Perm, Role
from qmpd.graph.node import Backend
from qmpd.jobs.copying import WRITES
from tests.jobs.rig import Rig

SECTOR = 512


class Guest(Backend):
    """A user of a node that can be held, as an export is. ``shadow`` is what it must read.

    Reads are compared; :attr:`error` is the first thing that went wrong.
    """

    def __init__(self, rig: Rig, node: str, *, seed: int = 0, pause: float = 0.0) -> None:
        """``pause``: seconds between two requests of the thread."""
        super().__init__()
        self._gate = threading.Condition()
        self._is_held = False
        self._inside = 0
        self._stop = threading.Event()
        self._pause = pause
        self._random = random.Random(seed)
        self._thread = threading.Thread(target=self._run, name="guest")
        self.error: BaseException | None = None
        self.requests = 0
        with rig.graph.edit() as edit:
            perm = Perm.CONSISTENT_READ | Perm.WRITE
            edit.attach(self, "root", rig.node(node), Role.NONE, perm=perm, shared=Perm.CONSISTENT_READ | WRITES)
        self.length = self.device.length
        self.shadow = bytearray(self.length)
        self.device.readinto(0, memoryview(self.shadow))

    @property
    def device(self) -> BlockDevice:
        """Where requests go now."""
        assert self.edge is not None
        return self.edge.device

    # -- the thread ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        """Let the thread end; raise what went wrong in it."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._pause):
                self.request()
        except BaseException as error:  # noqa: BLE001  finish() raises it
            self.error = error

    def request(self) -> None:
        """One request, or a discard with the write that makes its content known again."""
        length = SECTOR * self._random.choice([1, 1, 8, 8, 128, 200])
        offset = SECTOR * self._random.randrange((self.length - length) // SECTOR + 1)
        verb = self._random.choice(["write", "write", "zero", "discard", "read"])
        self._enter()
        try:
            self._do(verb, offset, length)
            self.requests += 1
        finally:
            self._leave()

    def _do(self, verb: str, offset: int, length: int) -> None:
        if verb == "read":
            buffer = bytearray(length)
            self.device.readinto(offset, memoryview(buffer))
            assert buffer == self.shadow[offset : offset + length], f"read at {offset}"
            return
        data = bytes(length) if verb == "zero" else self._random.randbytes(length)
        if verb == "zero":
            self.device.write_zeroes(offset, length)
        else:
            if verb == "discard":
                self.device.discard(offset, length)
            self.device.write(offset, data)
        self.shadow[offset : offset + length] = data

    # -- being held ----------------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        with self._gate:
            self._gate.wait_for(lambda: not self._is_held)
            self._inside += 1

    def _leave(self) -> None:
        with self._gate:
            self._inside -= 1
            self._gate.notify_all()

    def quiesce(self) -> None:
        with self._gate:
            self._is_held = True
            self._gate.wait_for(lambda: not self._inside)

    def resume(self) -> None:
        with self._gate:
            self._is_held = False
            self._gate.notify_all()

    @property
    def is_held(self) -> bool:
        return self._is_held

    def detach(self, rig: Rig) -> None:
        """Let go of the node."""
        assert self.edge is not None
        with rig.graph.edit() as edit:
            edit.detach(self.edge)
