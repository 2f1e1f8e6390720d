"""Commits of a daemon with a state, killed again and again: each goes on where it was, and is told of once.

A round is a random chain and one commit. The daemon is killed at a random call that changes an image, and
started anew until the commit is over. ``CRASH_SEED`` chooses the rounds.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.crash.instrument import UNHARMED, Orders
from tests.crash.server import Server
from tests.daemons import Client
from tests.tools import need

SEED = int(os.environ.get("CRASH_SEED", "1"))
SIZE = 16 << 20
FAST = 1 << 40  # bytes a second: a limit that never limits, but makes the job take the peer's steps
MOST = 12  # kills in one round
WORDS = ("--state-dir", "state", "--checkpoint-seconds", "0")


def run(directory: Path, *command: Any) -> None:
    subprocess.run([str(word) for word in command], cwd=directory, check=True, capture_output=True)


@dataclass
class Round:
    """One commit through all its incarnations."""

    server: Server
    directory: Path
    random: Random
    log: str | None = None
    told: list[dict[str, Any]] = field(default_factory=list)
    #: Offsets of the checkpoints found after each kill.
    checkpoints: list[int] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    def make_chain(self) -> None:
        """Two to four images above a base, with some of their own data each."""
        for index in range(self.random.randint(3, 5)):
            name = f"{index}.qcow2"
            cluster = self.random.choice([4096, 65536, 1 << 20])
            backing = ["-b", self.images[-1], "-F", "qcow2"] if self.images else []
            run(
                self.directory,
                "qemu-img",
                "create",
                "-qf",
                "qcow2",
                "-o",
                f"cluster_size={cluster}",
                *backing,
                name,
                SIZE,
            )
            self.images.append(name)
            changes: list[str] = []
            for _ in range(self.random.randint(1, 6)):
                offset = self.random.randrange(0, SIZE, 4096)
                length = min(self.random.choice([4096, 65536, 1 << 20, 4 << 20]), SIZE - offset)
                verb = self.random.choice([f"write -P {self.random.randint(1, 255)}"] * 3 + ["write -z"])
                changes += ["-c", f"{verb} {offset} {length}"]
            run(self.directory, "qemu-io", *changes, name)
        run(self.directory, "qemu-img", "convert", "-Oraw", self.images[-1], "expected.raw")

    def live(self, orders: Orders) -> bool:
        """One incarnation of the daemon; is the commit over?"""
        child = self.server.start(self.directory, orders, WORDS)
        over = False
        try:
            with child.client() as client:
                try:
                    self.listen(client)
                    self.ask(client)
                    over = self.wait(client)
                    client.execute("quit")
                finally:
                    self.hear(client)
        except (EOFError, OSError):
            assert orders is not UNHARMED, (self.directory / "errors").read_text()
        except BaseException:
            child.kill()
            child.wait()
            raise
        status = child.wait()
        assert status in (0, -9), (self.directory / "errors").read_text()
        self.look()
        return over

    def listen(self, client: Client) -> None:
        """Hear what came after the last event that was heard."""
        since = self.told[-1]["x-qmpd-number"] if self.told else 0
        arguments = {"since": since} | ({} if self.log is None else {"log": self.log})
        answer = client.execute("x-qmpd-subscribe", **arguments)
        assert answer["complete"]
        self.log = answer["log"]

    def ask(self, client: Client) -> None:
        """What a manager does that does not know how far it came: add what is missing, start what is not there."""
        there = {node["node-name"] for node in client.execute("query-named-block-nodes")}
        for below, name in zip([None, *self.images], self.images, strict=False):
            if f"n{name[0]}" in there:
                continue
            arguments: dict[str, Any] = {"driver": "qcow2", "node-name": f"n{name[0]}"}
            arguments |= {"file": {"driver": "file", "filename": name}, "read-only": name != self.images[-1]}
            client.execute_with("blockdev-add", arguments | ({"backing": f"n{below[0]}"} if below else {}))
        known = {row["id"] for row in client.execute("query-jobs") + client.execute("x-qmpd-job-results")}
        if "j0" not in known:
            names = {"device": f"n{len(self.images) - 1}", "top-node": f"n{len(self.images) - 2}", "base-node": "n0"}
            client.execute_with("block-commit", {"job-id": "j0", "speed": FAST, **names})

    def wait(self, client: Client) -> bool:
        """Until it is told to be over, now or before."""
        seen = [*self.told, *client.events]
        while not any(event["event"] == "JOB_STATUS_CHANGE" and event["data"]["status"] == "null" for event in seen):
            message = client.message()
            client.events.append(message)
            seen.append(message)
        return True

    def hear(self, client: Client) -> None:
        """Keep what was told to the end; those without a number came before the subscription."""
        self.told += [event for event in client.events if "x-qmpd-number" in event]

    def look(self) -> None:
        """What the state says of the job's place."""
        with closing(sqlite3.connect(f"file:{self.directory}/state/state.db?mode=rw", uri=True)) as database:
            rows = database.execute("SELECT checkpoint FROM jobs WHERE checkpoint IS NOT NULL").fetchall()
        self.checkpoints += [json.loads(row)["offset"] for (row,) in rows]

    def judge(self) -> None:
        numbers = [event["x-qmpd-number"] for event in self.told]
        assert numbers == list(range(1, len(numbers) + 1))
        ends = [event["data"] for event in self.told if event["event"] == "BLOCK_JOB_COMPLETED"]
        assert [("error" in end, end["offset"]) for end in ends] == [(False, SIZE)]
        assert self.checkpoints == sorted(self.checkpoints), "began anew in spite of a checkpoint"
        for name in self.images[1:-1]:
            (self.directory / name).unlink()
        run(self.directory, "qemu-img", "compare", "-fraw", "-Fqcow2", "expected.raw", self.images[-1])
        for name in (self.images[0], self.images[-1]):
            checked = subprocess.run(
                ["qemu-img", "check", "-q", name], cwd=self.directory, check=False, capture_output=True
            )
            assert checked.returncode in (0, 3), name


def one_round(server: Server, directory: Path, seed: int) -> Round:
    """A round to its end."""
    directory.mkdir()
    random = Random(f"durable {seed}")
    current = Round(server, directory, random)
    current.make_chain()
    for _ in range(MOST):
        if current.live(Orders(kill=random.randint(1, 60), torn=random.random() < 0.3)):
            break
    else:
        assert current.live(UNHARMED)
    current.judge()
    return current


@pytest.mark.parametrize("seed", range(SEED, SEED + 4))
def test_a_killed_commit_goes_on(server: Server, tmp_path: Path, seed: int) -> None:
    """The right content, no way made twice, and its end is told exactly once."""
    need("qemu-img", "qemu-io")
    one_round(server, tmp_path / "round", seed)


@pytest.mark.long
def test_a_thousand_killed_commits_go_on(server: Server, tmp_path: Path) -> None:
    """The same, and it was worth it: most of them were killed and went on from a checkpoint."""
    need("qemu-img", "qemu-io")
    resumed = 0
    for seed in range(SEED, SEED + int(os.environ.get("DURABLE_ROUNDS", "1000"))):
        directory = tmp_path / str(seed)
        try:
            done = one_round(server, directory, seed)
        except BaseException:
            print(f"CRASH_SEED={seed}")
            raise
        resumed += any(event["event"] == "X_QMPD_JOB_RESUMED" and event["data"]["offset"] > 0 for event in done.told)
        run(tmp_path, "rm", "-rf", directory)
    print(f"{resumed} rounds went on from a checkpoint")
    assert resumed
