"""Clients that others wrote commit a real chain; many clients at once; one that does not read."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.daemons import PEER, Client, Daemon, under_test
from tests.interop.chain import COMMIT, Chain
from tests.tools import need

one_client_only = pytest.mark.skipif(under_test() == PEER, reason="the peer serves one client at a time")


def test_the_qemu_qmp_library_commits(chain: Chain, daemon: Daemon) -> None:
    """QEMU's own asyncio client negotiates, opens a chain, commits and hears every event."""
    heard = asyncio.run(commit_with_library(chain, daemon.socket_path))
    assert heard == ["created", "running", "waiting", "pending", "concluded", "null"]
    assert daemon.exit_status() == 0
    assert chain.backing_of("top") == "base.qcow2"
    chain.verify()


async def commit_with_library(chain: Chain, path: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library uses what asyncio has deprecated
        from qemu.qmp import EventListener, QMPClient
    qmp = QMPClient("test")
    listener = EventListener(names={"JOB_STATUS_CHANGE"})
    qmp.register_listener(listener)
    await qmp.connect(path)
    for name, below in (("base", None), ("mid", "base"), ("top", "mid")):
        await qmp.execute("blockdev-add", chain.blockdev(name, below, read_only=name != "top"))
    await qmp.execute("block-commit", COMMIT)
    heard: list[str] = []
    while not heard or heard[-1] != "null":
        heard.append((await listener.get())["data"]["status"])
    await qmp.execute("quit")
    with contextlib.suppress(EOFError):
        await qmp.disconnect()
    return heard


def test_qmp_shell_commits(chain: Chain, daemon: Daemon) -> None:
    """QEMU's interactive shell, typed into by hand so to speak."""
    file = "file={'driver':'file','filename':'%s.qcow2'}"
    lines = [
        f"blockdev-add driver=qcow2 node-name=base read-only=true {file % 'base'}",
        f"blockdev-add driver=qcow2 node-name=mid read-only=true backing=base {file % 'mid'}",
        f"blockdev-add driver=qcow2 node-name=top backing=mid {file % 'top'}",
        "block-commit job-id=j0 device=top top-node=mid base-node=base auto-dismiss=false",
        "query-jobs",
    ]
    shell = Path(sys.executable).parent / "qmp-shell"
    typed = "".join(f"{line}\n" for line in lines)
    done = subprocess.run([shell, daemon.socket_path], input=typed, capture_output=True, text=True, timeout=60)
    assert done.stdout.count('{"return": {}}') == 4, done.stdout + done.stderr
    with daemon.client() as client:
        while client.execute("query-jobs")[0]["status"] != "concluded":
            pass
        assert "error" not in client.execute("query-jobs")[0]
        client.execute("job-dismiss", id="j0")
        client.execute("quit")
    assert daemon.exit_status() == 0
    assert chain.backing_of("top") == "base.qcow2"
    chain.verify()


def test_socat_with_single_quotes(daemon: Daemon) -> None:
    """A person with socat types what JSON does not allow and QMP does."""
    need("socat")
    typed = "{'execute':'qmp_capabilities'}\n{'execute':'query-jobs', 'id':'it\\'s me'}\n{'execute':'query-block'}"
    argv = ["socat", "-t10", "-", f"UNIX-CONNECT:{daemon.socket_path}"]
    done = subprocess.run(argv, input=typed.encode(), capture_output=True, timeout=60)
    greeting, *answers = done.stdout.decode().split("\r\n")
    assert greeting.startswith('{"QMP": ')
    assert answers == ['{"return": {}}', '{"return": [], "id": "it\'s me"}', '{"return": []}', ""]


@one_client_only
def test_two_hundred_clients_at_once(chain: Chain, daemon: Daemon) -> None:
    """All are greeted and served, and all hear all events of a job that one of them starts, in the same order."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(Client(daemon.dial()))) for _ in range(200)]
        chain.open(clients[0])
        for client in clients:
            client.send(b'{"execute":"query-jobs"}')
        for client in clients:
            assert client.message() == {"return": []}
        clients[100].execute_with("block-commit", COMMIT)
        stories = []
        for client in clients:
            client.wait_event(lambda event: event["data"].get("status") == "created")
            client.wait_status("j0", "null")
            stories.append(client.execute("query-block-jobs"))
        assert stories == [[]] * 200


@one_client_only
def test_a_client_that_never_reads_is_nobody_elses_problem(daemon: Daemon) -> None:
    """While one client asks for gigabytes and takes none, others are served; at the end even that one is gone."""
    glutton = daemon.dial()
    glutton.setblocking(False)
    with daemon.client() as client, contextlib.closing(glutton):
        greedy = b'{"execute":"qmp_capabilities"}' + b'{"execute":"query-qmp-schema"}' * 20000
        for _ in range(50):
            with contextlib.suppress(BlockingIOError, ConnectionError):
                greedy = greedy[glutton.send(greedy) :]
            assert client.execute("query-jobs") == []
        client.execute("quit")
    assert daemon.exit_status() == 0


@one_client_only
def test_clients_that_come_and_go_leave_nothing_behind(daemon: Daemon) -> None:
    """A thousand clients that hang up in every state of a conversation leave no descriptor open."""
    openings = (b"", b'{"exec', b'{"execute":"qmp_capabilities"}', b'{"execute":"qmp_capabilities"}{"execute":"query-j')
    with daemon.client() as client:
        descriptors = Path(f"/proc/{daemon.process.pid}/fd")
        client.execute("query-jobs")
        before = len(list(descriptors.iterdir()))
        for number in range(1000):
            with contextlib.closing(daemon.dial()) as sock:
                sock.sendall(openings[number % len(openings)])
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass
        client.execute("query-jobs")
        assert len(list(descriptors.iterdir())) <= before
