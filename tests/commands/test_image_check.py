"""x-qmpd-check on nodes in use: who is kept out, what is answered, and that nothing stays behind."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from qmpd.block.api import Perm, Role
from qmpd.block.drivers.qcow2 import Qcow2
from qmpd.block.findings import CheckResult, Report
from qmpd.commands.image_check import Checker
from qmpd.errors import QmpdError
from qmpd.graph.node import Backend
from tests.commands.test_blockdev import Daemon
from tests.tools import need

KIB = 1 << 10


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    need("qemu-img")
    monkeypatch.chdir(tmp_path)
    return Daemon()


def user(daemon: Daemon, name: str, perm: Perm, shared: Perm = Perm.ALL) -> None:
    with daemon.graph.edit() as edit:
        edit.attach(Backend(), "root", daemon.graph.get(name), Role.NONE, perm=perm, shared=shared)


async def test_a_clean_image_answers_like_qemu_img(daemon: Daemon) -> None:
    """Every member is there; nothing holds the node afterwards."""
    await daemon.chain("base", "top")
    parents = list(daemon.graph.get("base").parents)

    answer = await daemon.call("x-qmpd-check", node_name="base")

    assert answer == {
        "filename": "base.qcow2",
        "format": "qcow2",
        "check-errors": 0,
        "image-end-offset": 256 * KIB,
        "corruptions": 0,
        "leaks": 0,
        "corruptions-fixed": 0,
        "leaks-fixed": 0,
        "total-clusters": 64,
        "allocated-clusters": 0,
        "fragmented-clusters": 0,
        "compressed-clusters": 0,
        "findings": [],
    }
    assert daemon.graph.get("base").parents == parents


async def test_leaks_are_told_and_given_back(daemon: Daemon) -> None:
    """With the place of the count that is too high; qemu-img agrees when all is done."""
    await daemon.chain("top")
    driver = daemon.graph.get("top").opened
    assert isinstance(driver, Qcow2)
    user(daemon, "top", Perm.CONSISTENT_READ)
    lost = int(driver._image.alloc.allocate(1)[0])
    driver._image.file.write((lost + 1) * 64 * KIB - 1, b"\0")

    found = await daemon.call("x-qmpd-check", node_name="top", fix="none")
    fixed = await daemon.call("x-qmpd-check", node_name="top", fix="leaks")

    assert (found["leaks"], found["leaks-fixed"]) == (1, 0)
    (finding,) = found["findings"]
    assert (finding["severity"], finding["field"], finding["value"]) == ("leak", "refcount", 1)
    assert (fixed["leaks"], fixed["leaks-fixed"], fixed["findings"]) == (0, 1, [])
    done = subprocess.run(["qemu-img", "check", "-U", "top.qcow2"], check=False, stdout=subprocess.DEVNULL)
    assert done.returncode == 0


async def test_an_image_with_writers_is_not_checked(daemon: Daemon) -> None:
    """What is seen of it would not fit together."""
    await daemon.chain("base", "top")
    user(daemon, "top", Perm.WRITE)

    text = await daemon.refused("x-qmpd-check", node_name="top")

    assert text.startswith("Permission conflict on node 'top': permissions 'write' are both required by")
    assert (await daemon.call("x-qmpd-check", node_name="base"))["corruptions"] == 0


async def test_what_cannot_be_checked_or_repaired(daemon: Daemon) -> None:
    """Unknown nodes, formats without metadata, and nodes that must not change."""
    await daemon.chain("base", "top")

    assert await daemon.refused("x-qmpd-check", node_name="zz") == "Cannot find device='' nor node-name='zz'"
    text = await daemon.refused("x-qmpd-check", node_name="base-file")
    assert text == "This image format does not support checks"
    assert await daemon.refused("x-qmpd-check", node_name="base", fix="leaks") == "Block node is read-only"


async def test_the_graph_is_free_during_a_check_and_writers_are_kept_out(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other commands are answered; the node can be neither written nor deleted. Who asked may leave, which ends it."""
    await daemon.chain("base", "top")
    started = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def endless(self: Qcow2, *, fix_leaks: bool, pulse: Callable[[], None]) -> CheckResult:
        token.run_sync_soon(started.set)
        while True:
            pulse()

    monkeypatch.setattr(Qcow2, "check", endless)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: daemon.call("x-qmpd-check", node_name="top"))
        await started.wait()

        assert await daemon.call("query-named-block-nodes")
        assert await daemon.refused("blockdev-del", node_name="top") == "Node top is in use"
        with pytest.raises(QmpdError, match="Permission conflict"):
            user(daemon, "top", Perm.WRITE)
        nursery.cancel_scope.cancel()

    assert daemon.graph.get("top").parents == []


class Endless:
    """Stands in for a node whose check goes on until it is told to stop."""

    def __init__(self) -> None:
        self.opened = self
        self.pulses = 0
        self.stop = False

    def check(self, *, fix_leaks: bool, pulse: Callable[[], None]) -> CheckResult:
        while not self.stop:
            pulse()
            self.pulses += 1
        return CheckResult(Report())


async def test_a_check_rests_while_the_graph_below_changes() -> None:
    """When quiesce returns, nothing moves until resume."""
    node, checker = Endless(), Checker()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, checker.run, node, False)
        while not node.pulses:
            await trio.sleep(0)

        await trio.to_thread.run_sync(checker.quiesce)
        before = node.pulses
        await trio.to_thread.run_sync(lambda: None)
        assert node.pulses == before

        checker.resume()
        while node.pulses == before:
            await trio.sleep(0)
        node.stop = True


async def test_a_check_gives_up_when_its_node_is_replaced() -> None:
    """Its hold has moved to another node, so the old one is not protected any more."""
    checker = Checker()
    checker.retargeted(None)  # type: ignore[arg-type]

    with pytest.raises(QmpdError, match="The node was replaced during the check"):
        await trio.to_thread.run_sync(checker.run, Endless(), False)
