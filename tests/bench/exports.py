"""NBD: small random requests at two depths, on two formats; many connections; what a command costs meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.images import GIB, KIB
from tests.bench.runner import SCALE, Row, Times, Topic, alternate
from tests.daemons import Client, Program
from tests.exports import wire
from tests.exports.serving import Server, run

_SIZE = max(round(GIB * SCALE) // (16 << 20), 1) * (16 << 20)  # bytes of the disk
_BLOCK = 4 * KIB
_REQUESTS = max(500, round(60000 * SCALE))
_CROWD = 64


def nbd(directory: Path) -> Iterator[Row]:
    rows = {
        f"{kind} {work}": Row(f"NBD on {kind}, 4 KiB random {work}", goal, unit="/s", more_is_better=True)
        for kind, goals in (("raw", (2.5, 2.5, 1.0)), ("qcow2", (2.0, 2.0, 1.0)))
        for work, goal in zip(("read, depth 16", "write, depth 16", "read, depth 1"), goals, strict=True)
    }
    rows["copy"] = Row("NBD, nbdcopy of a qcow2 disk", 1.0, unit="s")
    rows["crowd"] = Row(f"NBD, {_CROWD} connections, read, depth 1 each", 1.0, unit="/s", more_is_better=True)
    rows["busy"] = Row("a command under full NBD load, in idle round trips", 3.0, limit=True, unit="x")
    images(directory)
    alternate(rows, lambda program: one_run(program, directory))
    yield from rows.values()


def images(directory: Path) -> None:
    """A disk full of data, in both formats."""
    for kind in ("raw", "qcow2"):
        path = directory / f"disk.{kind}"
        run("qemu-img", "create", "-q", "-f", kind, path, str(_SIZE))
        words = (f"write -P 0x5a {offset} {16 << 20}" for offset in range(0, _SIZE, 16 << 20))
        run("qemu-io", "-f", kind, *(part for word in words for part in ("-c", word)), path, timeout=600)
        cache_in_pages(path)


def cache_in_pages(path: Path) -> None:
    """Have the file cached as small requests leave it.

    What was written or read in large pieces is cached in large folios, in which ext4 (seen in Linux 6.18) takes 20 us
    for a write of 4 KiB, whoever writes, instead of 2: then nothing but that would be measured.
    """
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for offset in range(0, path.stat().st_size, _BLOCK):
            os.pread(file.fileno(), _BLOCK, offset)


def one_run(program: Program, directory: Path) -> Times:
    """All numbers from one fresh daemon."""
    times: dict[str, float] = {}
    with program.start(directory) as daemon, daemon.client() as client:
        server = Server(daemon, client, directory)
        server.listen()
        for kind in ("raw", "qcow2"):
            server.open(kind, [directory / f"disk.{kind}"])
            server.export(kind)
            for work, command, depth in (("read", wire.READ, 16), ("write", wire.WRITE, 16), ("read", wire.READ, 1)):
                with connected(server, kind) as connection:
                    rate = pump(connection, Load(command, _REQUESTS if depth > 1 else _REQUESTS // 6), depth)
                times[f"{kind} {work}, depth {depth}"] = rate
        before = time.perf_counter()
        run("nbdcopy", server.url("qcow2"), "null:", timeout=600)
        times["copy"] = time.perf_counter() - before
        times["crowd"] = crowd(server)
        times["busy"] = under_load(server, client)
    return times


@contextlib.contextmanager
def connected(server: Server, name: str) -> Iterator[wire.Connection]:
    with wire.connection(server.dial(60)) as connection:
        connection.enter(name)
        yield connection


class Load:
    """Requests made beforehand, all of one kind; replies are known by their length alone."""

    def __init__(self, command: int, count: int) -> None:
        rng, payload = random.Random(1), b"w" * _BLOCK if command == wire.WRITE else b""
        offsets = (rng.randrange(_SIZE // _BLOCK) * _BLOCK for _ in range(count))
        requests = [
            wire.request(command, offset, _BLOCK, cookie=n, payload=payload) for n, offset in enumerate(offsets)
        ]
        self.count, self.size = count, len(requests[0])
        self.data = memoryview(b"".join(requests))
        self.reply = 16 + (_BLOCK if command == wire.READ else 0)


def pump(connection: wire.Connection, load: Load, depth: int) -> float:
    """Keep so many requests in flight until all are answered; requests a second."""
    sock, buffer = connection.sock, bytearray(depth * load.reply)
    sent = received = 0
    before = time.perf_counter()
    while received < load.count * load.reply:
        if (limit := min(received // load.reply + depth, load.count)) > sent:
            sock.sendall(load.data[sent * load.size : limit * load.size])
            sent = limit
        got = sock.recv_into(buffer)
        assert got, "the server closed the connection"
        received += got
    return load.count / (time.perf_counter() - before)


def crowd(server: Server) -> float:
    """Requests a second of many connections together, each with one request in flight."""
    load = Load(wire.READ, max(10, _REQUESTS // 4 // _CROWD))
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(server, "raw")) for _ in range(_CROWD)]
        before = time.perf_counter()
        for number in range(load.count):
            request = load.data[number * load.size : (number + 1) * load.size]
            for connection in connections:
                connection.sock.sendall(request)
            for connection in connections:
                connection.exactly(load.reply)
        return load.count * _CROWD / (time.perf_counter() - before)


def under_load(server: Server, client: Client) -> float:
    """A command's median round trip while requests are kept in flight by another process, in idle round trips."""
    idle = trips(client, 300)
    argv = ["nbdcopy", "--requests=16", "--request-size=4096", "--connections=1", server.url("qcow2"), "null:"]
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            process = subprocess.Popen(argv)
            while process.poll() is None and not stop.wait(0.05):
                pass
            process.kill()
            process.wait()

    worker = threading.Thread(target=keep_busy)
    worker.start()
    try:
        trips(client, 300)  # until the load is there
        return trips(client, 300) / idle
    finally:
        stop.set()
        worker.join()


def trips(client: Client, count: int) -> float:
    """The median of so many round trips, in seconds."""
    result = []
    for _ in range(count):
        before = time.perf_counter()
        client.execute("query-block-jobs")
        result.append(time.perf_counter() - before)
    return statistics.median(result)


TOPICS = [Topic("nbd", nbd)]
