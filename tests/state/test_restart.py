"""Daemons that end and come back: what each way to end leaves for the next start."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.crash.server import Child, Server
from tests.daemons import Client
from tests.tools import need

SIZE = 16 << 20
STATE = ("--state-dir", "state", "--checkpoint-seconds", "0")


@pytest.fixture(scope="module")
def server() -> Any:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """base <- mid <- top of 16 MiB; mid holds all of them."""
    need("qemu-img", "qemu-io")
    for name, backing in (("base", []), ("mid", ["-b", "base.qcow2"]), ("top", ["-b", "mid.qcow2"])):
        options = [*backing, *(["-F", "qcow2"] if backing else [])]
        run(tmp_path, "qemu-img", "create", "-qf", "qcow2", *options, f"{name}.qcow2", str(SIZE))
    run(tmp_path, "qemu-io", "-c", f"write -P 7 0 {SIZE}", "mid.qcow2")
    return tmp_path


def run(directory: Path, *command: str) -> None:
    subprocess.run(command, cwd=directory, check=True, capture_output=True)


def add_chain(client: Client) -> None:
    for name, backing in (("base", None), ("mid", "base"), ("top", "mid")):
        arguments: dict[str, Any] = {"driver": "qcow2", "node-name": name, "read-only": name != "top"}
        arguments["file"] = {"driver": "file", "filename": f"{name}.qcow2"}
        client.execute_with("blockdev-add", arguments | ({"backing": backing} if backing else {}))


def commit(client: Client, **more: Any) -> None:
    arguments = {"job-id": "j0", "device": "top", "top-node": "mid", "base-node": "base", **more}
    client.execute_with("block-commit", arguments)


def kill(child: Child) -> None:
    child.kill()
    child.wait()


def edges(client: Client) -> set[tuple[str, str, str]]:
    """Which node is whose child, as (parent, slot, child)."""
    graph = client.execute("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    return {
        (names[edge["parent"]], edge["name"], names[edge["child"]])
        for edge in graph["edges"]
        if names[edge["parent"]] in ("base", "mid", "top", "snap")
    }


def ended(client: Client) -> None:
    client.wait_status("j0", "null")


def test_the_graph_is_there_again(server: Server, chain: Path) -> None:
    """Names, links, flags, generated names included; without the state there is nothing."""
    child = server.start(chain, words=STATE)
    with child.client() as client:
        client.execute_with("object-add", {"qom-type": "throttle-group", "id": "g", "limits": {"bps-total": 1 << 20}})
        client.execute_with("blockdev-add", {"driver": "null-co", "node-name": "n", "read-zeroes": True})
        client.execute_with(
            "blockdev-add", {"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "n"}
        )
        add_chain(client)
        before = client.execute("query-named-block-nodes"), edges(client)
        kill(child)
    child = server.start(chain, words=STATE)
    with child.client() as client:
        after = client.execute("query-named-block-nodes"), edges(client)
        client.execute("blockdev-del", node_name="top")
        kill(child)
    assert sorted(map(repr, after[0])) == sorted(map(repr, before[0]))
    assert after[1] == before[1]

    child = server.start(chain, words=STATE)
    with child.client() as client:
        assert "top" not in {node["node-name"] for node in client.execute("query-named-block-nodes")}
        client.execute("quit")
    child.wait()


@pytest.mark.parametrize("policy", ["resume", "wait"])
def test_a_signal_interrupts_a_job(server: Server, chain: Path, policy: str) -> None:
    """It is not cancelled; it goes on, or waits to be told to, and ends well."""
    child = server.start(chain, words=STATE)
    with child.client() as client:
        add_chain(client)
        commit(client, speed=1 << 20)
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait() == 0
    child = server.start(chain, words=[*STATE, "--jobs-at-start", policy])
    with child.client() as client:
        (row,) = client.execute("query-block-jobs")
        assert (row["device"], row["speed"]) == ("j0", 1 << 20)
        if policy == "wait":
            assert row["paused"]
            client.execute("job-resume", id="j0")
        client.execute("block-job-set-speed", device="j0", speed=0)
        ended(client)
        (result,) = client.execute("x-qmpd-job-results")
        assert (result["id"], result["outcome"]) == ("j0", "completed")
        assert ("top", "backing", "base") in edges(client)
        client.execute("quit")
    child.wait()


def test_a_cancelled_commit_marks_its_base(server: Server, chain: Path) -> None:
    """Until the same images have been committed to the end; the mark survives."""
    child = server.start(chain, words=STATE)
    with child.client() as client:
        add_chain(client)
        commit(client, speed=1 << 20)
        client.wait_status("j0", "running")
        while client.execute("query-block-jobs")[0]["offset"] == 0:
            pass
        client.execute("job-cancel", id="j0")
        ended(client)
        kill(child)
    child = server.start(chain, words=STATE)
    with child.client() as client:
        (mark,) = client.execute("x-qmpd-query-state")["partial-bases"]
        assert mark["base"] == str(chain / "base.qcow2")
        assert (mark["images"], mark["running"]) == ([str(chain / "mid.qcow2")], False)
        commit(client)
        ended(client)
        assert client.execute("x-qmpd-query-state")["partial-bases"] == []
        client.execute("quit")
    child.wait()


def test_a_snapshot_is_remembered(server: Server, chain: Path) -> None:
    """Whoever comes back must not write to an image that others have been written past."""
    child = server.start(chain, words=STATE)
    with child.client() as client:
        add_chain(client)
        names = {"node-name": "top", "snapshot-file": "snap.qcow2", "snapshot-node-name": "snap"}
        client.execute_with("blockdev-snapshot-sync", names)
        before = edges(client)
        kill(child)
    child = server.start(chain, words=STATE)
    with child.client() as client:
        after = edges(client)
        client.execute("quit")
    child.wait()
    assert ("snap", "backing", "top") in before
    assert after == before


def test_an_active_commit_begins_again(server: Server, chain: Path) -> None:
    """And ends as it would have, in either incarnation."""
    child = server.start(chain, words=STATE)
    with child.client() as client:
        add_chain(client)
        client.execute_with("block-commit", {"job-id": "j0", "device": "top", "base-node": "base", "speed": 1 << 20})
        kill(child)
    child = server.start(chain, words=STATE)
    with child.client() as client:
        client.execute("block-job-set-speed", device="j0", speed=0)
        while not client.execute("query-block-jobs")[0]["ready"]:
            pass
        client.execute("job-complete", id="j0")
        ended(client)
        kill(child)
    run(chain, "qemu-io", "-r", "-c", f"read -P 7 0 {SIZE}", "base.qcow2")
    child = server.start(chain, words=STATE)
    with child.client() as client:
        assert [row["outcome"] for row in client.execute("x-qmpd-job-results")] == ["completed"]
        assert client.execute("query-jobs") == []
        client.execute("quit")
    child.wait()


def test_what_is_gone_is_told_and_tried_again(server: Server, chain: Path) -> None:
    """An image that was away for one start is there at the next."""
    child = server.start(chain, words=STATE)
    with child.client() as client:
        add_chain(client)
        kill(child)
    (chain / "mid.qcow2").rename(chain / "away")
    child = server.start(chain, words=STATE)
    with child.client() as client:
        assert {node["node-name"] for node in client.execute("query-named-block-nodes")} >= {"base"}
        failed = client.execute("x-qmpd-events", names=["X_QMPD_RESTORE_FAILED"])["events"]
        assert {"mid", "top"} <= {row["data"]["name"] for row in failed}
        client.execute_with("blockdev-add", {"driver": "null-co", "node-name": "n", "read-zeroes": True})
        kill(child)
    (chain / "away").rename(chain / "mid.qcow2")
    child = server.start(chain, words=STATE)
    with child.client() as client:
        assert {"base", "mid", "top", "n"} <= {node["node-name"] for node in client.execute("query-named-block-nodes")}
        client.execute("quit")
    child.wait()


def test_what_commits_have_left_behind_is_remembered(server: Server, chain: Path) -> None:
    """After a restart it does not stand in the way of the next commit; once somebody has written to it, it does."""
    child = server.start(chain, words=STATE)
    with child.client() as client:
        add_chain(client)
        commit(client)
        ended(client)
        client.execute("blockdev-del", node_name="mid")
        kill(child)
    child = server.start(chain, words=STATE)
    with child.client() as client:
        plan = {"device": "top", "base-node": "base"}
        assert client.execute_with("x-qmpd-plan-commit", plan)["obstacles"] == []
        run(chain, "qemu-io", "-c", "write -P 8 0 64k", "mid.qcow2")
        (obstacle,) = client.execute_with("x-qmpd-plan-commit", plan)["obstacles"]
        assert "mid.qcow2" in obstacle
        kill(child)


def test_what_waits_waits_again(server: Server, chain: Path) -> None:
    """After a kill, behind the job that goes on; an equal command is still known as the same one."""
    child = server.start(chain, words=STATE)
    with child.client() as client:
        add_chain(client)
        commit(client, speed=1)
        stream = {"job-id": "j1", "device": "top", "x-qmpd-queue": True, "x-qmpd-idempotent": True}
        client.execute_with("block-stream", stream)
        kill(child)
    child = server.start(chain, words=STATE)
    with child.client() as client:
        commit(client, speed=1, **{"x-qmpd-idempotent": True})
        client.execute_with("block-stream", stream)
        (row,) = client.execute("x-qmpd-query-queue")["waiting"]
        assert (row["id"], row["waiting-on"]) == ("j1", {"kind": "job", "id": "j0"})
        client.execute("block-job-set-speed", device="j0", speed=0)
        client.wait_status("j1", "null")
        client.execute("quit")
    child.wait()
    child = server.start(chain, words=STATE)
    with child.client() as client:
        assert client.execute("x-qmpd-query-queue")["waiting"] == []
        outcomes = [(row["id"], row["outcome"]) for row in client.execute("x-qmpd-job-results")]
        assert outcomes == [("j0", "completed"), ("j1", "completed")]
        client.execute("quit")
    child.wait()


def test_the_budget_is_there_again(server: Server, tmp_path: Path) -> None:
    """Until it is taken away."""
    for budget in ({"bytes-per-second": 1 << 20, "iops": 7}, {"bytes-per-second": 0, "iops": 0}):
        child = server.start(tmp_path, words=STATE)
        with child.client() as client:
            client.execute_with("x-qmpd-set-budget", budget)
            kill(child)
        child = server.start(tmp_path, words=STATE)
        with child.client() as client:
            assert client.execute("x-qmpd-query-budget").items() >= budget.items()
            kill(child)
