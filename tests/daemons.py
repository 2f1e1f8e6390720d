"""Start a daemon as a real process, qmpd or the peer, and talk QMP to it from outside.

Everything here is plain blocking code on purpose: it is an outsider's view, sharing nothing with the program under
test. The harnesses built on it take a :class:`Program`, so that each can be pointed at qemu-storage-daemon as well; a
harness that the peer itself does not pass is wrong. ``QMPD_TEST_PROGRAM`` names the program to test: ``qmpd`` (the
default) or ``qemu-storage-daemon``; ``QMPD_COMMAND`` says how qmpd is called, if not as ``python -m qmpd``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tools import need

#: Seconds after which a silent daemon counts as hung. Generous: the suite may share its machine.
PATIENCE = 20.0


class HungError(AssertionError):
    """The daemon did not answer within :data:`PATIENCE`."""


class StartError(AssertionError):
    """The program ended before it served; the text is what it wrote to standard error."""


class CommandError(Exception):
    """An error reply."""

    def __init__(self, error_class: str, desc: str) -> None:
        super().__init__(f"{error_class}: {desc}")
        self.error_class = error_class
        self.desc = desc


class Conversation:
    """A byte stream to a monitor, read by line. No knowledge of QMP beyond CRLF."""

    def __init__(self, sock: socket.socket, patience: float = PATIENCE) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._patience = patience
        self._eof = False

    def send(self, data: bytes) -> None:
        """Write all of ``data``; a server that has hung up already is not an error here."""
        self._sock.settimeout(self._patience)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._sock.sendall(data)

    def finish_sending(self) -> None:
        """Half-close: the server sees the end of its input, and may still answer."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def line(self, patience: float | None = None) -> bytes | None:
        """The next CRLF-terminated line with its end, or None at end of file. Raises HungError."""
        deadline = time.monotonic() + (self._patience if patience is None else patience)
        while (end := self._buffer.find(b"\n")) < 0:
            if self._eof or not self._fill(deadline):
                return None
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return line

    def rest(self) -> bytes:
        """Everything up to end of file. Raises HungError."""
        deadline = time.monotonic() + self._patience
        while not self._eof and self._fill(deadline):
            pass
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    def close(self) -> None:
        self._sock.close()

    def _fill(self, deadline: float) -> bool:
        left = deadline - time.monotonic()
        if left <= 0:
            raise HungError("no answer in time")
        self._sock.settimeout(left)
        try:
            data = self._sock.recv(1 << 20)
        except TimeoutError:
            raise HungError("no answer in time") from None
        except ConnectionResetError:
            data = b""
        self._eof = not data
        self._buffer += data
        return bool(data)


