"""blockdev-snapshot, blockdev-snapshot-sync and transactions of them, on real images."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from qmpd.errors import Kind, QmpdError
from qmpd.graph.node import Backend
from tests.commands.served import Served, serving
from tests.jobs.guest import Guest
from tests.jobs.rig import backing, check, image, output, reads, shell, spy

MIB = 1 << 20


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Served]:
    """Nodes a and b with data, and overlays oa and ob for them without a backing node."""
    async with serving(tmp_path) as made:
        shell(
            "qemu-img create -q -f qcow2 a.qcow2 4M",
            "qemu-io -f qcow2 -c 'write -P 0x11 0 1M' a.qcow2",
            "qemu-img create -q -f qcow2 b.qcow2 4M",
            "qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 oa.qcow2",
            "qemu-img create -q -f qcow2 -b b.qcow2 -F qcow2 ob.qcow2",
        )
        await made.rig.add(*(image(name) for name in ("a", "b", "oa", "ob")))
        yield made


def snapshot(node: str, overlay: str) -> dict[str, Any]:
    return {"type": "blockdev-snapshot", "data": {"node": node, "overlay": overlay}}


def snapshot_sync(node: str, name: str, file: str | None = None, **more: str) -> dict[str, Any]:
    data = {"node-name": node, "snapshot-file": file or f"{name}.qcow2", "snapshot-node-name": name} | more
    return {"type": "blockdev-snapshot-sync", "data": data}


ABORT = {"type": "abort", "data": {}}
ABORTED = "Transaction aborted using Abort action"


async def sync(daemon: Served, node: str, name: str, file: str | None = None, **more: str) -> None:
    await daemon.call("blockdev-snapshot-sync", **snapshot_sync(node, name, file, **more)["data"])


async def sync_refused(daemon: Served, node: str, name: str, file: str | None = None, **more: str) -> str:
    return await daemon.refused("blockdev-snapshot-sync", **snapshot_sync(node, name, file, **more)["data"])


# -- an overlay that is there ------------------------------------------------------------------------------------------


async def test_users_move_to_the_overlay(daemon: Served) -> None:
    """What they write from then on is there, what was written before is read through it, and the node is read-only."""
    user = Guest(daemon.rig, "a")
    user.device.write(0, b"\x22" * 65536)
    await daemon.call("blockdev-snapshot", node="a", overlay="oa")

    node, overlay = daemon.graph.get("a"), daemon.graph.get("oa")
    assert user.edge is not None
    assert user.edge.node is overlay
    assert overlay.backing is node
    assert node.read_only
    assert daemon.graph.get("a-file").read_only
    seen = bytearray(65536)
    user.device.readinto(0, memoryview(seen))
    assert seen == b"\x22" * 65536
    user.device.write(65536, b"\x33" * 65536)
    user.device.flush()
    user.detach(daemon.rig)
    await daemon.rig.close()
    check("a.qcow2", "oa.qcow2")
    reads("a.qcow2", "0x22 0 64k", "0x11 64k 960k")
    reads("oa.qcow2", "0x22 0 64k", "0x33 64k 64k", "0x11 128k 896k")


async def test_a_writing_guest_loses_nothing(daemon: Served) -> None:
    """Snapshots of snapshots under random requests: every read fits, and so do the images at the end."""
    guest = Guest(daemon.rig, "a", seed=3)
    guest.start()
    below = "a"
    for number in range(4):
        start = guest.requests
        await daemon.rig.until(lambda least=start + 20: guest.requests >= least or guest.error is not None)
        name = f"s{number}"
        await sync(daemon, below, name)
        below = name
    guest.finish()
    guest.device.flush()
    guest.detach(daemon.rig)
    await daemon.rig.close()
    Path("shadow.raw").write_bytes(guest.shadow)
    shell("qemu-img compare -f raw -F qcow2 shadow.raw s3.qcow2")
    check("a.qcow2", "s0.qcow2", "s1.qcow2", "s2.qcow2", "s3.qcow2")


@pytest.mark.parametrize(
    ("node", "overlay", "text"),
    [
        ("nope", "oa", "Cannot find device='nope' nor node-name='nope'"),
        ("a", "nope", "Cannot find device='nope' nor node-name='nope'"),
        ("a", "a", "Making 'a' a backing child of 'a' would create a cycle"),
        ("a", "a-file", "The overlay is already in use"),
        ("under", "oa", "Node 'under' is busy: node is used as backing hd of 'over'"),
        ("a", "over", "The overlay already has a backing image"),
        ("a", "r", "The overlay does not support backing images"),
        ("a", "cor", "Filters cannot be used as overlays"),
        ("a", "short", "The overlay is shorter than node 'a': 1048576 bytes instead of 4194304"),
    ],
)
async def test_refusals(daemon: Served, node: str, overlay: str, text: str) -> None:
    """In the peer's words and order; the graph is as it was."""
    shell(
        "qemu-img create -q -f qcow2 under.qcow2 4M",
        "qemu-img create -q -f qcow2 over.qcow2 4M",
        "qemu-img create -q -f qcow2 short.qcow2 1M",
        "qemu-img create -q -f raw r.raw 4M",
    )
    await daemon.rig.add(image("under", read_only=True), image("over", "under"), image("short"))
    await daemon.call("blockdev-add", driver="raw", node_name="r", file={"driver": "file", "filename": "r.raw"})
    await daemon.call("blockdev-add", driver="copy-on-read", node_name="cor", file="r")
    assert await daemon.refused("blockdev-snapshot", node=node, overlay=overlay) == text


