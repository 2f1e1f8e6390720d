"""Filters and throttle groups as clients use them, in a whole daemon."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from qmpd.block.api import Perm, Role
from qmpd.block.filters.throttle import Throttle
from qmpd.control.bridge import run_steps
from qmpd.graph.node import Backend, Edge
from qmpd.jobs.surgery import quietly
from tests.inprocess import CommandError, InProcess, Wire, running
from tests.tools import need

MIB = 1 << 20


@asynccontextmanager
async def serving(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[InProcess, Wire]]:
    """A daemon in ``directory``, where r.raw is a file of 4 MiB; and a client."""
    monkeypatch.chdir(directory)
    with open("r.raw", "wb") as file:
        file.truncate(4 * MIB)
    async with running() as core:
        yield core, await core.client()


async def add(client: Wire, driver: str, name: str, **options: Any) -> None:
    await client.execute("blockdev-add", driver=driver, node_name=name, **options)


async def refused(client: Wire, command: str, **arguments: Any) -> str:
    """The text of the error."""
    with pytest.raises(CommandError) as caught:
        await client.execute(command, **arguments)
    return caught.value.desc


async def chain(client: Wire, *names: str) -> None:
    """Images of 4 MiB as nodes, the first one at the bottom; all read-only but the last."""
    below: str | None = None
    for name in names:
        need("qemu-img")
        stored = ["-b", f"{below}.qcow2", "-F", "qcow2"] if below else []
        await trio.run_process(["qemu-img", "create", "-q", "-f", "qcow2", *stored, f"{name}.qcow2", "4M"])
        file = {"driver": "file", "filename": f"{name}.qcow2"}
        await add(client, "qcow2", name, file=file, backing=below, read_only=name != names[-1])
        below = name


def raw(**more: Any) -> dict[str, Any]:
    return {"driver": "file", "filename": "r.raw", **more}


@contextmanager
def using(core: InProcess, name: str, perm: Perm) -> Iterator[Edge]:
    """Somebody does I/O on a node."""
    with core.ctx.graph.edit() as edit:
        edge = edit.attach(Backend(), "root", core.ctx.graph.get(name), Role.NONE, perm=perm)
    yield edge
    with core.ctx.graph.edit() as edit:
        edit.detach(edge)


def edge_of(core: InProcess, parent: str, child: str) -> Edge:
    return core.ctx.graph.get(parent).children[child]


# -- throttle ----------------------------------------------------------------------------------------------------------


async def test_a_group_is_in_use_as_long_as_a_node_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reopen moves the node to another group; an unknown one is refused with nothing changed."""
    async with serving(tmp_path, monkeypatch) as (_, client):
        for name in ("g0", "g1"):
            await client.execute("object-add", qom_type="throttle-group", id=name)
        assert await refused(
            client, "blockdev-add", driver="throttle", node_name="t", throttle_group="zz", file=raw()
        ) == ("Throttle group 'zz' does not exist")
        await add(client, "throttle", "t", throttle_group="g0", file=raw(**{"node-name": "f"}))
        in_use = "object '{}' is in use, can not be deleted"
        assert await refused(client, "object-del", id="g0") == in_use.format("g0")
        again = {"driver": "throttle", "node-name": "t", "file": "f"}
        assert await refused(client, "blockdev-reopen", options=[again | {"throttle-group": "zz"}]) == (
            "Throttle group 'zz' does not exist"
        )
        assert await refused(client, "object-del", id="g0") == in_use.format("g0")
        await client.execute("blockdev-reopen", options=[again | {"throttle-group": "g1"}])
        await client.execute("object-del", id="g0")
        assert await refused(client, "object-del", id="g1") == in_use.format("g1")
        await client.execute("blockdev-del", node_name="t")
        await client.execute("object-del", id="g1")


