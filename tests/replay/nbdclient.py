"""The held NBD connections of recorded scenarios: simple replies, no contexts, one action at a time."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Any

from tests.daemons import PATIENCE
from tests.replay.deviations import MismatchError

_REQUEST = struct.Struct(">IHHQQI")
_COMMANDS = {"read": 0, "write": 1, "flush": 3, "trim": 4, "zero": 6}
_SILENCE = 0.3  # seconds without a byte that stand for the recorded wait

Step = dict[str, Any]


class NbdClient:
    """One connection. Steps return what is compared with the recording."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(PATIENCE)
        self._sock.connect(str(path))
        self._awaited: list[Step] = []
        self._is_negotiating = False

    def close(self) -> None:
        self._sock.close()

    def act(self, step: Step) -> Step:
        """Do what ``step`` says; the members it should have."""
        match step["do"].split():
            case ["connect"]:
                return self._connect(step["export"])
            case ["connect-only"]:
                return self._within(step, lambda: {"result": f"greeting {self._exactly(18).hex()}"})
            case ["greeting"]:
                return {"result": self._exactly(18).hex()}
            case ["expect-eof"]:
                return self._within(step, self._eof)
            case ["disconnect"]:
                self._ask(2, 0, 0)
                return {"result": "closed" if not self._sock.recv(1) else "open"}
            case ["close"]:
                self.close()
                return {}
            case ["reply"]:
                return self._within(step, lambda: self._reply(self._awaited.pop(0)))
            case ["GO", name]:
                return {"result": self._go(name)}
            case [command]:
                return self._command(command, step)
        raise MismatchError(f"no such action: {step['do']}")

    def crowd(self) -> list[int]:
        """Ask for 18 reads and then for something unknown; the cookies in the order of the replies."""
        asked = [_REQUEST.pack(0x25609513, 0, 0, cookie, 512 * cookie, 512) for cookie in range(18)]
        self._sock.sendall(b"".join(asked) + _REQUEST.pack(0x25609513, 0, 99, 99, 0, 0))
        cookies = []
        for _ in range(len(asked) + 1):
            _, number, cookie = struct.unpack(">IIQ", self._exactly(16))
            cookies.append(cookie)
            self._exactly(0 if number else 512)
        return cookies

    def _within(self, step: Step, action: Any) -> Step:
        """``action``, or the recorded silence."""
        if step.get("result") == "timeout":
            self._sock.settimeout(_SILENCE)
        try:
            result: Step = action()
        except TimeoutError:
            result = {"result": "timeout"}
        finally:
            self._sock.settimeout(PATIENCE)
        return result

    def _connect(self, name: str) -> Step:
        self._exactly(18)
        kind, data, size, flags = self._enter(name)
        if kind != 1:
            return {"result": f"error {data.decode()}"}
        return {"result": "ok", "size": size, "transmission-flags": f"0x{flags:04x}"}

    def _go(self, name: str) -> str:
        kind, data, *_ = self._enter(name, once=True)
        return f"reply type {kind if kind < 1 << 31 else hex(kind)}" + (f" {data.decode()}" if kind >= 1 << 31 else "")

    def _enter(self, name: str, *, once: bool = False) -> tuple[int, bytes, int, int]:
        flags = b"" if self._is_negotiating else struct.pack(">I", 3)
        self._is_negotiating = True
        data = struct.pack(">I", len(name)) + name.encode() + b"\0\0"
        self._sock.sendall(flags + struct.pack(">8sII", b"IHAVEOPT", 7, len(data)) + data)
        size = transmission = 0
        while True:
            _, _, kind, length = struct.unpack(">QIII", self._exactly(20))
            payload = self._exactly(length)
            if kind == 3 and payload[:2] == b"\0\0":
                size, transmission = struct.unpack(">QH", payload[2:12])
            if kind != 3 or once:
                return kind, payload, size, transmission

    def _command(self, name: str, step: Step) -> Step:
        length = step.get("length", 0)
        payload = bytes([step.get("byte", 0x5A)]) * length if name == "write" else b""
        self._ask(_COMMANDS[name], step.get("offset", 0), length, payload)
        asked = {"reads": length if name == "read" else 0}
        if step.get("no_wait"):
            self._awaited.append(asked)
            return {"result": "sent"}
        return self._reply(asked)

    def _ask(self, command: int, offset: int, length: int, payload: bytes = b"") -> None:
        self._sock.sendall(_REQUEST.pack(0x25609513, 0, command, 7, offset, length) + payload)

    def _reply(self, asked: Step) -> Step:
        header = self._exactly(16)
        if not header:
            return {"result": "eof"}
        number = struct.unpack(">I", header[4:8])[0]
        if number:
            return {"result": f"error {number}"}
        data = self._exactly(asked["reads"])
        return {"result": "ok"} | ({"data": data[:16].hex()} if data else {})

    def _eof(self) -> Step:
        return {"result": "eof" if not self._sock.recv(1) else "more"}

    def _exactly(self, count: int) -> bytes:
        """So many bytes; none at the end of the stream."""
        data = b""
        while len(data) < count:
            try:
                piece = self._sock.recv(count - len(data))
            except ConnectionResetError:
                piece = b""
            if not piece:
                return b""
            data += piece
        return data