async def test_a_read_only_overlay_under_a_writer(daemon: Served) -> None:
    """Refused while somebody writes, accepted when nobody does."""
    shell("qemu-img create -q -f qcow2 ro.qcow2 4M")
    await daemon.rig.add(image("ro", read_only=True))
    user = Guest(daemon.rig, "a")
    assert await daemon.refused("blockdev-snapshot", node="a", overlay="ro") == "Block node is read-only"
    user.device.write(0, b"still writable")
    user.detach(daemon.rig)
    await daemon.call("blockdev-snapshot", node="a", overlay="ro")
    assert daemon.graph.get("ro").backing is daemon.graph.get("a")


async def test_a_node_that_cannot_be_flushed(daemon: Served) -> None:
    """The snapshot is refused: what it shows might be lost."""
    log: list[str] = []
    spy(daemon.graph.get("a"), "flush", log, QmpdError("No space left on device", Kind.NO_SPACE), once=True)
    text = await daemon.refused("blockdev-snapshot", node="a", overlay="oa")
    assert text == "Write to node 'a' failed: No space left on device"
    assert not daemon.graph.get("a").read_only


async def test_users_are_held_meanwhile(daemon: Served) -> None:
    """From before the flush until the links are changed nobody is inside; then everybody goes on."""
    held: list[bool] = []
    user = Guest(daemon.rig, "a")
    real = daemon.graph.get("a").opened.flush

    def flush() -> None:
        held.append(user.is_held)
        real()

    daemon.graph.get("a").opened.flush = flush  # type: ignore[method-assign]
    await daemon.call("blockdev-snapshot", node="a", overlay="oa")
    assert held == [True]
    assert not user.is_held
    user.detach(daemon.rig)


# -- an overlay made for the purpose -----------------------------------------------------------------------------------


async def test_the_overlay_is_made_and_stays(daemon: Served) -> None:
    """Size, format and backing name are in its header, and its node is there although nobody uses it."""
    await sync(daemon, "a", "s")
    overlay = daemon.graph.get("s")
    assert overlay.monitor_owned
    assert overlay.length == 4 * MIB
    assert overlay.backing is daemon.graph.get("a")
    assert overlay.filename == "s.qcow2"
    await daemon.call("blockdev-del", node_name="s")
    await daemon.rig.close()
    assert backing("s.qcow2") == ("a.qcow2", "qcow2")
    check("s.qcow2")
    reads("s.qcow2", "0x11 0 1M", "0 1M 3M")


async def test_the_backing_name_leads_there(daemon: Served) -> None:
    """Also from another directory, and for the second snapshot of a transaction, whose node is new itself."""
    Path("d1").mkdir()
    Path("d2").mkdir()
    actions = [snapshot_sync("a", "s", "d1/s.qcow2"), snapshot_sync("s", "t", "d2/t.qcow2")]
    await daemon.call("transaction", actions=actions)
    assert daemon.graph.get("t").filename == "d2/t.qcow2"
    await daemon.rig.close()
    assert backing("d1/s.qcow2") == ("../a.qcow2", "qcow2")
    assert backing("d2/t.qcow2") == ("../d1/s.qcow2", "qcow2")
    reads("d2/t.qcow2", "0x11 0 1M")


