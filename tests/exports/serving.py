"""A daemon with an NBD server, and the images it serves."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.daemons import Client, Daemon, under_test
from tests.tools import need

SIZE = 4 << 20  # bytes of each image

#: Images as users have them: a name and the commands for qemu-io that fill it. Each has data, written zeroes and holes.
LAYERS = {
    "raw": (("raw", "write -P 0x11 0 1M", "write -P 0x12 3M 256k"),),
    "qcow2": (("qcow2", "write -P 0x21 64k 1M", "write -z 2M 512k", "write -P 0x22 4032k 64k"),),
    "chain": (
        ("qcow2", "write -P 0x31 0 2M", "write -P 0x32 3M 512k"),
        ("qcow2", "write -z 512k 256k", "write -P 0x33 1M 128k"),
        ("qcow2", "write -P 0x34 1536k 64k", "write -z 3M 64k", "write -P 0x35 3584k 64k"),
    ),
}


def run(*argv: str | Path, cwd: Path | None = None, timeout: float = 60) -> str:
    """Output of a program that must succeed."""
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def make_image(directory: Path, kind: str) -> list[Path]:
    """The files of an image of :data:`LAYERS`, from the top down."""
    need("qemu-img", "qemu-io")
    files: list[Path] = []
    for number, (driver, *writes) in enumerate(LAYERS[kind]):
        path = directory / f"{kind}{number}.{driver}"
        backing = ["-b", files[0].name, "-F", driver] if files else []
        run("qemu-img", "create", "-q", "-f", driver, *backing, path.name, str(SIZE), cwd=directory)
        run("qemu-io", "-f", driver, *(word for write in writes for word in ("-c", write)), path, cwd=directory)
        files.insert(0, path)
    return files


def free_port() -> int:
    """A TCP port of the loopback that nobody listened at a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Server:
    """A daemon that serves NBD, on a UNIX socket ``nbd.sock`` or on a port of the loopback."""

    daemon: Daemon
    client: Client
    directory: Path
    port: int = 0  # 0: the UNIX socket

    def listen(self, **options: Any) -> None:
        """nbd-server-start with further arguments, spelled with underscores."""
        inet = {"host": "127.0.0.1", "port": str(self.port)}
        address = {"type": "inet", "data": inet} if self.port else {"type": "unix", "data": {"path": "nbd.sock"}}
        self.client.execute("nbd-server-start", addr=address, **options)

    def open(self, name: str, files: list[Path], **options: Any) -> None:
        """Add a chain of nodes, ``name`` on top, then ``name-1`` and so on down, and protocol nodes ``...-file``."""
        below: str | None = None
        for depth, path in reversed(list(enumerate(files))):
            node = name if depth == 0 else f"{name}-{depth}"
            driver = path.suffix[1:]
            node_options: dict[str, Any] = {
                "driver": driver,
                "node-name": node,
                "read-only": depth > 0,
                "file": {"driver": "file", "node-name": f"{node}-file", "filename": str(path), "discard": "unmap"},
                "discard": "unmap",
            }
            if driver == "qcow2":
                node_options["backing"] = below
            self.client.execute_with("blockdev-add", {**node_options, **options})
            below = node

    def export(self, node: str, *, writable: bool = True, **options: Any) -> None:
        """Export a node under an id and a name that are its own."""
        self.client.execute("block-export-add", type="nbd", id=node, node_name=node, writable=writable, **options)

    def serve(self, kind: str, **options: Any) -> list[Path]:
        """Make an image of :data:`LAYERS`, open it as the node of that name and export it."""
        files = make_image(self.directory, kind)
        self.open(kind, files)
        self.export(kind, **options)
        return files

    def url(self, name: str) -> str:
        """What libnbd and QEMU's tools take for an export."""
        if self.port:
            return f"nbd://127.0.0.1:{self.port}/{name}"
        return f"nbd+unix:///{name}?socket={self.directory}/nbd.sock"

    def dial(self, patience: float = 20.0) -> socket.socket:
        """A fresh connection that has not said a word."""
        sock = socket.socket(socket.AF_INET if self.port else socket.AF_UNIX)
        sock.settimeout(patience)
        sock.connect(("127.0.0.1", self.port) if self.port else f"{self.directory}/nbd.sock")
        return sock

    def alive(self) -> None:
        """The daemon runs, answers, and has nothing to complain about."""
        assert self.client.execute("query-block-exports") is not None
        assert self.daemon.process.poll() is None


@contextlib.contextmanager
def serving(directory: Path, *, tcp: bool = False, listen: bool = True, **options: Any) -> Iterator[Server]:
    """The program under test with its NBD server running (not with ``listen=False``)."""
    need(under_test().argv[0])
    with under_test().start(directory) as daemon, daemon.client() as client:
        server = Server(daemon, client, directory, free_port() if tcp else 0)
        if listen:
            server.listen(**options)
        yield server


def image_map(files: list[Path]) -> list[tuple[int, int, int]]:
    """What base:allocation must say, by ``qemu-img map``: offset, length, flags; equal neighbours are one."""
    text = run("qemu-img", "map", "-U", "--output=json", "-f", files[0].suffix[1:], files[0])
    return merged((row["start"], row["length"], 0 if row["data"] else 1 + 2 * row["zero"]) for row in json.loads(text))


def export_map(url: str) -> list[tuple[int, int, int]]:
    """The same by ``nbdinfo --map``, from the export."""
    rows = json.loads(run("nbdinfo", "--map", "--json", url))
    return merged((row["offset"], row["length"], row["type"]) for row in rows)


def merged(rows: Iterator[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    result: list[tuple[int, int, int]] = []
    for offset, length, flags in rows:
        if result and result[-1][2] == flags:
            offset, before, _ = result.pop()
            length += before
        result.append((offset, length, flags))
    return result
