"""blockdev-create under the real job manager: events, errors, images."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

import qmpd.commands
from qmpd.control.bridge import Bridge
from qmpd.control.bus import Bus
from qmpd.control.manager import JobManager
from qmpd.control.registry import COMMANDS, Context
from qmpd.errors import QmpdError
from qmpd.graph.edit import Graph
from tests.tools import need

assert qmpd.commands  # registers the commands

MIB = 1 << 20


class Daemon:
    """Graph, jobs and the commands on them; events are kept."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.events: list[str] = []
        self.concluded = trio.Event()
        lock = trio.Lock()
        self.jobs = JobManager(self._publish, Bridge(4), self.graph, lock)
        self.ctx = Context(self.graph, self.jobs, Bus(), None, None, lock)  # type: ignore[arg-type]

    def _publish(self, name: str, data: dict[str, Any]) -> None:
        self.events.append(data["status"])
        if data["status"] == "concluded":
            self.concluded.set()

    async def call(self, name: str, **arguments: Any) -> Any:
        return await COMMANDS[name].call(self.ctx, {key.replace("_", "-"): value for key, value in arguments.items()})

    async def create(self, **options: Any) -> str | None:
        """Run a create job to its end and dismiss it; its error."""
        self.events.clear()
        self.concluded = trio.Event()
        options = {key.replace("_", "-"): value for key, value in options.items()}
        assert await self.call("blockdev-create", job_id="c0", options=options) == {}
        await self.concluded.wait()
        (job,) = self.jobs.query_jobs()
        assert (job["type"], job["current-progress"], job["total-progress"]) == ("create", 1, 1)
        assert self.jobs.query_block_jobs() == []
        self.jobs.dismiss(self.jobs.find("c0"))
        failed = "error" in job
        middle = ["aborting"] if failed else ["waiting", "pending"]
        assert self.events == ["created", "running", *middle, "concluded", "null"]
        return job.get("error")

    async def create_qcow2(self, name: str = "a.qcow2", **options: Any) -> str | None:
        """With an inline file description; the file is made first."""
        Path(name).touch()
        return await self.create(driver="qcow2", file={"driver": "file", "filename": name}, **options)


@pytest.fixture
async def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Daemon]:
    need("qemu-img")
    monkeypatch.chdir(tmp_path)
    daemon = Daemon()
    async with trio.open_nursery() as nursery:
        await nursery.start(daemon.jobs.serve)
        yield daemon
        await daemon.jobs.shutdown()
        nursery.cancel_scope.cancel()


def info(name: str) -> Any:
    return json.loads(
        subprocess.run(["qemu-img", "info", "--output=json", name], check=True, capture_output=True).stdout
    )


def check(name: str) -> None:
    subprocess.run(["qemu-img", "check", "-q", name], check=True)


# -- data files --------------------------------------------------------------------------------------------------------


