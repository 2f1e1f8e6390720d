"""A guest that stays connected: qemu-io on an export, typed into across the steps of a scenario."""

from __future__ import annotations

import os
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

#: The first word of a step that speaks through the connection made earlier.
CONNECTED_EARLIER = "connected earlier:"

_EXPORT = "nbd+unix:///top?socket=nbd.sock"


class Guest:
    """qemu-io, connected from the first to the last moment of the ``with`` block."""

    def __init__(self, directory: Path) -> None:
        argv = ["qemu-io", "-f", "raw", _EXPORT]
        self._process = subprocess.Popen(
            argv, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, stderr=subprocess.STDOUT
        )
        self.ask("read 0 512")
        assert self.answers_within(10), "qemu-io did not connect"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, command: str) -> None:
        """Start a request."""
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")

    def answers_within(self, seconds: float) -> bool:
        """Whether the request finishes in time."""
        assert self._process.stdout is not None
        output = b""
        deadline = time.monotonic() + seconds
        while b"ops;" not in output:  # ends the last line of an answer; a prompt follows it
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return False
            output += os.read(self._process.stdout.fileno(), 4096)
        return True
