"""Exports of daemons that are killed and come back: on the node they were of, with every byte a guest was promised."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.crash.instrument import UNHARMED, Orders
from tests.crash.server import Child, Server
from tests.daemons import Client, CommandError
from tests.exports import wire
from tests.state.test_restart import SIZE, STATE, add_chain, edges, run

SEED = int(os.environ.get("CRASH_SEED", "0")) or random.randrange(1, 1 << 32)
ADDRESS = {"type": "unix", "data": {"path": "nbd.sock"}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """base <- mid <- top of 16 MiB, all empty."""
    for name, backing in (("base", []), ("mid", ["-b", "base.qcow2"]), ("top", ["-b", "mid.qcow2"])):
        options = [*backing, *(["-F", "qcow2"] if backing else [])]
        run(tmp_path, "qemu-img", "create", "-qf", "qcow2", *options, f"{name}.qcow2", str(SIZE))
    return tmp_path


@contextmanager
def guest(directory: Path, name: str = "disk") -> Iterator[wire.Connection]:
    """A client of an export."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(directory / "nbd.sock"))
    with wire.connection(sock) as connection:
        connection.enter(name)
        yield connection


def write(client: wire.Connection, offset: int, data: bytes, flags: int = 1) -> None:
    answer = client.call(wire.request(wire.WRITE, offset, len(data), flags=flags, payload=data))
    assert answer.error == 0


def read(client: wire.Connection, offset: int, length: int) -> bytes:
    answer = client.call(wire.request(wire.READ, offset, length), length)
    assert answer.error == 0
    return answer.data


def export(client: Client, **more: Any) -> None:
    arguments = {"type": "nbd", "id": "e0", "node-name": "top", "name": "disk", "writable": True}
    client.execute_with("block-export-add", arguments | more)


def exported(client: Client) -> list[tuple[str, str]]:
    return [(row["id"], row["node-name"]) for row in client.execute("query-block-exports")]


@contextmanager
def living(server: Server, directory: Path, *words: str, orders: Orders = UNHARMED) -> Iterator[tuple[Client, Child]]:
    """An incarnation; it is killed at the end, unless it has ended by itself."""
    child = server.start(directory, orders, words=(*STATE, *words))
    try:
        with child.client() as client:
            yield client, child
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        child.wait()


def test_exports_are_there_again_with_their_options(server: Server, chain: Path) -> None:
    """Names, descriptions, rights, contexts, the order; the socket of the killed daemon is replaced."""
    with living(server, chain) as (client, _):
        add_chain(client)
        client.execute_with("object-add", {"qom-type": "iothread", "id": "io"})
        client.execute_with("nbd-server-start", {"addr": ADDRESS, "max-connections": 1})
        export(client, description="the disk", **{"allocation-depth": True, "iothread": "io"})
        export(client, id="e1", name="second", writable=False)
        export(client, id="e2", name="third", writable=False)
        client.execute("block-export-del", id="e1")
        uri = "nbd+unix:///?socket=nbd.sock"
        before = subprocess.run(["nbdinfo", "--list", "--json", uri], cwd=chain, capture_output=True, text=True)
    assert (chain / "nbd.sock").is_socket()
    with living(server, chain) as (client, _):
        assert exported(client) == [("e2", "top"), ("e0", "top")]
        after = subprocess.run(["nbdinfo", "--list", "--json", uri], cwd=chain, capture_output=True, text=True)
        assert after.returncode == 0
        assert after.stdout == before.stdout
        assert "the disk" in after.stdout
        with pytest.raises(CommandError, match="in use"):
            client.execute("object-del", id="io")
        with guest(chain) as disk:
            write(disk, 0, b"again")
            assert read(disk, 0, 5) == b"again"


def test_an_export_is_of_the_node_that_it_was_moved_to(server: Server, chain: Path) -> None:
    """By a snapshot, and by the pivot of a commit: what a guest was promised is there."""
    with living(server, chain) as (client, _):
        add_chain(client)
        client.execute_with("nbd-server-start", {"addr": ADDRESS})
        export(client)
        with guest(chain) as disk:
            write(disk, 0, b"1" * 65536)
            names = {"node-name": "top", "snapshot-file": "snap.qcow2", "snapshot-node-name": "snap"}
            client.execute_with("blockdev-snapshot-sync", names)
            write(disk, 65536, b"2" * 65536)
    with living(server, chain) as (client, _):
        assert exported(client) == [("e0", "snap")]
        assert ("snap", "backing", "top") in edges(client)
        with guest(chain) as disk:
            assert read(disk, 0, 131072) == b"1" * 65536 + b"2" * 65536
            client.execute_with("block-commit", {"job-id": "j0", "device": "snap", "base-node": "base"})
            client.wait_status("j0", "ready")
            client.execute("job-complete", id="j0")
            client.wait_status("j0", "null")
            assert exported(client) == [("e0", "base")]
            write(disk, 131072, b"3" * 65536)
    with living(server, chain) as (client, _):
        assert exported(client) == [("e0", "base")]
        with guest(chain) as disk:
            assert read(disk, 0, 196608) == b"1" * 65536 + b"2" * 65536 + b"3" * 65536