class Client(Conversation):
    """A negotiated QMP client. Events that arrive meanwhile are kept in ``events``."""

    def __init__(self, sock: socket.socket, patience: float = PATIENCE, *, negotiate: bool = True) -> None:
        super().__init__(sock, patience)
        self.events: list[dict[str, Any]] = []
        if negotiate:
            self.greeting = self.message()
            self.send(b'{"execute": "qmp_capabilities"}')
            # The peer, if it was dialled while it started, sometimes greets twice.
            while "QMP" in (reply := self.message()):
                pass
            self._result(reply)

    def message(self, patience: float | None = None) -> dict[str, Any]:
        """The next message, whatever it is. Raises HungError; EOFError if the server has closed."""
        line = self.line(patience)
        if line is None:
            raise EOFError("the server closed the connection")
        value = json.loads(line)
        assert isinstance(value, dict)
        return value

    def call(self, command: dict[str, Any]) -> dict[str, Any]:
        """Send a command object as it is and return its whole reply."""
        self.send(json.dumps(command).encode())
        while "event" in (message := self.message()):
            self.events.append(message)
        return message

    def execute(self, name: str, /, **arguments: Any) -> Any:
        """Run a command; underscores in argument names stand for hyphens. Raises CommandError."""
        command: dict[str, Any] = {"execute": name}
        if arguments:
            command["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        return self._result(self.call(command))

    def execute_with(self, name: str, arguments: dict[str, Any]) -> Any:
        """Run a command with its arguments spelled as on the wire. Raises CommandError."""
        return self._result(self.call({"execute": name, "arguments": arguments}))

    def wait_event(self, wanted: Callable[[dict[str, Any]], bool], patience: float = PATIENCE) -> dict[str, Any]:
        """The first event, old or new, that ``wanted`` accepts. It and what came before it are forgotten."""
        deadline = time.monotonic() + patience
        while True:
            for index, event in enumerate(self.events):
                if wanted(event):
                    del self.events[: index + 1]
                    return event
            message = self.message(max(deadline - time.monotonic(), 0.0))
            assert "event" in message, f"a reply that nobody asked for: {message}"
            self.events.append(message)

    def wait_status(self, job: str, status: str, patience: float = PATIENCE) -> None:
        """Wait for JOB_STATUS_CHANGE of ``job`` to ``status``."""
        data = {"id": job, "status": status}
        self.wait_event(lambda event: event["event"] == "JOB_STATUS_CHANGE" and event["data"] == data, patience)

    @staticmethod
    def _result(reply: dict[str, Any]) -> Any:
        if "error" in reply:
            raise CommandError(reply["error"]["class"], reply["error"]["desc"])
        return reply["return"]


@dataclass(frozen=True)
class Program:
    """A daemon that takes qemu-storage-daemon's command line."""

    name: str
    argv: tuple[str, ...]

    @property
    def installed(self) -> bool:
        return shutil.which(self.argv[0]) is not None

    def bound_by_modes(self) -> Program:
        """The same program, for tests of file modes: as root, who otherwise may do anything, but without that right."""
        if os.geteuid() != 0:
            return self
        need("setpriv")
        return Program(self.name, ("setpriv", "--bounding-set=-dac_override,-dac_read_search", *self.argv))

    def version(self) -> str:
        """First line of --version."""
        run = subprocess.run([*self.argv, "--version"], capture_output=True, text=True, check=True)
        return run.stdout.splitlines()[0]

    def run(self, *options: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run to its end; for command lines that fail or only print."""
        return subprocess.run([*self.argv, *options], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE)

    @contextlib.contextmanager
    def start(self, cwd: Path, *options: str, monitor: str = "", ready: bool = True) -> Iterator[Daemon]:
        """Run with one monitor on a UNIX socket, in ``cwd``; ``options`` come before the monitor.

        Returns once the program serves (its pid file is there), or at once with ``ready=False``. On leaving, the
        process is stopped if it still runs. Standard error is kept, see :meth:`Daemon.stderr`.
        """
        with tempfile.TemporaryDirectory(prefix="qmpd-") as directory, tempfile.TemporaryFile() as errors:
            path, pid_file = os.path.join(directory, "qmp.sock"), os.path.join(directory, "pid")
            chardev = f"socket,id=test-monitor,path={path},server=on,wait=off"
            argv = [*self.argv, *options, "--chardev", chardev, "--monitor", "test-monitor" + monitor]
            argv += ["--pidfile", pid_file]
            process = subprocess.Popen(
                argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
            )
            daemon = Daemon(process, path, errors)
            try:
                if ready:
                    daemon.wait_for(Path(pid_file))
                yield daemon
            finally:
                daemon.stop()


@dataclass
class Daemon:
    """A running process and the way to its monitor."""

    process: subprocess.Popen[bytes]
    socket_path: str
    _errors: Any

    def wait_for(self, pid_file: Path) -> None:
        """Until the program has written its pid, which it does when all else is set up. Raises HungError, StartError.

        A client that connects to the peer earlier than this is sometimes greeted twice, or not at all.
        """
        deadline = time.monotonic() + PATIENCE
        while not (pid_file.exists() and pid_file.read_bytes().endswith(b"\n")):
            if self.process.poll() is not None:
                raise StartError(self.stderr())
            if time.monotonic() > deadline:
                raise HungError("the program did not start in time")
            time.sleep(0.002)

    def dial(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        sock.connect(self.socket_path)
        return sock

    @contextlib.contextmanager
    def client(self, patience: float = PATIENCE) -> Iterator[Client]:
        """A negotiated client, closed on leaving."""
        with contextlib.closing(Client(self.dial(), patience)) as client:
            yield client

    def stderr(self) -> str:
        """What the process has written to standard error so far."""
        self._errors.seek(0)
        return str(self._errors.read().decode(errors="replace"))

    def exit_status(self) -> int:
        """Wait for the process to end by itself. Raises HungError."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise HungError("the process did not exit") from None

    def stop(self) -> None:
        """End the process: politely, then not."""
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


QMPD = Program("qmpd", tuple(shlex.split(os.environ.get("QMPD_COMMAND", ""))) or (sys.executable, "-m", "qmpd"))
PEER = Program("qemu-storage-daemon", ("qemu-storage-daemon",))


def under_test() -> Program:
    """The program the harnesses run against, from the environment."""
    name = os.environ.get("QMPD_TEST_PROGRAM", QMPD.name)
    return {QMPD.name: QMPD, PEER.name: PEER}[name]