async def test_the_working_directory_may_have_changed(daemon: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it has after daemonizing: the node's relative name counts from where it was opened."""
    file = os.path.abspath("s.qcow2")
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir("/")
        await sync(daemon, "a", "s", file)

    assert backing("s.qcow2") == ("a.qcow2", "qcow2")


async def test_an_existing_image(daemon: Served) -> None:
    """Used as it is: its data show, and its own backing name does not count."""
    shell(
        "qemu-img create -q -f qcow2 e.qcow2 4M",
        "qemu-io -f qcow2 -c 'write -P 0x44 0 64k' e.qcow2",
        "qemu-img rebase -u -b nowhere.qcow2 -F qcow2 e.qcow2",
    )
    await sync(daemon, "a", "e", mode="existing")
    assert daemon.graph.get("e").backing is daemon.graph.get("a")
    seen = bytearray(128 << 10)
    daemon.graph.get("e").opened.readinto(0, memoryview(seen))
    assert seen == b"\x44" * 65536 + b"\x11" * 65536


async def test_flags_of_the_node_are_taken_over(daemon: Served) -> None:
    """A snapshot of a read-only node is read-only; caching is as it was."""
    shell("qemu-img create -q -f qcow2 ro.qcow2 1M")
    await daemon.call(
        "blockdev-add",
        driver="qcow2",
        node_name="ro",
        file={"driver": "file", "filename": "ro.qcow2"},
        read_only=True,
        cache={"no-flush": True},
        discard="unmap",
    )
    await sync(daemon, "ro", "s")
    overlay = daemon.graph.get("s")
    assert overlay.read_only
    assert overlay.spec.cache_no_flush
    assert overlay.spec.discard == "unmap"
    assert overlay.children["file"].node.read_only


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"device": "a"}, "Cannot find device='a' nor node-name=''"),
        ({"node_name": "nope", "snapshot_node_name": "9x"}, "Cannot find device='' nor node-name='nope'"),
        ({"node_name": "a"}, "New overlay node-name missing"),
        ({"node_name": "a", "snapshot_node_name": "b"}, "New overlay node-name already in use"),
        ({"node_name": "a", "snapshot_node_name": "9x"}, "Invalid node-name: '9x'"),
        ({"node_name": "a", "snapshot_node_name": "x" * 32}, "Node name too long"),
        ({"snapshot_file": "nodir/s"}, "Could not create 'nodir/s': No such file or directory"),
        ({"snapshot_file": ""}, "Could not create '': No such file or directory"),
        ({"snapshot_file": "nbd:x"}, "Unknown protocol 'nbd'"),
        ({"snapshot_file": "json:{}"}, "Unknown protocol 'json'"),
        ({"format": "bogus"}, "Unknown file format 'bogus'"),
        ({"format": "raw"}, "Backing file not supported for file format 'raw'"),
        ({"format": "file"}, "Backing file not supported for file format 'file'"),
        ({"format": "throttle"}, "Format driver 'throttle' does not support image creation"),
        ({"mode": "existing", "format": "bogus"}, "Unknown driver 'bogus'"),
        ({"mode": "existing", "format": "throttle"}, "Filters cannot be used as overlays"),
        ({"mode": "existing", "snapshot_file": "b.qcow2"}, 'Failed to get "write" lock'),
        ({"mode": "existing"}, "Could not open 's.qcow2': No such file or directory"),
        ({"snapshot_file": "a.qcow2"}, "Error: Trying to create an image with the same filename as the backing file"),
        ({"snapshot_file": "./b.qcow2"}, 'Failed to get "write" lock'),
    ],
)
async def test_refusals_before_anything_is_made(daemon: Served, arguments: dict[str, Any], text: str) -> None:
    """In the peer's words, and there is no new file."""
    usual = {"node_name": "a", "snapshot_node_name": "s"}
    own = {"device", "node_name", "snapshot_node_name"} & arguments.keys()
    files = sorted(os.listdir())
    sent = {"snapshot_file": "s.qcow2"} | ({} if own else usual) | arguments
    assert await daemon.refused("blockdev-snapshot-sync", **sent) == text
    assert sorted(os.listdir()) == files


@pytest.mark.parametrize("image_format", ["raw", "file"])
async def test_an_existing_image_that_cannot_have_a_backing_file(daemon: Served, image_format: str) -> None:
    """Found out when it is open; it is closed again."""
    shell("qemu-img create -q -f raw r.raw 4M")
    text = await sync_refused(daemon, "a", "r", "r.raw", mode="existing", format=image_format)
    assert text == "The overlay does not support backing images"


