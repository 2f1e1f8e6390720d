"""Guests that remember every byte, and a manager that reshapes the chain below them in random order."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

from tests.daemons import CommandError
from tests.exports import wire
from tests.exports.serving import Server, run

REGION = 1 << 20  # bytes that one guest owns
GUESTS = 4
SIZE = (GUESTS + 1) * REGION  # the last region is read by all and written by none
_LONGEST = 160 << 10  # bytes of a request
_PATIENCE = 120.0


class Guest(threading.Thread):
    """A connection that works on its own region, and reads the shared one, until told to stop."""

    def __init__(self, server: Server, number: int, seed: int, shared: bytes, stop: threading.Event) -> None:
        super().__init__(name=f"guest{number}")
        self.content = bytearray(REGION)
        self.requests = 0
        self.failure: BaseException | None = None
        self._start, self._rng = number * REGION, random.Random(seed * 1000 + number)
        self._shared, self._stopping = shared, stop
        self._connection = wire.Connection(server.dial(_PATIENCE))
        self._connection.enter("disk", structured=number % 2 == 1)

    def run(self) -> None:
        try:
            with self._connection.sock:
                while not self._stopping.is_set():
                    self._request()
                    self.requests += 1
        except BaseException as failure:  # noqa: BLE001 - shown by the test
            self.failure = failure
            self._stopping.set()

    def _request(self) -> None:
        length = self._rng.randrange(1, _LONGEST)
        start = self._rng.randrange(REGION - length)
        if self._rng.random() < 0.5:
            unit = self._rng.choice((512, 4096, 65536))
            start, length = start // unit * unit, max(length // unit * unit, unit)
        end = start + length
        fua = self._rng.choice((0, 0, 0, 1))
        match self._rng.choice("rrrrwwwwztsfbb"):
            case "b":
                self._requests()
            case "r":
                assert self._read(start, length) == self.content[start:end], f"{self.name} at {start}+{length}"
            case "s":
                answer = self._call(wire.READ, GUESTS * REGION + start, length)
                assert answer == self._shared[start:end], f"the shared region at {start}+{length}"
            case "w":
                data = self._rng.randbytes(32) * (length // 32 + 1)
                self._call(wire.WRITE, self._start + start, length, fua, data[:length])
                self.content[start:end] = data[:length]
            case "z":
                self._call(wire.ZERO, self._start + start, length, fua | self._rng.choice((0, 2)))
                self.content[start:end] = bytes(length)
            case "t":
                self._call(wire.TRIM, self._start + start, length, fua)
                after = self._read(start, length)
                assert all(new in (0, old) for new, old in zip(after, self.content[start:end], strict=True))
                self.content[start:end] = after
            case "f":
                self._call(wire.FLUSH, 0, 0)

    def _requests(self) -> None:
        """A dozen small ones, in flight together."""
        unit, command = self._rng.choice((512, 4096, 5000, 20480)), self._rng.choice((wire.READ, wire.WRITE))
        starts = [slot * unit for slot in self._rng.sample(range(REGION // unit), 12)]
        payloads = [self._rng.randbytes(unit) if command == wire.WRITE else b"" for _ in starts]
        packet = (
            wire.request(command, self._start + start, unit, cookie=number, payload=payload)
            for number, (start, payload) in enumerate(zip(starts, payloads, strict=True))
        )
        self._connection.sock.sendall(b"".join(packet))
        answers = self._connection.answers(12, unit if command == wire.READ else 0)
        assert sorted(answer.cookie for answer in answers) == list(range(12))
        for answer in answers:
            assert answer.error == 0, f"{self.name}: command {command}: {answer}"
            start = starts[answer.cookie]
            if command == wire.READ:
                assert answer.data == self.content[start : start + unit], f"{self.name} at {start}+{unit}"
            else:
                self.content[start : start + unit] = payloads[answer.cookie]

    def _read(self, start: int, length: int) -> bytes:
        return self._call(wire.READ, self._start + start, length)

    def _call(self, command: int, offset: int, length: int, flags: int = 0, payload: bytes = b"") -> bytes:
        data = wire.request(command, offset, length, cookie=self.requests, flags=flags, payload=payload)
        answer = self._connection.call(data, length if command == wire.READ else 0)
        assert (answer.cookie, answer.error) == (self.requests, 0), f"{self.name}: command {command}: {answer}"
        return answer.data


@dataclass
class Manager:
    """Whoever reshapes the chain. ``chain`` has the nodes from the bottom up; the export is on its last."""

    server: Server
    rng: random.Random
    chain: list[str] = field(default_factory=lambda: ["base"])
    done: list[str] = field(default_factory=list)

    def act(self) -> None:
        """Something at random that the chain allows."""
        acts = [self.snapshot_sync, self.snapshot, self.reopen]
        if len(self.chain) > 1:
            acts += [self.active_commit, self.active_commit, self.stream]
        if len(self.chain) > 2:
            acts += [self.commit, self.commit, self.commit]
        if len(self.chain) > 5:
            acts = [self.active_commit, self.commit]
        act = self.rng.choice(acts)
        self.done.append(f"{act.__name__} of {self.chain}")
        act()

    def file(self, node: str) -> Path:
        return self.server.directory / f"{node}.qcow2"

    def snapshot_sync(self) -> None:
        name = f"n{len(self.done)}"
        names = {"node_name": self.chain[-1], "snapshot_node_name": name}
        self._execute("blockdev-snapshot-sync", snapshot_file=str(self.file(name)), format="qcow2", **names)
        self.chain.append(name)

    def snapshot(self) -> None:
        name = f"n{len(self.done)}"
        backing = ["-b", str(self.file(self.chain[-1])), "-F", "qcow2"]
        run("qemu-img", "create", "-q", "-f", "qcow2", "-u", *backing, self.file(name), str(SIZE))
        self.server.client.execute_with("blockdev-add", self._options(name, backing=None))
        self._execute("blockdev-snapshot", node=self.chain[-1], overlay=name)
        self.chain.append(name)

    def reopen(self) -> None:
        below = self.chain[-2] if len(self.chain) > 1 else None
        options = self._options(self.chain[-1], backing=below)
        options["cache"] = {"no-flush": False, "direct": False}
        options["lazy-refcounts"] = self.rng.choice((False, True))
        options["file"] = self._file_node(self.chain[-1])
        self._execute("blockdev-reopen", options=[options])

    def commit(self) -> None:
        bottom = self.rng.randrange(len(self.chain) - 2)
        top = self.rng.randrange(bottom + 1, len(self.chain) - 1)
        where = {"top_node": self.chain[top], "base_node": self.chain[bottom]}
        slow = {"speed": 65536} if self.rng.random() < 0.3 else {}
        self._execute("block-commit", job_id="job", device=self.chain[-1], **where, **slow)
        if self._ended(cancel=bool(slow)):
            self._drop(bottom + 1, top + 1)

    def active_commit(self) -> None:
        bottom = self.rng.randrange(len(self.chain) - 1)
        self._execute("block-commit", job_id="job", device=self.chain[-1], base_node=self.chain[bottom])
        self.server.client.wait_status("job", "ready", _PATIENCE)
        pivot = self.rng.random() < 0.6
        self._execute("block-job-complete" if pivot else "block-job-cancel", device="job")
        self.server.client.wait_status("job", "null", _PATIENCE)
        if pivot:
            self._drop(bottom + 1, len(self.chain))

    def stream(self) -> None:
        bottom = self.rng.randrange(len(self.chain) - 1)
        slow = {"speed": 65536} if self.rng.random() < 0.3 else {}
        self._execute("block-stream", job_id="job", device=self.chain[-1], base_node=self.chain[bottom], **slow)
        if self._ended(cancel=bool(slow)):
            self._drop(bottom + 1, len(self.chain) - 1)

    def _ended(self, *, cancel: bool) -> bool:
        """Wait for the job to be gone; whether it was completed."""
        client, names = self.server.client, ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
        if cancel:
            try:
                self._execute("block-job-cancel", device="job")
            except CommandError as error:
                if error.error_class != "DeviceNotActive":  # the job was faster
                    raise
        event = client.wait_event(lambda event: event["event"] in names, _PATIENCE)
        assert "error" not in event["data"], event
        client.wait_status("job", "null", _PATIENCE)
        return bool(event["event"] == "BLOCK_JOB_COMPLETED")

    def _drop(self, start: int, end: int) -> None:
        """Forget nodes that left the chain, and remove their images, which would keep others from being committed to.

        The nodes of blockdev-snapshot-sync are gone by themselves.
        """
        for name in reversed(self.chain[start:end]):
            nodes = {node["node-name"] for node in self.server.client.execute("query-named-block-nodes", flat=True)}
            if name in nodes:
                self._execute("blockdev-del", node_name=name)
            self.file(name).unlink()
        del self.chain[start:end]

    def _options(self, name: str, backing: str | None) -> dict[str, object]:
        file = {"driver": "file", "filename": str(self.file(name)), "discard": "unmap"}
        return {"driver": "qcow2", "node-name": name, "file": file, "backing": backing, "discard": "unmap"}

    def _file_node(self, name: str) -> str:
        nodes = self.server.client.execute("query-named-block-nodes", flat=True)
        files = [node["node-name"] for node in nodes if node["drv"] == "file" and node["file"] == str(self.file(name))]
        assert len(files) == 1, files
        return str(files[0])

    def _execute(self, command: str, /, **arguments: object) -> None:
        self.server.client.execute(command, **arguments)
