"""A graph, jobs, objects and events behind the commands, without a server: called as the dispatcher calls."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpd.commands
from qmpd.control.bus import Bus
from qmpd.control.objects import ObjectStore
from qmpd.control.registry import Context, lookup
from qmpd.errors import QmpdError
from tests.jobs.rig import Rig, running

assert qmpd.commands  # registers the commands


class Served:
    """``events`` are the data of the events so far, by name; ``told`` takes them."""

    pretty = False

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.graph = rig.graph
        self.events: list[tuple[str, dict[str, Any]]] = []
        bus = Bus()
        bus.join(self)
        self.ctx = Context(rig.graph, rig.jobs, bus, ObjectStore(), self._quit, rig.lock)

    def publish(self, message: bytes) -> None:
        event = json.loads(message)
        self.events.append((event["event"], event["data"]))

    async def call(self, name: str, /, **arguments: Any) -> Any:
        """A command's result; '_' in names of arguments stands for '-'."""
        return await lookup(name).call(self.ctx, {key.replace("_", "-"): value for key, value in arguments.items()})

    async def refused(self, name: str, /, **arguments: Any) -> str:
        """The text of a command's error; the graph is as it was."""
        nodes, edges = list(self.graph.table.items()), self.rig.edges()
        with pytest.raises(QmpdError) as error:
            await self.call(name, **arguments)
        assert list(self.graph.table.items()) == nodes
        assert self.rig.edges() == edges
        return str(error.value)

    async def _quit(self) -> None:
        raise AssertionError("nobody asked to quit")


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[Served]:
    """Commands whose working directory is ``directory``; afterwards all nodes are closed."""
    async with running(directory) as rig:
        yield Served(rig)