async def test_a_short_existing_image(daemon: Served) -> None:
    """Refused, and left as it is."""
    shell("qemu-img create -q -f qcow2 e.qcow2 1M")
    before = Path("e.qcow2").read_bytes()
    text = await sync_refused(daemon, "a", "e", mode="existing")
    assert text == "The overlay is shorter than node 'a': 1048576 bytes instead of 4194304"
    assert Path("e.qcow2").read_bytes() == before


async def test_a_plain_file_prefix(daemon: Served) -> None:
    """``file:`` is a protocol like none."""
    await sync(daemon, "a", "s", "file:s.qcow2")
    assert Path("s.qcow2").exists()


async def test_a_bare_file_node(daemon: Served) -> None:
    """The format in the overlay's header is that of the node, and the length counts in sectors."""
    Path("f.raw").write_bytes(b"x" * 1000)
    await daemon.call("blockdev-add", driver="file", node_name="f", filename="f.raw")
    await sync(daemon, "f", "s")
    await daemon.rig.close()
    assert backing("s.qcow2") == ("f.raw", "file")
    assert json.loads(output("qemu-img info --output=json s.qcow2"))["virtual-size"] == 1024


# -- transactions ------------------------------------------------------------------------------------------------------


async def test_several_snapshots_at_once(daemon: Served) -> None:
    """All are there afterwards; later actions see what earlier ones did."""
    await daemon.call("transaction", actions=[snapshot("a", "oa"), snapshot("oa", "ob"), snapshot_sync("ob", "s")])
    chain = ["s", "ob", "oa", "a"]
    for above, below in itertools.pairwise(chain):
        assert daemon.graph.get(above).backing is daemon.graph.get(below)
        assert daemon.graph.get(below).read_only
    assert not daemon.graph.get("s").read_only


@pytest.mark.parametrize(
    ("actions", "text"),
    [
        ([ABORT, snapshot("nope", "x")], ABORTED),
        ([snapshot("nope", "x"), ABORT], "Cannot find device='nope' nor node-name='nope'"),
        ([snapshot("a", "oa"), snapshot("b", "ob"), ABORT], ABORTED),
        ([snapshot("a", "oa"), snapshot("a", "ob")], "Node 'a' is busy: node is used as backing hd of 'oa'"),
        ([snapshot_sync("a", "s"), ABORT], ABORTED),
        ([ABORT, snapshot_sync("a", "s", "nodir/s")], ABORTED),
        ([snapshot("a", "oa"), snapshot_sync("a", "s")], "Node 'a' is busy: node is used as backing hd of 'oa'"),
        ([snapshot_sync("a", "s"), snapshot_sync("b", "s", "t")], "New overlay node-name already in use"),
        ([snapshot_sync("a", "s"), snapshot_sync("s", "t"), snapshot_sync("t", "u"), ABORT], ABORTED),
        (
            [snapshot_sync("a", "s"), snapshot_sync("b", "t", "no/t")],
            "Could not create 'no/t': No such file or directory",
        ),
        ([snapshot("a", "nope"), snapshot_sync("b", "s", "no/t")], "Cannot find device='nope' nor node-name='nope'"),
    ],
)
async def test_a_failure_takes_everything_back(daemon: Served, actions: list[Any], text: str) -> None:
    """The error is that of the first action that fails; users, flags, nodes and files are as before."""
    users = [Guest(daemon.rig, name) for name in ("a", "b")]
    files = sorted(os.listdir())
    assert await daemon.refused("transaction", actions=actions) == text
    assert sorted(os.listdir()) == files
    for user in users:
        assert not user.is_held
        user.device.write(0, b"x" * 512)
        user.detach(daemon.rig)
    assert not daemon.graph.get("a").read_only


async def test_a_file_that_was_there_is_not_removed(daemon: Served) -> None:
    """Its content is gone, as the client wanted; the name is not."""
    Path("s.qcow2").write_bytes(b"old")
    assert await daemon.refused("transaction", actions=[snapshot_sync("a", "s"), ABORT]) == ABORTED
    assert Path("s.qcow2").exists()


