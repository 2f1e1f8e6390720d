"""Sockets: whose file is taken over, what is left behind, and how failures read (spec/qmp-protocol.md section 15)."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio

from qmpd.control import listen
from qmpd.errors import QmpdError


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A short name, since the kernel allows 107 bytes."""
    monkeypatch.chdir(tmp_path)
    return "s"


def test_a_live_daemons_socket_is_left_alone(path: str) -> None:
    """Also one whose backlog is full; the peer unlinks it."""
    for backlog in (8, 0):
        with socket.socket(socket.AF_UNIX) as owner, socket.socket(socket.AF_UNIX) as waiting:
            owner.bind(path)
            owner.listen(backlog)
            waiting.setblocking(False)
            waiting.connect(path)
            with pytest.raises(QmpdError, match=r"^Failed to bind socket to s: Address already in use$"):
                listen.bind_unix(path)

            assert os.path.exists(path)
        os.unlink(path)


def test_a_stale_socket_is_replaced(path: str) -> None:
    """A daemon that was killed leaves its file behind."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with listen.bind_unix(path) as server, listen.connect_unix(path):
        assert listen.is_listening(server)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda p: p.symlink_to("elsewhere")])
def test_what_is_no_socket_is_never_removed(path: str, make: object) -> None:
    """A regular file, a folder, a link."""
    make(Path(path))  # type: ignore[operator]
    with pytest.raises(QmpdError, match="Address already in use"):
        listen.bind_unix(path)

    assert os.path.lexists(path)


def test_failures_read_as_the_peers(path: str) -> None:
    """One text each."""
    long = "x" * 108
    texts = {
        lambda: listen.bind_unix("/nope/x"): "Failed to bind socket to /nope/x: No such file or directory",
        lambda: listen.connect_unix("nope"): "Failed to connect to 'nope': No such file or directory",
        lambda: listen.bind_unix(long): f"UNIX socket path '{long}' is too long",
        lambda: listen.inherit(-1): "File descriptor '-1' is not a socket",
        lambda: listen.connect_tcp("127.0.0.1", "x"): (
            "address resolution failed for 127.0.0.1:x: Servname not supported for ai_socktype"
        ),
    }
    for call, text in texts.items():
        with pytest.raises(QmpdError) as caught:
            call()
        assert caught.value.desc == text


def test_tcp_ports(path: str) -> None:
    """Any free port; a taken one; a closed one."""
    with listen.bind_tcp("127.0.0.1", "0") as server:
        port = str(server.getsockname()[1])
        with pytest.raises(QmpdError, match=r"^Failed to find an available port: Address already in use$"):
            listen.bind_tcp("127.0.0.1", port)
        with listen.connect_tcp("127.0.0.1", port) as client:
            assert not listen.is_listening(client)
            assert listen.is_listening(server)
    with pytest.raises(QmpdError, match=rf"^Failed to connect to '127.0.0.1:{port}': Connection refused$"):
        listen.connect_tcp("127.0.0.1", port)


async def test_the_socket_file_goes_with_its_listener(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the process is by then; but not if another daemon has put its own there."""
    listener = listen.Listener(listen.bind_unix(path), path=path)
    assert listener.address == "unix:s"
    monkeypatch.chdir("/")
    full = Path(os.path.realpath("/")).joinpath(listener._path or "")
    assert full.is_socket()
    listener.close()
    assert not full.exists()

    monkeypatch.chdir(full.parent)
    listener = listen.Listener(listen.bind_unix(path), path=path)
    os.unlink(path)
    with listen.bind_unix(path):
        listener.close()
        assert full.is_socket()


async def test_connections_are_handed_on_with_their_credentials(path: str) -> None:
    """All that come; a UNIX socket tells who they are."""
    listener = listen.Listener(listen.bind_unix(path), path=path)
    accepted: list[socket.socket] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, accepted.append)
        clients = [listen.connect_unix(path) for _ in range(3)]
        while len(accepted) < 3:
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    listener.close()

    assert {listen.peer(sock, "x").pid for sock in accepted} == {os.getpid()}
    assert listen.peer(accepted[0], "label").uid == os.getuid()
    for sock in (*clients, *accepted):
        sock.close()


async def test_a_shortage_of_descriptors_passes(
    path: str, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """The connection is accepted when there are some again."""
    listener = listen.Listener(listen.bind_unix(path), path=path)
    real, failures = listener._sock, iter([24, 24])

    class Short:
        """A socket whose accept() fails twice with EMFILE."""

        fileno = real.fileno
        close = real.close

        def accept(self) -> tuple[socket.socket, object]:
            for number in failures:
                raise OSError(number, "too many")
            return real.accept()

    listener._sock = Short()  # type: ignore[assignment]
    with listen.connect_unix(path), await listener.accept() as sock:
        assert not listen.is_listening(sock)
    listener.close()