def test_a_ready_commit_goes_on_below_its_export(server: Server, chain: Path) -> None:
    """Killed while the job's filter is between the two."""
    with living(server, chain) as (client, _):
        add_chain(client)
        client.execute_with("nbd-server-start", {"addr": ADDRESS})
        export(client)
        with guest(chain) as disk:
            client.execute_with("block-commit", {"job-id": "j0", "device": "top", "base-node": "base"})
            client.wait_status("j0", "ready")
            write(disk, 512, b"acknowledged")
    with living(server, chain) as (client, _):
        with guest(chain) as disk:
            assert read(disk, 512, 12) == b"acknowledged"
            while not client.execute("query-block-jobs")[0]["ready"]:
                pass
            client.execute("job-complete", id="j0")
            client.wait_status("j0", "null")
            assert read(disk, 512, 12) == b"acknowledged"
        assert exported(client) == [("e0", "base")]


def test_what_is_gone_stays_gone(server: Server, chain: Path) -> None:
    """An export that was deleted, a server that was stopped; and quit is the end of all of them."""
    with living(server, chain) as (client, _):
        add_chain(client)
        client.execute_with("nbd-server-start", {"addr": ADDRESS})
        export(client)
        client.execute("block-export-del", id="e0")
    with living(server, chain) as (client, _):
        assert exported(client) == []
        export(client)
        client.execute("nbd-server-stop")
    with living(server, chain) as (client, _):
        assert exported(client) == []
        client.execute_with("nbd-server-start", {"addr": ADDRESS})
        export(client)
        client.execute("quit")
    with living(server, chain) as (client, _):
        assert exported(client) == []
        with pytest.raises(CommandError, match="not running"):
            client.execute("nbd-server-stop")


def test_a_signal_leaves_exports_to_the_next_start(server: Server, chain: Path) -> None:
    """As it leaves jobs. What the command line makes as well is left to the state."""
    disk = ("--blockdev", "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2")
    served = ("--nbd-server", "addr.type=unix,addr.path=nbd.sock")
    words = (*disk, *served, "--export", "type=nbd,id=e0,node-name=top,name=disk,writable=on")
    with living(server, chain, *words) as (client, child):
        names = {"node-name": "top", "snapshot-file": "snap.qcow2", "snapshot-node-name": "snap"}
        client.execute_with("blockdev-snapshot-sync", names)
        os.kill(child.pid, signal.SIGTERM)
        assert client.rest() is not None
    with living(server, chain, *words) as (client, _):
        assert exported(client) == [("e0", "snap")]
        with guest(chain) as connection:
            write(connection, 0, b"new")


def test_an_export_that_was_leaving_is_told_to_be_gone(server: Server, chain: Path) -> None:
    """Its deletion waits for a request in flight when the daemon is killed; the event is not lost, nor told twice."""
    with living(server, chain) as (client, _):
        limits = {"qom-type": "throttle-group", "id": "g", "limits": {"iops-total": 1}}
        client.execute_with("object-add", limits)
        file = {"driver": "file", "filename": "base.qcow2"}
        slow = {"driver": "throttle", "node-name": "top", "throttle-group": "g", "file": file}
        client.execute_with("blockdev-add", slow)
        client.execute_with("nbd-server-start", {"addr": ADDRESS})
        export(client)
        with guest(chain) as disk:
            disk.sock.sendall(b"".join(wire.request(wire.READ, 0, 512, cookie=number) for number in range(50)))
            client.execute("block-export-del", id="e0", mode="hard")
    told = []
    for _ in range(2):
        with living(server, chain) as (client, _):
            assert exported(client) == []
            told.append(client.execute("x-qmpd-events", names=["BLOCK_EXPORT_DELETED"])["events"])
    assert [len(events) for events in told] == [1, 1]
    assert told[0][0]["data"] == {"id": "e0"}


