"""Requests over a socket pair against real images: data, checks, drains."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from qmpd.block.contract import BrokenContractError
from qmpd.errors import Kind, QmpdError
from qmpd.export.commands import Commands
from qmpd.export.gate import Gate
from qmpd.export.nbd import NbdExport
from qmpd.graph.open import open_tree
from qmpd.jobs import transaction
from qmpd.jobs.snapshot import Snapshot
from qmpd.steps import run_steps
from tests.export.rig import MODES, Client, client, create, detach, export_of, opened, spec
from tests.tools import need

MIB = 1 << 20
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("qemu-img")


@pytest.fixture(params=["raw", "qcow2"])
def export(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NbdExport]:
    path = create(tmp_path / "image", request.param, "4M")
    with opened(spec(path, request.param, discard="unmap")) as (graph, node):
        export = export_of(graph, node)
        yield export
        detach(graph, export)


@pytest.mark.parametrize("mode", MODES)
def test_random_requests_leave_what_a_shadow_holds(export: NbdExport, mode: str) -> None:
    rng = random.Random(7)
    shadow = bytearray(4 * MIB)
    with client(export, mode) as guest:
        for _ in range(300):
            length = rng.choice([1, 511, 512, 4096, 65536, 200_000])
            offset = rng.randrange(4 * MIB - length + 1)
            command = rng.choice([READ, READ, WRITE, WRITE, ZEROES, CACHE, FLUSH])
            data = rng.randbytes(length) if command == WRITE else b""
            answer = guest.ask(command, offset, length, data, flags=rng.choice([0, 1]))
            assert answer.error == 0
            if command == READ:
                assert answer.data == shadow[offset : offset + length]
            elif command in (WRITE, ZEROES):
                shadow[offset : offset + length] = data or bytes(length)
        assert guest.ask(READ, 0, 4 * MIB).data == shadow
    assert export.connections == 0


@pytest.mark.parametrize("mode", MODES)
def test_many_requests_in_one_packet_are_all_answered(export: NbdExport, mode: str) -> None:
    with client(export, mode) as guest:
        cookies = [guest.send(WRITE, n * 4096, 4096, bytes([n + 1]) * 4096) for n in range(40)]
        assert set(guest.replies(40)) == set(cookies)
        reads = [guest.send(READ, n * 4096, 4096) for n in range(40)]
        answers = guest.replies(40)
        assert [answers[c].data for c in reads] == [bytes([n + 1]) * 4096 for n in range(40)]


@pytest.mark.parametrize("mode", MODES)
def test_packets_of_all_kinds_of_requests(export: NbdExport, mode: str) -> None:
    """Whatever comes together, each request gets its own answer, right in every byte: data, holes, errors.

    Requests of one packet may be carried out in any order, so each has a piece of the disk to itself.
    """
    rng, block = random.Random(11), 8192
    shadow = bytearray(4 * MIB)
    with client(export, mode) as guest:
        for _ in range(120):
            asked: dict[int, tuple[int, int, int]] = {}
            with guest.held():
                for number in rng.sample(range(4 * MIB // block), rng.randint(1, 40)):
                    length = rng.choice([1, 512, 513, 4096, block])
                    offset = number * block + rng.randrange(block - length + 1)
                    command = rng.choices([READ, WRITE, ZEROES, FLUSH, CACHE, 99], [8, 6, 1, 1, 1, 1])[0]
                    data = rng.randbytes(length) if command == WRITE else b""
                    where = (0, 0) if command == FLUSH else (offset, length)
                    cookie = guest.send(command, *where, data, flags=rng.choice([0, 0, 1]) if command != 99 else 0)
                    asked[cookie] = command, offset, length
                    if command in (WRITE, ZEROES):
                        shadow[offset : offset + length] = data or bytes(length)
            answers = guest.replies(len(asked))
            assert answers.keys() == asked.keys()
            for cookie, (command, offset, length) in asked.items():
                assert answers[cookie].error == (22 if command == 99 else 0)
                if command == READ:
                    assert answers[cookie].data == shadow[offset : offset + length]


@pytest.mark.parametrize("mode", MODES)
def test_requests_that_are_refused(export: NbdExport, mode: str) -> None:
    size = 4 * MIB
    text = {
        (READ, size - 4, 8, 0): (22, f"operation past EOF; From: {size - 4}, Len: 8, Size: {size}"),
        (ZEROES, size, 1, 0): (28, f"operation past EOF; From: {size}, Len: 1, Size: {size}"),
        (READ, 0, (32 << 20) + 1, 0): (22, "len (33554433) is larger than max len (33554432)"),
        (READ, 0, 8, 8): (22, "unsupported flags for command read (got 0x8)"),
        (READ, 0, 8, 0x8000): (22, "unsupported flags for command read (got 0x8000)"),
        (99, 0, 0, 0x8000): (22, "unsupported flags for command <unknown> (got 0x8000)"),
        (99, 0, 0, 1): (22, "invalid request type (99) received"),
        (FLUSH, size + 1, 0, 0): (22, f"operation past EOF; From: {size + 1}, Len: 0, Size: {size}"),
    }
    with client(export, mode) as guest:
        for (command, offset, length, flags), (number, said) in text.items():
            answer = guest.ask(command, offset, length, flags=flags)
            assert answer.error == number
            assert answer.text == (said if mode != "simple" else "")
        assert guest.ask(READ, 0, 8).error == 0


def test_a_write_too_long_is_answered_and_closes(export: NbdExport) -> None:
    with client(export) as guest:
        assert guest.ask(WRITE, 0, (32 << 20) + 1).error == 22
        assert guest.sock.recv(1) == b""


def test_wrong_magic_is_answered_and_closes(export: NbdExport) -> None:
    with client(export) as guest:
        guest.sock.sendall(struct.pack(">IHHQQI", 0, 0, 0, 5, 0, 0))
        assert guest.exactly(16) == struct.pack(">IIQ", 0x67446698, 22, 5)
        assert guest.sock.recv(1) == b""


def test_half_close_still_brings_the_replies(export: NbdExport) -> None:
    with client(export) as guest:
        cookie = guest.send(READ, 0, 512)
        guest.sock.shutdown(1)
        assert guest.replies(1)[cookie].data == bytes(512)
        assert guest.sock.recv(1) == b""


def test_read_only_exports_refuse_writers(tmp_path: Path) -> None:
    path = create(tmp_path / "image", "raw", "1M")
    with opened(spec(path, "raw")) as (graph, node):
        export = export_of(graph, node, writable=False)
        with client(export, "structured") as guest:
            for command, data in ((WRITE, b"x" * 8), (TRIM, b""), (ZEROES, b"")):
                answer = guest.ask(command, 0, 8, data)
                assert (answer.error, answer.text) == (1, "Export is read-only")
            assert guest.ask(FLUSH).error == 0
        detach(graph, export)


@pytest.mark.parametrize("mode", ["structured", "extended"])
def test_block_status_of_a_chain(tmp_path: Path, mode: str) -> None:
    base = create(tmp_path / "base.qcow2", "qcow2", "1M")
    top = create(tmp_path / "top.qcow2", "qcow2", "1M", base)
    with opened(spec(base, "qcow2")) as (_, node):
        node.opened.write(0, b"b" * 131072)
    with opened(spec(top, "qcow2", children={"backing": spec(base, "qcow2", name="base")})) as (graph, node):
        node.opened.write(65536, b"t" * 65536)
        node.opened.write_zeroes(131072, 65536)
        export = export_of(graph, node)
        with client(export, mode) as guest:
            answer = guest.ask(STATUS, 0, MIB)
            assert answer.status[0] == [(131072, 0), (MIB - 131072, 3)]
            assert answer.status[1] == [(65536, 2), (131072, 1), (MIB - 196608, 0)]
            assert guest.ask(STATUS, 0, MIB, flags=8).status[0] == [(131072, 0)]
            assert guest.ask(READ, 0, MIB).data == b"b" * 65536 + b"t" * 65536 + bytes(MIB - 131072)
        detach(graph, export)


def test_hanging_up_ends_all_connections(export: NbdExport) -> None:
    with client(export) as one, client(export) as two:
        assert one.ask(READ, 0, 8).error == two.ask(READ, 0, 8).error == 0
        assert export.connections == 2
        export.hang_up()
        assert one.sock.recv(1) == two.sock.recv(1) == b""


def test_a_client_that_does_not_read_its_replies_holds_nobody(export: NbdExport) -> None:
    with client(export) as stalled, client(export) as other:
        for n in range(20):  # far more than the socket takes
            stalled.send(READ, 0, MIB) if n else stalled.ask(READ, 0, 8)
        assert other.ask(WRITE, 0, 8, b"x" * 8).error == 0
        export.quiesce()
        export.resume()
        assert other.ask(READ, 0, 8).data == b"x" * 8


def test_a_bug_ends_the_connection_and_nothing_else(
    export: NbdExport, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever meets it is cut off with a line in the log; others are served, and the graph can change."""
    with client(export) as other:
        assert other.ask(READ, 0, 8).error == 0
        for bug in (BrokenContractError("nonsense"), MemoryError(), KeyError(0)):
            with monkeypatch.context() as patch, client(export) as unlucky:
                patch.setattr(Commands, "run", Mock(side_effect=bug))
                unlucky.send(READ, 0, 8)
                assert unlucky.sock.recv(1) == b""
        assert [record.levelname for record in caplog.records] == ["ERROR"] * 3
        export.quiesce()
        export.resume()
        assert other.ask(READ, 0, 8).error == 0


