"""A commit of mid into base by a daemon as its users see it: monitor, nodes, job, events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.crash.contents import backing_name
from tests.crash.instrument import UNHARMED, Orders
from tests.crash.scenarios import Scenario
from tests.crash.server import Server
from tests.daemons import Client

KILLED = -9


#: A kill may leave an overlay led to base already, and another one not yet: a sibling, when it is committed again.
ALLOWED = {"x-qmpd-siblings": "allow"}


def commit(server: Server, scenario: Scenario, directory: Path, orders: Orders = UNHARMED) -> bool:
    """Have mid committed into base, unless no overlay is on mid any more; False if the daemon was killed at it."""
    child = server.start(directory, orders)
    try:
        with child.client() as client:
            _add_nodes(client, scenario, directory)
            users = [name for name in scenario.overlays if _below(directory, name) == "mid.qcow2"]
            if scenario.offline:
                _run_job(client, "x-qmpd-commit-offline", {"device": "mid.qcow2"})
            elif scenario.active:
                _run_job(client, "block-commit", {"device": "top.qcow2", "base-node": "base"}, active=True)
            elif users:
                _run_job(client, "block-commit", {"device": users[0], "top-node": "mid.qcow2", "base-node": "base"})
            client.execute("quit")
    except (EOFError, OSError):
        assert orders.kill is not None, (directory / "errors").read_text()
    except BaseException:
        child.kill()
        child.wait()
        raise
    status = child.wait()
    assert status in (0, KILLED), (directory / "errors").read_text()
    return status == 0


def _run_job(client: Client, command: str, names: dict[str, str], *, active: bool = False) -> None:
    client.execute_with(command, {"job-id": "j0", **names, **ALLOWED})
    if active:
        client.wait_event(lambda event: event["event"] == "BLOCK_JOB_READY")
        client.execute("block-job-complete", device="j0")
    told = client.wait_event(lambda event: event["event"] == "BLOCK_JOB_COMPLETED")
    assert "error" not in told["data"], told
    client.wait_status("j0", "null")


def _add_nodes(client: Client, scenario: Scenario, directory: Path) -> None:
    """Read-only below, the overlays as their headers say; only the first one is writable."""
    for name in scenario.images:
        if scenario.offline and name in scenario.overlays:
            continue
        node = "base" if name == scenario.base_file else name
        file = {"driver": "file", "filename": name}
        arguments: dict[str, Any] = {"driver": name.rsplit(".", 1)[1], "node-name": node, "file": file}
        arguments["read-only"] = name != "top.qcow2"
        below = None if name.endswith("raw") else _below(directory, name)
        if below is not None:
            arguments["backing"] = "base" if below == scenario.base_file else below
        client.execute_with("blockdev-add", arguments)


def _below(directory: Path, name: str) -> str | None:
    with open(directory / name, "rb") as file:
        return backing_name(file.read(65536))
