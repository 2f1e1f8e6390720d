"""A client that stops reading holds nobody."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemons import PEER, CommandError, under_test
from tests.exports import wire
from tests.exports.serving import Server, make_image, run

_BIG = 4 << 20  # bytes of a read that no socket's buffer holds


@pytest.fixture
def crowded(server: Server) -> Iterator[tuple[Server, wire.Connection, list[Path]]]:
    """A chain that is exported, and a client that has asked for 64 MiB of it and takes none."""
    files = make_image(server.directory, "chain")
    server.open("chain", files)
    server.export("chain")
    with wire.connection(server.dial()) as stalled:
        stalled.enter("chain", structured=True)
        for cookie in range(16):
            stalled.sock.sendall(wire.request(wire.READ, 0, _BIG, cookie=cookie))
        assert stalled.exactly(4)  # the answers have begun
        yield server, stalled, files


def relieve_the_peer(stalled: wire.Connection) -> None:
    """The peer waits until replies have left, for ever if need be: on it, the client reads on, the rest is the same."""

    def read_on() -> None:
        with contextlib.suppress(OSError):  # the test closes the socket at its end
            stalled.closed()

    if under_test() == PEER:
        threading.Thread(target=read_on, daemon=True).start()


def test_others_are_served(crowded: tuple[Server, wire.Connection, list[Path]]) -> None:
    """Reads, writes and flushes of another client of the same export, and QMP, go on."""
    server, _, _ = crowded
    with wire.connection(server.dial()) as other:
        other.enter("chain")
        assert other.call(wire.request(wire.WRITE, 8192, 512, payload=b"n" * 512)).error == 0
        assert other.call(wire.request(wire.READ, 8191, 514), 514).data == b"\x31" + b"n" * 512 + b"\x31"
        assert other.call(wire.request(wire.FLUSH, 0, 0)).error == 0
    server.alive()


def test_a_commit_below_ends(crowded: tuple[Server, wire.Connection, list[Path]]) -> None:
    """An intermediate commit changes the graph under the stalled client, who later reads what was promised."""
    server, stalled, files = crowded
    relieve_the_peer(stalled)
    server.client.execute("block-commit", job_id="j0", device="chain", top_node="chain-1", base_node="chain-2")
    server.client.wait_status("j0", "null")
    server.client.execute("quit")
    assert server.daemon.exit_status() == 0
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x33 1M 128k", "-c", "read -P 0x34 1536k 64k", files[0])
    for image in (files[0], files[2]):
        run("qemu-img", "check", "-q", image)


def test_an_active_commit_pivots(crowded: tuple[Server, wire.Connection, list[Path]]) -> None:
    """So does an active commit, which takes the export along while the stalled client's replies are on their way."""
    server, stalled, _ = crowded
    relieve_the_peer(stalled)
    server.client.execute("block-commit", job_id="j0", device="chain", base_node="chain-2")
    server.client.wait_status("j0", "ready")
    server.client.execute("block-job-complete", device="j0")
    server.client.wait_status("j0", "null")
    assert [export["node-name"] for export in server.client.execute("query-block-exports")] == ["chain-2"]


def test_only_hard_removal_ends_it(crowded: tuple[Server, wire.Connection, list[Path]]) -> None:
    """Removal in safe mode is refused, mode hard cuts the client off, and the node is free."""
    server, stalled, _ = crowded
    with pytest.raises(CommandError, match=r"^GenericError: export 'chain' still in use$"):
        server.client.execute("block-export-del", id="chain")
    relieve_the_peer(stalled)
    server.client.execute("block-export-del", id="chain", mode="hard")
    server.client.wait_event(lambda event: event["event"] == "BLOCK_EXPORT_DELETED")
    assert stalled.closed()
    server.client.execute("blockdev-del", node_name="chain")


def test_the_server_stops(crowded: tuple[Server, wire.Connection, list[Path]]) -> None:
    """nbd-server-stop and quit wait for nobody who does not read."""
    server, stalled, _ = crowded
    relieve_the_peer(stalled)
    server.client.execute("nbd-server-stop")
    assert stalled.closed()
    server.client.execute("blockdev-del", node_name="chain")
    server.client.execute("quit")
    assert server.daemon.exit_status() == 0


def test_when_it_reads_again_every_byte_is_there(crowded: tuple[Server, wire.Connection, list[Path]]) -> None:
    """The stalled client gets all it asked for, once it takes it."""
    server, stalled, _ = crowded
    server.alive()
    reads = dict.fromkeys(range(16), 0)
    first = True
    while any(covered < _BIG for covered in reads.values()):
        if not first:
            assert stalled.exactly(4) == wire.CHUNK_MAGIC.to_bytes(4, "big")
        first = False
        head = stalled.exactly(16)
        _, kind, cookie, length = struct.unpack(">HHQI", head)
        payload = stalled.exactly(length)
        assert kind in (1, 2)
        reads[cookie] += length - 8 if kind == 1 else int.from_bytes(payload[8:], "big")
    with contextlib.closing(stalled.sock):
        assert set(reads.values()) == {_BIG}
