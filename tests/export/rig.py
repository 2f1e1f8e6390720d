"""An export of real images, and a client of a few lines that speaks the three kinds of replies."""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmpd.block.api import Role
from qmpd.export.nbd import SHARED, NbdExport
from qmpd.graph.edit import Graph
from qmpd.graph.node import Node
from qmpd.graph.open import close_nodes, open_tree
from qmpd.graph.spec import NodeSpec
from qmpd.nbd.handshake import Negotiated
from qmpd.steps import run_steps

MODES = {
    "simple": Negotiated("d"),
    "structured": Negotiated("d", structured=True, contexts=((0, "base:allocation"), (1, "qemu:allocation-depth"))),
    "extended": Negotiated("d", True, True, ((0, "base:allocation"), (1, "qemu:allocation-depth"))),
}


def create(path: Path, fmt: str, size: str, backing: Path | None = None) -> Path:
    more = ["-b", str(backing), "-F", "qcow2"] if backing else []
    subprocess.run(["qemu-img", "create", "-q", "-f", fmt, *more, str(path), size], check=True)
    return path


def spec(path: Path, fmt: str, **more: Any) -> NodeSpec:
    file = NodeSpec("file", options={"filename": str(path)})
    return NodeSpec(fmt, more.pop("name", "d"), children={"file": file} | more.pop("children", {}), **more)


@contextmanager
def opened(described: NodeSpec) -> Iterator[tuple[Graph, Node]]:
    graph = Graph()
    try:
        yield graph, run_steps(open_tree(graph, described, monitor_owned=True))
    finally:
        run_steps(close_nodes(graph, graph.nodes))


def export_of(graph: Graph, node: Node, *, writable: bool = True, **more: Any) -> NbdExport:
    export = NbdExport("e0", "d", writable=writable, allocation_depth=True, **more)
    with graph.edit() as edit:
        edit.attach(export, "root", node, Role.NONE, perm=export.perm, shared=SHARED)
    export.begin()
    return export


def detach(graph: Graph, export: NbdExport) -> None:
    assert export.edge is not None
    with graph.edit() as edit:
        edit.detach(export.edge)


@dataclass
class Answer:
    """All replies to one request."""

    error: int = 0
    text: str = ""
    data: bytearray = field(default_factory=bytearray)
    kinds: list[int] = field(default_factory=list)
    status: dict[int, list[tuple[int, int]]] = field(default_factory=dict)


class Client:
    """One connection. Requests can be sent before replies are read."""

    def __init__(self, sock: socket.socket, negotiated: Negotiated) -> None:
        self.sock = sock
        self.mode = negotiated
        self._asked: dict[int, tuple[int, int, int]] = {}
        self._packet: bytearray | None = None

    def send(self, command: int, offset: int, length: int, data: bytes = b"", *, flags: int = 0) -> int:
        cookie = 0x1000 + len(self._asked)
        self._asked[cookie] = command, offset, length
        layout, magic = (">IHHQQQ", 0x21E41C71) if self.mode.extended else (">IHHQQI", 0x25609513)
        request = struct.pack(layout, magic, flags, command, cookie, offset, length) + data
        if self._packet is None:
            self.sock.sendall(request)
        else:
            self._packet += request
        return cookie

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is sent in the block leaves at its end, in one packet."""
        self._packet = bytearray()
        yield
        packet, self._packet = self._packet, None
        self.sock.sendall(packet)

    def ask(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", *, flags: int = 0) -> Answer:
        cookie = self.send(command, offset, length, data, flags=flags)
        return self.replies(1)[cookie]

    def replies(self, count: int) -> dict[int, Answer]:
        answers: dict[int, Answer] = {}
        ended = 0
        while ended < count:
            cookie, done = self._reply(answers)
            ended += done
            assert cookie in self._asked
        return answers

    def _reply(self, answers: dict[int, Answer]) -> tuple[int, bool]:
        magic, *_ = struct.unpack(">I", self.exactly(4))
        if magic == 0x67446698:
            assert not self.mode.extended
            error, cookie = struct.unpack(">IQ", self.exactly(12))
            answer = answers.setdefault(cookie, Answer())
            command, _, length = self._asked[cookie]
            answer.error = error
            if command == 0 and not error:
                assert not self.mode.structured
                answer.data += self.exactly(length)
            return cookie, True
        if self.mode.extended:
            assert magic == 0x6E8A278C
            flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", self.exactly(28))
            assert offset == self._asked[cookie][1]
        else:
            assert magic == 0x668E33EF
            flags, kind, cookie, length = struct.unpack(">HHQI", self.exactly(16))
        answer = answers.setdefault(cookie, Answer())
        answer.kinds.append(kind)
        self._chunk(answer, kind, self.exactly(length), cookie)
        return cookie, bool(flags & 1)

    def _chunk(self, answer: Answer, kind: int, body: bytes, cookie: int) -> None:
        start = self._asked[cookie][1]
        if kind == 0x8001:
            answer.error, size = struct.unpack(">IH", body[:6])
            answer.text = body[6 : 6 + size].decode()
        elif kind in (1, 2):
            at = int.from_bytes(body[:8], "big")
            assert at == start + len(answer.data)
            answer.data += body[8:] if kind == 1 else bytes(int.from_bytes(body[8:12], "big"))
        elif kind in (5, 6):
            (context,) = struct.unpack(">I", body[:4])
            head, size, letter = (8, 8, "Q") if kind == 6 else (4, 4, "I")
            numbers = struct.unpack(f">{(len(body) - head) // size}{letter}", body[head:])
            answer.status[context] = list(zip(numbers[::2], numbers[1::2], strict=True))

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            assert more, "closed"
            data += more
        return data


@contextmanager
def client(export: NbdExport, mode: str = "simple") -> Iterator[Client]:
    """A client in its transmission phase, with a thread that serves it."""
    here, there = socket.socketpair()

    def serve() -> None:
        with there:
            export.serve(there, MODES[mode], b"")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with here:
            here.settimeout(60)
            yield Client(here, MODES[mode])
    finally:
        thread.join(60)
        assert not thread.is_alive()