async def test_an_image_with_a_data_file(daemon: Daemon) -> None:
    """The header names it as seen from the image; the new node finds it there and says so."""
    Path("d").mkdir()
    Path("d/data.raw").touch()
    data = {"driver": "file", "filename": "d/data.raw"}
    assert await daemon.create_qcow2("d/a.qcow2", size=MIB, **{"data-file": data}) is None
    assert info("d/a.qcow2")["format-specific"]["data"]["data-file"] == "data.raw"
    assert Path("d/data.raw").stat().st_size == MIB

    file = {"driver": "file", "filename": "d/a.qcow2", "node-name": "file"}
    await daemon.call("blockdev-add", driver="qcow2", node_name="a", file=file)

    nodes = {node["node-name"]: node for node in await daemon.call("query-named-block-nodes", flat=True)}
    specific = nodes["a"]["image"]["format-specific"]["data"]
    assert (specific["data-file"], specific["data-file-raw"]) == ("data.raw", False)
    found = await daemon.call("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in found["nodes"]}
    edges = {(names[edge["parent"]], edge["name"]): edge for edge in found["edges"]}
    assert edges["a", "data-file"]["perm"] == []
    assert set(edges["a", "data-file"]["shared-perm"]) == {"consistent-read", "write", "write-unchanged"}
    assert set(edges["a", "file"]["shared-perm"]) == {"consistent-read", "write-unchanged"}


async def test_a_raw_data_file_in_nodes(daemon: Daemon) -> None:
    """By reference; what it holds is the disk. It can be made smaller and larger, and not be exchanged."""
    Path("data.raw").write_bytes(b"x" * MIB)
    await daemon.call("blockdev-add", driver="file", node_name="data", filename="data.raw")
    more = {"data-file": "data", "data-file-raw": True}
    assert await daemon.create_qcow2(size=MIB, **more) is None
    assert Path("data.raw").read_bytes() == b"x" * MIB
    file = {"driver": "file", "filename": "a.qcow2"}
    described = {"driver": "qcow2", "node-name": "a", "file": file, "data-file": "data"}
    await daemon.call("blockdev-add", **described)
    for size in (MIB // 2, 2 * MIB):
        await daemon.call("block_resize", node_name="a", size=size)
    assert Path("data.raw").read_bytes() == b"x" * (MIB // 2) + bytes(MIB + MIB // 2)

    await daemon.call("blockdev-reopen", options=[described])
    await daemon.call("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "a", "file": file}])
    await daemon.call("blockdev-add", driver="null-co", node_name="other")
    for other in ("other", ""):
        with pytest.raises(QmpdError, match=r"^Cannot change the option 'data-file'$"):
            await daemon.call("blockdev-reopen", options=[described | {"data-file": other}])
    await daemon.call("blockdev-del", node_name="a")
    check("a.qcow2")


async def test_data_files_that_cannot_be_had(daemon: Daemon) -> None:
    """Unknown, or too small to hold the disk."""
    said = await daemon.create_qcow2(size=MIB, **{"data-file": "nope"})
    assert said == "Cannot find device='nope' nor node-name='nope'"
    small = {"driver": "null-co", "size": 512}
    said = await daemon.create_qcow2(size=MIB, **{"data-file": small})
    assert said == "Could not resize image: Cannot grow device files"
    assert daemon.graph.nodes == []
    Path("a.qcow2").write_bytes(b"something")
    itself = {"driver": "file", "filename": "a.qcow2"}
    assert await daemon.create_qcow2(size=MIB, **{"data-file": itself}) == 'Failed to get "write" lock'
    await daemon.call("blockdev-add", driver="file", node_name="f", filename="a.qcow2")
    said = await daemon.create(driver="qcow2", file="f", size=MIB, **{"data-file": "f"})
    assert said is not None
    assert said.startswith("Permission conflict on node 'f'")
    assert Path("a.qcow2").read_bytes() == b"something"


# -- file --------------------------------------------------------------------------------------------------------------


async def test_a_file_of_zeros(daemon: Daemon) -> None:
    """The size is rounded up to 512; an existing file is emptied."""
    Path("a.raw").write_bytes(b"x" * 5000)
    assert await daemon.create(driver="file", filename="a.raw", size=1000) is None
    assert Path("a.raw").read_bytes() == bytes(1024)
    assert await daemon.create(driver="file", filename="b.raw", size=MIB, preallocation="falloc", nocow=True) is None
    assert Path("b.raw").stat().st_blocks * 512 >= MIB


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"filename": "nodir/a.raw", "size": 1}, "Could not create 'nodir/a.raw': No such file or directory"),
        ({"filename": "", "size": 1}, "Could not create '': No such file or directory"),
        ({"filename": "a", "size": -1}, "Could not resize file: Invalid argument"),
        ({"filename": "a", "size": 512, "preallocation": "metadata"}, "Unsupported preallocation mode: metadata"),
    ],
)
async def test_files_that_cannot_be_made(daemon: Daemon, options: dict[str, Any], text: str) -> None:
    """The command succeeds; the text is the job's."""
    assert await daemon.create(driver="file", **options) == text


async def test_a_file_that_is_in_use(daemon: Daemon) -> None:
    """Its content stays."""
    await daemon.create_qcow2(size=MIB)
    await daemon.call("blockdev-add", driver="qcow2", node_name="a", file={"driver": "file", "filename": "a.qcow2"})
    assert await daemon.create(driver="file", filename="a.qcow2", size=0) == 'Failed to get "write" lock'
    await daemon.call("blockdev-del", node_name="a")
    check("a.qcow2")


# -- qcow2 -------------------------------------------------------------------------------------------------------------


async def test_an_image_with_defaults(daemon: Daemon) -> None:
    """Version 3, 64 KiB clusters, and nothing of the job left in the graph."""
    assert await daemon.create_qcow2(size=MIB) is None
    found = info("a.qcow2")
    assert (found["virtual-size"], found["cluster-size"]) == (MIB, 65536)
    assert found["format-specific"]["data"]["compat"] == "1.1"
    check("a.qcow2")
    assert daemon.graph.nodes == []


async def test_options_reach_the_image(daemon: Daemon) -> None:
    """Backing strings are stored unchecked."""
    error = await daemon.create_qcow2(
        size=MIB,
        version="v3",
        cluster_size=4096,
        refcount_bits=8,
        lazy_refcounts=True,
        compression_type="zstd",
        backing_file="nope.qcow2",
        backing_fmt="qcow2",
    )
    assert error is None
    found = info("a.qcow2")
    data = found["format-specific"]["data"]
    assert (found["cluster-size"], found["backing-filename"], found["backing-filename-format"]) == (
        4096,
        "nope.qcow2",
        "qcow2",
    )
    assert (data["refcount-bits"], data["lazy-refcounts"], data["compression-type"]) == (8, True, "zstd")


