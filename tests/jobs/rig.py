"""Real images, a real graph and a real manager in one process; no sockets and no commands."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
import trio.testing

from qmpd.block.api import Perm
from qmpd.control.bridge import Bridge
from qmpd.control.manager import JobManager
from qmpd.errors import QmpdError
from qmpd.graph.edit import Graph
from qmpd.graph.node import Node
from qmpd.graph.open import close_unreferenced, open_tree
from qmpd.graph.spec import NodeSpec
from qmpd.jobs.active import ActiveCommitJob
from qmpd.jobs.commit import CommitJob
from qmpd.jobs.job import Job
from qmpd.jobs.plan import CommitRequest, plan_commit
from tests.tools import need

_CHILDREN = {"file", "backing", "image", "data-file"}


def shell(*lines: str, cwd: Path | None = None) -> None:
    """Run command lines, without a shell; each must succeed."""
    for line in lines:
        argv = shlex.split(line)
        need(argv[0])
        subprocess.run(argv, check=True, capture_output=True, cwd=cwd)


def output(line: str) -> str:
    """What a command line prints."""
    return subprocess.run(shlex.split(line), check=True, capture_output=True, text=True).stdout


def reads(name: str, *patterns: str) -> None:
    """qemu-io reads these patterns from an image; each is ``pattern offset length``."""
    commands = [part for pattern in patterns for part in ("-c", f"read -P {pattern}")]
    argv = ["qemu-io", "-r", "-f", "qcow2", *commands, name]
    subprocess.run(argv, check=True, capture_output=True)


def backing(name: str) -> tuple[str | None, str | None]:
    """What the header says: backing file and its format."""
    info = json.loads(output(f"qemu-img info -U --output=json {name}"))
    return info.get("backing-filename"), info.get("backing-filename-format")


def check(*images: str) -> None:
    """qemu-img finds nothing to complain about, not even leaks."""
    for name in images:
        subprocess.run(["qemu-img", "check", "-q", name], check=True)


def spec(description: Mapping[str, Any]) -> NodeSpec:
    """A blockdev-add description, as commands convert it."""
    common = {"node-name": "node_name", "read-only": "read_only", "driver": "driver"}
    known: dict[str, Any] = {common[key]: value for key, value in description.items() if key in common}
    rest = {key: value for key, value in description.items() if key not in common}
    children = {
        key: spec(value) if isinstance(value, dict) else value for key, value in rest.items() if key in _CHILDREN
    }
    options = {key: value for key, value in rest.items() if key not in _CHILDREN}
    return NodeSpec(**known, children=children, options=options)


def image(name: str, backing: str | None = None, **more: Any) -> dict[str, Any]:
    """The usual description of a qcow2 image: node ``name`` in file ``name``.qcow2."""
    more = {key.replace("_", "-"): value for key, value in more.items()}
    protocol = {"driver": "file", "node-name": f"{name}-file", "filename": f"{name}.qcow2"}
    return {"driver": "qcow2", "node-name": name, "file": protocol, "backing": backing} | more


class Rig:
    """Nodes and jobs. ``log`` has an entry per event, in short form, and R for each reply."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.log: list[str] = []
        #: The events of jobs, each with its data.
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.graph = Graph()
        self.lock = trio.Lock()
        self.bridge = Bridge(8)
        self.jobs = JobManager(self._publish, self.bridge, self.graph, self.lock)
        self.nursery = nursery

    def _publish(self, name: str, data: dict[str, Any]) -> None:
        self.events.append((name, data))
        if name == "JOB_STATUS_CHANGE":
            self.log.append(str(data["status"]))
        else:
            rest = {key: value for key, value in data.items() if key not in ("device", "id", "type")}
            self.log.append(name.removeprefix("BLOCK_JOB_") + "".join(f" {k}={v}" for k, v in rest.items()))

    async def add(self, *descriptions: Mapping[str, Any]) -> None:
        """blockdev-add."""
        for description in descriptions:
            node: Node = await self.bridge.run_steps(open_tree(self.graph, spec(description)))
            with self.graph.edit() as edit:
                edit.set_attribute(node, "monitor_owned", True)

    async def commit(self, device: str = "top", top: str = "mid", base: str | None = "base", **more: Any) -> None:
        """block-commit by node names."""
        usual = {"job_id": "j0", "device": device, "top_node": top, "base_node": base}
        await self.launch(CommitRequest(**usual | more))

    async def launch(self, request: CommitRequest) -> None:
        def make() -> Job:
            plan = plan_commit(self.graph, request)
            return (ActiveCommitJob if plan.active else CommitJob)(self.graph, plan)

        await self.jobs.launch(make)
        self.log.append("R")

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the other tasks and threads get on until it holds."""
        while not condition():
            await trio.testing.wait_all_tasks_blocked()

    async def rested(self) -> dict[str, Any]:
        """The only job, when it has got on to where it sleeps, is paused or over."""
        await trio.testing.wait_all_tasks_blocked()  # a thread at work counts as blocked, hence the rest
        life = self.jobs.find("j0")
        await self.until(lambda: not life.busy and (life.job.status.value != "running" or life.opened.is_set()))
        await trio.testing.wait_all_tasks_blocked()
        await self.until(lambda: not life.busy)
        return self.jobs.query_block_jobs()[0]

    async def gone(self) -> None:
        await self.until(lambda: self.jobs.query_jobs() == [])

    def told(self) -> str:
        """The log since the last look."""
        log, self.log[:] = ", ".join(self.log), []
        return log

    def node(self, name: str) -> Node:
        return self.graph.get(name)

    def edges(self) -> list[str]:
        """The graph as the recordings show it: nodes newest first, then jobs, then backends newest first."""
        jobs = [parent for parent in self.graph.parents if parent.graph_name]
        backends = [parent for parent in self.graph.parents if not parent.graph_name]
        lines = [
            _render(node.name, edge.name, edge.node.name, edge.perm, edge.shared)
            for node in reversed(self.graph.nodes)
            for edge in node.children.values()
        ]
        for parent in jobs + backends[::-1]:
            for node in reversed(self.graph.nodes):
                lines += [
                    _render(parent.graph_name or "block-backend", edge.name, node.name, edge.perm, edge.shared)
                    for edge in node.parents
                    if edge.parent is parent
                ]
        return lines

    async def close(self) -> None:
        """End all jobs and close all nodes, so that other programs may look at the images."""
        await self.jobs.shutdown()
        for node in self.graph.nodes:
            node.monitor_owned = False
        while self.graph.unreferenced():
            await self.bridge.run_steps(close_unreferenced(self.graph))


def _render(parent: str, name: str, child: str, perm: Perm, shared: Perm) -> str:
    def text(bits: Perm) -> str:
        return ",".join(sorted(bits.names())) or "-"

    return f"{parent} -{name}-> {child} perm={text(perm)} shared={text(shared)}"


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Rig]:
    """A rig whose working directory is ``directory``, as the daemon's would be."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        async with trio.open_nursery() as nursery:
            made = Rig(nursery)
            await nursery.start(made.jobs.serve)
            try:
                yield made
                await made.close()
            finally:
                nursery.cancel_scope.cancel()
    finally:
        os.chdir(before)