async def test_a_file_put_in_the_place_of_the_new_one_is_not_removed(daemon: Served) -> None:
    """Only what was made is taken away."""
    node = daemon.graph.get("b")
    real = node.opened.flush

    def replace() -> None:
        Path("other").write_bytes(b"precious")
        os.replace("other", "s.qcow2")
        real()

    node.opened.flush = replace  # type: ignore[method-assign]
    actions = [snapshot_sync("a", "s"), snapshot("b", "ob"), ABORT]
    assert await daemon.refused("transaction", actions=actions) == ABORTED
    assert Path("s.qcow2").read_bytes() == b"precious"


@pytest.mark.parametrize("kind", ["abort", "blockdev-snapshot", "blockdev-snapshot-sync"])
async def test_grouped_completion(daemon: Served, kind: str) -> None:
    """None of the actions starts a job; this is found before anything runs."""
    action = {"abort": ABORT, "blockdev-snapshot": snapshot("nope", "x")}.get(kind, snapshot_sync("a", "s"))
    text = await daemon.refused("transaction", actions=[action], properties={"completion-mode": "grouped"})
    assert text == f"Action '{kind}' does not support transaction property completion-mode = grouped"
    assert not Path("s.qcow2").exists()


async def test_nothing_to_do(daemon: Served) -> None:
    """An empty list succeeds, in either mode."""
    assert await daemon.call("transaction", actions=[]) == {}
    assert await daemon.call("transaction", actions=[], properties={"completion-mode": "grouped"}) == {}


async def test_a_handle_without_requests_moves_too(daemon: Served) -> None:
    """Any backend follows; the job's hold would not, but a job refuses the snapshot."""
    handle = Backend()
    with daemon.graph.edit() as edit:
        node = daemon.graph.get("a")
        edit.attach(handle, "root", node, role=node.children["file"].role)
    await daemon.call("blockdev-snapshot", node="a", overlay="oa")
    assert handle.edge is not None
    assert handle.edge.node.name == "oa"
    with daemon.graph.edit() as edit:
        edit.detach(handle.edge)


async def test_there_and_back(daemon: Served) -> None:
    """The usual round: take a snapshot, write, commit the overlay back, delete it."""
    user = Guest(daemon.rig, "a")
    await sync(daemon, "a", "s")
    user.device.write(0, b"\x44" * 65536)
    await daemon.call("block-commit", job_id="j0", device="s", x_qmpd_siblings="allow")  # "oa" is there already
    await daemon.rig.until(lambda: daemon.ctx.jobs.query_jobs()[0]["status"] == "ready")
    await daemon.call("job-complete", id="j0")
    await daemon.rig.gone()
    assert user.edge is not None
    assert user.edge.node is daemon.graph.get("a")
    user.device.write(65536, b"\x55" * 65536)
    user.detach(daemon.rig)
    await daemon.call("blockdev-del", node_name="s")
    await daemon.rig.close()
    check("a.qcow2")
    reads("a.qcow2", "0x44 0 64k", "0x55 64k 64k", "0x11 128k 896k", "0 1M 3M")


# -- inside images -----------------------------------------------------------------------------------------------------


def internal(device: str, name: str) -> dict[str, Any]:
    return {"type": "blockdev-snapshot-internal-sync", "data": {"device": device, "name": name}}


def inside(name: str) -> list[str]:
    """Snapshots in an image, by qemu-img."""
    info = json.loads(output(f"qemu-img info -U --output=json {name}"))
    return [entry["name"] for entry in info.get("snapshots", [])]


def held(name: str, snapshot: str) -> bytes:
    """What a snapshot in an image holds, by qemu-img."""
    shell(f"qemu-img convert -f qcow2 -O raw -l snapshot.name={snapshot} {name} held.raw")
    return Path("held.raw").read_bytes()


async def test_a_snapshot_inside_keeps_what_a_writing_guest_has_written(daemon: Served) -> None:
    """Taken under random requests it holds what the disk held in between two of them; the guest reads what it wrote."""
    guest = Guest(daemon.rig, "a", seed=4)
    guest.start()
    for number in range(3):
        start = guest.requests
        await daemon.rig.until(lambda least=start + 20: guest.requests >= least or guest.error is not None)
        await daemon.call("blockdev-snapshot-internal-sync", device="a", name=f"s{number}")
    deleted = await daemon.call("blockdev-snapshot-delete-internal-sync", device="a", name="s1")
    assert (deleted["id"], deleted["name"]) == ("2", "s1")
    guest.finish()
    guest.device.flush()
    guest.detach(daemon.rig)
    await daemon.rig.close()
    check("a.qcow2")
    assert inside("a.qcow2") == ["s0", "s2"]
    output("qemu-img convert -f qcow2 -O raw a.qcow2 now.raw")
    assert Path("now.raw").read_bytes() == guest.shadow