async def test_limits_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For old clients; settable at the start only, and weaker than the others."""
    async with serving(tmp_path, monkeypatch) as (_, client):
        make = partial(client.execute, "object-add", qom_type="throttle-group")
        await make(id="a", limits={"iops-total": 1}, x_iops_total=7, x_bps_read=5)
        values = await client.execute("qom-get", path="/objects/a", property="limits")
        assert (values["iops-total"], values["bps-read"]) == (1, 5)
        assert await client.execute("qom-get", path="a", property="x-bps-read") == 5
        text = "Property cannot be set after initialization"
        assert await refused(client, "qom-set", path="a", property="x-iops-total", value=5) == text
        bad = partial(refused, client, "object-add", qom_type="throttle-group", id="b")
        assert await bad(x_iops_total=-1) == "Property values cannot be negative"
        assert await bad(x_iops_total_max_length=1 << 33) == (
            "x-iops-total-max-length value must be in therange [0, 4294967295]"
        )
        assert await bad(limits={"bogus": 1}) == "Parameter 'limits.bogus' is unexpected"
        assert await refused(client, "qom-set", path="a", property="limits", value={"iops-total": "5"}) == (
            "Invalid parameter type for 'limits.iops-total', expected: integer"
        )
        types = await client.execute("qom-list-types", implements="user-creatable")
        assert {"name": "throttle-group", "parent": "object"} in types


class Waiting:
    """A node ``t`` limited to a byte a second, and a thread with a request that has to wait there."""

    def __init__(self, core: InProcess, edge: Edge) -> None:
        self.edge = edge
        self.over = threading.Event()
        driver = core.ctx.graph.get("t").driver
        assert isinstance(driver, Throttle)
        self.driver = driver

    async def write(self) -> None:
        def request() -> None:
            self.edge.device.write(0, b"late")
            self.over.set()

        await trio.to_thread.run_sync(request)


@asynccontextmanager
async def waiting(core: InProcess, client: Wire) -> AsyncIterator[Waiting]:
    """The request waits when the block is entered, and must be over when it is left."""
    await client.execute("object-add", qom_type="throttle-group", id="g", limits={"bps-write": 1})
    await add(client, "throttle", "t", throttle_group="g", file=raw())
    async with trio.open_nursery() as nursery:
        with using(core, "t", Perm.WRITE) as edge:
            case = Waiting(core, edge)
            await trio.to_thread.run_sync(edge.device.write, 0, bytes(MIB))
            nursery.start_soon(case.write)
            while not case.driver._group.waiting:
                await trio.sleep(0)
            yield case
            if not case.over.is_set():
                await trio.to_thread.run_sync(case.over.wait)
    assert Path("r.raw").read_bytes()[:4] == b"late"


async def test_a_waiting_request_sees_new_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the peer it sleeps out its old delay."""
    async with serving(tmp_path, monkeypatch) as (core, client), waiting(core, client):
        await client.execute("qom-set", path="/objects/g", property="limits", value={"bps-write": 0})


async def test_quit_does_not_wait_for_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests under way are made, without their delay."""
    async with (
        serving(tmp_path, monkeypatch) as (core, client),
        waiting(core, client) as case,
        core.ctx.graph_lock,  # the nodes are not closed under its feet
    ):
        await client.execute("quit")
        await trio.to_thread.run_sync(case.over.wait)


async def test_changing_the_graph_does_not_wait_for_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody waits for the requests in flight, so they go; afterwards the limit holds again."""
    async with serving(tmp_path, monkeypatch) as (core, client), waiting(core, client) as case:
        monkeypatch.setattr(case.edge.parent, "quiesce", case.over.wait)
        await run_steps(quietly(core.ctx.graph, [case.edge.node], lambda: None))
        assert case.over.is_set()
        assert case.driver._member.draining == 0


# -- copy-on-read ------------------------------------------------------------------------------------------------------


async def test_what_bottom_must_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node of the chain that is no filter. One outside of it makes the peer loop for ever."""
    async with serving(tmp_path, monkeypatch) as (_, client):
        await chain(client, "base", "top")
        await add(client, "null-co", "other")
        cor = partial(refused, client, "blockdev-add", driver="copy-on-read", node_name="c", file="top")
        assert await cor(bottom="nope") == "Bottom node 'nope' not found"
        assert await cor(bottom="c") == "Bottom node 'c' is a filter"
        assert await cor(bottom="other") == "'other' is not in this backing file chain"
        assert await refused(client, "blockdev-add", driver="copy-on-read", node_name="c", file="base") == (
            "Block node is read-only"
        )


async def test_the_chain_stays_as_it_is_down_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the filter is deleted."""
    async with serving(tmp_path, monkeypatch) as (_, client):
        await chain(client, "base", "mid", "top")
        await add(client, "file", "f", filename="r.raw")
        await add(client, "copy-on-read", "c", file="top", bottom="mid")
        options = [{"driver": "qcow2", "node-name": "top", "file": "f", "backing": None}]
        assert await refused(client, "blockdev-reopen", options=options) == (
            "Cannot change frozen 'backing' link from 'top' to 'mid'"
        )
        commit = partial(refused, client, "block-commit", job_id="j", device="c")
        assert await commit(top_node="top", base_node="base") == "Cannot change 'file' link to 'top'"
        reopen = [{"driver": "copy-on-read", "node-name": "c", "file": "top", "bottom": "mid"}]
        assert await refused(client, "blockdev-reopen", options=reopen) == (
            "Block format 'copy-on-read' used by node 'c' does not support reopening files"
        )
        await client.execute("blockdev-del", node_name="c")
        await client.execute("block-commit", job_id="j", device="top", top_node="mid", base_node="base")
        await client.event("BLOCK_JOB_COMPLETED")


