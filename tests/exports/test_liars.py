"""Whatever a client sends, it gets errors or is hung up on; the daemon lives and others are served."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path

import pytest

from tests.daemons import PEER, CommandError, under_test
from tests.exports import wire
from tests.exports.liars import conversation
from tests.exports.serving import Server

not_on_the_peer = pytest.mark.skipif(under_test() == PEER, reason="a defect of the peer's")

SEED = int(os.environ.get("LIARS_SEED", "1"))
COUNT = int(os.environ.get("LIARS_COUNT", "20000"))


def test_a_few_hundred_liars(server: Server) -> None:
    """The short form."""
    lie(server, range(300))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_many_liars(server: Server) -> None:
    """The long form: LIARS_COUNT conversations from LIARS_SEED on."""
    print(f"LIARS_SEED={SEED} LIARS_COUNT={COUNT}")
    lie(server, range(SEED, SEED + COUNT))


def lie(server: Server, seeds: range) -> None:
    """Each seed's conversation on a connection of its own, with a witness who must be served throughout."""
    server.serve("qcow2")
    with wire.connection(server.dial()) as witness:
        witness.enter("qcow2", structured=True)
        for seed in seeds:
            if under_test() == PEER and any(
                wire.option(wire.LIST) in message[17:] for message in conversation(seed, "qcow2")
            ):
                continue  # trailing bytes that look like an option end the peer
            tell(server, seed)
            answer = witness.call(wire.request(wire.READ, 4031 << 10, 2048, cookie=seed), 2048)
            assert answer == wire.Answer(seed, 0, bytes(1024) + b"\x22" * 1024), f"the witness, after seed {seed}"
            assert server.daemon.process.poll() is None, f"seed {seed} ended the daemon: {server.daemon.stderr()}"
    server.alive()
    assert "Traceback" not in server.daemon.stderr()


def tell(server: Server, seed: int) -> None:
    """One conversation, with the end of file behind it: the server must hang up, soon."""
    with server.dial() as sock:
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(b"".join(conversation(seed, "qcow2")))
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 20):
                    pass
        except TimeoutError:
            raise AssertionError(f"after seed {seed} the server does not hang up") from None


@not_on_the_peer
@pytest.mark.parametrize("number", [wire.LIST_META, wire.SET_META])
@pytest.mark.parametrize("behind", [b"\0", b"IHAVEOPT", wire.option(wire.LIST), bytes(5000)])
def test_bytes_behind_the_queries_are_an_error_and_gone(server: Server, number: int, behind: bytes) -> None:
    """They end the peer; here they are ERR_INVALID, and the next option is understood."""
    server.serve("qcow2")
    with wire.connection(server.dial()) as client:
        client.ask(wire.option(wire.STRUCTURED))
        replies = client.ask(wire.contexts(number, "qcow2", "base:allocation", behind=behind))
        assert [kind for kind, _ in replies] == [wire.ERR_INVALID]
        client.enter("qcow2")
        client.structured = True
        assert client.call(wire.request(wire.READ, 65535, 2), 2).data == b"\0\x21"
    server.alive()


@not_on_the_peer
def test_an_iothread_in_use_is_not_deleted(server: Server) -> None:
    """Deleting it ends the peer at the next request; here it is refused while the export is there."""
    server.client.execute("object-add", qom_type="iothread", id="io")
    server.serve("qcow2", iothread="io")
    with wire.connection(server.dial()) as client:
        client.enter("qcow2")
        with pytest.raises(CommandError):
            server.client.execute("object-del", id="io")
        assert client.call(wire.request(wire.READ, 65535, 2), 2).data == b"\0\x21"
    server.client.execute("block-export-del", id="qcow2", mode="hard")
    server.client.wait_event(lambda event: event["event"] == "BLOCK_EXPORT_DELETED")
    server.client.execute("object-del", id="io")


@not_on_the_peer
@pytest.mark.parametrize("structured", [False, True])
def test_a_read_that_fails_is_answered(server: Server, structured: bool) -> None:
    """The peer hangs up on a structured read; here it is EIO in either mode, and the next read is served."""
    fault = {"event": "none", "iotype": "read", "errno": 5, "once": True}
    file = {"driver": "file", "filename": "disk"}
    (server.directory / "disk").write_bytes(b"d" * 65536)
    faulty = {"driver": "blkdebug", "node-name": "faulty", "image": file, "inject-error": [fault]}
    server.client.execute_with("blockdev-add", {"driver": "raw", "node-name": "disk", "file": faulty})
    server.export("disk")
    with wire.connection(server.dial()) as client:
        client.enter("disk", structured=structured)
        assert client.call(wire.request(wire.READ, 0, 512, cookie=9), 512) == wire.Answer(9, 5)
        assert client.call(wire.request(wire.READ, 0, 512, cookie=10), 512).data == b"d" * 512


@not_on_the_peer
def test_a_null_node_reads_as_zeroes(server: Server) -> None:
    """The peer hands out what its memory held before."""
    server.client.execute("blockdev-add", driver="null-co", node_name="null", size=1 << 20)
    server.export("null")
    with wire.connection(server.dial()) as client:
        client.enter("null")
        for _ in range(4):
            assert client.call(wire.request(wire.WRITE, 0, 65536, payload=b"secret--" * 8192)).error == 0
            assert client.call(wire.request(wire.READ, 0, 65536), 65536).data == bytes(65536)


@not_on_the_peer
def test_a_regular_file_at_the_path_stays(server: Server, tmp_path: Path) -> None:
    """The peer unlinks it; here the start is refused, and a socket that nobody serves is replaced."""
    server.client.execute("nbd-server-stop")
    (tmp_path / "nbd.sock").write_text("precious")
    with pytest.raises(CommandError):
        server.listen()
    assert (tmp_path / "nbd.sock").read_text() == "precious"
    (tmp_path / "nbd.sock").unlink()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "nbd.sock"))
    server.listen()
    server.serve("raw")
    with wire.connection(server.dial()) as client:
        client.enter("raw")


@not_on_the_peer
def test_the_socket_goes_with_the_daemon(server: Server, tmp_path: Path) -> None:
    """The peer leaves it behind, dead."""
    server.client.execute("quit")
    assert server.daemon.exit_status() == 0
    assert not (tmp_path / "nbd.sock").exists()


def test_an_option_of_gigabytes_is_not_waited_for(server: Server) -> None:
    """A length no option has ends the connection, or is answered by an error, before the bytes come."""
    server.serve("raw")
    with wire.connection(server.dial()) as client:
        client.sock.sendall(struct.pack(">8sII", b"IHAVEOPT", wire.GO, 0xFFFFFFFF))
        client.sock.shutdown(socket.SHUT_WR)
        assert client.closed()
    server.alive()
