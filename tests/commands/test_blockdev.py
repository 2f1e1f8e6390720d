"""blockdev-add, blockdev-del and the node queries, called as the dispatcher calls them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import qmpd.commands
from qmpd.block.api import Perm, Role
from qmpd.control.bus import Bus
from qmpd.control.registry import COMMANDS, Context
from qmpd.errors import QmpdError
from qmpd.graph.edit import Graph
from qmpd.graph.node import Backend, JobParent
from tests.tools import need

assert qmpd.commands  # registers the commands


class Daemon:
    """A context without the parts that these commands do not use."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.ctx = Context(graph=self.graph, jobs=None, bus=Bus(), objects=None, shutdown=None)  # type: ignore[arg-type]

    async def call(self, name: str, **arguments: Any) -> Any:
        """One command, with dashes for underscores."""
        sent = {key.replace("_", "-"): value for key, value in arguments.items()}
        return await COMMANDS[name].call(self.ctx, sent)

    async def refused(self, name: str, **arguments: Any) -> str:
        """The error's text; the set of nodes is as before."""
        before = list(self.graph.table.items())
        with pytest.raises(QmpdError) as caught:
            await self.call(name, **arguments)
        assert list(self.graph.table.items()) == before
        return caught.value.desc

    async def chain(self, *names: str) -> None:
        """The images NAME.qcow2 as nodes, the first one at the bottom; all but the last read-only."""
        below = None
        for name in names:
            stored = ["-b", f"{below}.qcow2", "-F", "qcow2"] if below else []
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *stored, f"{name}.qcow2", "4M"], check=True)
            file = {"driver": "file", "filename": f"{name}.qcow2", "node-name": f"{name}-file"}
            await self.call(
                "blockdev-add", driver="qcow2", node_name=name, file=file, backing=below, read_only=name != names[-1]
            )
            below = name


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    need("qemu-img")
    monkeypatch.chdir(tmp_path)
    return Daemon()


# -- blockdev-add ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"driver": "null-co"}, "'node-name' must be specified for the root node"),
        ({"driver": "qcow2", "file": {"driver": "file", "filename": "nope"}}, "'node-name' must be specified"),
        ({"node_name": "n"}, "Parameter 'driver' is missing"),
        ({"driver": "nope"}, "Parameter 'driver' does not accept value 'nope'"),
        ({"driver": "file", "node_name": "n"}, "Parameter 'filename' is missing"),
        ({"driver": "file", "filename": 1}, "Invalid parameter type for 'filename', expected: string"),
        ({"driver": "file", "filename": "x", "aio": "foo"}, "Parameter 'aio' does not accept value 'foo'"),
        ({"driver": "null-co", "filename": "x"}, "Parameter 'filename' is unexpected"),
        ({"driver": "raw", "file": None}, "Invalid parameter type for 'file', expected: BlockdevRef"),
        ({"driver": "raw", "file": {"driver": "file"}}, "Parameter 'file.filename' is missing"),
        ({"driver": "raw", "file": "x", "backing": "y"}, "Parameter 'backing' is unexpected"),
        (
            {"driver": "qcow2", "file": "x", "backing": 1},
            "Invalid parameter type for 'backing', expected: BlockdevRefOrNull",
        ),
        ({"driver": "null-co", "cache": {"foo": True}}, "Parameter 'cache.foo' is unexpected"),
        ({"driver": "null-co", "node_name": "n", "size": -5}, "Value '-5' is out of range for parameter 'size'"),
        ({"driver": "file", "node_name": "n", "filename": "json:{}"}, "Could not open 'json:{}': No such file"),
        ({"driver": "file", "node_name": "n", "filename": ""}, "The 'file' block driver requires a file name"),
    ],
)
async def test_arguments_that_are_refused(daemon: Daemon, arguments: dict[str, Any], text: str) -> None:
    """Texts of spec/block-graph.md section 4."""
    assert (await daemon.refused("blockdev-add", **arguments)).startswith(text)


async def test_every_member_of_qcow2_is_taken(daemon: Daemon) -> None:
    """Also those that have nothing to tune here."""
    Path("f").touch()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M"], check=True)
    await daemon.call(
        "blockdev-add",
        driver="qcow2",
        node_name="q",
        file={"driver": "file", "filename": "a.qcow2", "locking": "auto", "aio": "threads", "drop-cache": True},
        backing=None,
        lazy_refcounts=False,
        pass_discard_request=True,
        pass_discard_snapshot=True,
        pass_discard_other=False,
        discard_no_unref=False,
        overlap_check={"template": "cached", "main-header": True},
        cache_size=1 << 20,
        cache_clean_interval=600,
        discard="unmap",
        detect_zeroes="unmap",
        cache={"no-flush": False},
    )
    (info,) = [node for node in await daemon.call("query-named-block-nodes") if node["node-name"] == "q"]
    assert info["detect_zeroes"] == "unmap"


# -- blockdev-del ------------------------------------------------------------------------------------------------------


async def test_deleting(daemon: Daemon) -> None:
    """An image goes with its inline file, and is free again."""
    await daemon.chain("a")
    assert await daemon.call("blockdev-del", node_name="a") == {}
    assert daemon.graph.nodes == []
    assert await daemon.refused("blockdev-del", node_name="a") == "Failed to find node with node-name='a'"