async def test_reading_through_the_node_fills_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the permission that the graph gave it."""
    async with serving(tmp_path, monkeypatch) as (core, client):
        await chain(client, "base", "mid", "top")
        await add(client, "copy-on-read", "c", file="top")
        assert edge_of(core, "c", "file").perm == Perm.WRITE_UNCHANGED
        with using(core, "c", Perm.CONSISTENT_READ) as edge:
            await trio.to_thread.run_sync(edge.device.readinto, 0, memoryview(bytearray(4 * MIB)))
        assert all(run.kind for run in core.ctx.graph.get("top").opened.map(0, 4 * MIB))


# -- preallocate -------------------------------------------------------------------------------------------------------


async def test_permissions_last_as_long_as_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else may write or resize below; all of it ends with the last writer."""
    async with serving(tmp_path, monkeypatch) as (core, client):
        await add(client, "preallocate", "p", file=raw(), prealloc_size=MIB)
        edge = edge_of(core, "p", "file")
        assert (edge.perm, edge.shared) == (Perm.NONE, Perm.ALL)
        with using(core, "p", Perm.WRITE | Perm.RESIZE) as writer:
            assert edge.perm == Perm.WRITE | Perm.RESIZE
            assert edge.shared == Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
            await trio.to_thread.run_sync(writer.device.write, 4 * MIB, b"more")
            assert os.stat("r.raw").st_size == 6 * MIB
        assert os.stat("r.raw").st_size == 4 * MIB + 512
        assert (edge.perm, edge.shared) == (Perm.NONE, Perm.ALL)


async def test_space_goes_back_below_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """qcow2 keeps its permissions to the end, so the space goes back when the nodes are closed."""
    async with serving(tmp_path, monkeypatch) as (core, client):
        await chain(client, "image")
        await client.execute("blockdev-del", node_name="image")
        file = {"driver": "preallocate", "file": {"driver": "file", "filename": "image.qcow2"}, "prealloc-size": MIB}
        await add(client, "qcow2", "image", file=file)
        with using(core, "image", Perm.WRITE) as writer:
            await trio.to_thread.run_sync(writer.device.write, 0, b"more")
        assert os.stat("image.qcow2").st_size > MIB
    assert os.stat("image.qcow2").st_size == 5 * 65536 + 512
    await trio.run_process(["qemu-img", "check", "-q", "image.qcow2"])


# -- names -------------------------------------------------------------------------------------------------------------


async def test_file_names_say_what_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules by place; a blkdebug without any has a plain name."""
    async with serving(tmp_path, monkeypatch) as (_, client):
        Path("rules").write_text("")
        await add(client, "blkdebug", "plain", image=raw(**{"read-only": True}), read_only=True)
        await add(client, "blkdebug", "file", image=raw(**{"read-only": True}), config="rules", read_only=True)
        rules = [{"event": "none", "errno": 0}]
        await add(client, "blkdebug", "ruled", image=raw(**{"read-only": True}), inject_error=rules, read_only=True)
        nodes = await client.execute("query-named-block-nodes", flat=True)
        names = {node["node-name"]: node["file"] for node in nodes}
        assert names["plain"] == "blkdebug::r.raw"
        assert names["file"] == "blkdebug:rules:r.raw"
        assert names["ruled"] == (
            'json:{"driver": "blkdebug", "image": {"driver": "file", "filename": "r.raw"},'
            ' "inject-error.0.errno": 0, "inject-error.0.event": "none"}'
        )