def spy(node: Node, method: str, log: list[str], error: QmpdError | None = None, once: bool = False) -> None:
    """Log calls of a driver's method; with ``error`` it fails instead, always or once."""
    real = getattr(node.opened, method)

    def called(*args: Any) -> Any:
        nonlocal error
        log.append(f"{node.name}.{method}")
        if error is not None:
            failure, error = error, None if once else error
            raise failure
        return real(*args)

    setattr(node.opened, method, called)


# -- the usual chain: three images of 4 MiB, see the fixture ``chain`` ------------------------------------------------

ALL = "consistent-read,resize,write,write-unchanged"
QUIET = "consistent-read,write-unchanged"

STARTED = "created, running, R"
DONE = "waiting, pending, COMPLETED len={0} offset={0} speed=0, concluded, null"
MIB = 1 << 20

AT_REST = [
    f"top -file-> top-file perm=consistent-read,resize,write shared={QUIET}",
    f"top -backing-> mid perm=- shared={ALL}",
    f"mid -file-> mid-file perm=consistent-read shared={QUIET}",
    f"mid -backing-> base perm=- shared={ALL}",
    f"base -file-> base-file perm=consistent-read shared={QUIET}",
]
WHILE_RUNNING = [
    f"cflt -backing-> mid perm=- shared={ALL}",
    f"top -file-> top-file perm=consistent-read,resize,write shared={QUIET}",
    f"top -backing-> cflt perm=- shared={ALL}",
    "mid -file-> mid-file perm=consistent-read shared=write-unchanged",
    f"mid -backing-> base perm=- shared={ALL}",
    f"base -file-> base-file perm=consistent-read,resize,write shared={QUIET}",
    f"j0 -main node-> top perm=- shared={ALL}",
    "j0 -intermediate node-> mid perm=- shared=write,write-unchanged",
    f"j0 -base-> base perm=- shared={ALL}",
    f"block-backend -root-> mid perm=- shared={ALL}",
    f"block-backend -root-> base perm=consistent-read,write shared={QUIET}",
]
AFTERWARDS = [
    f"top -file-> top-file perm=consistent-read,resize,write shared={QUIET}",
    f"top -backing-> base perm=- shared={ALL}",
    f"mid -file-> mid-file perm=consistent-read shared={QUIET}",
    f"mid -backing-> base perm=- shared={ALL}",
    f"base -file-> base-file perm=consistent-read shared={QUIET}",
]
CHAIN = (image("base", read_only=True), image("mid", "base", read_only=True), image("top", "mid"))
VIEW = ("0x33 0 64k", "0x22 64k 1984k", "0x11 2M 2M")