@pytest.mark.parametrize("mode", MODES)
def test_one_flush_makes_the_writes_of_a_packet_stable_and_fails_for_them(
    export: NbdExport, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that asked for it hear of a flush that fails, and the others do not; all are stored."""
    assert export.edge is not None
    flushes = Mock(side_effect=[None, QmpdError("gone", Kind.IO, errno=5)])
    monkeypatch.setattr(export.edge.node.opened, "flush", flushes)
    with client(export, mode) as guest:
        for result in (0, 5):
            with guest.held():
                cookies = [guest.send(WRITE, n * 1024, 1024, bytes([n + 1]) * 1024, flags=n % 2) for n in range(8)]
            answers = guest.replies(8)
            assert [answers[cookie].error for cookie in cookies] == [0, result] * 4
        assert flushes.call_count == 2
        assert guest.ask(READ, 0, 8192).data == b"".join(bytes([n + 1]) * 1024 for n in range(8))


@pytest.mark.parametrize("mode", MODES)
def test_of_a_packet_only_what_fails_fails(export: NbdExport, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads and writes that fail are answered with errors among those that succeed, each with its own bytes."""
    assert export.edge is not None
    device = export.edge.node.opened
    read, write = device.readinto, device.write

    def failing(call: Any) -> Any:
        def request(offset: int, data: memoryview) -> None:
            if offset in (2048, 5 * 1024):
                raise QmpdError("broken", Kind.IO, errno=5)
            call(offset, data)

        return request

    with client(export, mode) as guest:
        assert guest.ask(WRITE, 0, 8192, b"o" * 8192).error == 0
        monkeypatch.setattr(device, "read_many", lambda batch: [2, 5, 6])
        monkeypatch.setattr(device, "write_many", lambda batch: batch.indexes)
        monkeypatch.setattr(device, "readinto", failing(read))
        monkeypatch.setattr(device, "write", failing(write))
        with guest.held():
            writes = [guest.send(WRITE, n * 1024, 1024, bytes([n + 1]) * 1024) for n in range(8)]
        answers = guest.replies(8)
        assert [answers[cookie].error for cookie in writes] == [5 if n in (2, 5) else 0 for n in range(8)]
        with guest.held():
            reads = [guest.send(READ, n * 1024, 1024) for n in range(8)]
        answers = guest.replies(8)
        assert [answers[cookie].error for cookie in reads] == [5 if n in (2, 5) else 0 for n in range(8)]
        assert answers[reads[6]].data == b"\7" * 1024


def test_closing_the_gate_waits_for_those_inside_and_keeps_others_out() -> None:
    gate, inside, leave, closed, entered = Gate(), *(threading.Event() for _ in range(4))

    def stay() -> None:
        with gate:
            inside.set()
            leave.wait(60)

    def shut() -> None:
        gate.close()
        closed.set()

    def come_late() -> None:
        with gate:
            entered.set()

    threads = [threading.Thread(target=target) for target in (stay, shut)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    assert not closed.is_set()
    leave.set()
    assert closed.wait(60)
    gate.close()
    threads.append(threading.Thread(target=come_late))
    threads[2].start()
    gate.open()
    assert not entered.is_set()
    gate.open()
    assert entered.wait(60)
    for thread in threads:
        thread.join(60)


def test_a_snapshot_under_load_loses_no_write(tmp_path: Path) -> None:
    """The export moves to an overlay while a client writes and reads."""
    base = create(tmp_path / "base.qcow2", "qcow2", "4M")
    over = create(tmp_path / "over.qcow2", "qcow2", "4M")
    with opened(spec(base, "qcow2")) as (graph, node):
        top = run_steps(open_tree(graph, spec(over, "qcow2", name="over", children={"backing": None})))
        export = export_of(graph, node)
        with load_on(export) as load:
            load.wait_for(100)
            run_steps(transaction.run(graph, [Snapshot("d", "over")]))
            load.wait_for(200)
        assert export.edge is not None
        assert export.edge.node is top
        with client(export) as guest:
            assert guest.ask(READ, 0, 4 * MIB).data == load.shadow
        detach(graph, export)


class Load:
    """Random checked requests of one client, counted."""

    def __init__(self, length: int) -> None:
        self.shadow = bytearray(length)
        self.wrong = 0
        self.over = threading.Event()
        self._done = threading.Semaphore(0)

    def wait_for(self, count: int) -> None:
        """``count`` further requests are over, none of them wrong."""
        for _ in range(count):
            assert self._done.acquire(timeout=60)
        assert self.wrong == 0

    def run(self, guest: Client) -> None:
        rng, last = random.Random(3), len(self.shadow) - 4096
        while not self.over.is_set():
            at, data = rng.randrange(last), rng.randbytes(4096)
            self.wrong += guest.ask(WRITE, at, 4096, data).error != 0
            self.shadow[at : at + 4096] = data
            at = rng.randrange(last)
            self.wrong += guest.ask(READ, at, 4096).data != self.shadow[at : at + 4096]
            self._done.release()


@contextmanager
def load_on(export: NbdExport) -> Iterator[Load]:
    load = Load(export.info().size)
    with client(export, "structured") as guest, ThreadPoolExecutor(1) as pool:
        running = pool.submit(load.run, guest)
        try:
            yield load
        finally:
            load.over.set()
        running.result(60)
        assert load.wrong == 0
