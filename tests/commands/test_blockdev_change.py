"""blockdev-reopen, block_resize and change-backing-file on real images."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmpd.block.api import Perm, Role
from qmpd.graph.node import Backend
from tests.commands.test_blockdev import Daemon
from tests.tools import need

MIB = 1 << 20


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    need("qemu-img")
    monkeypatch.chdir(tmp_path)
    return Daemon()


def qcow2(name: str, **more: Any) -> dict[str, Any]:
    return {"driver": "qcow2", "node-name": name, "file": f"{name}-file", **more}


def export(daemon: Daemon, name: str, perm: Perm = Perm.CONSISTENT_READ, shared: Perm = Perm.ALL) -> None:
    with daemon.graph.edit() as edit:
        edit.attach(Backend(), "root", daemon.graph.get(name), Role.NONE, perm=perm, shared=shared)


async def edges(daemon: Daemon) -> Any:
    return (await daemon.call("x-debug-query-block-graph"))["edges"]


# -- blockdev-reopen ---------------------------------------------------------------------------------------------------


async def test_nothing_to_reopen(daemon: Daemon) -> None:
    """An empty list is no reason to die."""
    assert await daemon.call("blockdev-reopen", options=[]) == {}


async def test_nodes_that_cannot_be_found(daemon: Daemon) -> None:
    """They must have been named."""
    text = await daemon.refused("blockdev-reopen", options=[{"driver": "null-co"}])
    assert text == "node-name not specified"
    text = await daemon.refused("blockdev-reopen", options=[{"driver": "null-co", "node-name": "zz"}])
    assert text == "Failed to find node with node-name='zz'"
    text = await daemon.refused("blockdev-reopen", options=[{"driver": "raw", "node-name": "x"}])
    assert text == "Parameter 'options[0].file' is missing"


async def test_swapping_and_removing_backing(daemon: Daemon) -> None:
    """The header is not touched; the old child stays a node of its own."""
    await daemon.chain("base", "mid", "top")
    top = daemon.graph.get("top")
    text = "backing is missing for 'top'"
    assert await daemon.refused("blockdev-reopen", options=[qcow2("top")]) == text
    await daemon.call("blockdev-reopen", options=[qcow2("top", backing="base")])
    assert top.backing is daemon.graph.get("base")
    await daemon.call("blockdev-reopen", options=[qcow2("top", backing=None)])
    assert top.backing is None
    assert await daemon.refused("blockdev-reopen", options=[qcow2("top")]) == text
    text = "Making 'top' a backing child of 'top' would create a cycle"
    assert await daemon.refused("blockdev-reopen", options=[qcow2("top", backing="top")]) == text
    text = "Cannot find device='' nor node-name='nope'"
    assert await daemon.refused("blockdev-reopen", options=[qcow2("top", backing="nope")]) == text
    inline = {"driver": "qcow2", "file": "mid-file"}
    text = "Cannot change the option 'backing.driver'"
    assert await daemon.refused("blockdev-reopen", options=[qcow2("top", backing=inline)]) == text
    await daemon.call("blockdev-reopen", options=[qcow2("top", backing="mid")])
    assert daemon.graph.get("mid") in daemon.graph.nodes


async def test_a_backing_node_from_the_header_goes_when_replaced(daemon: Daemon) -> None:
    """Nobody owns it."""
    await daemon.chain("base", "top")
    for name in ("top", "base"):
        await daemon.call("blockdev-del", node_name=name)
    file = {"driver": "file", "filename": "top.qcow2", "node-name": "top-file"}
    await daemon.call("blockdev-add", driver="qcow2", node_name="top", file=file)
    assert len(daemon.graph.nodes) == 4
    await daemon.call("blockdev-reopen", options=[qcow2("top", backing=None)])
    assert [node.name for node in daemon.graph.nodes] == ["top-file", "top"]


async def test_a_frozen_link(daemon: Daemon) -> None:
    """A job relies on it."""
    await daemon.chain("base", "mid", "top")
    with daemon.graph.edit() as edit:
        edit.freeze(daemon.graph.get("mid").children["backing"])
    options = [qcow2("mid", backing=None, **{"read-only": True})]
    text = "Cannot change frozen 'backing' link from 'mid' to 'base'"
    assert await daemon.refused("blockdev-reopen", options=options) == text


@pytest.mark.parametrize("order", [1, -1])
async def test_read_only_and_back(daemon: Daemon, order: int) -> None:
    """The inline file goes along both ways, whether it is listed or not, in any order."""
    await daemon.chain("a")
    read_only = [qcow2("a", **{"read-only": True})]
    file = {"driver": "file", "node-name": "a-file", "filename": "a.qcow2"}
    await daemon.call("blockdev-reopen", options=read_only)
    assert daemon.graph.get("a-file").read_only
    assert (await edges(daemon))[0]["perm"] == ["consistent-read"]
    await daemon.call("blockdev-reopen", options=[qcow2("a")])
    assert not daemon.graph.get("a-file").read_only
    assert (await edges(daemon))[0]["perm"] == ["resize", "write", "consistent-read"]
    await daemon.call("blockdev-reopen", options=[*read_only, file][::order])
    assert daemon.graph.get("a-file").read_only
    await daemon.call("blockdev-reopen", options=[qcow2("a"), file][::order])
    assert not daemon.graph.get("a-file").read_only


async def test_an_explicitly_read_only_file_stays_so(daemon: Daemon) -> None:
    """Until it is listed itself."""
    await daemon.chain("a")
    file = {"driver": "file", "node-name": "a-file", "filename": "a.qcow2"}
    options = [qcow2("a", **{"read-only": True}), file | {"read-only": True}]
    await daemon.call("blockdev-reopen", options=options)
    assert await daemon.refused("blockdev-reopen", options=[qcow2("a")]) == "Block node is read-only"
    assert daemon.graph.get("a").read_only
    await daemon.call("blockdev-reopen", options=[qcow2("a"), file])
    assert not daemon.graph.get("a").read_only


async def test_read_only_under_a_writer(daemon: Daemon) -> None:
    """And one bad entry spoils all."""
    await daemon.chain("a")
    await daemon.chain("b")
    export(daemon, "b", Perm.CONSISTENT_READ | Perm.WRITE)
    options = [qcow2(name, **{"read-only": True}) for name in ("a", "b")]
    text = "Read-only block node 'b' cannot support read-write users"
    assert await daemon.refused("blockdev-reopen", options=options) == text
    assert not daemon.graph.get("a").read_only
    assert not daemon.graph.get("a").opened.read_only


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"driver": "raw", "file": "a-file", "backing": None}, "driver"),
        ({"force-share": True, "read-only": True}, "force-share"),
        ({"data-file": "a-file"}, "data-file"),
        ({"file": {"driver": "host_device", "filename": "a.qcow2"}}, "file.driver"),
        ({"file": {"driver": "file", "filename": "b.qcow2"}}, "file.filename"),
        ({"active": False}, "active"),
    ],
)
async def test_options_that_stay_as_they_are(daemon: Daemon, change: dict[str, Any], option: str) -> None:
    """Each is named."""
    await daemon.chain("a")
    described = {key: value for key, value in (qcow2("a") | change).items() if (key, value) != ("backing", None)}
    text = await daemon.refused("blockdev-reopen", options=[described])
    assert text == f"Cannot change the option '{option}'"


async def test_options_of_drivers(daemon: Daemon) -> None:
    """They reach the driver, whose refusals are told."""
    await daemon.chain("a")
    await daemon.call("blockdev-reopen", options=[qcow2("a", **{"cache-size": MIB, "lazy-refcounts": True})])
    same = {"driver": "file", "filename": "a.qcow2"}
    await daemon.call("blockdev-reopen", options=[qcow2("a") | {"file": same}])
    text = await daemon.refused("blockdev-reopen", options=[qcow2("a", **{"cache-size": 1, "l2-cache-size": 2})])
    assert text == "l2-cache-size may not exceed cache-size"
    text = await daemon.refused(
        "blockdev-reopen", options=[{"driver": "file", "node-name": "a-file", "filename": "other"}]
    )
    assert text == "Cannot change the option 'filename'"
    assert json.loads(json.dumps(daemon.graph.get("a").spec.options)) == {}


async def test_a_window_of_raw(daemon: Daemon) -> None:
    """It moves, its role changes, and it does not shrink under a user."""
    Path("a.raw").write_bytes(bytes(MIB) + b"x" * MIB)
    await daemon.call("blockdev-add", driver="file", node_name="f", filename="a.raw")
    await daemon.call("blockdev-add", driver="raw", node_name="r", file="f")
    node = daemon.graph.get("r")
    raw = {"driver": "raw", "node-name": "r", "file": "f"}
    await daemon.call("blockdev-reopen", options=[raw | {"offset": MIB}])
    assert node.length == MIB
    assert node.children["file"].role == Role.DATA | Role.PRIMARY
    assert not node.children["file"].shared & Perm.RESIZE
    data = bytearray(4)
    node.opened.readinto(0, memoryview(data))
    assert data == b"xxxx"
    await daemon.call("blockdev-reopen", options=[raw])
    assert node.length == 2 * MIB
    export(daemon, "r")
    text = await daemon.refused("blockdev-reopen", options=[raw | {"size": MIB}])
    assert text == "Node 'r' is in use: it cannot be made smaller"


# -- block_resize ------------------------------------------------------------------------------------------------------


async def test_resizing(daemon: Daemon) -> None:
    """Up and down; 0 is fine."""
    await daemon.chain("a")
    for size in (8 * MIB, MIB, 0):
        await daemon.call("block_resize", node_name="a", device="ignored", size=size)
        assert daemon.graph.get("a").length == size
    assert daemon.graph.parents == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"size": 1}, "Cannot find device='' nor node-name=''"),
        ({"device": "top", "size": 1}, "Cannot find device='top' nor node-name=''"),
        ({"node_name": "nope", "size": -1}, "Cannot find device='' nor node-name='nope'"),
        ({"node_name": "top", "size": -1}, "Parameter 'size' expects a >0 size"),
        ({"node_name": "base", "size": MIB}, "Node 'base' is busy: node is used as backing hd of 'top'"),
        ({"node_name": "top", "size": 1000}, "The new size must be a multiple of 512"),
        (
            {"node_name": "top", "size": (1 << 63) - 1},
            "offset(9223372036854775807) exceeds maximum(9223372035781033984)",
        ),
        ({"node_name": "ro", "size": MIB}, "Image is read-only"),
        ({"node_name": "top", "size": "8M"}, "Invalid parameter type for 'size', expected: integer"),
    ],
)
async def test_sizes_that_are_refused(daemon: Daemon, arguments: dict[str, Any], text: str) -> None:
    """In the peer's order, and nothing stays attached."""
    await daemon.chain("base", "top")
    Path("raw").write_bytes(bytes(MIB))
    file = {"driver": "file", "filename": "raw"}
    await daemon.call("blockdev-add", driver="raw", node_name="ro", file=file, read_only=True)
    assert await daemon.refused("block_resize", **arguments) == text
    assert daemon.graph.parents == []


