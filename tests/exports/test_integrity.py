"""Several guests read and write while the chain below them is reshaped: every read is right, nothing is lost."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from tests.exports.integrity import GUESTS, REGION, SIZE, Guest, Manager
from tests.exports.serving import Server, run
from tests.tools import need

SEED = int(os.environ.get("INTEGRITY_SEED", "0")) or random.randrange(1, 1 << 32)
SECONDS = float(os.environ.get("INTEGRITY_SECONDS", "300"))


def test_a_dozen_changes(server: Server) -> None:
    """The short form: so many changes of the graph in random order."""
    reshape(server, SEED, acts=12, seconds=0)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_minutes_of_changes(server: Server) -> None:
    """The long form: INTEGRITY_SECONDS long."""
    reshape(server, SEED, acts=12, seconds=SECONDS)


def reshape(server: Server, seed: int, acts: int, seconds: float) -> None:
    """At least so many acts, for at least so many seconds."""
    need("qemu-img", "qemu-io")
    print(f"INTEGRITY_SEED={seed}")
    manager, shared = Manager(server, random.Random(seed)), random.Random(seed).randbytes(REGION)
    base, stop = manager.file("base"), threading.Event()
    (server.directory / "start").write_bytes(bytes(GUESTS * REGION) + shared)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.directory / "start", base)
    server.open("base", [base])
    server.export("base", name="disk")
    guests = [Guest(server, number, seed, shared, stop) for number in range(GUESTS)]
    for guest in guests:
        guest.start()
    try:
        until = time.monotonic() + seconds
        while not stop.is_set() and (len(manager.done) < acts or time.monotonic() < until):
            manager.act()
    finally:
        stop.set()
        for guest in guests:
            guest.join()
    story = "\n".join([f"seed {seed}", *manager.done])
    for guest in guests:
        assert guest.failure is None, f"{guest.failure!r}\n{story}"
        assert guest.requests > 0
    server.client.execute("quit")
    assert server.daemon.exit_status() == 0
    expected = server.directory / "expected"
    expected.write_bytes(b"".join(guest.content for guest in guests) + shared)
    verify(manager, expected, story)


def verify(manager: Manager, expected: Path, story: str) -> None:
    """Every image of the chain is clean, and through its top the disk is what the guests remember."""
    assert expected.stat().st_size == SIZE
    for node in manager.chain:
        run("qemu-img", "check", "-q", "-f", "qcow2", manager.file(node))
    top = manager.file(manager.chain[-1])
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", expected, top), story