def test_what_cannot_be_served_is_told_and_tried_again(server: Server, chain: Path) -> None:
    """Something else is in the socket's place for one start; it is left alone."""
    with living(server, chain) as (client, _):
        add_chain(client)
        client.execute_with("nbd-server-start", {"addr": ADDRESS})
        export(client)
    (chain / "nbd.sock").unlink()
    (chain / "nbd.sock").write_text("precious")
    with living(server, chain) as (client, _):
        failed = client.execute("x-qmpd-events", names=["X_QMPD_RESTORE_FAILED"])["events"]
        assert [row["data"]["kind"] for row in failed] == ["nbd-server", "export"]
        client.execute_with("blockdev-add", {"driver": "null-co", "node-name": "n", "read-zeroes": True})
    assert (chain / "nbd.sock").read_text() == "precious"
    (chain / "nbd.sock").unlink()
    with living(server, chain) as (client, _):
        assert exported(client) == [("e0", "top")]


def test_an_export_does_not_come_back_on_another_node_of_that_name(server: Server, chain: Path) -> None:
    """Its image was away; meanwhile a client has called something else so."""
    with living(server, chain) as (client, _):
        add_chain(client)
        client.execute_with("nbd-server-start", {"addr": ADDRESS})
        export(client)
    (chain / "top.qcow2").rename(chain / "away")
    with living(server, chain) as (client, _):
        assert exported(client) == []
        client.execute_with("blockdev-add", {"driver": "null-co", "node-name": "top", "read-zeroes": True})
    with living(server, chain) as (client, _):
        assert exported(client) == []


@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_killed_again_and_again_below_a_guest(server: Server, chain: Path, rounds: int) -> None:
    """At any change of an image by snapshots, commits and writes: what was acknowledged as stable is there again."""
    print(f"CRASH_SEED={SEED}")
    rng = random.Random(SEED)
    shadow, unsure = bytearray(SIZE), dict[int, bytes]()
    with living(server, chain) as (client, _):
        add_chain(client)
        client.execute_with("nbd-server-start", {"addr": ADDRESS})
        export(client)
    for number in range(rounds):
        orders = Orders(kill=rng.randrange(1, 150))
        # Until it is killed, which may be before it serves anybody.
        with (
            suppress(EOFError, OSError),
            living(server, chain, orders=orders) as (client, _),
            guest(chain) as disk,
        ):
            compare(disk, shadow, unsure)
            while True:
                reshape(rng, client, f"{number}-{rng.getrandbits(32):x}")
                scribble(rng, disk, shadow, unsure)
    with living(server, chain) as (client, _), guest(chain) as disk:
        compare(disk, shadow, unsure)


def compare(disk: wire.Connection, shadow: bytearray, unsure: dict[int, bytes]) -> None:
    """All there is, with the sectors that may be either as they have turned out to be."""
    found = read(disk, 0, SIZE)
    for offset, data in unsure.items():
        if found[offset : offset + 512] == data:
            shadow[offset : offset + 512] = data
    unsure.clear()
    different = [
        offset for offset in range(0, SIZE, 512) if found[offset : offset + 512] != shadow[offset : offset + 512]
    ]
    assert different == []


def reshape(rng: random.Random, client: Client, name: str) -> None:
    """A snapshot, or a commit of all there is; each may be refused because of a job that is there already."""
    (_, node) = exported(client)[0]
    jobs = client.execute("query-jobs")
    try:
        for job in jobs:
            if job["status"] == "ready":
                client.execute("job-complete", id=job["id"])
        if not jobs and node != "base" and rng.random() < 0.4:
            client.execute_with("block-commit", {"job-id": f"j{name}", "device": node, "base-node": "base"})
        elif not jobs:
            names = {"node-name": node, "snapshot-file": f"{name}.qcow2", "snapshot-node-name": f"n{name}"}
            client.execute_with("blockdev-snapshot-sync", names)
    except CommandError as error:
        if not any(text in error.desc for text in ("busy", "not found", "cannot accept")):
            raise


def scribble(rng: random.Random, disk: wire.Connection, shadow: bytearray, unsure: dict[int, bytes]) -> None:
    """A stable write of a random sector. ``unsure`` has those that nobody was told of."""
    offset = rng.randrange(0, SIZE, 512)
    data = rng.randbytes(512)
    unsure[offset] = data
    write(disk, offset, data)
    shadow[offset : offset + 512] = unsure.pop(offset)