async def test_into_a_node(daemon: Daemon) -> None:
    """The usual order: create file, add file node, create qcow2, add qcow2 node."""
    await daemon.create(driver="file", filename="a.qcow2", size=0)
    await daemon.call("blockdev-add", driver="file", node_name="f", filename="a.qcow2")
    assert await daemon.create(driver="qcow2", file="f", size=MIB) is None
    await daemon.call("blockdev-add", driver="qcow2", node_name="q", file="f")
    node = daemon.graph.get("q")
    assert node.length == MIB
    assert await daemon.create(driver="qcow2", file="f", size=MIB) == (
        "Permission conflict on node 'f': permissions 'write, resize' are both required by an unnamed block device"
        " (uses node 'f' as 'root' child) and unshared by node 'q' (uses node 'f' as 'file' child)."
    )
    await daemon.call("blockdev-del", node_name="q")
    await daemon.call("blockdev-del", node_name="f")
    check("a.qcow2")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 1000}, "Image size must be a multiple of 512 bytes"),
        ({"size": MIB, "cluster_size": 100}, "Cluster size must be a power of two between 512 and 2048k"),
        ({"size": MIB, "refcount_bits": 65}, "Refcount width must be a power of two and may not exceed 64 bits"),
        (
            {"size": (1 << 63) - 512},
            "Could not resize image: offset(9223372036854775296) exceeds maximum(9223372035781033984)",
        ),
        ({"size": MIB, "data_file_raw": True}, "data-file-raw requires data-file"),
    ],
)
async def test_images_that_cannot_be_made(daemon: Daemon, options: dict[str, Any], text: str) -> None:
    """Nothing is written to the file, and it is free again."""
    Path("a.qcow2").write_bytes(b"precious")
    assert await daemon.create_qcow2(**options) == text
    assert Path("a.qcow2").read_bytes() == b"precious"
    assert daemon.graph.nodes == []


async def test_where_there_is_no_file(daemon: Daemon) -> None:
    """By name or by path."""
    assert await daemon.create(driver="qcow2", file="f", size=MIB) == "Cannot find device='f' nor node-name='f'"
    error = await daemon.create(driver="qcow2", file={"driver": "file", "filename": "nope"}, size=1)
    assert error == "Could not open 'nope': No such file or directory"


async def test_a_read_only_node(daemon: Daemon) -> None:
    """It cannot give write."""
    Path("a").touch()
    await daemon.call("blockdev-add", driver="file", node_name="f", filename="a", read_only=True)
    assert await daemon.create(driver="qcow2", file="f", size=MIB) == "Block node is read-only"


# -- what the command itself refuses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"job_id": "c0", "options": {"driver": "raw"}}, "Driver does not support blockdev-create"),
        ({"job_id": "1x", "options": {"driver": "null-co"}}, "Driver does not support blockdev-create"),
        ({"job_id": "c0", "options": {"driver": "raw", "file": "x"}}, "Parameter 'options.file' is unexpected"),
        ({"job_id": "c0", "options": {"driver": "file", "filename": "a"}}, "Parameter 'options.size' is missing"),
        ({"job_id": "c0", "options": {"driver": "file", "size": 1}}, "Parameter 'options.filename' is missing"),
        ({"job_id": "c0", "options": {}}, "Parameter 'options.driver' is missing"),
        ({"job_id": "c0", "options": {"driver": "bogus"}}, "Parameter 'driver' does not accept value 'bogus'"),
        (
            {"job_id": "c0", "options": {"driver": "file", "filename": "a", "size": "1M"}},
            "Parameter 'options.size' expects uint64",
        ),
        ({"options": {"driver": "raw"}}, "Parameter 'job-id' is missing"),
        ({"job_id": "c0"}, "Parameter 'options' is missing"),
        ({"job_id": "1x", "options": {"driver": "file", "filename": "a", "size": 1}}, "Invalid job ID '1x'"),
    ],
)
async def test_refusals(daemon: Daemon, arguments: dict[str, Any], text: str) -> None:
    """No job, no events."""
    with pytest.raises(QmpdError) as caught:
        await daemon.call("blockdev-create", **arguments)
    assert caught.value.desc == text
    assert daemon.events == []


async def test_a_concluded_job_keeps_its_id(daemon: Daemon) -> None:
    """It never dismisses itself."""
    options = {"driver": "file", "filename": "a", "size": 512}
    await daemon.call("blockdev-create", job_id="c0", options=options)
    await daemon.concluded.wait()
    with pytest.raises(QmpdError, match="Job ID 'c0' already in use"):
        await daemon.call("blockdev-create", job_id="c0", options=options)
