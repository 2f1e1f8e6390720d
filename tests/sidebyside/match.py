"""Two daemons side by side: one sequence of commands to both, everything compared after each."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmpd.jobs.siblings import SiblingPolicy
from tests.daemons import PEER, Client
from tests.replay import hosts, normal
from tests.sidebyside import operations
from tests.sidebyside.explained import explain, explain_state

_PAUSE = 0.01  # seconds between two looks at the jobs
_LOOKS = 400  # after which a job counts as never at rest

#: Counts all nodes since the start, failed ones too.
_GENERATED = re.compile(r"#block\d+")

_JOB_MEMBERS = ("id", "type", "status", "error")
_NODE_MEMBERS = ("node-name", "drv", "ro", "backing_file")


class DifferenceError(AssertionError):
    """The two went different ways, and nothing explains it."""


class Side:
    """One daemon, its images in a directory of its own."""

    def __init__(self, client: Client, directory: Path) -> None:
        self.client = client
        self.directory = directory

    def do(self, command: dict[str, Any]) -> Any:
        """The reply, when all jobs are at rest."""
        reply = self.client.call(command)
        self._settle()
        return {"return": {}} if "return" in reply else json.loads(_GENERATED.sub("#block", json.dumps(reply)))

    def state(self) -> dict[str, Any]:
        """Nodes, links with their permissions, exports, and jobs, in normal form."""
        graph = self.client.execute("x-debug-query-block-graph")
        nodes = self.client.execute("query-named-block-nodes", flat=True)
        exports = self.client.execute("query-block-exports")
        named = [node for node in nodes if not node["node-name"].startswith("#")]
        return {
            "graph": normal.layout(normal.edges(graph)),
            "nodes": sorted([str(normal.reply(node.get(key))) for key in _NODE_MEMBERS] for node in named),
            "exports": sorted(_GENERATED.sub("#block", str(sorted(export.items()))) for export in exports),
            "jobs": [{key: job.get(key) for key in _JOB_MEMBERS} for job in self.client.execute("query-jobs")],
        }

    def _settle(self) -> None:
        """Until three looks in a row show the same, with no job at work. One that has a speed of 1 sleeps for long."""
        seen: list[Any] = []
        for _ in range(_LOOKS):
            jobs = self.client.execute("query-block-jobs")
            seen.append(jobs)
            if not jobs or (seen[-3:] == [jobs] * 3 and not any(job["busy"] for job in jobs)):
                return
            time.sleep(_PAUSE)
        raise DifferenceError(f"a job never comes to rest: {seen[-1]}")


@contextlib.contextmanager
def both(directory: Path) -> Iterator[tuple[Side, Side]]:
    """qmpd and the peer, each over images of its own."""
    places = directory / "qmpd", directory / "peer"
    for place in places:
        place.mkdir()
        operations.make_images(place)
    with (
        hosts.start(places[0], siblings=SiblingPolicy.ALLOW) as host,
        PEER.start(places[1]) as peer,
        contextlib.closing(Client(host.dial())) as ours,
        contextlib.closing(Client(peer.dial())) as theirs,
    ):
        for client in (ours, theirs):
            client.execute("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        yield Side(ours, places[0]), Side(theirs, places[1])


def play(seed: int, directory: Path, length: int = 25) -> str:
    """One sequence. Why it ended early, or ''. Raises DifferenceError."""
    drawn = operations.Client(seed)
    sent: list[dict[str, Any]] = []
    with both(directory) as (ours, theirs):
        commands = drawn.chain()
        for _ in range(length):
            command = commands.pop(0) if commands else drawn.command()
            sent.append(command)
            try:
                why = _compare(command, ours, theirs)
            except DifferenceError as difference:
                raise DifferenceError(f"{difference}\nafter\n" + "\n".join(map(str, sent)) + f"\nseed {seed}") from None
            if why:
                return why
    _compare_images(seed, directory)
    return ""


def _compare(command: dict[str, Any], ours: Side, theirs: Side) -> str:
    mine = ours.do(command)
    try:
        other = theirs.do(command)
    except EOFError:
        return "the peer has crashed"
    if mine != other:
        reason = explain(command, mine, other)
        if reason is None:
            raise DifferenceError(f"qmpd {mine}\npeer {other}")
        if ("error" in mine) != ("error" in other):
            return reason
    states = ours.state(), theirs.state()
    for part, value in states[0].items():
        if value != states[1][part]:
            if why := explain_state(command, mine, value, states[1][part]):
                return why
            raise DifferenceError(f"{part}\nqmpd {value}\npeer {states[1][part]}")
    return ""


def _compare_images(seed: int, directory: Path) -> None:
    """All images of the two are sound, and read the same."""
    for name in [*operations.QCOW2, *operations.RAW]:
        image_format = "qcow2" if name in operations.QCOW2 else "raw"
        pair = [str(directory / side / name) for side in ("qmpd", "peer")]
        # Names inside json: count from the working directory.
        here = directory / "qmpd"
        if image_format == "qcow2":
            _judge(seed, here, "qemu-img", "check", "-q", pair[0])
        _judge(seed, here, "qemu-img", "compare", "-f", image_format, "-F", image_format, *pair)


def _judge(seed: int, directory: Path, *argv: str) -> None:
    run = subprocess.run(argv, cwd=directory, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if run.returncode:
        raise DifferenceError(f"{' '.join(argv)}: {run.stdout}{run.stderr}\nseed {seed}")
