"""Replay recorded exchanges of bytes with an NBD server: images, nodes and exports as described, then what was sent.

What follows one send up to the next pause was recorded as one answer. At the end of an exchange that was not closed by
the server the client half-closes: the server says no more.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from pathlib import Path
from typing import Any

from tests.daemons import PATIENCE, PEER, Client, CommandError, under_test
from tests.replay import hosts
from tests.replay.deviations import MismatchError
from tests.tools import need

_SIZE = 1 << 20
_RAW = ((0, 0x11, 4096), (65536, 0x22, 65536), (1044480, 0x33, 4096))
_SOCKET = "nbd.sock"


class Images:
    """Images by the words that the recordings describe them with; each is made once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def put(self, image: dict[str, Any], directory: Path) -> list[dict[str, Any]]:
        """Files for ``image`` in ``directory``; arguments of blockdev-add for the nodes, ``d`` last."""
        content = image["content"]
        if "null device" in content:
            return [_null(content)]
        unmap = {"discard": "unmap"} if "discard=unmap" in image.get("node", "") else {}
        if image["format"] == "raw":
            _copy(self._raw(), directory / "disk")
            return [_node("raw", "d", "disk", unmap)]
        _copy(self._qcow2(backed="backing file" in content), directory / "disk")
        if "backing file" not in content:
            return [_node("qcow2", "d", "disk", unmap)]
        _copy(self._directory / "backing.qcow2", directory / "backing.qcow2")
        return [_node("qcow2", "below", "backing.qcow2", {}), _node("qcow2", "d", "disk", unmap) | {"backing": "below"}]

    def _raw(self) -> Path:
        path = self._directory / "disk.raw"
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(_SIZE)
                for offset, byte, length in _RAW:
                    file.seek(offset)
                    file.write(bytes([byte]) * length)
        return path

    def _qcow2(self, *, backed: bool) -> Path:
        path = self._directory / f"disk{backed}.qcow2"
        if path.exists():
            return path
        need("qemu-img", "qemu-io")
        below = []
        if backed:
            self._make("backing.qcow2", "write -P 0x44 512k 128k")
            below = ["-b", "backing.qcow2", "-F", "qcow2"]
        self._make(path.name, "write -P 0x11 0 64k", "write -z 64k 64k", "write -P 0x22 128k 64k", options=below)
        return path

    def _make(self, name: str, *writes: str, options: list[str] | None = None) -> None:
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", *(options or []), name, "1M"]
        subprocess.run(argv, cwd=self._directory, check=True)
        words = [word for write in writes for word in ("-c", write)]
        subprocess.run(["qemu-io", "-f", "qcow2", *words, name], cwd=self._directory, check=True, capture_output=True)


def _node(driver: str, name: str, filename: str, options: dict[str, Any]) -> dict[str, Any]:
    file = {"driver": "file", "filename": filename} | options
    return {"driver": driver, "node-name": name, "file": file} | options


def _null(content: str) -> dict[str, Any]:
    image = {"driver": "null-co", "size": _SIZE}
    node: dict[str, Any] = {"driver": "blkdebug", "node-name": "d", "image": image}
    if "align 4096" in content:
        return node | {"align": 4096}
    types, number = (
        (["read"], 5) if "every read fails" in content else (["write", "write-zeroes", "discard", "flush"], 28)
    )
    faults = [{"event": "none", "iotype": kind, "errno": number} for kind in types]
    return node | {"discard": "unmap", "inject-error": faults}


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--sparse=auto", source, target], check=True)


def replay(case: dict[str, Any], images: Images, directory: Path) -> None:
    """Raise MismatchError unless the program under test answers as recorded."""
    nodes = images.put(case["export"]["image"], directory)
    with hosts.start(directory) as host, contextlib.closing(Client(host.dial())) as client:
        try:
            _prepare(client, case, nodes)
        except CommandError as error:
            raise MismatchError(str(error)) from error
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(directory / _SOCKET))
            _exchange(case, sock)
        if under_test() != PEER or case.get("exit-status", 0) >= 0:
            assert client.execute("query-block-exports") is not None  # it lives


def _prepare(client: Client, case: dict[str, Any], nodes: list[dict[str, Any]]) -> None:
    for words in case.get("objects", ()):
        kind, *rest = words.split(",")
        client.execute_with("object-add", {"qom-type": kind} | dict(word.split("=") for word in rest))
    for node in nodes:
        client.execute_with("blockdev-add", node)
    for command in case.get("before", ()):
        client.execute_with(command["execute"], command["arguments"])
    address = {"type": "unix", "data": {"path": _SOCKET}}
    client.execute_with("nbd-server-start", {"addr": address} | case.get("server", {}))
    described = {key: value for key, value in case["export"].items() if key not in ("image", "all")}
    for export in case["export"].get("all", [described]):
        client.execute_with("block-export-add", export)


def _exchange(case: dict[str, Any], sock: socket.socket) -> None:
    steps = case["exchange"]
    loose = case.get("timing-dependent", False)
    half_closed = False
    for number, step in enumerate(steps):
        if "send_hex" in step:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(bytes.fromhex(step["send_hex"]))
        elif "half-close" in step:
            half_closed = True
            sock.shutdown(socket.SHUT_WR)
        else:
            _compare(f"answer {number}", _read(sock, len(step["recv_hex"]) // 2), step["recv_hex"], loose=loose)
    if not case["closed"] and not half_closed:
        if "tls-creds" in case.get("server", {}):
            return  # the end of a connection below TLS is a failure of its own
        sock.shutdown(socket.SHUT_WR)
    rest = _read(sock, 1)
    if rest and not loose:
        raise MismatchError(f"more than was recorded: {rest.hex()}")


def _read(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        try:
            piece = sock.recv(count - len(data))
        except ConnectionResetError:
            piece = b""
        except TimeoutError:
            raise MismatchError(f"silence after {data.hex()}") from None
        if not piece:
            break
        data += piece
    return data


def _compare(what: str, got: bytes, recorded: str, *, loose: bool) -> None:
    wanted = bytes.fromhex(recorded)
    if loose and sorted(got) == sorted(wanted):
        return
    if got != wanted:
        raise MismatchError(f"{what}\n  got      {got.hex()}\n  recorded {recorded}")