async def test_the_order_of_checks(daemon: Daemon) -> None:
    """Backends, blockers, ownership, parents."""
    await daemon.chain("base", "top")
    text = "Node 'base' is busy: node is used as backing hd of 'top'"
    assert await daemon.refused("blockdev-del", node_name="base") == text
    text = "Node base-file is not owned by the monitor"
    assert await daemon.refused("blockdev-del", node_name="base-file") == text
    with daemon.graph.edit() as edit:
        edit.attach(Backend(), "root", daemon.graph.get("base"), Role.NONE)
    assert await daemon.refused("blockdev-del", node_name="base") == "Node base is in use"
    await daemon.call("blockdev-add", driver="null-co", node_name="n", size=512)
    await daemon.call("blockdev-add", driver="raw", node_name="r", file="n")
    assert await daemon.refused("blockdev-del", node_name="n") == "Block device n is in use"


# -- queries -----------------------------------------------------------------------------------------------------------


async def test_a_node_as_the_peer_describes_it(daemon: Daemon) -> None:
    """The example of spec/block-graph.md section 7."""
    await daemon.chain("base", "mid")
    mid, *_ = await daemon.call("query-named-block-nodes")
    actual_size = mid["image"].pop("actual-size")
    assert actual_size == Path("mid.qcow2").stat().st_blocks * 512
    specific = {
        "type": "qcow2",
        "data": {
            "compat": "1.1",
            "compression-type": "zlib",
            "lazy-refcounts": False,
            "refcount-bits": 16,
            "corrupt": False,
            "extended-l2": False,
        },
    }
    backing = mid["image"].pop("backing-image")
    assert mid == {
        "node-name": "mid",
        "drv": "qcow2",
        "file": "mid.qcow2",
        "backing_file": "base.qcow2",
        "backing_file_depth": 1,
        "ro": False,
        "active": True,
        "encrypted": False,
        "detect_zeroes": "off",
        "write_threshold": 0,
        "cache": {"writeback": True, "direct": False, "no-flush": False},
        **dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0),
        "image": {
            "filename": "mid.qcow2",
            "format": "qcow2",
            "virtual-size": 4 << 20,
            "cluster-size": 65536,
            "dirty-flag": False,
            "backing-filename": "base.qcow2",
            "full-backing-filename": "base.qcow2",
            "backing-filename-format": "qcow2",
            "format-specific": specific,
        },
    }
    assert backing["filename"] == "base.qcow2"
    assert "backing-image" not in backing


async def test_all_nodes_newest_first(daemon: Daemon) -> None:
    """``flat`` leaves the images below out, and so the depth."""
    await daemon.chain("base", "mid", "top")
    deep = await daemon.call("query-named-block-nodes")
    flat = await daemon.call("query-named-block-nodes", flat=True)
    names = ["top", "top-file", "mid", "mid-file", "base", "base-file"]
    assert [node["node-name"] for node in deep] == [node["node-name"] for node in flat] == names
    assert [node["backing_file_depth"] for node in deep] == [2, 0, 1, 0, 0, 0]
    assert [node["backing_file_depth"] for node in flat] == [0] * 6
    assert deep[0]["image"]["backing-image"]["backing-image"]["filename"] == "base.qcow2"
    assert all("backing-image" not in node["image"] for node in flat)
    json.dumps(deep)


async def test_file_raw_and_null(daemon: Daemon) -> None:
    """What each of them has to tell, and what not."""
    Path("raw.img").write_bytes(bytes(1000))
    file = {"driver": "file", "filename": "raw.img"}
    await daemon.call("blockdev-add", driver="raw", node_name="r", file=file)
    await daemon.call("blockdev-add", driver="null-co", node_name="n", size=512)
    null, raw, inner = (node["image"] for node in await daemon.call("query-named-block-nodes"))
    assert null == {
        "filename": 'json:{"driver": "null-co", "size": 512}',
        "format": "null-co",
        "actual-size": 0,
        "virtual-size": 512,
    }
    assert (raw["format"], raw["virtual-size"], raw["dirty-flag"]) == ("raw", 1024, False)
    assert "format-specific" not in raw
    assert inner["format-specific"] == {"type": "file", "data": {}}
    assert "cluster-size" not in inner


async def test_no_guest_devices(daemon: Daemon) -> None:
    """A storage daemon has none, whatever nodes there are."""
    await daemon.call("blockdev-add", driver="null-co", node_name="n")
    assert await daemon.call("query-block") == []


async def test_the_graph(daemon: Daemon) -> None:
    """Nodes newest first, then jobs, then backends; permissions from the highest bit down."""
    await daemon.chain("base", "top")
    with daemon.graph.edit() as edit:
        edit.attach(JobParent("commit", "j0"), "main node", daemon.graph.get("top"), Role.NONE)
        edit.attach(Backend(), "root", daemon.graph.get("top"), Role.NONE, perm=Perm.CONSISTENT_READ | Perm.WRITE)
    graph = await daemon.call("x-debug-query-block-graph")
    assert [(node["id"], node["type"], node["name"]) for node in graph["nodes"]] == [
        (6, "block-driver", "top"),
        (5, "block-driver", "top-file"),
        (4, "block-driver", "base"),
        (3, "block-driver", "base-file"),
        (2, "block-job", "j0"),
        (1, "block-backend", ""),
    ]
    assert [(edge["parent"], edge["name"], edge["child"]) for edge in graph["edges"]] == [
        (6, "file", 5),
        (6, "backing", 4),
        (4, "file", 3),
        (2, "main node", 6),
        (1, "root", 6),
    ]
    assert graph["edges"][0]["perm"] == ["resize", "write", "consistent-read"]
    assert graph["edges"][-1]["shared-perm"] == ["resize", "write-unchanged", "write", "consistent-read"]
