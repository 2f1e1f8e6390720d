"""A process that has imported the daemon already, and forks off one running daemon after another.

A line of JSON comes in: orders, working directory, socket; a line of JSON goes out when the child has started, and one
with its wait status when it has ended.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.crash.instrument import UNHARMED, Instrument, Orders
from tests.daemons import PATIENCE, Client

_LISTENING = 3  # number of the monitor's socket in the child


class Child:
    """A running daemon, and the way to it."""

    def __init__(self, server: Server, pid: int, socket_path: str) -> None:
        self._server = server
        self.pid = pid
        self._path = socket_path

    @contextmanager
    def client(self) -> Iterator[Client]:
        """A negotiated client."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(self._path)
            yield Client(sock)

    def wait(self) -> int:
        """How it ended, as os.waitstatus_to_exitcode says."""
        return int(self._server.answer()["status"])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Server:
    """The forking process, seen from outside. One child at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYDANTIC_DISABLE_PLUGINS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=Path(__file__).parents[2],
        )

    def start(self, directory: Path, orders: Orders = UNHARMED, words: Sequence[str] = ()) -> Child:
        """A daemon in ``directory``, with ``words`` on its command line; it listens already."""
        assert self._process.stdin is not None
        request = {"directory": str(directory), "orders": asdict(orders), "words": list(words)}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return Child(self, self.answer()["pid"], str(directory / "monitor"))

    def answer(self) -> dict[str, Any]:
        """The next line of the forking process."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the forking process is gone"
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self._process.communicate(timeout=PATIENCE)


def _serve() -> None:
    from qmpd import daemon

    gc.disable()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        os.chdir(request["directory"])
        if os.path.exists("monitor"):
            os.unlink("monitor")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("monitor")
            listening.listen()
            pid = os.fork()
            if pid == 0:
                _be_a_daemon(daemon.main, Orders(**request["orders"]), listening, request["words"])
        _say(pid=pid)
        _, status = os.waitpid(pid, 0)
        _say(status=os.waitstatus_to_exitcode(status))


def _be_a_daemon(main: Any, orders: Orders, listening: socket.socket, words: list[str]) -> None:
    os.dup2(listening.fileno(), _LISTENING)
    os.set_inheritable(_LISTENING, True)
    with open("errors", "ab") as errors:
        os.dup2(errors.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    try:
        Instrument(orders).install()
        status = main([*words, "--chardev", f"socket,id=m,fd={_LISTENING},server=on,wait=off", "--monitor", "m"])
    except BaseException:  # noqa: BLE001  the parent sees the status
        sys.excepthook(*sys.exc_info())
        status = 99
    sys.stderr.flush()
    os._exit(status)


def _say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve()