async def test_resizing_what_others_rely_on(daemon: Daemon) -> None:
    """A format below, an export above."""
    await daemon.chain("a")
    text = await daemon.refused("block_resize", node_name="a-file", size=MIB)
    assert text.startswith("Permission conflict on node 'a-file': permissions 'resize' are both required by an unnamed")
    export(daemon, "a", shared=Perm.ALL & ~Perm.RESIZE)
    text = await daemon.refused("block_resize", node_name="a", size=MIB)
    assert text.startswith("Permission conflict on node 'a': permissions 'resize' are both required by")


# -- change-backing-file -----------------------------------------------------------------------------------------------


def header(name: str) -> tuple[str | None, str | None]:
    output = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", name], check=True, capture_output=True, text=True
    ).stdout
    info = json.loads(output)
    return info.get("backing-filename"), info.get("backing-filename-format")


@pytest.mark.parametrize("image", ["mid", "top"])
async def test_rewriting_the_backing_name(daemon: Daemon, image: str) -> None:
    """Verbatim, with the format of the real backing node; also of a read-only image."""
    await daemon.chain("base", "mid", "top")
    await daemon.call("change-backing-file", device="top", image_node_name=image, backing_file="./x/../y")
    assert header(f"{image}.qcow2") == ("./x/../y", "qcow2")
    await daemon.call("change-backing-file", device="top", image_node_name=image, backing_file="")
    assert header(f"{image}.qcow2") == (None, None)
    assert daemon.graph.get("mid").read_only
    assert daemon.graph.get("mid").backing is daemon.graph.get("base")


@pytest.mark.parametrize(
    ("device", "image", "text"),
    [
        ("nope", "mid", "Cannot find device='nope' nor node-name='nope'"),
        ("mid", "mid", "Need a root block node"),
        ("top", "nope", "Cannot find device='' nor node-name='nope'"),
        ("top", "base", "not allowing backing file change on an image without a backing file"),
        ("other", "mid", "'other' and image file are not in the same chain"),
    ],
)
async def test_names_that_are_refused(daemon: Daemon, device: str, image: str, text: str) -> None:
    """The peer's order."""
    await daemon.chain("base", "mid", "top")
    await daemon.call("blockdev-add", driver="null-co", node_name="other")
    arguments = {"device": device, "image_node_name": image, "backing_file": "x"}
    assert await daemon.refused("change-backing-file", **arguments) == text


async def test_a_name_that_does_not_fit(daemon: Daemon) -> None:
    """Found before anything is written."""
    await daemon.chain("base", "top")
    name = "y" * 1024
    text = await daemon.refused("change-backing-file", device="top", image_node_name="top", backing_file=name)
    assert text == f"Could not change backing file to '{name}': Invalid argument"
    assert header("top.qcow2") == ("base.qcow2", "qcow2")