async def test_a_snapshot_inside_holds_its_moment(daemon: Served) -> None:
    user = Guest(daemon.rig, "a")
    await daemon.call("blockdev-snapshot-internal-sync", device="a", name="s")
    user.device.write(0, b"\x22" * 65536)
    user.detach(daemon.rig)
    info = await daemon.call("query-named-block-nodes")
    [node] = [known for known in info if known["node-name"] == "a"]
    assert [known["name"] for known in node["image"]["snapshots"]] == ["s"]
    await daemon.rig.close()
    check("a.qcow2")
    reads("a.qcow2", "0x22 0 64k", "0x11 64k 960k")
    assert held("a.qcow2", "s")[: 1 * MIB] == b"\x11" * MIB


async def test_a_transaction_takes_them_on_all_disks_or_on_none(daemon: Served) -> None:
    actions = [internal("a", "s"), internal("b", "s")]
    assert await daemon.refused("transaction", actions=[*actions, ABORT]) == ABORTED
    assert await daemon.refused("transaction", actions=[*actions, internal("a", "s")]) == (
        "Snapshot with name 's' already exists on device 'a'"
    )
    assert inside("a.qcow2") == inside("b.qcow2") == []
    await daemon.call("transaction", actions=actions)
    assert inside("a.qcow2") == inside("b.qcow2") == ["s"]
    await daemon.rig.close()
    check("a.qcow2", "b.qcow2")


async def test_an_action_sees_what_those_before_it_will_have_done(daemon: Served) -> None:
    """With an overlay on it a node is no root any more, and the overlay takes the snapshot."""
    refused = await daemon.refused("transaction", actions=[snapshot("a", "oa"), internal("a", "s")])
    assert refused == "Need a root block node"
    await daemon.call("transaction", actions=[snapshot("a", "oa"), internal("oa", "s")])
    assert inside("a.qcow2") == []
    assert inside("oa.qcow2") == ["s"]


async def test_the_image_below_a_filter_keeps_the_snapshot(daemon: Served) -> None:
    """A filter has no snapshots; its only child has. Whoever else writes there stands still meanwhile."""
    await daemon.rig.add({"driver": "copy-on-read", "node-name": "f", "file": "a"})
    guest = Guest(daemon.rig, "a", seed=6)
    guest.start()
    await daemon.rig.until(lambda: guest.requests >= 20 or guest.error is not None)
    held_back = []
    real = daemon.graph.get("a").opened.take_snapshot

    def take(name: str, nanoseconds: int) -> Any:
        held_back.append(guest.is_held)
        return real(name, nanoseconds)

    daemon.graph.get("a").opened.take_snapshot = take  # type: ignore[method-assign]
    await daemon.call("blockdev-snapshot-internal-sync", device="f", name="s")
    assert held_back == [True]
    assert inside("a.qcow2") == ["s"]
    deleted = await daemon.call("blockdev-snapshot-delete-internal-sync", device="f", name="s")
    assert deleted["name"] == "s"
    guest.finish()
    guest.detach(daemon.rig)


async def test_no_snapshot_where_it_fails(daemon: Served) -> None:
    """The error tells which device; the image takes no more writes where nobody knows what is on disk."""
    log: list[str] = []
    spy(daemon.graph.get("a"), "take_snapshot", log, QmpdError("No space left on device", Kind.NO_SPACE), once=True)
    text = await daemon.refused("transaction", actions=[internal("b", "s"), internal("a", "s")])
    assert text == "Failed to create snapshot 's' on device 'a': No space left on device"
    assert inside("a.qcow2") == inside("b.qcow2") == []


async def test_an_inactive_node_has_no_snapshots_taken_or_deleted(daemon: Served) -> None:
    await daemon.call("blockdev-snapshot-internal-sync", device="a", name="s")
    await daemon.call("blockdev-set-active", node_name="a", active=False)
    refused = await daemon.refused("blockdev-snapshot-internal-sync", device="a", name="t")
    assert refused == "Block format 'qcow2' used by device 'a' does not support internal snapshots"
    refused = await daemon.refused("blockdev-snapshot-delete-internal-sync", device="a", name="s")
    assert refused == "Device 'a' is inactive"
