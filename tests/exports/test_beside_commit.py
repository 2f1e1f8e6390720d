"""Exports and commits side by side: which exports are refused while a job runs, and where those that are there lead."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import Client, CommandError, under_test
from tests.exports.serving import run
from tests.tools import need

_URI = "nbd+unix:///{}?socket=nbd.sock"
_UNSHARED = (
    "Permission conflict on node '{0}': permissions '{1}' are both required by an unnamed block device (uses node '{0}'"
    " as 'root' child) and unshared by {2}."
)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """base, mid and top with 4 MiB of data in each of the lower two, and an NBD server."""
    need("qemu-img", "qemu-io")
    run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "4M", cwd=tmp_path)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x11 0 4M", "base.qcow2", cwd=tmp_path)
    for name, below in (("mid", "base"), ("top", "mid")):
        run(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            f"{below}.qcow2",
            "-F",
            "qcow2",
            f"{name}.qcow2",
            cwd=tmp_path,
        )
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0x22 0 2M", "mid.qcow2", cwd=tmp_path)
    with under_test().start(tmp_path) as daemon, daemon.client() as made:
        below: str | None = None
        for name in ("base", "mid", "top"):
            file = {"driver": "file", "node-name": f"{name}-file", "filename": f"{name}.qcow2"}
            node = {"driver": "qcow2", "node-name": name, "file": file, "backing": below, "read-only": name != "top"}
            made.execute_with("blockdev-add", node)
            below = name
        made.execute("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        yield made


def export(client: Client, node: str, *, writable: bool = False, name: str | None = None) -> str:
    """The id of a new export; or why it is refused."""
    key = name or f"e-{node}-{'rw' if writable else 'ro'}"
    try:
        client.execute("block-export-add", id=key, type="nbd", node_name=node, name=key, writable=writable)
    except CommandError as error:
        return str(error.desc)
    return key


def leads_to(client: Client) -> dict[str, str]:
    """Exports and their nodes."""
    return {known["id"]: known["node-name"] for known in client.execute("query-block-exports")}


@contextlib.contextmanager
def committing(client: Client, **more: Any) -> Iterator[None]:
    """mid into base, asleep in its rate limit at first; run to its end on leaving."""
    arguments = {"device": "top", "top_node": "mid", "base_node": "base", "filter_node_name": "cflt"} | more
    client.execute("block-commit", job_id="j0", speed=1, **arguments)
    yield
    client.execute("block-job-set-speed", device="j0", speed=0)
    if arguments["top_node"] == "top":
        client.wait_status("j0", "ready")
        client.execute("job-complete", id="j0")
    client.wait_status("j0", "null")


_JOB = "commit job 'j0' (uses node 'mid' as 'intermediate node' child)"

#: While mid goes into base: node, writable?, the refusal; None: allowed.
_ROWS = [
    ("base", True, _UNSHARED.format("base", "write", "an unnamed block device (uses node 'base' as 'root' child)")),
    ("base", False, None),
    ("mid", True, "Cannot export read-only node as writable"),
    (
        "mid",
        False,
        _UNSHARED.format("mid", "consistent read", "commit job 'j0' (uses node 'mid' as 'intermediate node' child)"),
    ),
    ("top", True, None),
    ("top", False, None),
    ("cflt", False, None),
    ("cflt", True, "Cannot export read-only node as writable"),
]


def test_exports_while_an_intermediate_commit_runs(client: Client, tmp_path: Path) -> None:
    """Row by row; a refusal leaves graph and exports as they were, and what is allowed reads and writes right."""
    with committing(client):
        answers = []
        for node, writable, refusal in _ROWS:
            before = client.execute("x-debug-query-block-graph"), leads_to(client)
            answer = export(client, node, writable=writable)
            answers.append(None if answer in leads_to(client) else answer)
            if refusal is not None:
                assert (client.execute("x-debug-query-block-graph"), leads_to(client)) == before
        assert answers == [refusal for _, _, refusal in _ROWS]
        run("qemu-io", "-f", "raw", "-c", "write -P 0x33 1M 64k", _URI.format("e-top-rw"), cwd=tmp_path)
        for name in ("e-top-ro", "e-cflt-ro"):
            run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0x22 0 1M", _URI.format(name), cwd=tmp_path)
    assert leads_to(client)["e-cflt-ro"] == "base"
    reads = ("-c", "read -P 0x33 1M 64k", "-c", "read -P 0x22 1088k 960k")
    run("qemu-io", "-r", "-f", "raw", *reads, _URI.format("e-top-rw"), cwd=tmp_path)


def test_a_node_with_exports_is_not_deactivated(client: Client) -> None:
    export(client, "top", writable=True)
    with committing(client), pytest.raises(CommandError, match="Failed to inactivate node: Operation not permitted"):
        client.execute("blockdev-set-active", node_name="top", active=False)


def test_an_export_of_mid_goes_to_the_filter_and_then_to_base(client: Client, tmp_path: Path) -> None:
    """Its client reads the same before, meanwhile and afterwards; after a cancelled commit it is on mid again."""
    export(client, "mid", name="e")
    reads = ("qemu-io", "-r", "-f", "raw", "-c", "read -P 0x22 0 2M", "-c", "read -P 0x11 2M 2M", _URI.format("e"))
    client.execute("block-commit", job_id="j0", device="top", top_node="mid", base_node="base", speed=1)
    assert leads_to(client)["e"].startswith("#block")
    run(*reads, cwd=tmp_path)
    client.execute("job-cancel", id="j0")
    client.wait_status("j0", "null")
    assert leads_to(client) == {"e": "mid"}
    run(*reads, cwd=tmp_path)
    with committing(client):
        assert leads_to(client) == {"e": "cflt"}
        run(*reads, cwd=tmp_path)
    assert leads_to(client) == {"e": "base"}
    run(*reads, cwd=tmp_path)


def test_a_writable_export_of_base_keeps_a_commit_from_starting(client: Client) -> None:
    """Whoever writes to base would be written over; a reader of it is no obstacle."""
    client.execute_with("blockdev-reopen", {"options": [_reopened("base")]})
    export(client, "base", writable=True, name="e")
    text = _UNSHARED.format("base", "write", "an unnamed block device (uses node 'base' as 'root' child)")
    with pytest.raises(CommandError) as error:
        client.execute("block-commit", job_id="j0", device="top", top_node="mid", base_node="base")
    assert error.value.desc == text
    client.execute("block-export-del", id="e")
    export(client, "base", name="reader")
    with committing(client):
        pass


def test_base_cannot_be_exported_for_writing_while_an_active_commit_fills_it(client: Client, tmp_path: Path) -> None:
    """What a client wrote there would be lost or spoil the copy; readers are welcome. The pivot is as it should be."""
    export(client, "top", writable=True, name="guest")
    with committing(client, top_node="top"):
        before = client.execute("x-debug-query-block-graph"), leads_to(client)
        refusal = export(client, "base", writable=True)
        assert refusal.startswith("Permission conflict on node 'base': permissions 'write' are both required by")
        assert (client.execute("x-debug-query-block-graph"), leads_to(client)) == before
        assert export(client, "base") in leads_to(client)
        run("qemu-io", "-f", "raw", "-c", "write -P 0x44 3M 64k", _URI.format("guest"), cwd=tmp_path)
    assert leads_to(client)["guest"] == "base"
    reads = ("read -P 0x22 0 2M", "read -P 0x11 2M 1M", "read -P 0x44 3M 64k")
    run("qemu-io", "-f", "raw", *(word for read in reads for word in ("-c", read)), _URI.format("guest"), cwd=tmp_path)


def _reopened(name: str) -> dict[str, Any]:
    return {"driver": "qcow2", "node-name": name, "file": f"{name}-file", "backing": None, "read-only": False}


def test_a_client_that_connects_while_an_active_commit_is_pending_loses_nothing(client: Client, tmp_path: Path) -> None:
    """What it was told is written is there after the pivot, for itself, for old clients and in the file."""
    export(client, "top", writable=True, name="guest")
    arguments = {"device": "top", "base_node": "base", "auto_finalize": False}
    client.execute("block-commit", job_id="j0", **arguments)
    client.wait_status("j0", "ready")
    client.execute("job-complete", id="j0")
    client.wait_status("j0", "pending")
    run("qemu-io", "-f", "raw", "-c", "write -P 0x55 1M 64k", _URI.format("guest"), cwd=tmp_path)
    client.execute("job-finalize", id="j0")
    client.wait_status("j0", "null")
    assert leads_to(client) == {"guest": "base"}
    run("qemu-io", "-f", "raw", "-c", "read -P 0x55 1M 64k", _URI.format("guest"), cwd=tmp_path)
    client.execute("block-export-del", id="guest", mode="hard")
    for name in ("top", "mid", "base"):
        client.execute("blockdev-del", node_name=name)
    reads = ("-c", "read -P 0x22 0 1M", "-c", "read -P 0x55 1M 64k", "-c", "read -P 0x22 1088k 960k")
    run("qemu-io", "-r", "-f", "qcow2", *reads, "base.qcow2", cwd=tmp_path)
    run("qemu-img", "check", "-q", "base.qcow2", cwd=tmp_path)
